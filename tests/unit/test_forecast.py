"""How long a run will take, and what it says when that is far longer than meant."""

from eopd.telemetry.forecast import forecast

ROW = {
    "eopd_step": 3.0,
    "eopd_step_seconds": 100.0,
    "eopd_train_seconds": 80.0,
    "eopd_generate_seconds": 15.0,
    "eopd_score_seconds": 4.0,
    "eopd_weights_seconds": 1.0,
}
TOLD = "this run will take about 100 minutes in all: 57 more steps of 100.0 s"


def told(row=ROW, **more):
    return forecast(
        row, **{"spent_s": 300.0, "step_s": 100.0, "batches": 60, "expected_minutes": None, **more}
    )


def test_the_whole_run_is_foretold_with_what_is_spent():
    assert told() == TOLD
    assert told(expected_minutes=50) == TOLD, "twice as long is not yet far longer"
    assert told(step_s=200.0).startswith(
        "this run will take about 3.2 hours in all: 57 more steps of 200.0 s"
    )


def test_a_short_run_takes_a_minute():
    said = told(spent_s=15.0, step_s=1.0)
    assert said == "this run will take about a minute in all: 57 more steps of 1.0 s"


def test_a_far_longer_run_names_what_it_spends_its_time_on():
    said = told(expected_minutes=12)
    assert said.startswith(
        f"{TOLD}. It was written to take 12 minutes. Most of a step is train (80%): "
    )
    assert "student.dtype" in said
    assert said.endswith("; or lower run.batches")
    slow_teacher = {**ROW, "eopd_train_seconds": 10.0, "eopd_score_seconds": 60.0}
    assert "Most of a step is score (60%): raise teachers[].threads" in told(
        slow_teacher, expected_minutes=12
    )
