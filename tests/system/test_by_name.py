"""A run whose models and data are names of a Hub: trained, continued after the branches have moved,
exported and uploaded there.
"""

import json

import pytest
from fake_hub import TOKEN, FakeHub, running
from program import ROOT, Program, read_rows

from eopd.config import load_config

pytestmark = pytest.mark.slow

SETTINGS = [
    "student.model=org/student",
    "teachers.0.model=org/teacher@main",
    "prompts.data=org/rows:train",
    "rollout.engines=1",
    "learner.ranks=1",
    "checkpoint.every=1",
    "evaluation.prompts=4",
]


@pytest.fixture(scope="module")
def hub(program, tmp_path_factory) -> FakeHub:
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


def commits(hub: FakeHub) -> list[str]:
    kinds = ("models", "org/student"), ("models", "org/teacher"), ("datasets", "org/rows")
    return [hub.repositories[kind].refs["main"] for kind in kinds]


def train(program: Program, batches: int, *options: str) -> str:
    settings = [*SETTINGS, f"run.batches={batches}"]
    done = program.run(*program.train("by_name", *settings), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_by_name_goes_on_at_its_commits_and_is_uploaded(program, hub, monkeypatch):
    first, directory = commits(hub), program.runs / "by_name"
    train(program, 1)
    config = load_config(directory / "config.yaml")
    student, teacher, data = first
    assert config.student.model == f"org/student@{student}"
    assert config.teachers[0].model == f"org/teacher@{teacher}"
    assert [part.data for part in config.prompts.data] == [f"org/rows@{data}:train"]

    # all branches move, to what could not be trained; that of the teacher, which the config
    # names, is looked up again
    for (_, name), repository in hub.repositories.items():
        files = repository.commits[repository.refs["main"]]
        broken = {"config.json": b"{}", "train.jsonl": b""} if name != "org/teacher" else {}
        repository.commit({**files, "README.md": b"newer", **broken})

    hub.requests.clear()
    out = train(program, 2, "--resume")
    assert hub.downloads() == []
    newer = f"org/teacher@{commits(hub)[1]}"
    told = f"from step 2: teachers.teacher.model org/teacher@{teacher} -> {newer}"
    assert told in out.replace("\n", "")
    config = load_config(directory / "config.yaml")
    assert config.student.model == f"org/student@{student}"
    assert config.teachers[0].model == newer
    assert [part.data for part in config.prompts.data] == [f"org/rows@{data}:train"]
    assert [row["step"] for row in read_rows(directory / "metrics.jsonl")] == [1, 2]

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
    assert f"| teacher | {newer} |" in card
    assert f"{after['reverse_kl']['mean']:.4f} ±" in card
    assert str(program.models) not in card


def test_an_evaluation_names_the_commits_that_it_read(program, hub):
    row = json.dumps({"prompt": "What is 3 + 4?", "answer": "7"}).encode()
    hub.add("datasets", "org/sums", {"README.md": b"# sums", "train.jsonl": row})
    names = ("models", "org/teacher"), ("datasets", "org/sums")
    model, data = (hub.repositories[name].refs["main"] for name in names)
    options = ("--n", "2", "--max-response-tokens", "4", "--dtype", "float32", "--json")
    done = program.run("eval", "org/teacher", "org/sums:train", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["settings"]["model"], found["settings"]["data"]) == (
        "org/teacher",
        "org/sums:train",
    )
    assert found["pinned"] == {
        "model": f"org/teacher@{model}",
        "data": f"org/sums@{data}:train",
    }
    assert list(found["pass_at_k"]) == ["1", "2"]
