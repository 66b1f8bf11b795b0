"""What `eopd check` finds before anything starts: several teachers, their prompts, and the report of it."""

import json
import sys

import pytest

from eopd import preflight
from eopd.cli.main import main
from eopd.config import ConfigError, load_config
from eopd.models.tiny import build_model, train_tokenizer, write_model

ROWS = [("a", "math"), ("b", "math"), ("c", "code"), ("d", "poems")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("check")
    for name, end in (("student", "<|endoftext|>"), ("chat", "<|im_end|>"), ("base", "<|endoftext|>")):
        tokenizer = train_tokenizer(["a few words to cut into pieces"], 270)
        tokenizer.eos_token = end
        write_model(root / name, build_model("qwen3", tokenizer, seed=0, layers=1), tokenizer)
    (root / "chat" / "chat_template.jinja").write_text("{{ messages }}<think>")
    for weights in (root / "base").glob("*.safetensors"):
        weights.unlink()
    lines = [json.dumps({"prompt": prompt, "source": source}) + "\n" for prompt, source in ROWS]
    (root / "train.jsonl").write_text("".join([*lines, json.dumps({"prompt": "word " * 99, "source": "math"})]))
    (root / "held_out.jsonl").write_text(lines[0])
    (root / "c.yaml").write_text(
        f"run: {{name: r, batches: 1, directory: {root}/runs}}\nstudent: {{model: {root}/student, dtype: float32}}\n"
        f"teachers:\n"
        f"  - {{name: chat, model: {root}/chat, replicas: 2, dtype: float32, eos_remap: {{0: 2}}, "
        "sources: [math, poems]}\n"
        f"  - {{name: far, model: {root}/base, backend: eopd, dtype: float32, server: {{url: 'http://far:8000'}}}}\n"
        f"prompts: {{data: {root}/train.jsonl, held_out: {root}/held_out.jsonl, max_tokens: 64, overlong: drop}}\n"
        "flow: {batch_prompts: 1}\n"
    )
    return root


@pytest.fixture
def check(files, monkeypatch, capsys):
    def run(*overrides: str) -> tuple[int, str]:
        arguments = [part for one in overrides for part in ("--set", one.format(root=files))]
        monkeypatch.setattr(sys, "argv", ["eopd", "check", str(files / "c.yaml"), *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        shown = capsys.readouterr()
        assert not (files / "runs").exists()
        assert bool(shown.out) != bool(shown.err)
        return int(caught.value.code or 0), (shown.out or shown.err).replace(str(files), "")

    return run


def test_the_report_says_what_every_teacher_shares_and_teaches(check):
    code, shown = check("cluster.cpus=8")
    assert code == 0
    tokens = shown.split("vocabulary  ")[1].split(" tokens")[0]
    assert shown.splitlines() == [
        "student /student",
        "teacher chat: /chat (2 x vllm)",
        f"  vocabulary  {tokens} tokens; {tokens} and {tokens} rows",
        "  end tokens  student 0 <|endoftext|>; teacher 2 <|im_end|>",
        "  eos_remap   0 <|endoftext|> -> 2 <|im_end|>",
        "  prompts     3 to train, 1 held out",
        "  note        chat templates differ; prompts are rendered with the student's",
        "teacher far: /base (http://far:8000)",
        f"  vocabulary  {tokens} tokens; {tokens} and {tokens} rows",
        "  end tokens  student 0 <|endoftext|>; teacher 0 <|endoftext|>",
        "  eos_remap   none",
        "  prompts     1 to train, 0 held out",
        "dropped 1 prompts of more than 64 tokens",
    ]


def test_the_report_says_which_precision_was_chosen_and_why(check):
    _, shown = check("student.dtype=auto", "teachers.1.dtype=auto")
    told = [line for line in shown.splitlines() if "dtype" in line]
    assert len(told) == 2
    assert told[0].startswith(("student.dtype: float32 (auto: ", "student.dtype: bfloat16 (auto: "))
    assert told[1] == "teachers.far.dtype: bfloat16 (auto: what most servers compute in)"


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["rollout.engines=1000000"], "the roles ask for 1000004 cpus (learner 1 x 1, rollout 1000000 x 1, teacher "),
        (["rollout.cpus=5000"], "the roles ask for 5004 cpus (learner 1 x 1, rollout 1 x 5000, teacher chat 2 x 1, "),
        (["cluster.cpus=3.5"], "the roles ask for 5 cpus (learner 1 x 1, rollout 1 x 1, teacher chat 2 x 1, teacher "),
        (["cluster.address=head:6379", "rollout.cpus=5000"], None),
        (["rollout.gpus=8", "teachers.0.gpus=8", "cluster.cpus=9"], None),
    ],
)
def test_what_this_machine_lacks_is_a_note_where_ray_is_started_here(check, overrides, note, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, shown = check(*overrides)
    told = [line for line in shown.splitlines() if line.startswith("note: there is no room for it on this machine: ")]
    assert code == 0 and len(told) == (note is not None)
    assert note is None or note in told[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers.0.eos_remap={{}}"], "error: teachers.chat: student /student, teacher /chat: the student ends a "),
        (["teachers.0.eos_remap={{}}"], "write eos_remap: {0: 2}  # '<|endoftext|>' -> '<|im_end|>'\n"),
        (["teachers.1.eos_remap={{0: 2}}"], "error: teachers.far: student /student, teacher /base: eos_remap: the "),
        (["teachers.0.eos_remap={{0: 2, 1: 2}}"], "0 and 1 both become 2"),
        (["teachers.1.model={root}/no"], "error: teachers.far.model: /no is no Hugging Face model directory"),
        (
            ["teachers.1.backend=vllm", "teachers.1.server=null"],
            "error: teachers.far.model: /base has no weights",
        ),
        (
            ["rollout.vllm={{max_num_seq: 4}}"],
            "error: rollout.vllm: vLLM has no option max_num_seq; did you mean max_num_",
        ),
        (["teachers.0.vllm={{zeal: 4}}"], "error: teachers.chat.vllm: vLLM has no option zeal\n"),
        (["telemetry.trackers=[mlflow]"], "error: telemetry.trackers: mlflow needs a server: set MLFLOW_TRACKING_URI"),
        (
            ["teachers.1.sources=[logic]"],
            "error: /train.jsonl: nobody teaches source 'code' (1 prompts); teachers.sources are 'logic', 'math', "
            "'poems'; name it there, or leave one teacher without sources",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(check, overrides, message):
    code, shown = check(*overrides)
    assert code == 2
    assert message in shown
    assert shown.count("\n") == 1 and "Traceback" not in shown


def test_held_out_prompts_need_a_teacher_too(files):
    swapped = [f"prompts.held_out={files}/train.jsonl", f"prompts.data={files}/held_out.jsonl"]
    preflight.check(load_config(files / "c.yaml", swapped))
    with pytest.raises(ConfigError, match=r"train\.jsonl: nobody teaches source 'code'"):
        preflight.check(load_config(files / "c.yaml", [*swapped, "teachers.1.sources=[logic]"]))


# ---- answers that a grader needs ------------------------------------------------------------------------------------

REWARD = ["loss.reverse_kl={{kind: sampled, reward: {{grader: math}}}}", "rollout.samples_per_prompt=2"]


@pytest.fixture
def graded(files, check):
    def run(*answers):
        rows = [{"prompt": "a", "source": "math"} | answer for answer in answers]
        (files / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return check("prompts.data={root}/graded.jsonl", *REWARD)

    return run


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"answer": 5}, {}, {"answer": None}], "/graded.jsonl:2 (and 1 more row): has no `answer`, so that nothing"),
        (
            [{"answer": 5}, {"answer": " "}],
            "/graded.jsonl:2: answer: the grader math can read nothing in it: ' '; write",
        ),
        (
            [{"answer": "He sold half as many clips in May."}],
            "/graded.jsonl:1: answer: the grader math can read nothing",
        ),
    ],
)
def test_a_reward_needs_answers_that_its_grader_can_read(graded, answers, message):
    code, shown = graded(*answers)
    assert code == 2 and f"error: prompts.data: {message}" in shown


def test_several_answers_and_whole_solutions_are_fine_for_a_reward(graded):
    assert graded({"answer": [5, "five"]}, {"answer": "2 + 3 = 5\n#### 5"}, {"answer": r"So \boxed{5}."})[0] == 0
