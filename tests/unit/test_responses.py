"""Training responses that are kept, and how the terminal shows them."""

import asyncio
import io
import json

import fakes
import numpy as np
import pytest
import rich.console

from eopd.config import ConfigError, load_config
from eopd.evaluation.samples import response_record
from eopd.run.directory import RunDirectory
from eopd.runtime import responses as keeping
from eopd.runtime.responses import Responses, of_first_prompts
from eopd.telemetry.plain import visible
from eopd.telemetry.responses import print_responses, responses_of
from eopd.types import Exact, Header, Stored

ENTROPY = Exact(np.array([0.0, 0.5, 2.0], np.float32))


class Body:
    """The body of a trajectory, which is awaited as a reference of Ray's is."""

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return fakes.scored(ENTROPY)


def stored(prompt_id="p", sample_index=0, *, epoch=0, body=None):
    header = fakes.header(prompt_id, sample_index=sample_index, epoch=epoch)
    return Stored(header, body or Body())


def test_a_record_has_the_header_and_every_token_and_no_candidates():
    scored = fakes.scored(ENTROPY)
    header = Header.of(scored.trajectory, {"rollout_logprob": -1.75}, reward=0.5)
    record = response_record(header, scored, "What?", fakes.Strips())
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "epoch": 0,
        "sample_index": 0,
        "source": "s",
        "reward": 0.5,
        "stop_reason": "end_token",
        "versions": [0, 0],
        "sums": {"rollout_logprob": -1.75},
        "prompt_id": "p",
        "prompt": "What?",
        "response": "the sea",
        "teacher": "t",
        "ids": [1, 2, 0],
        "loss_mask": [1, 0, 1],
        "student_logprobs": [None, -1.25, -0.5],
        "teacher_logprobs": [-0.5, -1.25, None],
        "entropy_low": [0.0, 0.5, 2.0],
        "entropy_high": [0.0, 0.5, 2.0],
        "texts": {"0": "<end>", "1": " the", "2": " sea"},
    }


def test_all_samples_of_the_first_prompts_are_kept():
    batch = [stored("a"), stored("b"), stored("a", 1), stored("c"), stored("a", epoch=1)]
    assert of_first_prompts(batch, 2) == [batch[0], batch[1], batch[2]]
    assert of_first_prompts(batch, 9) == batch


# --- beside the loop


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes what keeps the responses of a run, and its directory."""
    monkeypatch.setattr(keeping, "load_tokenizer", lambda model: fakes.Strips())
    path = fakes.write_config(tmp_path)

    def made(responses="{every: 2, prompts: 1}"):
        config = load_config(path, [f"telemetry.responses={responses}"])
        directory = RunDirectory.create(config)
        return Responses(config, directory, {"p": "What?", "a": "Which?"}), directory

    return made


async def test_every_so_many_steps_are_kept(make):
    responses, directory = make()
    async with responses:
        for step in range(1, 5):
            responses.take(step, [stored(sample_index=step), stored("a")] if step % 2 == 0 else [])
            await asyncio.sleep(0.05)

    rows = fakes.read_rows(directory.responses)
    assert [(row["step"], row["sample_index"], row["prompt"]) for row in rows] == [
        (2, 2, "What?"),
        (4, 4, "What?"),
    ]


async def test_nothing_is_kept_unless_asked_for(make):
    responses, directory = make("null")
    async with responses:
        responses.take(2, [])

    assert not directory.responses.exists()


async def test_the_end_of_the_loop_waits_for_a_body(make):
    responses, directory = make()
    body = asyncio.get_running_loop().create_future()
    async with responses:
        responses.take(2, [stored(body=body)])
        asyncio.get_running_loop().call_later(
            0.05,
            body.set_result,
            fakes.scored(ENTROPY),
        )

    assert [row["step"] for row in fakes.read_rows(directory.responses)] == [2]


async def test_a_loop_that_fails_gives_up_what_is_under_way(make):
    responses, directory = make()
    body = asyncio.get_running_loop().create_future()
    with pytest.raises(RuntimeError):
        async with asyncio.timeout(5.0), responses:
            responses.take(2, [stored(body=body)])
            await asyncio.sleep(0.01)
            raise RuntimeError("the learner was lost")

    assert body.cancelled()
    assert not directory.responses.exists()


async def test_a_step_is_passed_over_while_another_is_under_way(make):
    responses, directory = make()
    body = asyncio.get_running_loop().create_future()
    async with responses:
        responses.take(2, [stored(body=body)])
        responses.take(4, [stored("a")])
        body.set_result(fakes.scored(ENTROPY))

    assert [row["step"] for row in fakes.read_rows(directory.responses)] == [2]


async def test_a_failure_is_logged_and_ends_nothing(make, caplog):
    responses, directory = make()

    async def fails():
        raise OSError("no space")

    async with responses:
        responses.take(2, [stored(body=fails())])

    assert "the responses of step 2 were not kept" in caplog.text
    assert not directory.responses.exists()


def test_rows_after_a_checkpoint_are_dropped(make):
    _, directory = make()
    for step in (2, 4, 6):
        directory.add_responses(step, [{"prompt_id": "p"}, {"prompt_id": "a"}])

    directory.drop_rows_after(4)
    assert [row["step"] for row in fakes.read_rows(directory.responses)] == [2, 2, 4, 4]


# --- in the terminal


def row(step=2, prompt_id="p", **other):
    scored = fakes.scored(ENTROPY)
    header = Header.of(scored.trajectory, {}, reward=0.5)
    record = response_record(header, scored, "What?\x1b[31m", fakes.Strips())
    record = json.loads(json.dumps(record)) | {"student_logprobs": [-1.0, -1.25, -0.5]}
    return {"step": step, **record, "prompt_id": prompt_id, **other}


def shown(rows, *, terminal=False, **options):
    file = io.StringIO()
    colours = {"force_terminal": True, "color_system": "truecolor"} if terminal else {}
    output = rich.console.Console(file=file, width=80, highlight=False, **colours)
    print_responses(rows, output=output, **{"threshold": 0.8, **options})
    return file.getvalue()


def test_other_line_ends_are_marked_and_not_taken_for_broken_data():
    assert visible("a\u2028b\u2029c\x07") == "a\u21b5b\u21b5c\ufffd"


def test_a_pipe_gets_plain_text():
    rows = [
        row(),
        row(
            sample_index=1,
            reward=None,
            stop_reason="length",
        ),
        row(prompt_id="q"),
    ]
    head = "3 tokens, ended by itself, reward 0.5, reverse KL -0.500 nats, teacher entropy 1.000 nats, gate open 50%"
    assert shown(rows).splitlines() == [
        "",
        "step 2, prompt p",
        "What?\ufffd[31m",
        "",
        f"sample 0: {head}",
        " the sea<end>",
        "",
        f"sample 1: {head}".replace("ended by itself, reward 0.5", "cut by the length limit"),
        " the sea<end>",
        "",
        "step 2, prompt q",
        "What?\ufffd[31m",
        "",
        f"sample 0: {head}",
        " the sea<end>",
    ]


def test_a_terminal_gets_the_colours_of_the_report():
    text = shown([row()], terminal=True)
    # 2 nats: rgba(217, 95, 2, .47) over white, and the gate is open
    assert "\x1b[4;38;2;28;27;25;48;2;237;180;136m<end>\x1b[0m" in text
    assert "\x1b[2m sea\x1b[0m" in text  # not in the loss
    assert text.startswith("teacher entropy, nats:  up to 0.1 ")
    by_kl = shown([row()], terminal=True, shade="kl", threshold=None)
    # log p - log q is -0.5 and infinite: rgba(0, 103, 168, .16) and rgba(217, 95, 2, .75)
    assert "\x1b[38;2;28;27;25;48;2;214;231;241m the\x1b[0m" in by_kl
    assert "\x1b[38;2;28;27;25;48;2;226;135;65m<end>\x1b[0m" in by_kl
    assert "gate" not in by_kl


def test_the_newest_step_is_shown_or_the_one_that_is_named():
    rows = [row(2), row(4, "a"), row(4, "b"), {}, row(6, ids=[1]), {"step": 8}]
    assert responses_of(rows, step=None, prompt=None) == rows[1:3]
    assert responses_of(rows, step=2, prompt=None) == rows[:1]
    assert responses_of(rows, step=4, prompt="b") == rows[2:3]
    for options, message in (
        ({"step": 3, "prompt": None}, "--step 3: there are responses of steps 2, 4"),
        ({"step": None, "prompt": "c"}, "--prompt c: step 4 has responses to a, b"),
    ):
        with pytest.raises(ConfigError) as caught:
            responses_of(rows, **options)

        assert str(caught.value) == message


def test_the_command_says_what_is_missing(eopd, tmp_path):
    path = fakes.write_config(tmp_path)
    directory = RunDirectory.create(load_config(path))
    done = eopd("show", directory.path)
    assert (done.code, done.out) == (2, "")
    assert (
        "keeps no responses; set telemetry.responses: {every: 10}, also with --resume" in done.err
    )

    directory = RunDirectory.create(load_config(path, ["telemetry.responses={every: 5}"]))
    done = eopd("show", directory.path)
    assert "has kept no responses yet; it keeps those of every 5th step" in done.err
    directory.responses.write_text("half a row")
    assert "error: responses.jsonl holds no whole row" in eopd("show", directory.path).err
    directory.responses.write_text(json.dumps(row()) + "\n")
    done = eopd("show", directory.path, "--step", "2", "--prompt", "p", "--by", "kl")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == " the sea<end>"
    assert (
        "error: --step 7: there are responses of steps 2"
        in eopd("show", directory.path, "--step", 7).err
    )
