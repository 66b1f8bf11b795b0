"""The runs of a sweep are the product of its grids and its seeds."""

import fakes
import pytest

from eopd.config import ConfigError
from eopd.run.grid import plan_runs, read_grids, read_seeds


@pytest.fixture
def path(tmp_path):
    return fakes.write_config(tmp_path, more="learner: {token_budget: 9000}")


def refusal(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)

    return str(caught.value)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("a.b=hard,never", ["hard", "never"]),
        ("a.b=1e-5", ["1e-5"]),
        ("a.b={kind: hard, tau: 0.5}, never", ["{kind: hard, tau: 0.5}", "never"]),
        ("a.b=[1, 2],[3]", ["[1, 2]", "[3]"]),
        ("a.b='x,y',\"z]\"", ["'x,y'", '"z]"']),
        ("a.b=it's, plain", ["it's", "plain"]),
        ("a.b=x=y,z", ["x=y", "z"]),
        ("a.b=null,true", ["null", "true"]),
    ],
)
def test_values_are_split_at_the_commas_between_them(option, values):
    assert read_grids([option]) == {"a.b": values}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a.b"], "--grid a.b: must be section.key=value,value"),
        (["=1"], "--grid =1: must be section.key=value,value"),
        (["a.b="], "--grid a.b=: names no value; write a.b=value,value"),
        (["a.b= "], "--grid a.b= : names no value; write a.b=value,value"),
        (["a.b=1,"], "--grid a.b=1,: ends with a comma: a value is missing"),
        (["a.b=1,2,1"], "--grid a.b=1,2,1: the value 1 stands twice"),
        (["a.b=1", "a.b=2"], "--grid a.b=2: a.b stands twice; write all values in one"),
        (["a.b=1] #"], "--grid a.b=1] #: ends at #, where a comment of YAML begins"),
        (["c.d=1"], "--grid c.d=1: c.d is in --set too; remove one of the two"),
        (["c=1"], "--grid c=1: its values replace all of c, so that c.d would be lost; write it"),
        (["a.b=1", "a=2"], "--grid a=2: its values replace all of a, so that a.b would be lost"),
        (["run.seed=1,2"], "--grid run.seed=1,2: name seeds with --seeds"),
        (["run.name=a,b"], "--grid run.name=a,b: runs are named after their arm and seed"),
    ],
)
def test_a_wrong_grid_is_one_message(options, message):
    assert refusal(read_grids, options, ["c.d=1"]).startswith(message)


def test_a_key_below_what_is_set_keeps_the_rest():
    assert read_grids(["a.b.c=1,2", "c.dd=3"], ["a.b=1", "c.d=1"]) == {
        "a.b.c": ["1", "2"],
        "c.dd": ["3"],
    }


@pytest.mark.parametrize("option", ["a.b=1,,2", "a.b=,1", "a.b=[1", "a.b=1],[2", "a.b='x"])
def test_a_grid_that_is_no_yaml_is_one_message(option):
    assert refusal(read_grids, [option]).startswith(f"--grid {option}: is not YAML: ")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0..4", [0, 1, 2, 3, 4]), ("3", [3]), ("7, 1", [7, 1]), ("0..1,5..6", [0, 1, 5, 6])],
)
def test_seeds_are_numbers_and_ranges_with_both_ends(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--seeds : must be such as 0..4 or 0,1,7 (has '')"),
        ("1,", "--seeds 1,: must be such as 0..4 or 0,1,7 (has '')"),
        ("0...4", "--seeds 0...4: must be such as 0..4 or 0,1,7 (has '0...4')"),
        ("-1", "--seeds -1: must be such as 0..4 or 0,1,7 (has '-1')"),
        ("9" * 21, f"--seeds {'9' * 21}: must be such as 0..4 or 0,1,7 (has '{'9' * 21}')"),
        ("4..0", "--seeds 4..0: the range 4..0 falls; write 0..4"),
        ("0..2,1", "--seeds 0..2,1: the seed 1 stands twice"),
        ("0..99999999999", "--seeds 0..99999999999: names more than 1000 seeds"),
    ],
)
def test_wrong_seeds_are_one_message(text, message):
    assert refusal(read_seeds, text) == message


def test_runs_are_the_product_of_grids_and_seeds(path, tmp_path):
    grids = read_grids(["learner.lr=1e-5,3e-5", "loss.gate=hard,never"])
    directory, runs = plan_runs(path, ["run.batches=7"], grids, [4, 5])
    assert directory == tmp_path / "runs" / "r-sweep"
    assert [run.name for run in runs[:4]] == [
        "lr-1e-5_gate-hard-seed-4",
        "lr-1e-5_gate-never-seed-4",
        "lr-3e-5_gate-hard-seed-4",
        "lr-3e-5_gate-never-seed-4",
    ]
    settings = [
        (run.config.learner.lr, run.config.loss.gate.kind, run.config.run.seed) for run in runs
    ]
    assert settings == [
        (lr, gate, seed) for seed in (4, 5) for lr in (1e-5, 3e-5) for gate in ("hard", "never")
    ]
    assert {run.config.run.directory for run in runs} == {directory}
    assert {run.config.run.batches for run in runs} == {7}
    assert runs[-1].arm == "learner.lr=3e-5, loss.gate=never"


def test_runs_are_uploaded_below_the_name_of_their_sweep(path):
    _, (run,) = plan_runs(path, ["run.upload=s3://bucket/runs/"], {}, None, "mine")
    assert run.config.run.upload == "s3://bucket/runs/mine"


def test_without_grids_and_seeds_there_is_one_run(path, tmp_path):
    directory, (run,) = plan_runs(path, ["run.seed=3"], {}, None, "mine")
    assert directory == tmp_path / "runs" / "mine"
    assert (run.name, run.arm, run.config.run.seed) == ("seed-3", "", 3)


def test_values_that_fit_no_name_are_told_apart_by_a_checksum(path):
    grids = read_grids(["prompts.suffix='a b','a-b'", "student.model=/x/y,/x-y"])
    names = [run.name for run in plan_runs(path, [], grids)[1]]
    assert len(set(names)) == 4
    assert all(name.startswith("suffix-a-b-") for name in names)


def test_keys_that_end_alike_are_written_out(path):
    grids = read_grids(["rollout.threads=1,2", "learner.threads=1"])
    assert (
        plan_runs(
            path,
            [],
            grids,
        )[1][0].name
        == "rollout.threads-1_learner.threads-1-seed-0"
    )


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("learner.lrr=1,2", "arm learner.lrr=1: "),
        ("learner.lr=1e-5,fast", "arm learner.lr=fast: "),
        ("learner.lr.x=1", "--grid learner.lr.x=1: "),
        ("learner.lr=1e-5,0.00001", "--grid: the arms learner.lr=1e-5 and learner.lr=0.00001 are"),
        (
            "loss.gate=hard,{kind: hard}",
            "--grid: the arms loss.gate=hard and loss.gate={kind: hard",
        ),
        ("telemetry.port=1,2", "--grid: the arms telemetry.port=1 and telemetry.port=2 are the"),
    ],
)
def test_an_arm_that_is_wrong_or_no_other_is_named(path, grid, message):
    found = refusal(
        plan_runs,
        path,
        ["learner.lr=1e-4"] if "x" in grid else [],
        read_grids([grid]),
    )
    assert found.startswith(message), found


def test_a_seed_and_a_name_have_bounds(path):
    assert refusal(plan_runs, path, [], {}, [2**64]).startswith("--seeds: ")
    assert refusal(
        plan_runs,
        path,
        [],
        {},
        None,
        "a/b",
    ).startswith("--name a/b: must be letters")
    many = {f"rollout.vllm.{'x' * 40}{number}": ["1"] for number in range(6)}
    assert refusal(plan_runs, path, [], many).startswith("the name of a run: ")
