"""The terminal: plain lines, the live view at 80 columns, an honest remaining time, the table
at the end.
"""

import io
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console

from eopd.run.evaluations import Evaluation
from eopd.run.record import Best, HeldOut, Measurement, Sample, Summary
from eopd.telemetry import plain
from eopd.telemetry.catalog import CATALOG
from eopd.telemetry.cells import COLUMNS
from eopd.telemetry.console import Console, print_measured, print_summary
from eopd.telemetry.evaluations import evaluation_line, evaluation_row
from eopd.telemetry.plain import say
from eopd.telemetry.status import print_status


def test_text_is_shown_as_it_is():
    """No ``:100:`` is an emoji, no bracket markup, and no escape sequence reaches a terminal."""
    for interactive in (False, True):
        terminal = Terminal(interactive=interactive)
        say(terminal.output, "data.jsonl:100: [red]not[/red] JSON \x1b[31m 1\u202f000")
        assert terminal.raw() == "data.jsonl:100: [red]not[/red] JSON \ufffd[31m 1\u202f000\n"


class Terminal:
    """A terminal of 80 columns and a clock that stands still."""

    def __init__(self, *, interactive: bool, width: int = 80) -> None:
        self.now = 1000.0
        self._file = io.StringIO()
        self.output = rich.console.Console(
            file=self._file,
            width=width,
            height=25,
            force_terminal=interactive,
            force_interactive=interactive,
            color_system=None,
            get_time=lambda: self.now,
            _environ={},
        )

    def raw(self) -> str:
        return self._file.getvalue()

    def lines(self) -> list[str]:
        """Every line ever written that is not blank; the last frame of the live view comes last."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw().replace("\r", "\n"))
        return [line for line in text.splitlines() if line.strip()]


def row_of(step: int) -> dict[str, float]:
    return {
        "eopd_step": float(step),
        "eopd_step_seconds": 4.214,
        "eopd_wait_seconds": 1.8,
        "eopd_train_seconds": 2.1,
        "eopd_weights_seconds": 0.31,
        "eopd_reverse_kl_nats": 1.2345,
        "eopd_gate_ratio": 0.307,
        "eopd_in_flight_trajectories": 8.0,
        "eopd_ready_trajectories": 3.0,
        "eopd_staleness_max": 1.0,
    }


def test_the_log_has_a_line_of_each_step_also_beside_a_live_view(caplog) -> None:
    caplog.set_level("INFO", "eopd")
    console = Console(run="demo", batches=10, output=Terminal(interactive=True).output)
    for step in (1, 2):
        console.write(row_of(step))

    console.close()
    assert [message.split(" | ")[0] for message in caplog.messages] == ["step 1/10", "step 2/10"]


def test_without_a_terminal_a_minute_of_silence_is_broken_by_what_is_under_way() -> None:
    terminal = Terminal(interactive=False)
    console = Console(run="demo", batches=10, output=terminal.output)
    console.message("measuring on 64 held-out prompts")
    for done in range(1, 15):
        terminal.now += 10.0
        console.doing(f"{done}/64")

    console.close()
    assert terminal.lines() == ["measuring on 64 held-out prompts", "6/64", "12/64"]


def test_the_live_view_shows_what_is_under_way_until_the_next_step() -> None:
    terminal = Terminal(interactive=True)
    console = Console(run="demo", batches=10, output=terminal.output)
    console.doing("held-out prompts written and read: 7/64 " + "x" * 100)
    terminal.output.print(console)
    shown = terminal.lines()
    console.write(row_of(1))
    console.close()
    assert shown[-1].startswith("held-out prompts written and read: 7/64 xxx") and shown[
        -1
    ].endswith("…")
    assert len(shown[-1]) <= 80
    assert "held-out" not in "".join(terminal.lines()[len(shown) :])


def test_without_a_terminal_each_step_is_one_plain_line() -> None:
    terminal = Terminal(interactive=False)
    console = Console(run="demo", batches=10, output=terminal.output)
    console.message(
        "end token 2 -> 2 [both ways] and a text that is longer than a line of eighty columns is"
    )
    for step in (1, 2):
        terminal.now += 10.0
        console.write(row_of(step))

    console.close()
    assert "\x1b" not in terminal.raw()
    message, first, second = terminal.lines()
    assert "[both ways]" in message
    assert first == (
        "step 1/10 | 4.21 s (wait 1.80 s, train 2.10 s, weights 0.31 s) | KL reverse / "
        "forward 1.234 / - | entropy teacher / student - / - | gate 31% | length - | in "
        "flight / ready 8 / 3 | staleness 1"
    )
    assert second.startswith("step 2/10 |") and second.endswith("| 1:20 left")


def test_after_three_steps_the_whole_run_is_foretold_once() -> None:
    terminal = Terminal(interactive=False)
    console = Console(run="demo", batches=10, expected_minutes=1, output=terminal.output)
    for step in range(1, 6):
        terminal.now += 60.0
        console.write(row_of(step))

    console.close()
    told = [line for line in terminal.lines() if not line.startswith("step ")]
    assert len(told) == 1 and terminal.lines().index(told[0]) == 3
    assert told[0].startswith(
        "this run will take about 10 minutes in all: 7 more steps of 60.0 s. It was written to"
    )


def test_the_remaining_time_follows_recent_steps_and_never_runs_dry() -> None:
    terminal = Terminal(interactive=True)
    console = Console(run="demo", batches=100, output=terminal.output)

    def shown() -> str:
        terminal.output.print(console)
        heads = [line for line in terminal.lines() if line.startswith("demo ")]
        return heads[-1].split("/100", maxsplit=1)[1].strip()

    try:
        assert shown() == "0:00"
        terminal.now += 300.0  # engines start
        console.write(row_of(1))
        assert shown() == "5:00"
        for step in range(2, 31):
            terminal.now += 10.0
            console.write(row_of(step))

        for step in range(31, 51):  # from now on slower: the 20 last gaps count
            terminal.now += 20.0
            console.write(row_of(step))

        assert shown() == "16:30  16:40 left"
        terminal.now += 5.0
        assert shown() == "16:35  16:35 left"
        terminal.now += 3600.0
        assert shown() == "1:16:35  16:20 left"
        terminal.now += 1.0
        console.write(row_of(100))
        assert shown().endswith("done")
    finally:
        console.close()


def test_the_live_view_fits_80_columns_and_shows_every_cell() -> None:
    terminal = Terminal(interactive=True)
    console = Console(
        run="a-run-with-a-name-that-is-far-too-long-for-it", batches=1000, output=terminal.output
    )
    row = {key: 1234.5 if "seconds" in key or "tokens" in key else 0.999 for key in CATALOG}
    row |= {"eopd_step": 999.0, "eopd_staleness_mean": 12.34, "eopd_staleness_max": 128.0}
    row |= {"eopd_in_flight_trajectories": 1024.0, "eopd_ready_trajectories": 1024.0}
    console.write(row)
    terminal.now += 4.0
    console.write(row)
    console.close()
    frame = terminal.lines()[-6:]
    assert max(len(line) for line in frame) <= 80
    text = "\n".join(frame)
    for label, _ in (cell for column in COLUMNS for cell in column):
        assert label in text

    assert "1024 / 1024" in text and "12.3 / 128" in text and "1234.50 s" in text
    assert frame[0].count("\u2501") >= 15, "the long name leaves room for the bar"
    assert "999/1000" in frame[0] and "0:04 left" in frame[0]


def test_close_ends_the_live_view_and_its_thread() -> None:
    before = set(threading.enumerate())
    terminal = Terminal(interactive=True)
    console = Console(run="demo", batches=2, output=terminal.output)
    console.write(row_of(1))
    console.close()
    console.message("after")
    assert terminal.lines()[-1] == "after"
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive(), thread.name


def measured(mean: float, standard_error: float) -> Measurement:
    return Measurement(mean=mean, standard_error=standard_error)


SUMMARY = Summary(
    status="finished",
    steps=50,
    tokens=12800,
    wall_s=3726.4,
    tokens_per_s=56.54,
    step_seconds={"generate": 1.234, "score": 0.4, "train": 2.1, "weights": 0.31, "wait": 1.8},
    held_out=HeldOut(
        before={
            "reverse_kl": measured(4.1, 0.21),
            "forward_kl": measured(3.9, 0.2),
            "student_entropy": measured(3.2, 0.1),
            "top1_agreement": measured(0.21, 0.02),
        },
        after={
            "reverse_kl": measured(1.29, 0.08),
            "forward_kl": measured(1.4, 0.2),
            "student_entropy": measured(1.2, 0.1),
            "top1_agreement": measured(0.61, 0.02),
        },
    ),
)


def summary_lines(summary: Summary, samples: list[Sample], width: int = 80) -> list[str]:
    terminal = Terminal(interactive=False, width=width)
    print_summary(summary, samples, Path("runs/demo"), terminal.output)
    return [line.rstrip() for line in terminal.lines()]


def test_a_run_that_did_not_get_as_far_as_any_number_is_one_line() -> None:
    nothing = replace(SUMMARY, status="interrupted", steps=0, held_out=HeldOut())
    assert summary_lines(replace(nothing, wall_s=33.0), [], width=200) == [
        "interrupted before the first step, after 0:33; run directory: runs/demo"
    ]
    assert len(summary_lines(replace(nothing, held_out=SUMMARY.held_out), [])) > 5


def test_the_summary_shows_rate_time_and_held_out_numbers() -> None:
    lines = summary_lines(SUMMARY, [])
    assert max(len(line) for line in lines) <= 80
    cells = [line.split() for line in lines]
    assert "finished: 50 steps, 12,800 response tokens in 1:02:06 (56.5/s in the steps)" in lines
    assert [
        "mean",
        "seconds",
        "per",
        "step",
        "generate",
        "score",
        "train",
        "weights",
        "wait",
    ] in cells
    assert ["1.23", "0.40", "2.10", "0.31", "1.80"] in cells
    assert [
        "reverse",
        "KL",
        "(nats)",
        "4.100",
        "±",
        "0.210",
        "1.290",
        "±",
        "0.080",
        "-2.810",
    ] in cells
    assert ["top-1", "agreement", "0.210", "±", "0.020", "0.610", "±", "0.020", "+0.400"] in cells
    assert lines[-1] == "run directory: runs/demo"


def test_the_summary_tells_where_the_teacher_is_sure_and_which_prompts_are_near_it() -> None:
    parts = {
        "share: teacher unsure": (0.62, 0.44),
        "reverse_kl: teacher unsure": (2.5, 0.75),
        "forward_kl: teacher unsure": (1.5, 0.5),
        "share: source lists": (0.3, 0.31),
        "reverse_kl: source lists": (1.0, 0.2),
        "forward_kl: source lists": (0.9, 0.1),
    }
    before, after = ({name: measured(pair[i], 0.1) for name, pair in parts.items()} for i in (0, 1))
    lines = summary_lines(replace(SUMMARY, held_out=HeldOut(before=before, after=after)), [])
    assert max(len(line) for line in lines) <= 80
    cells = [line.split() for line in lines]
    unsure = [
        "teacher",
        "unsure",
        *["62%", "→", "44%", "2.500", "→", "0.750", "1.500", "→", "0.500"],
    ]
    lists = ["source", "lists", *["30%", "→", "31%", "1.000", "→", "0.200", "0.900", "→", "0.100"]]
    assert cells.index(unsure) + 1 == cells.index(lists)
    assert not any("by part" in line for line in summary_lines(SUMMARY, []))


def test_the_summary_of_an_interrupted_run_has_no_after() -> None:
    summary = replace(
        SUMMARY,
        status="interrupted",
        held_out=replace(SUMMARY.held_out, after=None),
    )
    cells = [line.split() for line in summary_lines(summary, [])]
    assert ["forward", "KL", "(nats)", "3.900", "±", "0.200", "-", "-"] in cells


def test_sampled_text_cannot_steer_the_terminal() -> None:
    sample = Sample(
        prompt="Say [bold]hi[/bold].", before="a\x1b[31m b\n\n\tc\x07", after="word " * 100
    )
    text = "\n".join(summary_lines(SUMMARY, [sample]))
    assert "\x1b" not in text and "\x07" not in text
    assert "Say [bold]hi[/bold]." in text
    assert "a\ufffd[31m b c\ufffd" in text
    after = text.split("after   ")[1].split("run directory")[0]
    assert after.count("word") == 40 and after.rstrip().endswith("…")


def status_of(
    status: str, summary: Summary | None, rows: list[dict[str, float]], advice: str | None = None
) -> list[str]:
    terminal = Terminal(interactive=False)
    print_status(
        "demo",
        status,
        summary,
        rows,
        batches=40,
        advice=advice,
        output=terminal.output,
    )
    return terminal.lines()


def test_the_status_of_a_run_is_made_of_its_files() -> None:
    before = {"reverse_kl": measured(2.5, 0.1)}
    best = Best(step=10, metric="held_out/reverse_kl", value=0.25)
    summary = Summary(
        status="running",
        steps=10,
        held_out=HeldOut(before=before),
        best=best,
    )
    faults = {
        "eopd_engines_up": 2.0,
        "eopd_engine_replacements_total": 1.0,
        "eopd_skipped_steps_total": 3.0,
    }
    rows = [row_of(step) | faults | {"time": time.time() - 100 + 10 * step} for step in range(1, 5)]
    lines = status_of("running", summary, rows)
    assert lines[0] == "demo: running, step 4/40, the last one 1:00 ago, about 6:00 left"
    # two days down, and a clock that was set back: neither is the run's pace
    taken = [row | {"eopd_run_seconds_total": 10.0 * row["eopd_step"]} for row in rows]
    for moved in (2 * 86_400.0, -3_600.0):
        resumed = [*taken[:2], *(row | {"time": row["time"] + moved} for row in taken[2:])]
        assert "about 6:00 left" in status_of("running", summary, resumed)[0]

    # rows of an earlier version have the clock alone
    mixed = [*rows[:2], *taken[2:]]
    assert "about 6:00 left" in status_of("running", summary, mixed)[0]
    assert status_of("starting", Summary(status="starting"), []) == ["demo: starting, step 0/40"]

    assert "1.234" in " ".join(lines[1:6]) and "31%" in " ".join(lines[1:6])
    assert (
        lines[6] == "engines up / replaced 2 / 1, learner restarts -, failed weight transfers -, "
        "skipped steps 3"
    )
    assert lines[7] == "best checkpoint: step 10, held_out/reverse_kl 0.2500"
    assert any(line.startswith("reverse KL (nats)") and "2.500 ± 0.100" in line for line in lines)
    assert status_of("completed", summary, rows)[0] == "demo: completed, step 4/40"
    assert status_of("starting", None, []) == ["demo: starting, step 0/40"]
    dead = status_of(
        "dead (process 7 on h, is gone)", summary, rows, "continue with: eopd train c.yaml --resume"
    )
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(rows[-1]["time"]))
    assert (
        dead[0]
        == f"demo: dead (process 7 on h, is gone), step 4/40, the last one at {at} (1:00 ago)"
    )
    assert dead[-1] == "continue with: eopd train c.yaml --resume"


EVALUATION = Evaluation(
    step=5,
    phase="during",
    name="gsm_8k",
    time=1.0,
    seconds=12.34,
    prompts=2,
    samples=4,
    measurements={
        "avg_at_n": Measurement(mean=0.512, standard_error=0.021),
        "pass_at_2": Measurement(mean=0.625, standard_error=None),
        "pass_at_4": Measurement(mean=0.75, standard_error=None),
        "response_tokens": Measurement(mean=312.52, standard_error=1.0),
        "truncation_rate": Measurement(mean=0.021, standard_error=0.01),
        "distinct_1": Measurement(mean=0.25, standard_error=0.01),
        "lost": Measurement(mean=3.0),
    },
    differences={"avg_at_n": Measurement(mean=0.034, standard_error=0.012)},
)


def test_an_evaluation_is_a_line_and_metrics() -> None:
    assert evaluation_line(EVALUATION) == (
        "step 5, gsm_8k: avg@4 0.512 ± 0.021 (+0.034 ± 0.012), pass@4 0.750, 312.5 tokens a "
        "response, 2.1% truncated, 3 lost, in 12.3 s"
    )
    assert evaluation_row(EVALUATION) == {
        'eopd_eval_step{evaluation="gsm_8k"}': 5.0,
        'eopd_eval_seconds{evaluation="gsm_8k"}': 12.34,
        'eopd_eval_avg_at_n_ratio{benchmark="gsm_8k"}': 0.512,
        'eopd_eval_pass_at_k_ratio{benchmark="gsm_8k",k="2"}': 0.625,
        'eopd_eval_pass_at_k_ratio{benchmark="gsm_8k",k="4"}': 0.75,
        'eopd_eval_response_tokens_mean{benchmark="gsm_8k"}': 312.52,
        'eopd_eval_truncated_ratio{benchmark="gsm_8k"}': 0.021,
        'eopd_eval_distinct_ratio{benchmark="gsm_8k",n="1"}': 0.25,
        'eopd_eval_lost_trajectories{benchmark="gsm_8k"}': 3.0,
    }


def test_a_held_out_measurement_has_no_label_and_leaves_its_parts_out() -> None:
    held_out = replace(
        EVALUATION,
        name="held_out",
        measurements={
            "reverse_kl": Measurement(mean=0.5, standard_error=0.1),
            "reverse_kl: teacher sure": Measurement(mean=0.4, standard_error=0.1),
        },
        differences={},
    )
    assert evaluation_line(held_out) == "step 5, held out: reverse KL 0.500 ± 0.100, in 12.3 s"
    assert evaluation_row(held_out) == {
        'eopd_eval_step{evaluation="held_out"}': 5.0,
        'eopd_eval_seconds{evaluation="held_out"}': 12.34,
        "eopd_eval_reverse_kl_nats": 0.5,
    }


def test_the_status_has_the_newest_evaluations() -> None:
    terminal = Terminal(interactive=False)
    print_status(
        "demo", "running", None, [], batches=9, evaluations=[EVALUATION], output=terminal.output
    )
    assert terminal.lines()[1] == evaluation_line(EVALUATION)


def test_one_measurement_is_a_table() -> None:
    terminal = Terminal(interactive=False)
    parts = {
        "share: teacher sure": measured(0.6, 0.0),
        "reverse_kl: teacher sure": measured(0.4, 0.1),
        "forward_kl: teacher sure": measured(0.3, 0.1),
    }
    print_measured({"reverse_kl": measured(0.5, 0.1)} | parts, terminal.output)
    text = "\n".join(terminal.lines())
    assert "reverse KL (nats)             0.500 ± 0.100" in text
    assert "teacher sure" in text and "60%" in text


def test_what_takes_long_is_told_again_and_again(capsys, monkeypatch):
    monkeypatch.setattr(plain, "SLOW_S", 0.05)
    with plain.told_while_slow("reading"):
        time.sleep(0.3)

    assert set(capsys.readouterr().err.splitlines()) == {"still reading, for 0 s"}
    with pytest.raises(KeyError), plain.told_while_slow("reading"):
        raise KeyError

    assert capsys.readouterr().err == ""
