"""Bad input: one message that names the key, exit code 2, no traceback, before any worker
starts.
"""

import asyncio
import inspect
import json
import re
import shutil
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fakes
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from eopd.cli.evaluate import evaluate as evaluate_command
from eopd.cli.like import settings_of
from eopd.cli.scores import score_lines, score_record
from eopd.config import (
    ConfigError,
    PromptsConfig,
    RolloutConfig,
    StudentConfig,
    dump_config,
    load_config,
)
from eopd.evaluation.benchmarks import Answer, BenchmarkResult, PromptResult
from eopd.models.tiny import build_model, train_tokenizer, write_model
from eopd.rewards.verdict import Verdict
from eopd.roles import LearnerDownError
from eopd.run.changes import changes
from eopd.run.directory import RunDirectory
from eopd.run.record import Summary
from eopd.run.storage import StorageError
from eopd.runtime import evaluate, measure
from eopd.types import RunFailedError, StopReason


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    tokenizer = train_tokenizer(["a few words to cut into pieces"], 270)
    other = train_tokenizer(["entirely different text, and more of it"], 280)
    write_model(
        root / "model",
        build_model("qwen3", tokenizer, seed=0, layers=1),
        tokenizer,
    )
    write_model(root / "other", build_model("qwen3", other, seed=0, layers=1), other)
    words = Tokenizer(WordLevel({"<eos>": 0, "few": 1, "words": 2}, unk_token="<eos>"))
    small = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<eos>",
        bos_token="<eos>",
        pad_token="<eos>",
    )
    write_model(root / "small", build_model("qwen3", small, seed=0, layers=1), small)
    (root / "empty.jsonl").write_text("\n")
    fakes.write_whole_config(root, root / "model", batches=1, flow="{batch_prompts: 1}")

    return root


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "rollout.engine=2",
            "error: {root}/c.yaml: rollout.engine: unknown key; did you mean engines?",
        ),
        ("student.model={root}/no", "error: student.model: there is no directory {root}/no;"),
        (
            "teachers.0.model={root}/no",
            "error: teachers.teacher.model: there is no directory {root}/no;",
        ),
        (
            "prompts.data={root}/no.jsonl",
            "error: prompts.data: {root}/no.jsonl cannot be read (No such file or ",
        ),
        (
            "prompts.held_out={root}/empty.jsonl",
            "error: prompts.held_out: {root}/empty.jsonl has no rows",
        ),
        (
            "prompts.max_tokens=3",
            "longer than prompts.max_tokens 3; this is the longest, with 26 tokens: shorten what ",
        ),
        (
            "learner.token_budget=64",
            "learner.token_budget: 64 is below prompts.max_tokens + rollout.max_response_tokens = 204",
        ),
        ("teachers.0.model={root}/other", "{root}/other"),
        (
            "student.model={root}/small teachers.0.model={root}/small loss.top_k=4",
            "error: loss.top_k: 4 is larger than the vocabulary of 3 tokens",
        ),
        (
            "student.model={root}/small teachers.0.model={root}/small loss.top_k=2",
            "error: prompts.template: chat, but the tokenizer has no chat template; set it to none",
        ),
        (
            "prompts.max_tokens=3000 learner.token_budget=9000",
            "{root}/model has 2048 positions; prompts.max_tokens + ",
        ),
        (
            "student.lora.target_modules=q_prj",
            "error: student.lora.target_modules: 'q_prj' matches no layer of "
            "Qwen3ForCausalLM; its linear ",
        ),
        ("loss.top_k=300", "loss.top_k: must be a whole number from 1 to 256 (is 300)"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(eopd, files, overrides, message):
    options = []
    for override in overrides.format(root=files).split():
        options += ["--set", override]

    done = eopd("train", files / "c.yaml", *options)
    assert done.code == 2
    assert message.format(root=files) in done.err
    assert "Traceback" not in done.err
    assert not (files / "runs").exists()


def test_a_config_is_printed_with_every_default_and_loads_again(eopd, files, tmp_path):
    override = "loss.gate=always"
    done = eopd("config", "show", files / "c.yaml", "--plain", "--set", override)
    assert done.code == 0
    assert "max_skipped_steps: 3\n" in done.out
    whole = tmp_path / "whole.yaml"
    whole.write_text(done.out)
    assert load_config(whole) == load_config(files / "c.yaml", [override])


@pytest.mark.parametrize("verb", ["train", "check", "config show"])
def test_help_gives_an_example_of_an_override(eopd, verb):
    done = eopd(*verb.split(), "-h")
    shown = " ".join(done.out.split())
    assert done.code == 0
    assert "--set learner.lr=1e-5" in shown
    assert "docs/configuration-reference.md" in shown


def test_options_of_eval_have_the_bounds_of_their_keys(eopd):
    done = eopd("eval", "model", "rows.jsonl", "--threads", "1000", "--gpus", "1.5")
    assert done.code == 2
    assert done.err == (
        "error: --gpus: 1.5 is neither a whole number of GPUs nor, below 1, a share of one\n"
        "--threads: must be a whole number from 1 to 512 (is 1000)\n"
    )


@pytest.fixture
def run(files, tmp_path):
    """A run directory with checkpoints of steps 2 and 10, one that lost a file, and one that
    was never finished.
    """
    directory = tmp_path / "run"
    for step in (2, 10, 11):
        state = fakes.driver_state(step)
        asyncio.run(fakes.save_checkpoint(directory / "checkpoints", state))

    (directory / "checkpoints" / "step-000011" / "state.json").unlink()
    (directory / "checkpoints" / ".step-000012.partial").mkdir()
    shutil.copy(files / "c.yaml", directory / "config.yaml")
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    shutil.copy(files / "c.yaml", tmp_path / "new" / "config.yaml")
    (directory / "hf-step-000010").mkdir()

    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{root}/no", "error: {root}/no holds no run (it has no config.yaml)"),
        ("{root}/empty", "error: {root}/empty holds no run (it has no config.yaml)"),
        ("{root}/new", "error: {root}/new holds no checkpoint"),
        ("{root}/run --step 7", "error: --step 7: {root}/run has checkpoints of step 2, 10 only"),
        (
            "{root}/run --step 11",
            "error: --step 11: {root}/run/checkpoints/step-000011 is not whole: state.json "
            "is missing",
        ),
        (
            "{root}/run --best --step 2",
            "error: --best, --step 2: only one can say which checkpoint it is",
        ),
        (
            "{root}/run --best",
            "error: --best: {root}/run keeps no best (checkpoint.keep_best is null)",
        ),
        ("{root}/run --step 12", "error: --step 12: {root}/run has checkpoints of step 2, 10 only"),
        (
            "{root}/run",
            "passing over {root}/run/checkpoints/step-000011: state.json is missing; "
            "the newest that is whole is step-000010\n"
            "error: --output {root}/run/hf-step-000010: exists; remove it or name another",
        ),
        (
            "{root}/run --step 2 --output {root}/empty",
            "error: --output {root}/empty: exists; remove it or name another",
        ),
        (
            "{root}/run --step 2 --output {root}/" + "x" * 256,
            "error: --output {root}/" + "x" * 256 + ": File name too long",
        ),
        (
            "{root}/run --step 2 --output {root}/" + "x" * 256 + "/a",
            "error: --output {root}/" + "x" * 256 + "/a: File name too long",
        ),
        (
            "{root}/run --step 2 --output {root}/a/b",
            "error: --output {root}/a/b: there is no directory {root}/a",
        ),
    ],
)
def test_a_mistaken_export_is_one_message_and_writes_nothing(eopd, run, arguments, message):
    before = sorted(run.rglob("*"))
    done = eopd("export", *arguments.format(root=run).split())
    assert done.code == 2
    assert done.err == message.format(root=run) + "\n"
    assert sorted(run.rglob("*")) == before


def test_a_disk_that_takes_no_more_is_one_message(eopd, run, monkeypatch):
    def full(*arguments, **options):
        raise StorageError(
            "here could not be written: [Errno 28] No space left on device; "
            "0 bytes were free there."
        )

    monkeypatch.setattr("eopd.runtime.train.train", full)
    done = eopd("train", run / "run" / "config.yaml")
    assert done.code == 1
    message = "error: here could not be written: [Errno 28] No space left on device; 0"
    assert done.err.startswith(message)


RAN = Summary(status="completed", steps=1, tokens=9, wall_s=1.0, tokens_per_s=1.0)


@pytest.fixture
def train(eopd, run, monkeypatch):
    """``eopd train`` with a run that does nothing: its exit code, what it was asked for, and
    what was shown.
    """
    file = run / "run" / "config.yaml"
    its_own = load_config(file, [f"run.directory={run}", "run.name=run"])
    file.write_text(dump_config(its_own))

    def command(arguments, status="completed", trained=True, error=None):
        asked = {}

        def pretended(config, *, say, **options):
            asked.update(options)
            if error is not None:
                raise error

            return replace(RAN, status=status), trained

        monkeypatch.setattr("eopd.runtime.train.train", pretended)
        config = str(file)
        done = eopd("train", *arguments.replace("CONFIG", config).split())
        shown = done.out + done.err
        return int(done.code or 0), asked, shown.replace(config, "CONFIG")

    return command


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ("CONFIG", {"resume": "no", "step": None}),
        ("CONFIG --resume", {"resume": "yes", "step": None}),
        ("--resume CONFIG", {"resume": "yes", "step": None}),
        ("CONFIG --resume --set run.batches=2", {"resume": "yes", "step": None}),
        ("CONFIG --resume auto", {"resume": "auto", "step": None}),
        ("--resume auto CONFIG", {"resume": "auto", "step": None}),
        ("CONFIG --resume=auto --set run.batches=2", {"resume": "auto", "step": None}),
        ("CONFIG --resume --step 7", {"resume": "yes", "step": 7}),
        ("CONFIG --step 7 --resume", {"resume": "yes", "step": 7}),
    ],
)
def test_resume_stands_alone_or_takes_auto(train, arguments, asked):
    assert train(arguments)[:2] == (0, asked)


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "auto"]])
def test_the_config_of_a_copy_does_not_continue_the_original(eopd, tmp_path, monkeypatch, resume):
    original = RunDirectory.create(load_config(fakes.write_config(tmp_path)))
    original.write_summary(RAN)
    monkeypatch.setattr("eopd.runtime.train.train", lambda config, **options: (RAN, True))

    more = ["--set", "run.batches=9"]
    assert eopd("train", original.path / "config.yaml", *resume, *more).code == 0

    copy = tmp_path / "copy"
    shutil.copytree(original.path, copy)
    words = ["train", copy / "config.yaml", *resume]
    done = eopd(*words, *more)
    assert done.code == 2
    assert f"{copy / 'config.yaml'} lies with a run that was copied or moved" in done.err
    places = [f"run.directory={tmp_path}", "run.name=copy"]
    assert f"--set {places[0]} --set {places[1]}" in done.err

    # who says where it is has thought of it
    assert eopd(*words, "--set", places[0], "--set", places[1]).code == 0
    assert eopd("train", copy / "config.yaml").code == 0, "another run may begin with it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("CONFIG --step 7", "error: --step 7: goes with --resume alone"),
        ("CONFIG --resume auto --step 7", "error: --step 7: goes with --resume alone"),
        ("CONFIG --resume often", "often"),
        ("CONFIG --resume=often", "error: --resume: 'often' is not one of 'no', 'yes', 'auto'"),
    ],
)
def test_a_mistaken_resume_is_exit_code_2(train, arguments, message):
    code, asked, shown = train(arguments)
    assert code == 2
    assert asked == {}
    assert message in shown


@pytest.mark.parametrize(
    "arguments",
    [
        "CONFIG --set run.batches=2",
        "--set run.batches=2 --resume --step 2 CONFIG",
    ],
)
def test_an_interrupted_run_says_what_continues_it(train, arguments):
    code, _, shown = train(arguments, status="interrupted")
    assert code == 130
    command = "eopd train CONFIG --set run.batches=2 --resume"
    assert shown.splitlines()[-1] == f"continue with: {command}"


def test_a_run_that_the_guard_has_ended_is_exit_code_1_and_is_not_to_be_continued(train):
    code, _, shown = train("CONFIG", status="collapsed")
    assert code == 1
    assert "continue with" not in shown
    assert "collapsed" in shown


def test_a_failed_run_says_what_continues_it(train):
    code, _, shown = train("CONFIG --set run.name=a", error=StorageError("full"))
    assert code == 1
    assert shown.splitlines() == [
        "continue with: eopd train CONFIG --set run.name=a --resume auto",
        "error: full",
    ]


def test_a_job_that_was_interrupted_is_to_be_submitted_again(train, run, tmp_path, monkeypatch):
    copy = tmp_path / "working_dir_files/_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    _, _, shown = train("CONFIG", status="interrupted")
    assert shown.splitlines()[-1] == ("continue with: this job, submitted again with --resume auto")
    (run / "sweep.json").write_text("{}")
    _, _, shown = train("CONFIG", status="interrupted")
    assert shown.splitlines()[-1] == "continue with: this job, submitted again"


def test_a_complete_run_says_so_and_is_exit_code_0(train, run):
    code, _, shown = train("CONFIG --resume auto", trained=False)
    assert code == 0
    complete = f"{run / 'run'} is complete: 1 of 1 steps"
    assert f"{complete}; raise run.batches to train it further" in shown


def test_the_status_of_a_run_that_was_killed_says_what_continues_it(eopd, run):
    directory = RunDirectory(run / "run")
    directory.write_summary(replace(RAN, status="running"))
    lines = eopd("status", directory.path).out.splitlines()
    assert lines[0] == "r: dead (the process that ran it is gone), step 0/1"
    # by the fixture, which has copied the config
    moved = f"--set run.directory={run} --set run.name=run"
    command = f"eopd train {directory.path}/config.yaml {moved} --resume"
    assert lines[-1] == f"continue with: {command}"


def test_the_status_of_a_job_that_is_gone_says_that_it_is_submitted_again(eopd, run):
    directory = RunDirectory(run / "run")
    directory.write_summary(replace(RAN, status="running"))
    config = directory.path / "config.yaml"
    copy = "/tmp/ray/runtime_resources/working_dir_files/_ray_pkg_1/x.jsonl"
    config.write_text(re.sub(r"\S+\.jsonl", copy, config.read_text()))
    lines = eopd("status", directory.path).out.splitlines()
    assert lines[-1] == "continue with: this job, submitted again with --resume auto"
    (run / "sweep.json").write_text("{}")
    lines = eopd("status", directory.path).out.splitlines()
    assert lines[-1] == "continue with: this job, submitted again"


def test_an_export_needs_the_student_that_was_trained(eopd, run, files):
    config = run / "run" / "config.yaml"
    student = f"student: {{model: {files}/model}}"
    text = config.read_text()
    config.write_text(text.replace(student, "student: {model: /gone}"))
    done = eopd("export", run / "run", "--step", "2")
    assert done.code == 2
    assert "error: student.model: there is no directory /gone;" in done.err
    moved = f"student.model={files / 'model'}"
    done = eopd("export", run / "run", "--step", "2", "--set", moved)
    assert "student.model" not in done.err


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"prompt": "few", "answer": 1}, {"prompt": "words", "id": "x"}],
            [],
            'error: DATA: {root}/graded.jsonl:2 (id "x"): has no `answer`, '
            "so that nothing can be graded; ",
        ),
        ([{"question": "few"}], [], "error: DATA: {root}/graded.jsonl:1: needs either `prompt`"),
        (
            [],
            ["--template-options", "["],
            "error: --template-options [: must be a YAML mapping, e.g. {{enable_",
        ),
        (
            [],
            ["--template-options", "yes"],
            "error: --template-options yes: must be a YAML mapping, e.g. {{enable_",
        ),
        (
            [],
            ["--template-options", "tools: 1"],
            "error: --template-options.tools: cannot be set here",
        ),
        ([], ["--k", "9"], "error: --k 9: must be between 1 and --n 8"),
        (
            [{"prompt": "few", "answer": " "}],
            ["--grader", "math"],
            "error: DATA: {root}/graded.jsonl:1: answer: the grader math can read nothing "
            "in it: ' '",
        ),
        (
            [],
            ["--template-options", "{{a: 1, a: 2}}"],
            "error: --template-options {{a: 1, a: 2}}: must be a YAML mapping, e.g. "
            "{{enable_thinking: false}}; this a stands twice",
        ),
        (
            [],
            ["--template-options", "a: no"],
            "error: --template-options.a: no is false in YAML 1.1 and text in YAML",
        ),
        (
            [],
            ["--output", "{root}"],
            "error: --output {root}: cannot be written (Is a directory); name a file",
        ),
        (
            [],
            ["--output", "{root}/no/x"],
            "error: --output {root}/no/x: there is no directory {root}/no",
        ),
        ([], ["--output", "/proc/x"], "error: --output /proc/x: cannot be written ("),
        (
            [],
            ["--output", "{root}/" + "x" * 300],
            "error: --output {root}/" + "x" * 300 + ": cannot be written (File name",
        ),
        (
            [],
            ["--max-prompt-tokens", "99999999"],
            "error: --max-prompt-tokens: must be a whole number from 1 to 10",
        ),
        (
            [],
            ["--gpus", "2"],
            "error: --gpus 2: an engine here has one GPU at most; write --engines 2 --gpus 1",
        ),
        ([], ["--suffix", "\boxed"], "error: --suffix: holds the control character "),
        ([], ["--top-p", "0"], "error: --top-p: must be a number above 0, at most 1 (is 0.0)"),
        (
            [],
            ["--top-p", "1.5"],
            "error: --top-p: must be a number above 0, at most 1 (is 1.5)",
        ),
        (
            [],
            ["--top-p", "nan"],
            "error: --top-p: must be a number above 0, at most 1 (is .nan)",
        ),
        (
            [],
            ["--stop", ""],
            "error: --stop: a text that ends a response has at least one character",
        ),
        (
            [{"prompt": "few", "answer": 1}],
            ["--vllm", "max_num_seq=4"],
            "error: --vllm.max_num_seq: unknown key; did you mean max_num_seqs?",
        ),
        ([], ["--vllm", "max_num_seqs: no"], "error: --vllm.max_num_seqs: no is false in YAML"),
        ([], ["--vllm", "dtype=float32"], "error: --vllm.dtype: cannot be set here: "),
        (
            [],
            ["--vllm", "max_num_seqs"],
            "error: --vllm max_num_seqs: must be a YAML mapping, e.g. {{max_num_seqs: 64}}",
        ),
        (
            [],
            ["--vllm", "max_num_seqs=["],
            "error: --vllm max_num_seqs=[: must be a YAML mapping, e.g. {{max_num_seqs: 64}}; this",
        ),
        (
            [],
            ["--vllm", "tensor_parallel_size=2", "--gpus", "1"],
            "error: --gpus: must be 2 for vllm.tensor_parallel_size 2 (is 1)",
        ),
        (
            [],
            ["--columns", "promt=question"],
            "error: --columns: no column plays the role 'promt'; did you mean prompt?",
        ),
        (
            [{"question": "few", "answer": 1}],
            ["--columns", "prompt=questoin"],
            "error: DATA: {root}/graded.jsonl: has no column 'questoin' to be prompt; did you mean "
            "'question'? its columns are 'question', 'answer'\n",
        ),
        (
            [{"question": "few", "solution": " "}],
            ["--columns", "{{prompt: question, answer: solution}}", "--grader", "math"],
            "error: DATA: {root}/graded.jsonl:1: answer: the grader math can read nothing",
        ),
        ([], ["--system", ""], "error: --system: must be text, or null (is '')"),
        (
            [],
            ["--system", "Think.", "--template", "none"],
            "error: --system: is a message of a chat; template is none",
        ),
    ],
)
def test_a_mistaken_eval_is_one_message(eopd, files, rows, options, message):
    """It comes before an engine starts."""
    data = files / "graded.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(files.iterdir())
    options = [option.format(root=files) for option in options]
    done = eopd("eval", files / "model", data, *options)
    assert done.code == 2
    assert done.err.startswith(message.format(root=files))
    assert sorted(files.iterdir()) == before


def test_eval_writes_over_a_file_only_at_the_end(eopd, files, monkeypatch):
    def fails(*arguments):
        raise ConfigError("stop")

    monkeypatch.setattr("eopd.runtime.evaluate.evaluate_model", fails)
    old, new = files / "old.jsonl", files / "new.jsonl"
    old.write_text("old")
    for output in (old, new):
        done = eopd("eval", files / "model", files / "rows.jsonl", "--output", output)
        assert done.err == "error: stop\n"

    assert old.read_text() == "old"
    assert not new.exists()


def test_a_rank_that_is_lost_under_a_measurement_is_one_line(eopd, tmp_path, monkeypatch):
    async def fails(*arguments):
        raise LearnerDownError("its actor died")

    monkeypatch.setattr(measure, "prepare_held_out", lambda config: SimpleNamespace(prompts=()))
    monkeypatch.setattr(measure.cluster, "connect", lambda config: nullcontext())
    monkeypatch.setattr(measure.cluster, "require_room", lambda *arguments: None)
    monkeypatch.setattr(measure, "_measure", fails)
    monkeypatch.setattr(RunDirectory, "checkpoint", lambda directory, step: tmp_path / "step-7")
    config = load_config(fakes.write_config(tmp_path))
    done = eopd("measure", RunDirectory.create(config).path)
    assert (done.code, done.err) == (1, "error: a worker was lost: its actor died\n")


def test_a_checkpoint_is_measured_as_then_where_actors_are_now(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(measure, "_measure_apart", lambda config, *rest: measured.append(config))
    monkeypatch.setattr(
        RunDirectory, "checkpoint", lambda run, step: run.checkpoints / f"step-{step}"
    )
    path = fakes.write_config(tmp_path)
    before = load_config(path, ["student.lora={rank: 4, alpha: 8}", "rollout.vllm={seed: 1}"])
    settings = [
        "student.lora={rank: 4, alpha: 64}",
        "rollout.vllm={seed: 2, max_num_seqs: 4}",
        "rollout.temperature=0.5",
        "loss.gate=always",
        "evaluation.seed=9",
        "learner.lr=0.5",
        "rollout.engines=5",
        "cluster.address=head:6379",
    ]
    run, after = RunDirectory.create(before), load_config(path, settings)
    run.go_on(after, 10, changes(before, after))
    for step in (10, 11):
        measure.measure_checkpoint(run.path, step, [], print)

    then, now = measured
    assert (then.rollout.temperature, now.rollout.temperature) == (before.rollout.temperature, 0.5)
    assert (then.loss, then.evaluation) == (before.loss, before.evaluation)
    assert (now.loss, now.evaluation) == (after.loss, after.evaluation)
    assert (then.student.lora.alpha, now.student.lora.alpha) == (8, 64)
    assert then.rollout.vllm == {"max_num_seqs": 4, "seed": 1}
    for config in measured:
        assert (config.rollout.engines, config.cluster.address) == (5, "head:6379")

    measure.measure_checkpoint(run.path, 10, ["rollout.engines=2"], print)
    assert measured[-1].rollout.engines == 2


def test_engines_that_are_lost_under_an_eval_are_one_line(eopd, files, tmp_path, monkeypatch):
    class Engine:
        async def generate(self, *arguments):
            raise RunFailedError("no rollout engine is left")

    limits = []

    @asynccontextmanager
    async def engines(student, rollout, *arguments):
        limits.append(rollout.timeout_s)
        yield Engine()

    monkeypatch.setattr(evaluate, "rollout_engines", engines)
    monkeypatch.setattr(evaluate.cluster, "connect", lambda config: nullcontext())
    monkeypatch.setattr(evaluate.cluster, "require_room", lambda *arguments: None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a few words", "answer": "1"}\n')
    done = eopd("eval", files / "model", rows, "--max-response-tokens", "8")
    assert done.code == 1
    assert done.err.splitlines()[-1] == "error: no rollout engine is left"
    assert "Traceback" not in done.err
    eopd("eval", files / "model", rows, "--max-response-tokens", "8", "--timeout", "7")
    assert limits == [1800.0, 7.0]


def of(result):
    """A result of a model and of data that were named as on the Hub."""
    return result, {"model": "org/m@c0ffee", "data": "org/rows@beef:train"}


def judged(name, stop, answers, lost):
    """A prompt, the verdicts and lengths of its answers, and the number of samples that were lost."""
    return PromptResult(
        prompt_id=name,
        source="s",
        reference_answer="",
        answers=tuple(
            Answer(
                sample_index=0,
                response="",
                response_ids=(1,) * length,
                stop_reason=stop,
                verdict=verdict,
            )
            for verdict, length in answers
        ),
        lost=(fakes.lost(fakes.prompt(name)),) * lost,
    )


def test_eval_prints_scores_and_every_verdict(eopd, files, monkeypatch):
    answers = {
        "1": [(Verdict.CORRECT, 4), (Verdict.NO_ANSWER, 4)],
        "2": [(Verdict.ERROR, 4), (Verdict.ERROR, 4)],
    }
    prompts = [judged(name, StopReason.LENGTH, found, lost=0) for name, found in answers.items()]
    result = BenchmarkResult(prompts=tuple(prompts))
    monkeypatch.setattr("eopd.runtime.evaluate.evaluate_model", lambda *arguments: of(result))
    done = eopd("eval", files / "model", files / "rows.jsonl", "--n", "2")
    assert done.code == 0
    assert done.out.splitlines() == [
        "avg@2   0.2500 ± 0.2500",
        "pass@1  0.2500 ± 0.2500",
        "pass@2  0.5000 ± 0.5000",
        "2 prompts, 4.0 tokens an answer, 100.0% truncated, 0 lost",
        "4 answers: 1 right, 0 wrong, 1 without an answer, 0 timed out, 2 not graded",
        "not graded: prompts 2: the grader failed, or cannot read the accepted answer; "
        "these count as wrong",
    ]


LIKE = (
    "prompts={data: rows.jsonl, held_out: rows.jsonl, suffix: ' Think.', system: Sums.,"
    " template_options: {enable_thinking: false, words: 'a: [b'}, max_tokens: 300}",
    "rollout={temperature: 0.6, max_response_tokens: 77, threads: 3, timeout_s: 99,"
    " vllm: {max_num_seqs: 5}}",
    "student.dtype=float32",
)


@pytest.fixture
def trained(files, tmp_path):
    """A run directory with settings of its own, whose student was written."""
    config = load_config(files / "c.yaml", LIKE)
    directory = tmp_path / "trained"
    directory.mkdir()
    (directory / "config.yaml").write_text(dump_config(config))
    shutil.copytree(files / "model", directory / "hf")
    return directory


@pytest.fixture
def asked(monkeypatch):
    """What ``eopd eval`` asks for, each time."""
    asked = []
    result = BenchmarkResult(prompts=(judged("1", StopReason.LENGTH, [(Verdict.CORRECT, 4)], 0),))
    monkeypatch.setattr(
        "eopd.runtime.evaluate.evaluate_model", lambda *given: asked.append(given) or of(result)
    )
    return asked


def test_eval_like_a_run_has_its_settings_and_what_is_given_wins(eopd, files, trained, asked):
    options = ("--like", trained, "--n", "1", "--suffix", " Now.", "--vllm", "seed=1")
    options += ("--timeout", "0.5")
    done = eopd("eval", files / "model", files / "rows.jsonl", *options)
    assert (done.code, done.err) == (0, "")
    ((student, rollout, prompts, benchmark, *_),) = asked
    assert (prompts.system, prompts.suffix, prompts.max_tokens) == ("Sums.", " Now.", 300)
    assert prompts.template_options == {"enable_thinking": False, "words": "a: [b"}
    assert (benchmark.temperature, rollout.max_response_tokens) == (0.6, 77)
    assert (rollout.threads, rollout.timeout_s) == (3, 0.5)
    assert rollout.vllm == {"max_num_seqs": 5, "seed": 1}, "key by key"
    assert student.dtype == "float32"


def test_every_setting_that_a_run_and_an_eval_share_is_taken(trained):
    """An option of the name of a key of the run's sections is one that they share."""
    sections = (RolloutConfig, PromptsConfig, StudentConfig)
    keys = {key for section in sections for key in section.model_fields}
    named = {"timeout": "timeout_s", "max_prompt_tokens": "max_tokens"}
    options = set(inspect.signature(evaluate_command).parameters)
    shared = {option for option in options if named.get(option, option) in keys}
    assert set(settings_of(RunDirectory(trained).config())) == shared - {"data", "model", "columns"}


def test_an_eval_of_a_runs_student_under_other_settings_says_so(eopd, files, trained, asked):
    rows = files / "rows.jsonl"
    done = eopd("eval", trained / "hf", rows, "--n", "1", "--system", "Sums.")
    told = (
        "note: the run that wrote it had template_options {enable_thinking: false, words: 'a: [b'} "
        "(here {}), suffix ' Think.' (here ''), temperature 0.6 (here 1.0), "
        "max_response_tokens 77 (here 1024); "
        f"--like {trained} takes its settings\n"
    )
    (files / "link").symlink_to(trained / "hf")
    linked = eopd("eval", files / "link", rows, "--n", "1", "--system", "Sums.")
    (files / "link").unlink()
    assert done.err == linked.err == told
    assert eopd("eval", trained / "hf", rows, "--n", "1", "--like", trained).err == ""


def test_eval_like_what_is_no_run_is_a_mistake(eopd, files, tmp_path):
    done = eopd("eval", files / "model", files / "rows.jsonl", "--like", tmp_path)
    assert (done.code, done.err) == (
        2,
        f"error: {tmp_path} holds no run (it has no config.yaml)\n",
    )


def scored(mean, error, interval):
    """A score in the object."""
    return {
        "mean": pytest.approx(mean),
        "standard_error": pytest.approx(error),
        "interval_95": pytest.approx(interval),
    }


def test_eval_prints_one_object_with_every_number(eopd, files, monkeypatch):
    """Worked by hand: 1 and 2 of 5 samples are right."""
    answers = [(Verdict.CORRECT, 4), (Verdict.ERROR, 7), (Verdict.WRONG, 5)]
    prompts = (
        judged("7", StopReason.LENGTH, answers, lost=2),
        judged("8", StopReason.END_TOKEN, [(Verdict.CORRECT, 2)] * 2, lost=3),
    )
    result = BenchmarkResult(prompts=prompts)
    asked = []
    monkeypatch.setattr(
        "eopd.runtime.evaluate.evaluate_model", lambda *given: asked.append(given) or of(result)
    )
    options = [
        *("--n", "5", "--top-p", "0.9", "--stop", "\n\n", "--stop", "Q:", "--system", "Think."),
        *("--columns", "prompt=question", "--columns", "{answer: solution, id: key}"),
        *("--vllm", "max_num_seqs=4", "--vllm", "{enforce_eager: true, max_num_seqs: 8}"),
    ]
    done = eopd("eval", files / "model", files / "rows.jsonl", "--json", *options)
    assert done.code == 0
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    settings = found.pop("settings")
    assert found == {
        "prompts": 2,
        "samples": 5,
        "avg_at_n": scored(0.3, 0.1, [0.1040036, 0.4959964]),
        "pass_at_k": {
            "1": scored(0.3, 0.1, [0.1040036, 0.4959964]),
            "2": scored((0.4 + 0.7) / 2, 0.15, [0.2560054, 0.8439946]),
            "4": scored((0.8 + 1.0) / 2, 0.1, [0.7040036, 1.0]),
            "5": scored(1.0, 0.0, [1.0, 1.0]),
        },
        "response_tokens": {"mean": (16 / 3 + 2) / 2, "median": 4, "max": 7},
        "truncation_rate": 0.5,
        "lost": 5,
        "verdicts": {"correct": 3, "wrong": 1, "no_answer": 0, "timeout": 0, "error": 1},
        "not_graded": ["7"],
        "pinned": {"model": "org/m@c0ffee", "data": "org/rows@beef:train"},
    }
    ((student, rollout, prompts, benchmark, *_),) = asked
    assert rollout.vllm == settings["vllm"] == {"max_num_seqs": 8, "enforce_eager": True}
    assert (benchmark.top_p, benchmark.stop) == (0.9, ("\n\n", "Q:"))
    assert (settings["top_p"], settings["stop"]) == (0.9, ["\n\n", "Q:"])
    columns = {"prompt": "question", "answer": "solution", "id": "key"}
    assert prompts.columns == settings["columns"] == columns
    assert prompts.system == settings["system"] == "Think."
    assert settings["model"] == str(student.model) == f"{files}/model"
    assert (settings["data"], settings["k"]) == (f"{files}/rows.jsonl", [1, 2, 4, 5])


def test_a_result_without_an_answer_has_no_lengths():
    result = BenchmarkResult(prompts=(judged("7", StopReason.LENGTH, [], lost=2),))
    found = score_record(result, 2, [1], {})
    assert found["response_tokens"] == {"mean": None, "median": None, "max": None}
    assert found["truncation_rate"] is None
    assert found["avg_at_n"] == {"mean": 0.0, "standard_error": None, "interval_95": None}
    json.dumps(found, allow_nan=False)
    assert score_lines(result, 2, [1])[:2] == ["avg@2   0.0000", "pass@1  0.0000"]


def test_a_score_without_any_spread_has_an_interval_of_no_width():
    prompts = tuple(judged(name, StopReason.LENGTH, [], lost=2) for name in "78")
    found = score_record(BenchmarkResult(prompts=prompts), 2, [], {})
    assert found["avg_at_n"] == {"mean": 0.0, "standard_error": 0.0, "interval_95": [0.0, 0.0]}
    assert found["pass_at_k"] == {}


def test_ctrl_c_before_anything_runs_is_one_line(eopd, files, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("eopd.runtime.train.train", interrupted)
    done = eopd("train", files / "c.yaml")
    assert done.code == 130
    assert done.err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train c.yaml --step x", "--step: must be a whole number (is x)"),
        ("train c.yaml --step 1.5", "--step: must be a whole number (is 1.5)"),
        ("train c.yaml --step 0", "--step: must be 1 or more (is 0)"),
        ("scale run --engines many", "--engines: must be a whole number (is many)"),
        ("eval m d --gpus x", "--gpus: must be a number (is x)"),
        ("eval m d --k x", "--k: must be a whole number (is x)"),
        ("teacher serve c.yaml --port 99999", "--port: must be 65535 or less (is 99999)"),
        ("models tiny --family gpt", "--family: 'gpt' is not one of 'llama', 'qwen3'"),
    ],
)
def test_a_wrong_option_is_told_as_a_key_is(eopd, arguments, message):
    done = eopd(*arguments.split())
    assert done.code == 2
    assert done.err == f"error: {message}\n"


@pytest.mark.parametrize("verb", ["status", "export", "scale", "report"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("c.yaml", "Not a directory"),
        ("c.yaml/run", "Not a directory"),
        ("x" * 256, "File name too long"),
    ],
)
def test_what_is_no_directory_is_no_run(eopd, files, verb, name, reason):
    done = eopd(verb, files / name, *options_of(verb, files))
    assert done.code == 2
    assert done.err == f"error: {files / name} is no run directory ({reason})\n"


def options_of(verb, files):
    """What a verb needs beside the run."""
    if verb == "scale":
        return ["--engines", "2"]

    if verb == "report":
        return ["--output", files / "report.html"]

    return []


@pytest.mark.parametrize("verb", ["status", "export", "scale", "report"])
def test_a_run_in_a_closed_directory_is_one_message(eopd, files, verb, tmp_path, monkeypatch):
    def closed(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", closed)  # the superuser may read all
    done = eopd(verb, tmp_path, *options_of(verb, files))
    assert done.code == 2
    assert done.err == f"error: {tmp_path} is no run directory (Permission denied)\n"


@pytest.mark.parametrize(
    ("directory", "reason"),
    [
        ("{root}/c.yaml", "File exists"),
        ("/proc/x", "No such file or directory"),
        ("{root}/c.yaml/m", "Not a directory"),
    ],
)
@pytest.mark.parametrize("pair", ["tiny", "demo"])
def test_models_are_made_where_a_directory_can_be(eopd, files, pair, directory, reason):
    named = directory.format(root=files)
    done = eopd("models", pair, named)
    assert done.code == 2
    assert done.err == f"error: {named}: {reason}\n"


def test_models_for_a_user_without_a_home_need_a_directory(eopd, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    done = eopd("models", "tiny")
    told = (
        "error: DIRECTORY: ~/.cache/eopd/models/tiny: this user has no home directory; name "
        "another, or set HOME\n"
    )
    assert done.code == 2
    assert done.err == told
