"""A run of which this machine has nothing: its models and data are names of a Hub, its checkpoints
go to S3. Its driver is killed while it uploads, its directory is gone, the branches of the Hub move,
and the store is away when it ends. It is the same to the token, and is sent to the Hub at last.
"""

import json
import shutil
import signal
import threading

import pytest
from fake_hub import TOKEN, FakeHub, running
from program import ROOT, Run, read_rows
from store import BUCKET, open_store

from eopd.config import Config, load_config
from eopd.run.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow

NAME = "elsewhere"
THERE = f"s3://{BUCKET}/runs/{NAME}"
SETTINGS = (
    "student.model=org/student",
    "teachers.0.model=org/teacher@main",
    "prompts.data=org/rows:train",
    f"run.upload=s3://{BUCKET}/runs",
    "rollout.engines=1",
    "evaluation.prompts=8",
)
REPOSITORIES = ("models", "org/student"), ("models", "org/teacher"), ("datasets", "org/rows")
COMPARED = 15  # steps, of which five were trained again


@pytest.fixture(scope="module")
def hub(program, tmp_path_factory):
    """A Hub that holds the tiny pair and the demo's prompts; its address is in the environment."""
    with running() as hub, pytest.MonkeyPatch.context() as patch:
        for name in ("student", "teacher"):
            files = [path for path in (program.models / name).rglob("*") if path.is_file()]
            hub.add(
                "models",
                f"org/{name}",
                {str(path.relative_to(program.models / name)): path.read_bytes() for path in files},
            )

        rows = (ROOT / "configs/prompts/demo_train.jsonl").read_bytes()
        hub.add("datasets", "org/rows", {"README.md": b"# rows", "train.jsonl": rows})
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.fixture(scope="module")
def store():
    with open_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)

        yield store


def commits(hub: FakeHub) -> list[str]:
    return [hub.repositories[kind].refs["main"] for kind in REPOSITORIES]


def names_in(config: Config) -> list[str]:
    (rows,) = config.prompts.data
    return [str(config.student.model), str(config.teachers[0].model), rows.data]


@pytest.fixture(scope="module")
def killed(program, hub, store):
    """A driver killed while it uploads the second file of step 20, and its directory removed."""
    under_way, gone, first = threading.Event(), threading.Event(), set()

    def look(method, path):
        if method != "PUT" or "step-000020/learner" not in path:
            return

        first.add(path)
        if len(first) > 1:
            under_way.set()
            gone.wait(60)

    store.before = look
    run = Run(program, NAME, *SETTINGS)
    assert under_way.wait(300), run.log.read_text()[-3000:]
    run.process.kill()
    run.process.wait()
    store.before = lambda method, path: None
    gone.set()
    assert program.left_behind(grace_s=60) == []

    trained = read_rows(run.directory / "trained.jsonl")
    config = load_config(run.directory / "config.yaml")
    shutil.rmtree(run.directory)
    return trained, config


@pytest.fixture(scope="module")
def moved(hub, killed):
    """The commits that the run has begun with. All branches move to what could not be trained, but
    for the teacher's, which the config names: that one is looked up again.
    """
    began_with = commits(hub)
    for kind in REPOSITORIES:
        repository = hub.repositories[kind]
        files = repository.commits[repository.refs["main"]]
        broken = {"config.json": b"{}", "train.jsonl": b""} if kind[1] != "org/teacher" else {}
        repository.commit({**files, "README.md": b"newer", **broken})

    hub.requests.clear()
    return began_with


@pytest.fixture(scope="module")
def resumed(program, store, killed, moved):
    """It goes on to its end, which the store does not see: somebody ends the wait for it."""
    assert store.whole_steps(f"runs/{NAME}") == [10]
    run = Run(program, NAME, *SETTINGS, options=["--resume", "auto"])
    run.wait(lambda row: row.get("eopd_uploaded_step") == 20)
    store.stop()
    try:
        run.says("Ctrl-C ends the wait", after=0)
        run.process.send_signal(signal.SIGINT)
        said = run.ended(0)
    finally:
        store.start()

    return run.directory, said


def test_names_are_pinned_to_their_commits(killed, moved):
    student, teacher, rows = moved
    names = [f"org/student@{student}", f"org/teacher@{teacher}", f"org/rows@{rows}:train"]
    assert names_in(killed[1]) == names


def test_it_is_restored_and_says_so(resumed):
    said = resumed[1].replace("\n", "")
    assert f"from {THERE}: step-000010, " in said
    assert f"passing over {THERE}/checkpoints/step-000020: manifest.json is missing" in said
    assert f"restored from {THERE}, up to step 10" in said
    assert "which did not leave in order" in said


def test_it_goes_on_at_its_commits(resumed, hub, moved):
    directory, said = resumed
    assert hub.downloads() == []
    student, teacher, rows = moved
    newer = f"org/teacher@{commits(hub)[1]}"
    told = f"from step 11: teachers.teacher.model org/teacher@{teacher} -> {newer}"
    assert told in said.replace("\n", "")
    names = [f"org/student@{student}", newer, f"org/rows@{rows}:train"]
    assert names_in(load_config(directory / "config.yaml")) == names


def test_it_trains_every_number_once_and_the_same_tokens(resumed, killed):
    trained = read_rows(resumed[0] / "trained.jsonl")
    assert [row["step"] for row in trained] == list(range(1, 31))
    issues = [issue for row in trained for issue in row["issues"]]
    assert issues == list(range(8 * 30))
    assert trained[:COMPARED] == killed[0][:COMPARED]


def test_a_store_that_is_gone_at_the_end_is_a_warning(resumed, store):
    directory, said = resumed
    assert "trying again" in said
    assert "warning: run.upload: not up at " in said
    assert "--resume auto uploads it" in said
    assert json.loads((directory / "summary.json").read_text())["status"] == "completed"
    assert f"runs/{NAME}/hf/config.json" not in store.objects()


def test_all_of_it_is_there_once_the_store_is_back(program, resumed, store):
    directory, _ = resumed
    done = program.run(*program.train(NAME, *SETTINGS), "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    here = [path.name for path in list_checkpoints(directory / "checkpoints")]
    assert here == ["step-000020", "step-000030"]
    assert store.whole_steps(f"runs/{NAME}") == [20, 30]
    objects = store.objects()
    names = ["config.yaml", "metrics.jsonl", "report.html", "summary.json", "trained.jsonl"]
    names += [f"hf/{path.name}" for path in (directory / "hf").iterdir()]
    for name in names:
        assert objects[f"runs/{NAME}/{name}"] == (directory / name).read_bytes(), name


def test_it_is_exported_to_the_hub(program, resumed, hub, monkeypatch):
    directory, _ = resumed
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = program.run("export", str(directory), "--push", "org/made")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"made {hub.url}/org/made, private" in done.stderr
    made = hub.repositories["models", "org/made"]
    sent = made.commits[made.refs["main"]]
    assert sent["model.safetensors"] == (directory / "hf" / "model.safetensors").read_bytes()

    card = sent["README.md"].decode()
    after = json.loads((directory / "summary.json").read_text())["held_out"]["after"]
    assert "base_model: org/student\n" in card
    assert f"| teacher | org/teacher@{commits(hub)[1]} |" in card
    assert f"{after['reverse_kl']['mean']:.4f} ±" in card
    assert str(program.models) not in card


def test_an_evaluation_names_the_commits_that_it_read(program, hub, moved, tmp_path):
    rows = (ROOT / "configs/prompts/arithmetic.jsonl").read_bytes()
    hub.add("datasets", "org/sums", {"README.md": b"# sums", "train.jsonl": rows})
    names = ("models", "org/teacher"), ("datasets", "org/sums")
    model, data = (hub.repositories[name].refs["main"] for name in names)
    answers = tmp_path / "answers.jsonl"
    done = program.run(
        "eval",
        "org/teacher",
        "org/sums:train",
        *("--n", "2", "--k", "2", "--grader", "math", "--max-response-tokens", "16"),
        *("--stop", "e", "--top-p", "0.9", "--vllm", "max_num_seqs=8"),
        *("--dtype", "float32", "--threads", "1", "--output", str(answers), "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    settings = found["settings"]
    assert (settings["model"], settings["data"]) == ("org/teacher", "org/sums:train")
    assert found["pinned"] == {
        "model": f"org/teacher@{model}",
        "data": f"org/sums@{data}:train",
    }
    assert list(found["pass_at_k"]) == ["2"]

    written = read_rows(answers)
    responses = [answer["response"] for row in written for answer in row["answers"]]
    assert (len(written), len(responses)) == (40, 80)
    assert not any("e" in response for response in responses)
