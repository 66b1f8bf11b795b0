"""Made-up run directories in, numbers on the page out."""

import json
import math
import re
import sys
import time
from html.parser import HTMLParser

import pytest

from eopd.cli.main import main
from eopd.config import ConfigError
from eopd.telemetry.catalog import CATALOG
from eopd.telemetry.report.charts import Frame, curves, histogram, stacked, ticks
from eopd.telemetry.report.headline import result
from eopd.telemetry.report.healthy import HEALTHY, minus
from eopd.telemetry.report.lines import Line, extremes, look, smoothed, thinned
from eopd.telemetry.report.objective import gate_value, lead_of
from eopd.telemetry.report.page import report_of_ended, write_report
from eopd.telemetry.report.public import Public
from eopd.telemetry.report.reading import read_runs
from eopd.telemetry.report.samples import prompts_of
from eopd.telemetry.report.subject import objective_words
from eopd.telemetry.report.terms import explained

CONFIG = "run: {name: r, batches: 10}\nloss:\n  gate: {kind: hard, tau: 0.8}\n"
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def row(step, **numbers):
    seconds = {"step": 8.0, "wait_rollout": 2.0, "wait_teacher": 1.0, "train": 4.0, "weights": 1.0}
    named = {f"eopd_{name}_seconds": value for name, value in seconds.items()}
    return {
        "step": step,
        "time": 1.7e9,
        "eopd_response_tokens_total": 400.0 * step,
        **named,
        **numbers,
    }


def sample(prompt="Why?", num_tokens=3, texts=("sky", " is", " blue"), **changes):
    """Entropies 0.05, 1.0 and 3.0, and so on again; the student is surer than the teacher by
    1 nat.
    """
    ids = [r % 3 for r in range(num_tokens)]
    found = {
        "prompt_id": prompt,
        "prompt": prompt,
        "ids": ids,
        "loss_mask": [1] * num_tokens,
        "student_logprobs": [-0.5] * num_tokens,
        "teacher_logprobs": [-1.5] * num_tokens,
        "entropy_low": [(0.05, 1.0, 3.0)[i] for i in ids],
        "entropy_high": [(0.05, 1.0, 3.0)[i] for i in ids],
        "topk_ids": [[0, 2]] * num_tokens,
        "topk_logprobs": [[math.log(0.75), math.log(0.125)]] * num_tokens,
        "texts": dict(zip("012", texts, strict=True)),
    }
    return found | changes


def held_out(phase, *samples, step=0):
    counts = {
        "student_entropy_counts": [6, 2, 0, 0, 2, 0],
        "teacher_entropy_counts": [5, 1, 0, 0, 0, 4],
    }
    return {"phase": phase, "step": step, "entropy_bin_nats": 0.2, "samples": samples, **counts}


def measured(mean):
    return {"mean": mean, "standard_error": 0.1}


SUMMARY = {
    "status": "completed",
    "steps": 3,
    "wall_s": 3725.4,
    "held_out": {"before": {"reverse_kl": measured(4.0)}, "after": {"reverse_kl": measured(1.0)}},
}


def both_ends(summary):
    """The lines of ``evaluations.jsonl`` of which a summary tells the two ends."""
    steps = {"before": 0, "after": summary.get("steps", 0)}
    return [
        evaluation(steps[phase], phase) | {"measurements": measurements}
        for phase, measurements in summary.get("held_out", {}).items()
        if measurements
    ]


@pytest.fixture
def run(tmp_path):
    """Make a run directory: ``run("name", rows=[...])``; a file given as None is left out."""

    def make(name="first", rows=None, **files):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        texts = {
            "config.yaml": CONFIG,
            "metrics.jsonl": rows or [row(1), row(2), row(3)],
            "summary.json": json.dumps(SUMMARY),
            "held_out.jsonl": [
                held_out("before", sample()),
                held_out(
                    "after",
                    sample(),
                    step=3,
                ),
            ],
            "timeline.jsonl": [
                {"step": s, "generate": [[-1.0, 2.0]], "score": [[1.0, 3.0]]} for s in (1, 2, 3)
            ],
            "versions.json": json.dumps({"python": "3.11.9", "torch": "2.13.0"}),
            **files,
        }
        if "evaluations.jsonl" not in texts and texts["summary.json"]:
            texts["evaluations.jsonl"] = both_ends(json.loads(texts["summary.json"]))

        for file, content in texts.items():
            if content is not None:
                lines = (
                    content
                    if isinstance(content, str)
                    else "".join(json.dumps(one) + "\n" for one in content)
                )
                (directory / file).write_text(lines)

        return directory

    return make


class Parsed(HTMLParser):
    """Every element with its attributes, all text outside of script and style, and the data
    of the charts.
    """

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.data, self._inside = [], "", [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None
        self.text += " "

    def handle_data(self, data):
        if self._inside == "script" and self.elements[-1][1].get("type") == "application/json":
            self.data.append(json.loads(data))
        elif self._inside not in ("script", "style"):
            self.text += data

    def labels(self):
        """What each chart is called."""
        return [a["aria-label"] for _, a in self.elements if a.get("class") == "chart"]

    def chart(self, title):
        """The lines of a chart by label."""
        charts = self.labels()
        numbers = [one for one in self.data if "lines" in one]
        (found,) = [
            n
            for label, n in zip(
                charts,
                numbers,
                strict=True,
            )
            if label.startswith(title)
        ]

        return {line["label"]: line["points"] for line in found["lines"]}


@pytest.fixture
def page(tmp_path):
    def make(*directories):
        output = tmp_path / "report.html"
        write_report(directories, output)
        return Parsed(output.read_text(encoding="utf-8"))

    return make


# ---- what is on the page -------------------------------------------------------------------------------------------


def test_the_headline_has_the_numbers_of_the_run(run, page):
    text = " ".join(page(run()).text.split())
    for expected in (
        "first completed",
        "steps 3 of 10",
        "response tokens 1,200",
        "tokens per second, in the steps 50.0",
        "1:02:05",
    ):
        assert expected in text

    assert "reverse KL nats 4.000 ± 0.100 1.000 ± 0.100 \u22123.000" in text
    assert "torch 2.13.0" in text and "loss.gate.tau 0.8" in text


def test_a_run_under_way_has_the_wall_time_of_its_rows_and_the_age_of_the_last(run, page):
    now = time.time()
    rows = [row(1, time=now - 7300.0), row(2, time=now - 100.0)]
    text_of_summary = json.dumps(SUMMARY | {"status": "running", "wall_s": 9.0})
    found = page(run(rows=rows, **{"summary.json": text_of_summary}))
    text = " ".join(found.text.split())
    assert "wall time 2:00:08" in text and re.search(r"since then 0:01:4\d", text)
    for number, seconds in enumerate((50.0, 150.0)):  # the run was down in between
        rows[number]["eopd_run_seconds_total"] = seconds

    resumed = page(run("resumed", rows=rows, **{"summary.json": text_of_summary}))
    assert "wall time 0:01:48" in " ".join(resumed.text.split())
    ended = page(run("ended", rows=rows))
    assert "wall time 1:02:05" in " ".join(ended.text.split()) and "since then" not in ended.text


def test_runs_are_compared_by_their_final_numbers(run, page):
    after = {
        "reverse_kl": measured(2.0),
        "top1_agreement": measured(0.5),
        "reverse_kl: source lists": measured(3.0),
    }
    held_out_after = {"held_out": {"after": after | {"share: source lists": measured(0.4)}}}
    first, second = (
        run("first"),
        run("second", **{"summary.json": json.dumps(SUMMARY | held_out_after)}),
    )
    found = page(first, second)
    text = " ".join(found.text.split())

    for expected in (
        "held-out reverse KL, after 1.000 ± 0.100 2.000 ± 0.100",
        "held-out top-1 agreement, after - 0.500 ± 0.100",
        "held-out reverse KL, source lists, after - 3.000 ± 0.100",
        "wall time 1:02:05 1:02:05 tokens per second, in the steps 50.0 50.0",
    ):
        assert expected in text

    assert "do not compare" not in text and "Side by side" not in page(first).text


def test_runs_that_were_measured_differently_are_said_not_to_compare(run, page):
    texts = (
        "teachers: [{model: a}]\nevaluation: {seed: 1}\n",
        "teachers: [{model: b}]\nevaluation: {seed: 1, samples: 9}\nrollout: {temperature: 0.7}\n",
    )
    runs = [run(f"r{i}", **{"config.yaml": CONFIG + text}) for i, text in enumerate(texts)]
    assert (
        "do not compare, since their configs differ in teachers, rollout.temperature."
        in page(*runs).text
    )


def test_runs_whose_teachers_differ_in_what_computes_nothing_do_compare(run, page):
    teachers = ("{model: a, replicas: 1}", "{model: a, replicas: 2, node_labels: {zone: b}}")
    runs = [
        run(f"r{i}", **{"config.yaml": f"{CONFIG}teachers: [{text}]\n"})
        for i, text in enumerate(teachers)
    ]
    assert "do not compare" not in page(*runs).text


def test_a_curve_has_the_values_of_the_rows_and_gaps_where_there_are_none(run, page):
    values = [4.0, None, float("nan"), 2.5]
    found = page(
        run(rows=[row(i + 1, eopd_reverse_kl_nats=value) for i, value in enumerate(values)])
    )
    assert found.chart("Reverse KL") == {"reverse KL": [[1, 4.0], [4, 2.5]]}
    assert "Gate open (share of tokens): no numbers" in found.text


def test_what_was_changed_is_told_and_marked_from_its_step_on(run, page):
    changes = [
        {
            "from_step": 2,
            "time": 1.7e9,
            "changes": {"learner.lr": [1e-4, 5e-5], "a.b": [None, True]},
        }
    ]
    changed = page(
        run(
            "changed",
            rows=[row(s, eopd_loss=1.0 * s) for s in (1, 2, 3)],
            **{"changes.jsonl": changes},
        )
    )
    assert "From step 2: learner.lr 0.0001 → 5e-05; a.b null → true" in changed.text
    (mark,) = [
        found
        for tag, found in changed.elements
        if tag == "line" and found.get("class") == "changed" and found["y1"] == "8"
    ]
    assert mark["x1"] == mark["x2"] == str(Frame([(1.0, 0.0), (3.0, 1.0)]).x(2))
    same = page(run("same"))
    assert "From step" not in same.text
    assert not [tag for tag, attributes in same.elements if attributes.get("class") == "changed"]


def test_what_only_some_runs_have_is_drawn_where_it_is(run, page):
    lost = {
        'eopd_lost_trajectories_total{reason="too_stale"}': 2.0,
        'eopd_lost_trajectories_total{reason="failed"}': 0.0,
    }
    some = {
        "eopd_loss": 1.5,
        "eopd_clipped_ratio": 0.25,
        "eopd_repetition_ratio": 0.5,
        "eopd_reward_mean": 0.75,
    }
    found = page(run(rows=[row(1, **some, **lost)]))
    assert found.chart("Loss") == {"loss": [[1, 1.5]]}
    assert found.chart("Clipped") == {"ratio clipped": [[1, 0.25]]}
    assert found.chart("Written before") == {"repetition": [[1, 0.5]]}
    assert found.chart("Reward") == {"reward": [[1, 0.75]]}
    assert found.chart("Lost") == {"too_stale": [[1, 2.0]]}
    bare = page(
        run(
            "bare",
            rows=[
                row(
                    1,
                    eopd_reward_mean=None,
                    **dict.fromkeys(lost, 0.0),
                )
            ],
        )
    ).text
    assert not [
        title for title in ("Loss", "Clipped", "Written before", "Reward", "Lost") if title in bare
    ]


def test_runs_are_overlaid_and_what_differs_comes_first(run, page):
    first = run("first", rows=[row(1, eopd_gate_ratio=0.2), row(2, eopd_gate_ratio=0.3)])
    config = CONFIG.replace("hard, tau: 0.8", "always")
    second = run("second", rows=[row(1, eopd_gate_ratio=1.0)], **{"config.yaml": config})
    found = page(first, second)
    assert found.chart("Gate open") == {
        "first, gate": [[1, 0.2], [2, 0.3]],
        "second, gate": [[1, 1.0]],
    }
    assert "loss.gate.kind differs hard always" in " ".join(found.text.split())
    labels = [a["aria-label"] for tag, a in found.elements if a.get("class") == "timeline"]
    assert labels == ["first: step 2, 8.00 s", "second: step 1, 8.00 s"]


def test_two_runs_of_one_name_are_told_apart(run):
    directories = [run("a/same"), run("b/same")]
    assert [one.name for one in read_runs(directories)] == [
        str(directory) for directory in directories
    ]


def test_histograms_say_how_many_tokens_are_above_the_run_s_threshold_or_the_paper_s(run, page):
    found = page(run())
    shares = (
        "teacher, before 40.0%; student, before 20.0%; teacher, after 40.0%; student, after 20.0%"
    )
    assert f"Tokens above 0.8 nats: {shares}. Tokens: 10 before, 10 after." in found.text
    low = page(
        run("low", **{"config.yaml": CONFIG.replace("0.8", "0.15")}),
        run("none", **{"config.yaml": "run: {}"}),
    )
    assert "Tokens above 0.2 nats: teacher, before 50.0%; student, before 40.0%;" in low.text
    assert "Tokens above 0.8 nats: teacher, before 40.0%; student, before 20.0%;" in low.text
    assert found.chart("first: entropy")["teacher, after"][:2] == [[0.0, 0.5], [0.2, 0.1]]


def test_the_timeline_shows_one_step_from_its_start(run, page):
    found = page(run())
    start = next(i for i, (_, a) in enumerate(found.elements) if a.get("class") == "timeline")
    drawn = [
        (a["class"], a["x"], a["width"])
        for tag, a in found.elements[start:]
        if tag == "rect" and "%" in a["x"]
    ]
    assert drawn[:6] == [
        ("f-rollout", "0.000%", "25.000%"),  # began a second before the step
        ("f-teacher", "12.500%", "25.000%"),
        ("f-wait-rollout", "0.000%", "25.000%"),
        ("f-wait-teacher", "25.000%", "12.500%"),
        ("f-train", "37.500%", "50.000%"),
        ("f-weights", "87.500%", "12.500%"),
    ]
    for expected in ("Rollout engines, busy 25%", "Teachers, busy 25%", "Learner, waits 38%"):
        assert expected in found.text


def test_a_learner_that_began_before_its_batch_was_whole_is_drawn_so(run, page):
    spans = {
        "wait_rollout": [[0.0, 1.0], [3.0, 4.0]],
        "wait_teacher": [[4.0, 5.0]],
        "train": [[1.0, 3.0], [5.0, 7.0]],
        "weights": [[7.0, 8.0]],
    }
    found = page(run(**{"timeline.jsonl": [{"step": step, **spans} for step in (1, 2, 3)]}))
    drawn = [
        (a["class"], a["x"], a["width"])
        for tag, a in found.elements
        if tag == "rect" and a.get("class", "").startswith("f-") and "%" in a.get("x", "")
    ]
    assert drawn == [
        ("f-wait-rollout", "0.000%", "12.500%"),
        ("f-wait-rollout", "37.500%", "12.500%"),
        ("f-wait-teacher", "50.000%", "12.500%"),
        ("f-train", "12.500%", "25.000%"),
        ("f-train", "62.500%", "25.000%"),
        ("f-weights", "87.500%", "12.500%"),
    ]


def test_a_usual_step_is_one_with_a_timeline(run, page):
    rows = [row(1), row(2, eopd_step_seconds=9.0), row(3, eopd_step_seconds=10.0)]
    found = page(run(rows=rows, **{"timeline.jsonl": [{"step": 3, "generate": [[0.0, 5.0]]}]}))
    assert "first: step 3, 10.00 s" in found.text
    assert "Rollout engines, busy 50%" in found.text and "Teachers: not recorded" in found.text


def test_waits_that_were_not_recorded_are_not_shown_as_none(run, page):
    waits = ("eopd_wait_rollout_seconds", "eopd_wait_teacher_seconds")
    found = page(run(rows=[{name: x for name, x in row(1).items() if name not in waits}]))
    assert "Learner: waits not recorded" in found.text and "Learner, waits" not in found.text
    assert "Not recorded: waits for engines, waits for teachers." in found.text
    assert found.chart("first: seconds of a step") == {
        "trains": [[1, 4.0]],
        "sends weights": [[1, 1.0]],
    }
    (trains,) = [
        a for tag, a in found.elements if tag == "rect" and a["class"] == "f-train" and "x" in a
    ]
    assert (trains["x"], trains["width"]) == ("37.500%", "50.000%")


def test_charts_of_several_runs_have_the_same_axes(run, page):
    long = {"eopd_step_seconds": 16.0, "eopd_train_seconds": 12.0}
    counts = {"student_entropy_counts": [10] + [0] * 9, "teacher_entropy_counts": [0] * 9 + [10]}
    second = run(
        "second",
        rows=[row(9, **long)],
        **{"held_out.jsonl": [held_out("before", sample()) | counts]},
    )
    found = page(run("first"), second)
    charts = [
        a["aria-label"] for tag, a in found.elements if tag == "svg" and a.get("class") == "chart"
    ]
    ranges = [(one["from"], one["to"]) for one in found.data if "lines" in one]
    shown = dict(zip(charts, ranges, strict=True))
    assert {to for label, to in shown.items() if ": entropy" in label} == {(0.0, 2.0)}
    assert {to for label, to in shown.items() if "seconds of a step" in label} == {(1, 9)}
    trains = [
        a["width"]
        for tag, a in found.elements
        if tag == "rect" and a["class"] == "f-train" and "x" in a
    ]
    assert trains == ["25.000%", "75.000%"]


def test_a_much_shorter_step_has_an_axis_of_its_own(run, page):
    slow = run("slow", rows=[row(1, eopd_step_seconds=40.0, eopd_train_seconds=36.0)])
    found = page(run("quick"), slow)
    trains = [
        a["width"]
        for tag, a in found.elements
        if tag == "rect" and a["class"] == "f-train" and "x" in a
    ]
    assert trains == ["50.000%", "90.000%"]
    assert found.text.count("On an axis of its own") == 1


def test_the_wall_time_is_accounted_for(run, page):
    checkpoint = {"eopd_checkpoint_step": 1.0, "eopd_checkpoint_seconds": 5.0}
    rows = [row(1), row(2, **checkpoint), row(3, **checkpoint)]
    lines = [evaluation(0, "before", seconds=30.0), evaluation(2, "during", seconds=9.0)]
    summary = json.dumps(SUMMARY | {"wall_s": 100.0})
    found = page(run(rows=rows, **{"evaluations.jsonl": lines, "summary.json": summary}))
    assert (
        "first: 100 s in all: steps 24 s, evaluations 39 s, checkpoints 5 s, "
        "start-up and everything else 32 s." in found.text
    )


def test_the_time_between_steps_is_told_apart_from_start_up(run, page):
    """Of 22 s between steps a checkpoint took 5 and the held-out prompts 9; a benchmark is measured
    beside a step, and the last checkpoint is written behind the last step."""
    first = {"eopd_checkpoint_step": 1.0, "eopd_checkpoint_seconds": 5.0}
    last = {"eopd_checkpoint_step": 3.0, "eopd_checkpoint_seconds": 6.0}
    rows = [
        row(1, eopd_between_steps_seconds=0.0),
        row(2, eopd_between_steps_seconds=10.0, **first),
        row(3, eopd_between_steps_seconds=12.0, **last),
    ]
    lines = [
        evaluation(0, "before", seconds=30.0),
        evaluation(2, "during", seconds=9.0),
        evaluation(2, "during", name="arithmetic", seconds=7.0),
    ]
    summary = json.dumps(SUMMARY | {"wall_s": 100.0})
    found = page(run(rows=rows, **{"evaluations.jsonl": lines, "summary.json": summary}))
    assert (
        "first: 100 s in all: steps 24 s, evaluations 39 s, checkpoints 11 s, "
        "other time between steps 8 s, start-up and everything else 18 s." in found.text
    )


# ---- of what, and with what result ---------------------------------------------------------------------------------

RESOLVED = """
run: {name: r, batches: 10, seed: %d}
student: {model: %s, dtype: bfloat16, lora: {rank: 8}}
teachers:
- {name: a, model: 'org/big@0123456789abcdef0123456789abcdef01234567', temperature: 0.6, sources: [x, y]}
- {name: b, model: org/other}
prompts: {data: [{data: one.jsonl, weight: 1}, {function: 'pkg:rows', options: {data: no}}], held_out: h.jsonl}
rollout: {samples_per_prompt: 4, max_response_tokens: 99}
flow: {batch_prompts: 12, max_staleness: 2}
loss:
  top_k: 16
  alpha: 0.5
  gate: %s
  forward_kl: {kind: tail}
  reverse_kl: {kind: sampled, reward: {function: exact, weight: 2.0}}
learner: {lr: 1.0e-05, schedule: cosine, warmup_batches: 3}
"""
HARD = "{kind: hard, tau: 0.8}"


def resolved(gate=HARD, seed=0, model="/models/small"):
    return RESOLVED % (seed, model, gate)


def evaluation(step, phase, name="held_out", seconds=1.0, **means):
    return {
        "step": step,
        "phase": phase,
        "name": name,
        "time": 1.7e9,
        "seconds": seconds,
        "prompts": 64,
        "samples": 1,
        "measurements": {key: {"mean": mean, "standard_error": 0.1} for key, mean in means.items()},
    }


def test_the_top_says_what_was_trained(run, page):
    versions = {
        "eopd": "1.2",
        "ray": "2.0",
        "provenance": {
            "commit": "abc-dirty",
            "nodes": 2,
            "cpus": 8.0,
            "gpus": 1.0,
            "gpu_model": "X",
        },
    }
    files = {
        "config.yaml": resolved(),
        "versions.json": json.dumps(versions),
        "parent.json": json.dumps({"run": "older", "step": 7}),
    }
    text = " ".join(page(run(**files)).text.split())

    for expected in (
        "Student small, bfloat16, LoRA of rank 8",
        "Teachers org/big@01234567, temperature 0.6, for x and y; org/other",
        "Objective Reverse KL on every token, as a policy gradient on the sampled one, with 2 times "
        "the advantage of exact. Plus 0.5 times the forward KL where the teacher's entropy is above "
        "0.8 nats, over the teacher's 16 most likely tokens and all others as one.",
        "Learning AdamW, learning rate 1e-05, cosine, 3 batches of warm-up, batches of 12 prompts, "
        "4 answers each of at most 99 tokens, at most 2 versions old",
        "Data one.jsonl + pkg:rows; held out h.jsonl",
        "Hardware 2 nodes, 1 GPU (X), 8 CPUs",
        "Versions eopd 1.2, ray 2.0",
        "Commit abc and changes",
        "Forked from older, step 7",
    ):
        assert expected in text


def test_machines_without_a_gpu_name_none(run, page):
    machines = {"nodes": 1, "cpus": 2.0, "gpus": 0.0, "gpu_model": "", "cpu_model": "P"}
    versions = json.dumps({"eopd": "1.2", "provenance": machines})
    text = " ".join(page(run(**{"versions.json": versions})).text.split())
    assert "Hardware 1 node, 2 CPUs (P) Versions" in text


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("{kind: never}", "No forward KL."),
        ("{kind: quantile, top: 0.2}", "on the 20 % of a batch's tokens at which"),
        ("{kind: sigmoid, tau: 0.8, scale: 0.1}", "exceeds 0.8 nats, within about 0.1,"),
        ("{kind: random, rate: 0.25}", "on a random 25 % of the tokens"),
        ("{kind: always}", "forward KL on every token"),
        ("{kind: custom, function: 'a.b:c'}", "where a.b:c opens the gate"),
        ("{kind: new}", "by the gate new"),
    ],
)
def test_every_gate_has_words(run, gate, words):
    (record,) = read_runs([run(**{"config.yaml": resolved(gate)})])
    assert words in objective_words(record.config)


def sentence(run, *lines, config=CONFIG, **summary):
    files = {
        "evaluations.jsonl": lines,
        "config.yaml": config,
        "summary.json": json.dumps(SUMMARY | {"held_out": {}} | summary),
    }
    return result(read_runs([run(**files)])[0])


def test_the_result_is_one_sentence_with_its_interval(run):
    paired = {"differences": {"reverse_kl": {"mean": -3.0, "standard_error": 0.5}}}
    before, after = (
        evaluation(
            s,
            p,
            reverse_kl=kl,
        )
        for s, p, kl in ((0, "before", 4), (9, "after", 1))
    )
    assert sentence(run, before, after | paired) == (
        "The student came from 4.00 to 1.00 nats of its teacher (\u221275 %), measured on 64 held-out "
        "prompts; 95 % interval of the difference \u22123.98 to \u22122.02."
    )


def test_no_share_is_told_of_a_distance_that_was_none(run):
    ends = ((0, "before", 4e-8), (9, "after", 2.0))
    before, after = (evaluation(step, phase, reverse_kl=kl) for step, phase, kl in ends)
    assert sentence(run, before, after).startswith(
        "The student went away, from 0.00 to 2.00 nats of its teacher, measured on"
    )


def test_the_table_has_the_error_of_a_paired_change(run, page):
    paired = {"differences": {"reverse_kl": {"mean": -2.5, "standard_error": 0.5}}}
    before, after = (
        evaluation(s, p, reverse_kl=kl, forward_kl=kl)
        for s, p, kl in ((0, "before", 4.0), (9, "after", 1.5))
    )
    text = " ".join(page(run(**{"evaluations.jsonl": [before, after | paired]})).text.split())
    assert "reverse KL nats 4.000 ± 0.100 1.500 ± 0.100 \u22122.500 ± 0.500" in text
    assert "forward KL nats 4.000 ± 0.100 1.500 ± 0.100 \u22122.500 top-1" in text


def test_an_error_is_explained_where_it_stands(run, page):
    note = "\u00b1 is one standard error, clustered by prompt."
    assert page(run()).text.count(note) == 1
    without = {"held_out": {"before": {"reverse_kl": {"mean": 4.0, "standard_error": None}}}}
    assert note not in page(run("alone", **{"summary.json": json.dumps(SUMMARY | without)})).text
    assert page(run("one"), run("other")).text.count(note) == 3  # of each, and side by side


def test_every_number_has_the_same_minus_sign():
    assert minus("-0.5 (-1.25 to +2), 1e-05, top-1, a-2") == (
        "\u22120.5 (\u22121.25 to +2), 1e-05, top-1, a-2"
    )


def test_settings_are_written_as_yaml_has_them(run, page):
    text = page(run(**{"config.yaml": f"{CONFIG}  reward: null\n  on: true\n"})).text
    assert "loss.reward null" in " ".join(text.split()) and "None" not in text


def test_without_a_paired_difference_the_two_errors_add_up(run):
    # 1.96 x 0.1 x sqrt 2 on both sides
    assert result(read_runs([run()])[0]) == (
        "The student came from 4.00 to 1.00 nats of its teacher (\u221275 %), measured on 64 held-out "
        "prompts; 95 % interval of the difference \u22123.28 to \u22122.72."
    )


@pytest.mark.parametrize(
    ("after", "status", "words"),
    [
        (
            4.1,
            "completed",
            "No change can be told from chance: the student was 4.00 and is 4.10 nats",
        ),
        (6.0, "completed", "The student went away, from 4.00 to 6.00 nats of its teacher (+50 %)"),
        (1.0, "running", "So far, at step 9: The student came from 4.00 to 1.00 nats"),
    ],
)
def test_the_result_does_not_promise(run, after, status, words):
    lines = [
        evaluation(
            0,
            "before",
            reverse_kl=4.0,
        ),
        evaluation(9, "during", reverse_kl=after),
    ]
    assert sentence(run, *lines, status=status).startswith(words)


def test_a_run_that_was_measured_once_or_never_says_so(run):
    once = evaluation(0, "before", reverse_kl=4.0)
    two_teachers = "teachers: [{model: a}, {model: b}]\n"
    assert "4.00 nats from its teachers at step 0, and was not measured again" in sentence(
        run, once, config=two_teachers
    )
    (record,) = read_runs([run("bare", **{"summary.json": json.dumps({"status": "running"})})])
    assert result(record).startswith("Nothing was measured")


def test_an_after_that_is_missing_is_not_bold(run, page):
    summary = SUMMARY | {"held_out": {"before": {"reverse_kl": measured(4.0)}}}
    page(run(**{"summary.json": json.dumps(summary)}))
    cells = r"<tr><th>.*?reverse KL.*?</td><td>(.*?)</td><td>"
    page_of = (run("whole").parent / "report.html").read_text
    assert re.findall(cells, page_of()) == ["-"]
    page(run("other"))
    assert re.findall(cells, page_of()) == ["<b>1.000 ± 0.100</b>"]


# ---- judgement -----------------------------------------------------------------------------------------------------


def test_the_ranges_are_those_of_the_catalogue():
    for name, healthy in HEALTHY.items():
        bounds = [bound for bound in (healthy.low, healthy.high) if math.isfinite(bound)]
        said = [float(word) for word in re.findall(r"\d+(?:\.\d+)?", CATALOG[name].healthy)]
        assert bounds and set(bounds) <= set(said), name


def test_a_breach_is_named_coloured_and_drawn(run, page):
    rows = [row(step, eopd_gate_ratio=value) for step, value in enumerate((0.18, 0.4, 0.5), 1)]
    found = page(run(rows=rows))
    words = "Gate: 50 % at step 3, above the healthy range (15 % to 20 %); outside in 2 of 3 steps."
    assert words in found.text and "Outside of a healthy range: Gate open." in found.text
    assert [a for tag, a in found.elements if tag == "figure" and a.get("class") == "breached"]
    frame = Frame([(1.0, 0.18), (3.0, 0.5)])
    (band,) = [a for tag, a in found.elements if a.get("class") == "healthy"]
    assert (float(band["y"]), float(band["height"])) == pytest.approx(
        (frame.y(0.2), frame.y(0.15) - frame.y(0.2)), abs=0.06
    )
    (outside,) = [a for tag, a in found.elements if a.get("class") == "outside c0 d0"]
    assert outside["d"] == frame.path([(2, 0.4), (3, 0.5)])


def test_what_came_back_is_told_and_what_never_left_is_not(run, page):
    back = page(run("back", rows=[row(s, eopd_gate_ratio=g) for s, g in enumerate((0.9, 0.17), 1)]))
    words = "Gate: back in the healthy range (15 % to 20 %) at the end; outside in 1 of 2 steps"
    assert words in back.text and "Outside of a healthy" not in back.text
    never = page(run("never", rows=[row(s, eopd_gate_ratio=g) for s, g in ((1, 0.16), (2, 0.17))]))
    assert "outside in" not in never.text


def test_too_little_is_a_breach_too(run, page):
    rows = [row(s, eopd_teacher_topk_mass_ratio=0.95 - 0.1 * s) for s in (1, 2)]
    assert (
        "Teacher: 75 % at step 2, below the healthy range (at least 90 %); outside in 2 of 2 steps."
        in page(run(rows=rows)).text
    )


def test_a_range_is_for_the_runs_that_it_is_for(run, page):
    rows = [row(s, eopd_gate_ratio=1.0 - 0.1 * s) for s in (1, 2)]
    idle = f"{CONFIG}  alpha: 0.0\n"  # the gate does nothing
    assert "outside in" not in page(run("idle", rows=rows, **{"config.yaml": idle})).text
    always = CONFIG.replace("hard, tau: 0.8", "always")
    assert (
        "outside in"
        not in page(
            run(
                "always",
                rows=rows,
                **{"config.yaml": always},
            )
        ).text
    )
    assert "outside in" in page(run("hard", rows=rows)).text


def test_a_range_above_all_values_is_in_the_frame(run, page):
    rows = [row(s, eopd_teacher_topk_mass_ratio=0.5 + 0.01 * s) for s in (1, 2, 3)]
    (band,) = [a for _, a in page(run(rows=rows)).elements if a.get("class") == "healthy"]
    frame = Frame([(1.0, 0.53), (3.0, 0.99)])
    assert float(band["y"]) == frame.y(1.0) and float(band["height"]) == pytest.approx(
        frame.y(0.9) - frame.y(1.0)
    )


def test_charts_that_say_nothing_are_a_line_of_a_list(run, page):
    rows = [
        row(
            s,
            eopd_staleness_mean=0.0,
            eopd_staleness_max=0.0,
            eopd_clipped_ratio=0.0,
            eopd_grad_norm=s,
        )
        for s in (1, 2)
    ]
    found = page(run(rows=rows))
    assert "Staleness (versions): 0 all along" in found.text
    assert "Clipped (share of tokens): 0 % all along" in found.text
    drawn = [label for label in found.labels() if not label.startswith(("Held", "first"))]
    assert [label.partition(".")[0] for label in drawn] == ["Gradient norm"]
    wrong = page(run("wrong", rows=[row(s, eopd_clipped_ratio=0.5) for s in (1, 2)]))
    assert wrong.chart("Clipped") == {
        "ratio clipped": [[1, 0.5], [2, 0.5]]
    }  # constant, and a breach


def test_charts_stand_by_importance(run, page):
    names = ("grad_norm", "gate_ratio", "reverse_kl_nats", "learning_rate", "loss")
    rows = [row(s, **{f"eopd_{name}": 0.1 * s for name in names}) for s in (1, 2)]
    labels = [label.partition(" (")[0].partition(".")[0] for label in page(run(rows=rows)).labels()]
    order = ["Reverse KL", "Gate open", "Loss", "Gradient norm", "Learning rate"]
    assert [label for label in labels if label in order] == order


# ---- what happened on the way --------------------------------------------------------------------------------------


def test_checkpoints_restarts_collapse_and_the_best_are_marked(run, page):
    rows = [
        row(
            s,
            eopd_loss=1.0 * s,
            eopd_checkpoint_step=s // 2 * 2.0,
            eopd_checkpoint_seconds=1.0,
        )
        | {"eopd_collapse": float(s in (4, 5, 7))}
        for s in range(1, 8)
    ]
    timeline = [
        {"step": s, "incarnation": int(s > 3), "generate": [], "score": []} for s in range(1, 8)
    ]
    best = {"step": 5, "metric": "held_out/reverse_kl", "value": 0.5}
    found = page(
        run(
            rows=rows,
            **{"timeline.jsonl": timeline, "summary.json": json.dumps(SUMMARY | {"best": best})},
        )
    )
    kinds = "checkpoint|best checkpoint|the learner started again|signs of collapse"
    assert set(re.findall(rf"step \d+: (?:{kinds})", found.text)) == {
        "step 0: checkpoint",
        "step 2: checkpoint",
        "step 4: checkpoint",
        "step 6: checkpoint",
        "step 4: the learner started again",
        "step 4: signs of collapse",
        "step 7: signs of collapse",
        "step 5: best checkpoint",
    } - {"step 0: checkpoint"}  # before the first row
    assert "Best checkpoint: step 5, where held_out/reverse_kl was 0.5." in found.text
    assert "Signs of collapse began to show at step 4, 7" in found.text


def test_evaluations_are_curves_with_their_intervals(run, page):
    lines = [
        evaluation(0, "before", reverse_kl=4.0, teacher_entropy=1.0),
        evaluation(2, "during", reverse_kl=2.0, teacher_entropy=1.0),
        evaluation(
            0,
            "before",
            "gsm",
            avg_at_n=0.1,
            pass_at_2=0.2,
            pass_at_4=0.95,
            lost=0.0,
        ),
        evaluation(
            2,
            "during",
            "gsm",
            avg_at_n=0.3,
            pass_at_2=0.5,
            pass_at_4=0.95,
            lost=0.0,
        ),
    ]
    for line in lines[2:]:
        line["samples"] = 4

    found = page(run(**{"evaluations.jsonl": lines}))
    assert found.chart("Held-out reverse KL") == {
        "reverse KL": [[0, 4.0, 3.804, 4.196], [2, 2.0, 1.804, 2.196]]
    }
    assert found.chart("gsm: correct answers") == {
        "avg@n": [[0, 0.1, 0.0, 0.296], [2, 0.3, 0.104, 0.496]],  # a share is never below 0
        "pass@4": [[0, 0.95, 0.754, 1.0], [2, 0.95, 0.754, 1.0]],
    }
    assert not [label for label in found.labels() if "entropy (nats)" in label or "lost" in label]


# ---- arms ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(run):
    """Three seeds of a hard gate, two of a gate that never opens; lengths 3, 3, 2, 3, 3."""

    def arm(gate, seeds, lengths):
        for seed, length in zip(seeds, lengths, strict=True):
            rows = [
                row(
                    s,
                    eopd_loss=1.0 * s + seed + 10.0 * (gate != HARD),
                    eopd_grad_norm=1.0 * s,
                )
                for s in range(1, 1 + length)
            ]
            rows[0]["eopd_grad_norm"] = [1.0, None][seed % 2]
            lines = [
                evaluation(0, "before", reverse_kl=9.0),
                evaluation(
                    length, "after", reverse_kl=1.0 + seed + (gate != HARD) * (1.0 + 0.1 * seed)
                ),
            ]
            name = f"{gate[7:11]}-{seed}"
            files = {
                "config.yaml": resolved(gate, seed),
                "evaluations.jsonl": lines,
                "summary.json": json.dumps(SUMMARY | {"steps": length}),
            }
            yield run(name, rows=rows, **files)

    return [*arm(HARD, (0, 1, 2), (3, 3, 2)), *arm("{kind: never}", (0, 1), (3, 3))]


def test_seeds_of_an_arm_are_one_curve_with_a_band(sweep, page):
    found = page(*sweep)
    assert found.chart("Loss") == {
        "loss.gate.kind=hard, loss.gate.tau=0.8, loss": [[1, 2.0, 1.0, 3.0], [2, 3.0, 2.0, 4.0]],
        "loss.gate.kind=never, loss": [
            [1, 11.5, 11.0, 12.0],
            [2, 12.5, 12.0, 13.0],
            [3, 13.5, 13.0, 14.0],
        ],
    }
    assert "5 runs, 2 arms" in found.text
    # a seed without a value is a gap of the mean
    never = found.chart("Gradient norm")["loss.gate.kind=never, norm"]
    assert never == [[2, 2.0, 2.0, 2.0], [3, 3.0, 3.0, 3.0]]


def test_what_a_run_measured_before_it_went_on_is_not_its_end(run, page):
    lines = [
        evaluation(
            0,
            "before",
            reverse_kl=9.0,
        ),
        evaluation(3, "after", reverse_kl=1.25),
    ]
    went_on = {"evaluations.jsonl": lines, "summary.json": json.dumps(SUMMARY | {"steps": 5})}
    text = " ".join(page(run("first"), run("second", **went_on)).text.split())
    assert "held-out reverse KL, after 1.000 ± 0.100 -" in text


def test_arms_are_compared_in_pairs_of_one_seed(sweep, page):
    text = " ".join(page(*sweep).text.split())
    # of 1, 2, 3: 2 and 4.303 / sqrt 3 on both sides; of 2, 3.1: 2.55 and 12.706 x 0.55;
    # differences 1.0 and 1.1: 1.05 and 12.706 x 0.05
    assert (
        "reverse KL 2.000 (\u22120.484 to 4.484) 2.550 (\u22124.438 to 9.538)+1.050 (+0.415 to +1.685)"
    ) in text


def test_a_difference_is_bold_where_its_interval_leaves_out_0(sweep, page, tmp_path):
    page(*sweep)
    assert "<b>+1.050 (+0.415 to +1.685)</b>" in (tmp_path / "report.html").read_text()


def test_runs_of_one_seed_each_are_no_arms(run, page):
    runs = [
        run(f"r{n}", **{"config.yaml": resolved(gate)})
        for n, gate in enumerate((HARD, "{kind: never}"))
    ]
    found = page(*runs)
    assert "r0 \u00b7 r1" in found.text and "paired by seed" not in found.text


# ---- to give away --------------------------------------------------------------------------------------------------

HOME = "/home" + "/anna"
SECRETS = (
    HOME,
    "anna",
    "node17",
    "corp.example",
    "/scratch",
    "bertha",
    "10.1.2.3",
    "10.9.8.7",
    "bucket",
)
SECRETS += ("kim", "uni.example")
PRIVATE = """
cluster: {address: 'node17:6379'}
telemetry: {host: 10.1.2.3, trackers: []}
checkpoints: HOME/runs
upload: s3://bucket/anna/x
extra: {server: {url: 'http://bertha:pw@web.corp.example:80/v1'}, note: 'see /scratch/notes.txt'}
more: ['mail kim@uni.example', 'it was 10.9.8.7, before']
""".replace("HOME", HOME)


def private(run, name="shared"):
    moved = {"cluster.address": ["node17:1", None], "a.data": ["/scratch/old.jsonl", "b"]}
    spoken = sample(prompt="Who is anna at node17?", texts=("bertha", " is", " in"))
    versions = {"eopd": "1", "provenance": {"commit": "abc"}, "x": f"{HOME}/y"}
    return run(
        name,
        **{
            "config.yaml": resolved(model="/scratch/models/small") + PRIVATE,
            "changes.jsonl": [{"from_step": 2, "changes": moved}],
            "parent.json": json.dumps({"run": f"{HOME}/runs/older", "step": 7}),
            "held_out.jsonl": [held_out("before", spoken)],
            "versions.json": json.dumps(versions),
        },
    )


def test_a_public_page_names_no_path_host_or_user(run, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "machine-of-mine")
    directory = private(run, "machine-of-mine")
    (directory / "logs").mkdir()
    (directory / "logs" / "driver.log").write_text(f"anna@node17: {HOME}\n")
    write_report([directory], tmp_path / "private.html")
    write_report([directory], tmp_path / "public.html", public=True)
    told, kept = ((tmp_path / f"{name}.html").read_text() for name in ("private", "public"))
    assert [secret for secret in SECRETS if secret not in told] == []
    assert [
        secret for secret in (*SECRETS, "machine-of-mine", str(tmp_path)) if secret in kept
    ] == []

    for expected in (
        "small, bfloat16",
        "…/old.jsonl",
        "Forked from",
        "…/older, step 7",
        "…/notes.txt",
    ):
        assert expected in kept and ("…" in expected or expected in told)


def test_a_public_page_keeps_what_says_nothing_of_anybody(run, tmp_path):
    directories = [private(run, "a/same"), private(run, "b/same")]
    write_report(directories, tmp_path / "public.html", public=True)
    kept = (tmp_path / "public.html").read_text()
    for expected in ("same (1)", "same (2)", "org/big@01234567", "pkg:rows", "commit"):
        assert expected in kept.replace("Commit", "commit")


def test_what_labels_choose_nodes_by_is_left_out_of_a_public_page():
    settings = {
        "learner": {"node_labels": {"kubernetes.io/hostname": "gpu-17.corp", "zone": "north"}}
    }
    public = Public(settings)
    assert public.text("seen on gpu-17.corp") == "seen on …"
    assert public.settings(settings) == {
        "learner": {"node_labels": {"kubernetes.io/hostname": "…", "zone": "…"}}
    }


def test_the_keys_of_settings_are_no_names(monkeypatch):
    monkeypatch.setattr("eopd.telemetry.report.public._own_names", lambda: ["run"])
    settings = {"run": {"name": "a run"}}
    assert Public({}).settings(settings) == {"run": {"name": "a …"}}


def test_names_of_labels_and_options_are_left_out_too():
    settings = {
        "cluster": {"address": "gpu-17.corp:6379"},
        "rollout": {"vllm": {"gpu-17.corp": "on", "/srv/alice/cache": "off"}},
    }
    vllm = Public(settings).settings(settings)["rollout"]["vllm"]
    assert vllm == {"…": "on", "…/cache": "off"}


def test_nothing_is_left_out_where_there_is_no_name(monkeypatch):
    monkeypatch.setattr("eopd.telemetry.report.public._own_names", lambda: ["root", "localhost"])
    assert Public({}).text("a text") == "a text"


def test_the_verb_leaves_out_what_it_is_told_to(run, tmp_path, monkeypatch):
    directory = private(run)
    monkeypatch.setattr(sys, "argv", ["eopd", "report", str(directory), "--public"])
    with pytest.raises(SystemExit):
        main()

    assert "anna" not in (directory / "report.html").read_text()


# ---- explained where it stands -------------------------------------------------------------------------------------


def test_terms_are_explained_where_they_stand_and_to_screen_readers(run, page):
    found = page(run())
    terms = [a for tag, a in found.elements if tag == "dfn"]
    ids = {a["id"] for _, a in found.elements if "id" in a}
    assert terms and all(a["tabindex"] == "0" and a["data-is"] for a in terms)
    assert {a["aria-describedby"] for a in terms} <= ids


def test_a_text_keeps_its_words_when_it_is_explained():
    assert explained("<b> & nothing") == "&lt;b&gt; &amp; nothing"
    shown = explained("Reverse KL <nats>")
    assert shown.startswith('<dfn tabindex="0" data-is="How much surer')
    assert shown.endswith('aria-describedby="term-reverse-kl">Reverse KL</dfn> &lt;nats&gt;')


def test_the_objective_stands_beside_a_token_of_each_kind(run, page):
    text = " ".join(page(run()).text.split())
    # entropies 0.05, 1.0, 3.0; of the two above 0.8 the upper one is the middle
    assert "A The gate is shut …sky" in text and "B The gate is open …sky is blue" in text
    assert (
        "log p \u2212 log q = +1.00 nats, so that this token becomes less likely. No FKL here."
        in text
    )
    assert "FKL : the candidates above become likely in the teacher's proportions." in text


BOTH = "RKL reverse KL, on every token"
ON_TOP = "there the forward KL comes on top, and teaches all of its candidates"


@pytest.mark.parametrize(
    ("objective", "said", "not_said"),
    [
        ("", [BOTH, ON_TOP, "The gate is open"], ["There is no"]),
        (
            "  reverse_kl: {kind: none}\n",
            ["There is no reverse KL", "No RKL here", "there the forward KL teaches all of"],
            [BOTH, "On every token the reverse KL", "log p \u2212 log q = +1.00 nats, so"],
        ),
        (
            "  alpha: 0.0\n",
            [BOTH, "There is no forward KL: loss.alpha is 0.", "No FKL here"],
            ["forward KL: more", "the forward KL", "The gate is open", "the gate is open"],
        ),
        ("  reverse_kl: {kind: topk_tail}\n", ["the student is surer of this"], ["becomes less"]),
    ],
)
def test_a_term_that_a_run_does_not_have_is_not_said_to_act(run, page, objective, said, not_said):
    text = " ".join(page(run(**{"config.yaml": CONFIG + objective})).text.split())
    text = text[: text.index("How sure they are")]
    assert [words for words in said if words not in text] == []
    assert [words for words in not_said if words in text] == []


def test_the_lead_says_what_holds_for_all_runs(run):
    never = CONFIG.replace("hard, tau: 0.8", "never")
    always = CONFIG.replace("hard, tau: 0.8", "always")
    both = run("both"), run("never", **{"config.yaml": never})
    assert "the forward KL of some runs comes on top" in lead_of(read_runs(both))
    alone = lead_of(read_runs([run("always", **{"config.yaml": always})]))
    assert "The forward KL teaches all of its candidates on every token." in alone
    assert lead_of(read_runs(both[1:])).endswith("There is no forward KL to teach them.")


@pytest.mark.parametrize(
    ("gate", "values"),
    [
        (HARD, [0.0, 0.0, 1.0]),
        (
            "{kind: sigmoid, tau: 0.8, scale: 0.1}",
            [1 / (1 + math.e**8), 0.5, 1 / (1 + math.e**-12)],
        ),
        ("{kind: always}", [1.0] * 3),
        ("{kind: never}", [0.0] * 3),
        ("{kind: quantile, top: 0.2}", [None] * 3),
    ],
)
def test_the_gate_that_is_drawn_is_the_gate(run, gate, values):
    (record,) = read_runs([run(**{"config.yaml": resolved(gate)})])
    found = [gate_value(record.config, entropy) for entropy in (0.0, 0.8, 2.0)]
    assert found == [value if value is None else pytest.approx(value) for value in values]


# ---- samples -------------------------------------------------------------------------------------------------------


def test_tokens_are_coloured_by_entropy_and_kl_and_carry_the_alternatives(run):
    (prompt,) = prompts_of(read_runs([run()]))
    before, after = prompt.responses
    assert (before.phase, before.step, after.phase, after.step) == ("before", 0, "after", 3)
    assert before.spans == (
        '<span class="e0 k5 shut">sky</span><span class="e3 k5 open"> is</span><span class="e5 k5 open"> blue</span>'
    )
    data = Parsed(before.data).data[0]
    assert [data["texts"][token[0]] for token in data["tokens"]] == ["sky", " is", " blue"]
    _, token_id, student, teacher, low, high, gate, candidates, chances, rest, rank = data[
        "tokens"
    ][1]
    assert (token_id, student, teacher, low, high, gate) == (1, -0.5, -1.5, 1.0, 1.0, "open")
    assert [data["texts"][one] for one in candidates] == ["sky", " blue"]
    assert (chances, rest) == ([75.0, 12.5], 12.5)
    assert (rank, [token[-1] for token in data["tokens"]]) == (-1, [0, -1, 1])
    assert before.teacher_entropy == pytest.approx(1.35) and before.reverse_kl == 1.0
    assert before.gate_ratio == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("changes", "config", "classes"),
    [
        ({"entropy_low": [0.7], "entropy_high": [0.9]}, CONFIG, "e3 k5 unsure"),
        # the gate opens above the threshold
        ({"entropy_low": [0.8], "entropy_high": [0.8]}, CONFIG, "e3 k5 shut"),
        ({}, CONFIG.replace("hard, tau: 0.8", "always"), "e0 k5"),
        ({"loss_mask": [0]}, CONFIG, "masked"),
        ({"teacher_logprobs": [None]}, CONFIG, "e0 k7 shut"),
        ({"student_logprobs": [-4.5]}, CONFIG, "e0 k0 shut"),
    ],
)
def test_a_token_s_classes(run, changes, config, classes):
    lines = [held_out("before", sample(num_tokens=1, **changes))]
    (prompt,) = prompts_of(read_runs([run(**{"held_out.jsonl": lines, "config.yaml": config})]))
    assert prompt.responses[0].spans == f'<span class="{classes}">sky</span>'


def test_a_candidate_without_probability_is_left_out(run):
    one = sample(num_tokens=1, topk_logprobs=[[0.0, None]])
    (prompt,) = prompts_of(read_runs([run(**{"held_out.jsonl": [held_out("before", one)]})]))
    assert Parsed(prompt.responses[0].data).data[0]["tokens"][0][-4:] == [[0], [100.0], 0.0, 0]


def test_prompts_of_all_runs_come_first_and_every_run_is_shown(run, page):
    both = [sample(prompt=f"both {n}") for n in range(4)]
    runs = [
        run(
            name,
            **{
                "held_out.jsonl": [
                    held_out(
                        "after",
                        *(sample(prompt=f"{name} {n}") for n in range(9)),
                        *both,
                    )
                ]
            },
        )
        for name in ("first", "second")
    ]
    shown = [prompt.text for prompt in prompts_of(read_runs(runs))]
    assert shown[:4] == [f"both {n}" for n in range(4)]
    assert shown[4:] == [f"{name} {n}" for n in range(4) for name in ("first", "second")]
    assert "12 of 22 prompts shown" in page(*runs).text
    assert "prompts shown" not in page(run("third")).text


def test_what_is_cut_ends_in_an_ellipsis(run):
    texts = ("a" * 40, "b" * 41, "c" * 17)
    lines = [held_out("before", sample(prompt="p" * 2001, texts=texts))]
    (prompt,) = prompts_of(read_runs([run(**{"held_out.jsonl": lines})]))
    assert prompt.text == "p" * 1999 + "…"
    found = Parsed(prompt.responses[0].spans).text.split()
    assert found == ["a" * 40, "b" * 39 + "…", "c" * 17]
    assert "c" * 15 + "…" in Parsed(prompt.responses[0].data).data[0]["texts"]


def test_the_mean_of_a_response_leaves_out_what_is_infinite_and_counts_it(run, page):
    some = sample(teacher_logprobs=[-1.5, None, -2.5])
    none = sample(prompt="How?", teacher_logprobs=[None] * 3)
    found = page(run(**{"held_out.jsonl": [held_out("before", some, none)]}))
    assert "log p \u2212 log q +1.50 nats (without 1 infinite)" in found.text
    assert "log p \u2212 log q \u2013 (without 3 infinite)" in found.text


def test_text_of_a_model_can_neither_become_markup_nor_steer_the_page(run, page):
    spoilt = sample(prompt=ATTACK, texts=(ATTACK, "\x00\u202e\n", ""))
    config = f"{CONFIG}prompts: {{suffix: '{ATTACK}'}}\n"
    found = page(run(**{"held_out.jsonl": [held_out("before", spoilt)], "config.yaml": config}))
    tags = [tag for tag, _ in found.elements]
    assert "img" not in tags and [a for tag, a in found.elements if tag == "script" and not a] == [
        {}
    ]
    assert not [name for _, a in found.elements for name in a if name.startswith("on")]
    assert ATTACK in found.text and "\ufffd\ufffd↵\n" in found.text and "⟨2⟩" in found.text
    assert not {"\x00", "\u202e"} & set(found.text)


# ---- runs that are not whole -----------------------------------------------------------------------------------------


def test_a_run_under_way_is_reported_with_what_there_is(run, page):
    bare = dict.fromkeys(("summary.json", "held_out.jsonl", "timeline.jsonl", "versions.json"))
    found = page(run(rows=[row(1)], **bare))

    for expected in (
        "unknown",
        "summary.json is missing or cannot be read",
        "No samples yet",
        "Not measured yet.",
    ):
        assert expected in found.text

    assert "Rollout engines: not recorded" in found.text and "busy" not in found.text


@pytest.mark.parametrize("name", ["metrics", "held_out", "timeline", "evaluations", "changes"])
@pytest.mark.parametrize(
    "line",
    [
        '{"step": "x", "phase": "after", "from_step": "y"}',
        '{"step": null, "phase": 3}',
        '{"step": 3, "phase": "after", "samples": 5, "measurements": []}',
        "[1]",
    ],
)
def test_lines_of_another_kind_are_named_and_left_out(run, page, name, line):
    directory = run()
    path = directory / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("\n".join([*lines, line]) + "\n")

    unread = f"1 of {len(lines) + 1} lines of {name}.jsonl could not be read"
    taken = name == "timeline" and '"step": 3' in line
    assert (unread in page(directory).text) != taken


def test_lines_and_files_that_cannot_be_read_are_counted(run, page):
    rows = json.dumps(row(1)) + "\n[1]\n" + json.dumps(row(2))[:-9]
    broken = {"metrics.jsonl": rows, "config.yaml": "a: [", "summary.json": "{"}
    found = page(run(**broken, **{"evaluations.jsonl": None}))

    for expected in (
        "2 of 3 lines of metrics.jsonl",
        "config.yaml cannot",
        "summary.json is missing",
        "1 of ?",
    ):
        assert expected in found.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.yaml": None}, "error: {run} holds no run (it has no config.yaml)"),
        (
            {"metrics.jsonl": None},
            "error: {run}: no step was completed yet (metrics.jsonl has no rows)",
        ),
        (
            {"metrics.jsonl": '{"step": 1, "loss": 2}'},
            "error: {run}: no step was completed yet (metrics.jsonl has no rows)",
        ),
        (
            {"metrics.jsonl": "{"},
            "error: {run}: no step was completed yet (metrics.jsonl has no rows)",
        ),
    ],
)
def test_no_run_or_no_rows_is_one_message_and_exit_code_2(run, files, message, capsys, monkeypatch):
    directory = run(**files)
    monkeypatch.setattr(sys, "argv", ["eopd", "report", str(directory)])
    with pytest.raises(SystemExit) as caught:
        main()

    assert caught.value.code == 2
    assert capsys.readouterr().err == message.format(run=directory) + "\n"
    assert not (directory / "report.html").exists()


def test_of_several_runs_those_that_cannot_be_shown_are_left_out(run, capsys, monkeypatch):
    directory = run("sweep/a").parent
    run("sweep/b")
    empty = run("sweep/c", **{"metrics.jsonl": None})
    monkeypatch.setattr(sys, "argv", ["eopd", "report", str(directory)])
    with pytest.raises(SystemExit) as caught:
        main()

    assert caught.value.code == 0
    why = "no step was completed yet (metrics.jsonl has no rows)"
    assert capsys.readouterr() == (f"{directory}/report.html\n", f"left out: {empty}: {why}\n")
    page = (directory / "report.html").read_text()
    assert [name in page for name in (">a<", ">b<", ">c<")] == [True, True, False]


def test_a_run_that_is_named_and_not_there_is_a_mistake(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eopd", "report", str(run()), str(tmp_path / "typo")])
    with pytest.raises(SystemExit) as caught:
        main()

    assert caught.value.code == 2
    assert f"error: {tmp_path}/typo" in capsys.readouterr().err


def test_a_report_that_fails_does_not_fail_the_run(run, tmp_path, caplog):
    report_of_ended(run("empty", **{"metrics.jsonl": None}), tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
    spoilt = held_out("before", {"prompt": "Why?"})
    report_of_ended(run("spoilt", **{"held_out.jsonl": [spoilt]}), tmp_path / "x.html")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"{tmp_path}/x.html could not be written"]


def test_the_verb_writes_beside_the_run_or_where_it_is_told(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = str(run("first")), str(run("second"))
    calls = [
        [first],
        [first, second],
        [first, "--output", "x.html"],
        [first, "--output", "no/x.html"],
    ]

    for arguments in calls:
        monkeypatch.setattr(sys, "argv", ["eopd", "report", *arguments])
        with pytest.raises(SystemExit):
            main()

    shown = capsys.readouterr()
    assert shown.out.split() == [f"{first}/report.html", "report.html", "x.html"]
    assert shown.err == "error: no/x.html: No such file or directory\n"
    assert "second" in (tmp_path / "report.html").read_text()


# ---- one small file --------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing(run, page, tmp_path):
    found = page(run())
    links = [
        a[name]
        for _, a in found.elements
        for name in ("src", "href", "action", "data")
        if name in a
    ]
    assert links and all(link.startswith(("#", "data:,")) for link in links)
    styles = re.findall(r"(?:url\(|@import)([^)]*)", (tmp_path / "report.html").read_text())
    assert styles and all(target.startswith("#") for target in styles)


def test_long_runs_with_long_samples_stay_under_5_mb(run, page, tmp_path):
    many = dict.fromkeys(
        ("eopd_reverse_kl_nats", "eopd_gate_ratio", "eopd_grad_norm", "eopd_staleness_max"), 1.0 / 3
    )
    rows = [
        row(step, **{name: value + step % 2 for name, value in many.items()})
        for step in range(1, 2001)
    ]
    texts = {str(i): f"{i}" + "\u6587" * 50 for i in range(1200)}  # no two tokens are alike
    wide = {
        "ids": list(range(120)),
        "texts": texts,
        "topk_ids": [list(range(120 + 9 * r, 129 + 9 * r)) for r in range(120)],
        "topk_logprobs": [[-2.5] * 9] * 120,
    }
    samples = [sample(prompt=f"{n:03}" * 3000, num_tokens=120) | wide for n in range(14)]
    lines = [held_out(phase, *samples) for phase in ("before", "after")]
    found = page(
        *(
            run(
                name,
                rows=rows,
                **{"held_out.jsonl": lines},
            )
            for name in ("first", "second")
        )
    )
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert len(found.chart("Reverse KL")["first, reverse KL"]) in range(286, 289)
    assert "120 tokens, the first 104 shown" in found.text


# ---- charts ----------------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0, 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-3.0, 7.0, 4) == [-2.5, 0.0, 2.5, 5.0]
    assert ticks(1, 80, 5) == [20.0, 40.0, 60.0, 80.0]


def test_a_frame_spans_the_data_and_zero():
    frame = Frame([(1.0, 2.0), (5.0, 4.0)])
    assert [(frame.x(x), frame.y(y)) for x, y in ((1.0, 4.0), (5.0, 0.0), (3.0, 2.0))] == [
        (44.0, 8.0),
        (352.0, 168.0),
        (198.0, 88.0),
    ]


@pytest.mark.parametrize(
    ("low", "high", "ends"),
    [(0.0, 0.95, (0.0, 1.0)), (-0.1, 5.3, (-2.0, 6.0)), (0.0, 9.6, (0, 10))],
)
def test_both_ends_of_an_axis_have_a_label(low, high, ends):
    frame = Frame([(0.0, low), (1.0, high)])
    assert (frame.y_min, frame.y_max) == pytest.approx(ends)
    for end in ends:
        label = f"{end:g}".replace("-", "\u2212")
        assert f'y="{frame.y(end) + 3.5}" text-anchor="end">{label}</text>' in frame.axes()


def test_what_the_steps_are_called_stands_under_the_axis():
    assert ">step</text>" in Frame([(0.0, 1.0)]).axes()
    assert ">nats</text>" in histogram("h", [Line("l", [0.0], [1.0])], 0.2, None)


def test_thinning_and_smoothing_are_means():
    line = Line("l", range(10), [0, 2, None, 4, 6, math.inf, 8, 10, 12, 20])
    short = thinned(line, 5)
    assert (list(short.xs), list(short.ys)) == ([1, 3, 5, 7, 9], [1.0, 4.0, 6.0, 9.0, 16.0])
    assert thinned(line, 10).points() == line.points()
    assert thinned(Line("l", range(4), [None, None, 1.0, 2.0]), 2).ys == [None, 1.5]
    falls = smoothed(Line("l", range(60), [9.0, 6.0, 3.0] + [0.0] * 57))
    assert list(falls.ys)[:4] == [9.0, 6.0, pytest.approx(3.6), pytest.approx(18 / 7)]
    flat = smoothed(Line("l", range(40), [0.0] * 20 + [10.0] * 20))
    assert list(flat.ys)[16:24] == [0.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 10.0]


def test_what_was_measured_keeps_its_peaks_in_their_order_and_its_ends():
    values = [2.0] * 2000
    values[777], values[778], values[-1] = 9.0, -3.0, 2.5
    short = extremes(Line("l", range(2000), values), 300)
    points = short.points()
    assert len(points) <= 300 and points[0] == (0, 2.0) and points[-1] == (1999, 2.5)
    at = points.index((777, 9.0))
    assert points[at + 1] == (778, -3.0)
    (path,) = re.findall(
        r'class="raw[^"]*" d="([^"]*)"', curves("c", [Line("l", range(2000), values)])
    )
    assert f"{Frame(points).y(9.0)}L" in path


@pytest.mark.parametrize("num_points", [10, 300])
def test_a_gap_in_a_line_is_a_gap_in_its_path(num_points):
    line = Line("l", range(40), [1.0] * 15 + [None] * 10 + [2.0] * 14 + [math.nan])
    picture = curves("c", [line], num_points=num_points)
    for name in ("raw", "line"):
        (path,) = re.findall(rf'class="{name} [^"]*" d="([^"]*)"', picture)
        assert path.count("M") == 2

    alone = curves("c", [Line("l", [1, 2, 3], [1.0, None, 1.0])])
    assert re.findall(r'class="raw[^"]*" d="([^"]*)"', alone) == ["M44.0 8.0h0M352.0 8.0h0"]


def test_25_runs_are_told_apart_by_colour_and_mark():
    assert len({look(run) for run in range(25)}) == 25
    picture = curves(
        "c",
        [
            Line(
                str(run),
                [1, 2],
                [1.0, 2.0],
                color=run,
            )
            for run in range(25)
        ],
    )
    assert (
        len(set(re.findall(r'class="mark (c\d) d0" transform="[^"]*" d="([^"]*)"', picture))) == 25
    )


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1.0, 2.0], [None, math.nan], [1e-9, 1e9]])
def test_every_coordinate_is_finite_and_inside(values):
    line = Line("l", range(len(values)), values)
    counts = [abs(y) if y is not None and math.isfinite(y) else 0.0 for y in values]
    pictures = [
        curves("c", [thinned(line, 300)]),
        stacked("s", [Line("l", range(len(counts)), counts)], ["f-train"]),
        histogram("h", [Line("l", range(len(counts)), counts)], 1.0, 0.8),
    ]

    for picture in pictures:
        for path in re.findall(r' d="M([^"]*)"', picture.split("<script")[0]):
            numbers = [float(n) for n in re.findall(r"-?[\d.]+|nan|inf", path)]
            assert all(math.isfinite(n) and -7 <= n <= 360 for n in numbers), path


def test_the_message_of_a_mistake_names_the_run_of_several(run, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere holds no run"):
        read_runs([run(), tmp_path / "nowhere"])
