"""The report in a real browser: it draws, it answers the pointer, and it complains about
nothing.
"""

import json
import math

import pytest
from browser import chromium

from eopd.telemetry.report.page import write_report

pytestmark = pytest.mark.slow

CONFIG = "run: {name: r, batches: 60}\nloss:\n  gate: {kind: hard, tau: 0.8}\n"
# two tokens of one text
WORDS = ["The", " sky", " is", " blue", ",", " <b>", "\n", "</script>", " blue"]


def rows(offset):
    for step in range(1, 21 + 40 * offset):  # the first run is the shorter one
        value = offset + math.exp(-step / 20)
        names = (
            "reverse_kl_nats",
            "forward_kl_gated_nats",
            "teacher_entropy_nats",
            "gate_ratio",
            "response_tokens_mean",
        )
        seconds = {
            "step": 8.0,
            "wait_rollout": 2.0,
            "wait_teacher": 1.0,
            "train": 4.0,
            "weights": 1.0,
        }
        yield {
            "step": step,
            "time": 1.7e9,
            "eopd_response_tokens_total": 100.0 * step,
            **{f"eopd_{name}": value for name in names},
            **{f"eopd_{name}_seconds": value for name, value in seconds.items()},
        }


def measured(phase):
    ids = [r % 8 for r in range(40)]
    sample = {
        "prompt_id": "p",
        "prompt": "Why is the sky blue, and " + "so " * 40 + "x" * 200 + "?",
        "ids": ids,
        "loss_mask": [1] * len(ids),
        "student_logprobs": [-0.7 - 0.1 * i for i in ids],
        "teacher_logprobs": [-0.2 * i for i in ids],
        "entropy_low": [0.6 * i for i in ids],
        "entropy_high": [0.6 * i for i in ids],
        "topk_ids": [[1, 3, 8]] * len(ids),
        "topk_logprobs": [[math.log(p) for p in (0.5, 0.25, 0.125)]] * len(ids),
        "texts": {str(i): word for i, word in enumerate(WORDS)},
    }
    counts = [5, 4, 3, 2, 1, 0]

    return {
        "phase": phase,
        "step": 0,
        "entropy_bin_nats": 0.2,
        "student_entropy_counts": counts,
        "teacher_entropy_counts": counts[::-1],
        "samples": [sample],
    }


def evaluation(step, offset):
    mean = {"mean": 4.0 + offset - step / 10, "standard_error": 0.25}
    return {
        "step": step,
        "phase": "during" if step else "before",
        "name": "held_out",
        "time": 1.7e9,
        "seconds": 3.0,
        "prompts": 64,
        "samples": 1,
        "measurements": {"reverse_kl": mean},
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two runs side by side, one of them with its last row cut short."""
    root = tmp_path_factory.mktemp("report")
    for offset, name in enumerate(
        ("first", "second-with-a-rather-long-name-that-has-to-wrap-somewhere")
    ):
        (root / name).mkdir()
        files = {
            "metrics.jsonl": rows(offset),
            "held_out.jsonl": [measured("before"), measured("after")],
            "evaluations.jsonl": [evaluation(step, offset) for step in (0, 10, 20)],
            "timeline.jsonl": [
                {"step": s, "generate": [[0, 2]], "score": [[1, 3]]} for s in range(1, 61)
            ],
        }
        for file, lines in files.items():
            (root / name / file).write_text("".join(json.dumps(line) + "\n" for line in lines))

        (root / name / "config.yaml").write_text(CONFIG)
        (root / name / "summary.json").write_text(json.dumps({"status": "running", "wall_s": 9.0}))

    with (root / "first" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "ti')

    write_report(
        [root / "first", root / "second-with-a-rather-long-name-that-has-to-wrap-somewhere"],
        root / "r.html",
    )

    return root / "r.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(autouse=True)
def _no_complaint(page):
    page.complaints.clear()
    yield
    assert page.complaints == []


every_view = pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
)


@every_view
def test_charts_are_drawn_inside_their_frames(page, report, width, scheme):
    page.open(report, width=width, scheme=scheme)
    boxes = page.value(
        "[...document.querySelectorAll('svg.chart')].map(svg => "
        "[...svg.querySelectorAll('path')].map(path => { const b = path.getBBox(); return "
        "[path.getTotalLength(), b.x, b.y, b.x + b.width, b.y + b.height]}))"
    )
    assert len(boxes) == 1 + 5 + 2 + 2  # held-out, curves, histograms, step times
    drawn = [box for chart in boxes for box in chart]
    assert len(drawn) > 40 and all(boxes)
    for length, left, top, right, bottom in drawn:
        assert length > 0 and -8 <= left <= right <= 360 and -8 <= top <= bottom <= 190

    bars = page.value(
        "[...document.querySelectorAll('.timeline rect')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(bars) == 2 * (3 + 2 + 4) and min(bars) > 10


@every_view
def test_nothing_is_wider_than_the_page(page, report, width, scheme):
    page.open(report, width=width, scheme=scheme)
    page.value("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.value("document.documentElement.scrollWidth") == width


def luminance(color):
    parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(
        weight * part
        for weight, part in zip(
            (0.2126, 0.7152, 0.0722),
            linear,
            strict=True,
        )
    )


def blend(over, under):
    top = [float(part) for part in over[over.index("(") + 1 : -1].split(",")]
    alpha = top[3] if len(top) == 4 else 1.0
    base = [float(part) for part in under[under.index("(") + 1 : -1].split(",")]
    return "rgb({},{},{})".format(
        *(alpha * a + (1 - alpha) * b for a, b in zip(top[:3], base[:3], strict=True))
    )


@pytest.mark.parametrize("colored_by", [0, 1])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_a_token_leaves_its_text_readable(page, report, scheme, colored_by):
    page.open(report, scheme=scheme)
    page.value(f"document.querySelectorAll('.controls input')[{colored_by}].click()")
    style = (
        "(one => (s => [s.color, "
        "s.backgroundColor])(getComputedStyle(document.querySelector(one))))"
    )
    paper = page.value(f"{style}('.prompt')")[1]
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    kinds = [f".scale .{'ek'[colored_by]}{number}" for number in range(7 + colored_by)]
    backgrounds = set()

    for kind in kinds:
        ink, background = page.value(f"{style}('{kind}')")
        backgrounds.add(background)
        low, high = sorted((luminance(ink), luminance(blend(background, paper))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (kind, ink, background)

    assert len(backgrounds) == len(kinds)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_token_under_the_pointer_shows_what_the_teacher_would_have_written(page, report, width):
    page.open(report, width=width)
    assert page.value("document.getElementById('card').hidden")
    page.point_at(".tokens span:nth-child(4)")
    card = page.value("document.getElementById('card').innerText")
    assert "“ blue”" in card and "token 3" in card
    candidates = page.value(
        "[...document.querySelectorAll('#card li')]"
        ".map(e => [e.className, e.firstChild.textContent, e.lastChild.textContent])"
    )
    assert candidates == [
        ["", "␣sky", "50.0%"],
        ["taken", "␣blue", "25.0%"],
        ["", "␣blue", "12.5%"],
        ["", "all others", "12.5%"],
    ]
    numbers = page.value("[...document.querySelectorAll('#card dd')].map(e => e.textContent)")
    assert numbers == ["36.8%", "54.9%", "\u22120.400 nats", "1.800 nats", "open"]
    box = page.value(
        "(b => [b.left, b.right, b.top, "
        "b.bottom])(document.getElementById('card').getBoundingClientRect())"
    )
    assert 0 <= box[0] < box[1] <= width and 0 <= box[2] < box[3] <= 900


def test_arrow_keys_move_from_token_to_token(page, report):
    page.open(report)
    page.value("document.querySelector('.tokens').focus()")
    for _ in range(3):
        page.press("ArrowRight")

    assert page.value("document.querySelector('.tokens .here').textContent") == " is"
    page.press("ArrowLeft")
    assert page.value("document.querySelector('#card h4').textContent") == "“ sky”"
    page.press("Escape")
    assert page.value("document.getElementById('card').hidden")


def test_a_chart_under_the_pointer_shows_the_value_of_every_run(page, report):
    page.open(report)
    shown = "[...document.querySelectorAll('#readout b')].map(e => e.textContent)"
    page.point_at("#curves svg.chart", 0.25)
    head, *values = page.value(shown)
    step = int(head.removeprefix("step "))
    assert 5 <= step <= 15
    assert [float(text) for text in values] == pytest.approx(
        [o + math.exp(-step / 20) for o in (0, 1)], rel=1e-3
    )
    page.point_at("#curves svg.chart")
    head, of_ended, of_longer = page.value(shown)
    step = int(head.removeprefix("step "))
    assert 25 <= step <= 35 and of_ended == "\u2013"
    assert float(of_longer) == pytest.approx(1 + math.exp(-step / 20), rel=1e-3)
    page.point_at("#entropy svg.chart", 0.3)
    teacher, student = "6.7%", "26.7%"
    assert page.value(shown) == ["nats from 0.2", teacher, student, teacher, student]


def test_a_measurement_under_the_pointer_has_its_interval(page, report):
    page.open(report)
    page.point_at("#measured svg.chart")
    shown = page.value("[...document.querySelectorAll('#readout b')].map(e => e.textContent)")
    head, first, second = shown
    assert int(head.removeprefix("step ")) in range(9, 14)
    assert (first, second) == ("3 (2.51 to 3.49)", "4 (3.51 to 4.49)")


@every_view
def test_a_term_is_explained_when_it_has_the_focus(page, report, width, scheme):
    page.open(report, width=width, scheme=scheme)
    shown = (
        "(style => [style.content, style.visibility])(getComputedStyle("
        "document.querySelectorAll('dfn')[{}], '::after'))"
    )
    count = page.value("document.querySelectorAll('dfn').length")
    assert count > 5 and page.value(shown.format(0))[0] == "none"
    for term in range(count):
        page.value(f"document.querySelectorAll('dfn')[{term}].focus()")
        content, visibility = page.value(shown.format(term))
        assert len(content) > 20 and visibility == "visible"
        assert page.value("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_outside_of_its_range_can_be_seen_and_read(page, report, scheme):
    page.open(report, scheme=scheme)
    color = "getComputedStyle(document.querySelector('{}')).{}"
    warning = page.value(color.format("figure.breached .warning", "color"))
    paper = page.value(color.format("figure.breached", "backgroundColor"))
    low, high = sorted((luminance(warning), luminance(paper)))
    assert (high + 0.05) / (low + 0.05) >= 4.5
    assert page.value(color.format("figure.breached", "borderTopColor")) == warning
    assert page.value(color.format("figure.breached .outside", "stroke")) == warning
