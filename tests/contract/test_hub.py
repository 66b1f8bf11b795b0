"""Models and data sets by name, found through ``huggingface_hub`` and ``datasets`` on a Hub of our
own. Each case is a process, since the libraries read their variables when they are imported.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from fake_hub import TOKEN, FakeHub, running

TINY = {
    "config.json": b'{"vocab_size": 7}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"s" * 1000,
    "pytorch_model.bin": b"b" * 1000,
    "onnx/model.onnx": b"o" * 1000,
    "README.md": b"tiny",
}
ROWS = b'{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n'
NEWER = b'{"prompt": "c", "answer": "3"}\n'
NO_COMMIT = "0" * 40
SECONDS = 10.0  # in which a missing network is told

# What each process does: a mistake of the user is one line, as the command line prints it.
PROGRAM = """
import json, sys, time
from eopd.config import ConfigError
from eopd.hub import model_directory
from eopd.hub.push import push, require_repository
from eopd.preflight import pin_model
from eopd.prompts.named import pin_data
from eopd.prompts import read_data

def rows(spec):
    return [row.columns["prompt"] for row in read_data(spec)]

def files(spec, weights):
    return sorted(file.name for file in model_directory(spec, weights=weights).iterdir())

started = time.monotonic()
try:
    said = eval(sys.argv[1])
except ConfigError as error:
    said = f"error: {error}"
print(json.dumps([said, time.monotonic() - started]))
"""


class Said(NamedTuple):
    """What a process answered, and the seconds it took after its imports."""

    value: object
    seconds: float


Ask = Callable[..., Said]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running() as hub:
        yield hub


@pytest.fixture
def ask(hub, tmp_path) -> Ask:
    """Evaluate an expression in a process of its own: ``ask("rows('org/rows')", HF_TOKEN="x")``."""

    def ask(expression: str, endpoint: str = "", **variables: str) -> Said:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {
            **kept,
            "NO_PROXY": "*",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_ENDPOINT": endpoint or hub.url,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **variables,
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, expression],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return Said(*json.loads(done.stdout.splitlines()[-1]))

    return ask


@pytest.fixture
def tiny(hub):
    hub.requests.clear()
    return hub.add("models", "org/tiny", TINY)


@pytest.fixture
def closed() -> str:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


PIN = "pin_model('student.model', 'org/tiny', {}, weights=True)"


def test_the_commit_is_pinned_and_found_again_after_the_branch_moved(hub, ask, tiny):
    first = tiny.refs["main"]
    assert ask(PIN).value == f"org/tiny@{first}"
    assert hub.downloads() == ["config.json", "model.safetensors", "tokenizer.json"]

    second = tiny.commit({**TINY, "config.json": b'{"vocab_size": 8}'})
    assert first != second
    hub.requests.clear()
    again = f"model_directory('org/tiny@{first}', weights=True).joinpath('config.json').read_text()"
    assert ask(again).value == '{"vocab_size": 7}'
    assert hub.requests == []
    assert ask(PIN).value == f"org/tiny@{second}"
    # what did not change is not fetched again
    assert hub.downloads() == ["config.json"]


def test_without_weights_configuration_and_tokenizer_are_downloaded(hub, ask, tiny):
    commit = tiny.refs["main"]
    found = ask(f"files('org/tiny@{commit}', weights=False)")
    assert found.value == ["config.json", "tokenizer.json"]
    assert hub.downloads() == ["config.json", "tokenizer.json"]
    found = ask(f"files('org/tiny@{commit}', weights=True)")
    assert found.value == ["config.json", "model.safetensors", "tokenizer.json"]


def test_tags_branches_and_commits_are_revisions(ask, tiny):
    first = tiny.refs["main"]
    tiny.refs["v1"] = first
    tiny.commit({**TINY, "tokenizer.json": b"[]"})
    for revision in ("v1", first):
        pin = f"pin_model('student.model', 'org/tiny@{revision}', {{}}, weights=False)"
        assert ask(pin).value == f"org/tiny@{first}"


@pytest.mark.slow
def test_a_filled_cache_is_enough_without_a_network(ask, tiny, closed):
    pinned = ask(PIN).value
    # nothing is asked of a commit, and the last answer stands for a name
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"endpoint": closed}):
        assert ask(PIN, **variables).value == pinned
        found = ask(f"files('{pinned}', weights=True)", **variables).value
        assert found == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.slow
def test_a_cache_with_half_a_model_is_told_without_a_network(ask, tiny, closed):
    small = "pin_model('student.model', 'org/tiny', {}, weights=False)"
    assert ask(small).value == f"org/tiny@{tiny.refs['main']}"
    offline = ask(PIN, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, and the cache " in str(offline.value)
    away = ask(PIN, endpoint=closed)
    assert "cannot be reached ([Errno 111] Connection refused), and the cache " in str(away.value)
    assert away.seconds < SECONDS


@pytest.mark.parametrize(
    "spec", ["org/tiny", pytest.param(f"org/tiny@{NO_COMMIT}", marks=pytest.mark.slow)]
)
def test_no_network_is_one_line_in_time(ask, tmp_path, closed, silent, spec):
    pin = f"pin_model('student.model', '{spec}', {{}}, weights=True)"
    refused = ask(pin, endpoint=closed)
    assert str(refused.value).startswith(
        f"error: student.model: {spec}: {closed} cannot be reached"
    )
    assert f"`hf download {spec.replace('@', ' --revision ')}`" in str(refused.value)

    mute = ask(pin, endpoint=silent)
    assert f"{spec}: {silent} cannot be reached (no answer in 6 s)" in str(mute.value)
    for said in (refused, mute):
        assert "\n" not in str(said.value)
        assert said.seconds < SECONDS
        # a misspelt path must not look like a fault of the network alone
        is_both = f"; nor is there a directory {tmp_path}/org/tiny" in str(said.value)
        assert is_both == ("@" not in spec)


def test_a_gated_model_says_where_to_ask(hub, ask):
    hub.add("models", "org/gated", TINY, gated=True)
    pin = "pin_model('teachers.big.model', 'org/gated', {}, weights=False)"
    stranger = str(ask(pin).value)
    assert stranger.startswith("error: teachers.big.model: org/gated@")
    assert f"is gated; accept its conditions at {hub.url}/org/gated, and set HF_TOKEN" in stranger
    assert "the token that is set (HF_TOKEN" in str(ask(pin, HF_TOKEN="hf_other").value)
    assert ask(pin, HF_TOKEN=TOKEN).value.startswith("org/gated@")


def test_a_missing_or_private_model_says_what_to_do(hub, ask, tmp_path):
    hub.add("models", "org/private", TINY, private=True)
    for name in ("org/private", "org/missing"):
        said = str(ask(f"pin_model('MODEL', '{name}', {{}}, weights=False)").value)
        told = f"error: MODEL: {name}: {hub.url} has no such model, or it is private; then set HF_TOKEN"
        assert said.startswith(told)
        assert said.endswith(f"; nor is there a directory {tmp_path}/{name}")

    pin = "pin_model('MODEL', 'org/private', {}, weights=False)"
    assert ask(pin, HF_TOKEN=TOKEN).value.startswith("org/private@")


@pytest.mark.parametrize("revision", ["v9", NO_COMMIT])
def test_a_missing_revision_is_named(ask, hub, tiny, revision):
    said = ask(f"pin_model('MODEL', 'org/tiny@{revision}', {{}}, weights=False)").value
    assert said == (
        f"error: MODEL: org/tiny@{revision}: org/tiny has no such revision; "
        f"{hub.url}/org/tiny/tree/main lists its branches"
    )


def test_what_is_no_model_is_refused(hub, ask):
    hub.add("models", "org/other", {"README.md": b"a demo"})
    said = str(ask("pin_model('MODEL', 'org/other', {}, weights=False)").value)
    assert "is no model of transformers (it has no config.json)" in said


# --- data sets


@pytest.fixture
def rows(hub):
    hub.requests.clear()
    return hub.add("datasets", "org/rows", {"README.md": b"# rows", "train.jsonl": ROWS})


def test_a_data_set_is_pinned_and_read_at_that_commit(hub, ask, rows):
    first = rows.refs["main"]
    pinned = f"org/rows@{first}:train"
    assert ask("pin_data('prompts.data', 'org/rows:train', {})").value == pinned
    second = rows.commit({"README.md": b"# rows", "train.jsonl": NEWER})
    assert ask(f"rows('{pinned}')").value == ["a", "b"]
    assert ask(f"rows('org/rows@{second}')").value == ["c"]
    hub.requests.clear()
    # the newest of the cache is the other one
    assert ask(f"rows('{pinned}')").value == ["a", "b"]
    assert hub.requests == []


@pytest.mark.slow
def test_a_pinned_data_set_needs_no_network_once_it_was_read(ask, rows, closed):
    pinned = f"org/rows@{rows.refs['main']}:train"
    assert ask("rows(pin_data('prompts.data', 'org/rows:train', {}))").value == ["a", "b"]
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"endpoint": closed}):
        assert ask("pin_data('prompts.data', 'org/rows:train', {})", **variables).value == pinned
        assert ask(f"rows('{pinned}')", **variables).value == ["a", "b"]


@pytest.mark.slow
def test_another_commit_in_the_cache_does_not_stand_for_the_pinned_one(ask, rows, closed):
    first = rows.refs["main"]
    second = rows.commit({"README.md": b"# rows", "train.jsonl": NEWER})
    assert ask(f"rows('org/rows@{second}:train')").value == ["c"]
    said = ask(f"rows('org/rows@{first}:train')", endpoint=closed)
    told = f"error: prompts.data: org/rows@{first}:train: {closed} cannot be reached"
    assert str(said.value).startswith(told)
    assert said.seconds < SECONDS


@pytest.mark.slow
def test_a_gated_data_set_is_told_whatever_the_cache_holds(ask, rows):
    first = rows.refs["main"]
    rows.gated = True
    said = str(ask(f"rows('org/rows@{first}:train')").value)
    assert said.startswith(f"error: prompts.data: data set org/rows@{first}:train cannot be loaded")
    assert "is a gated dataset on the Hub. You must be authenticated to access it" in said

    rows.gated = False
    second = rows.commit({"README.md": b"# rows", "train.jsonl": NEWER})
    assert ask(f"rows('org/rows@{second}:train')").value == ["c"]
    rows.gated = True
    # here the library would take the newest commit of its cache
    said = ask(f"rows('org/rows@{first}:train')").value
    told = f"the Hub did not send it; the cache has commit {second}"
    assert said == f"error: prompts.data: org/rows@{first}:train: {told}"
    assert ask(f"rows('org/rows@{first}:train')", HF_TOKEN=TOKEN).value == ["a", "b"]


def test_missing_data_sets_and_revisions_say_what_to_do(hub, ask, rows):
    said = ask("pin_data('prompts.data', 'org/none:train', {})").value
    told = f"error: prompts.data: org/none:train: {hub.url} has no such data set, or it is private;"
    assert str(said).startswith(told)
    said = ask("pin_data('prompts.data', 'org/rows@v9:train', {})").value
    assert str(said).startswith(
        "error: prompts.data: org/rows@v9:train: org/rows has no such revis"
    )


# --- uploads


@pytest.mark.parametrize(
    ("name", "variables", "told"),
    [
        ("student", {"HF_TOKEN": TOKEN}, "must be OWNER/NAME"),
        ("org/student@v1", {"HF_TOKEN": TOKEN}, "must be OWNER/NAME"),
        ("org/student", {}, "needs a token that may write; set HF_TOKEN, or log in with `hf auth "),
        ("org/student", {"HF_TOKEN": "hf_other"}, "does not let this token write there; "),
        ("org/student", {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_an_upload_that_may_not_be_is_refused_before_it_begins(hub, ask, name, variables, told):
    created = len(hub.created)
    said = str(ask(f"require_repository('{name}', public=False)", **variables).value)
    assert said.startswith(f"error: --push {name}: ")
    assert told in said
    assert len(hub.created) == created


def test_a_directory_is_uploaded_to_a_private_repository(hub, ask, tmp_path):
    exported = tmp_path / "exported"
    exported.mkdir()
    for file in ("config.json", "model.safetensors", "README.md"):
        (exported / file).write_bytes(TINY[file])

    token = {"HF_TOKEN": TOKEN}
    made = ask("require_repository('org/student', public=False)", **token).value
    assert made == f"made {hub.url}/org/student, private"
    assert hub.repositories["models", "org/student"].private

    sent = ask(f"push(__import__('pathlib').Path('{exported}'), 'org/student', 'x')", **token)
    assert sent.value == f"{hub.url}/org/student"
    repository = hub.repositories["models", "org/student"]
    assert repository.commits[repository.refs["main"]] == {
        file: TINY[file] for file in ("config.json", "model.safetensors", "README.md")
    }

    again = ask("require_repository('org/student', public=True)", **token).value
    assert again == f"{hub.url}/org/student is there, and stays as visible as it is"
    found = ask("pin_model('MODEL', 'org/student', {}, weights=True)", **token).value
    assert found == f"org/student@{repository.refs['main']}"


def test_a_public_repository_is_asked_for_by_name(hub, ask):
    made = ask("require_repository('org/open', public=True)", HF_TOKEN=TOKEN).value
    assert made == f"made {hub.url}/org/open, public"
    assert not hub.repositories["models", "org/open"].private


@pytest.mark.slow
def test_an_upload_that_breaks_says_how_to_send_it_again(ask, hub, closed, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = "__import__('pathlib').Path('.').absolute()"
    said = ask(f"push({path}, 'org/student', 'x')", endpoint=closed, HF_TOKEN=TOKEN).value
    assert str(said).startswith(f"error: --push org/student: {closed} cannot be reached")
    assert str(said).endswith(f"`hf upload org/student {tmp_path}` sends what was exported")
