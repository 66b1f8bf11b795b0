"""``eopd check --offline``: what it finds of what is here, what it says of what is not, and that no
recipe has a mistake that it finds.
"""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import model_facts
import pytest

import eopd.hub.faults
from eopd.config import ConfigError, load_config
from eopd.preflight import check_offline

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
PAIR = ("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-8B")


@pytest.fixture(autouse=True)
def _nobody_is_asked(tmp_path, monkeypatch):
    """There is an empty working directory, an empty cache, and no network."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(eopd.hub.faults, "in_time", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def recipe(name: str, *overrides: str) -> list[str]:
    return check_offline(load_config(ROOT / "configs" / f"{name}.yaml", overrides))


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_has_a_mistake_beside_the_numbers_of_its_models(name, tmp_path):
    model_facts.write_cache(tmp_path / "hub")
    for directory, config in model_facts.IN_DIRECTORIES.items():
        model_facts.write_directory(tmp_path / directory, config)

    shutil.copytree(ROOT / "configs/prompts", tmp_path / "configs/prompts")
    lines = recipe(name)
    models = [line for line in lines if ".model: " in line]
    assert len(models) > 1
    own = name in ("tiny", "demo", "math")  # their models are made on the machine
    assert all((" is not here: not checked" in line) == own for line in models)
    rows = [line for line in lines if line.startswith(("prompts.data", "prompts.held_out"))]
    assert all((" rows, not rendered" in line) == own for line in rows)


def test_what_is_not_here_is_said(eopd):
    done = eopd("check", "--offline", ROOT / "configs/qwen3-0.6b-math.yaml")
    assert done.code == 0
    assert done.out.splitlines() == [
        "student.model: Qwen/Qwen3-0.6B-Base is not here: not checked",
        "teachers.teacher.model: Qwen/Qwen3-8B is not here: not checked",
        f"prompts.data: {Path.cwd()}/data/math_train.jsonl is not here: not checked",
        f"prompts.held_out: {Path.cwd()}/data/math_held_out.jsonl is not here: not checked",
        "student.dtype, teachers.teacher.dtype: bfloat16 (auto: runs on GPUs)",
        "learner.zero_stage: 1 (auto: the fastest on one rank in bfloat16)",
        "the roles ask for 16 cpus (learner 1 x 4, rollout 2 x 4, teacher teacher 1 x 4); "
        "the roles ask for 4 gpus (learner 1 x 1, rollout 2 x 1, teacher teacher 1 x 1)",
        "no mistake was found in what is here",
    ]


def test_a_config_alone_tells_the_numbers_of_its_model(tmp_path):
    model_facts.write_cache(tmp_path / "hub")
    assert recipe("qwen3-0.6b-math")[:2] == [
        "student.model: Qwen/Qwen3-0.6B-Base has 151936 rows, 32768 positions, 28 layers, 16 heads, "
        "8 key-value heads; tokenizer and weights not here: not checked",
        "teachers.teacher.model: Qwen/Qwen3-8B has 151936 rows, 40960 positions, 36 layers, "
        "32 heads, 8 key-value heads; tokenizer and weights not here: not checked",
    ]
    other = recipe("qwen3-0.6b-math", "student.model=Qwen/Qwen3-0.6B-Base@other")
    assert other[0] == "student.model: Qwen/Qwen3-0.6B-Base@other is not here: not checked"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluation.max_response_tokens=40000", "learner.token_budget=50000"],
            "has 32768 positions; prompts.max_tokens + max_response_tokens is 41024",
        ),
        (
            ["teachers.0.vllm={tensor_parallel_size: 3}", "teachers.0.gpus=3"],
            "teachers.teacher.vllm.tensor_parallel_size: 3 workers cannot share the 32 attention "
            "heads of",
        ),
        (
            ["rollout.vllm={tensor_parallel_size: 5}", "rollout.gpus=5"],
            "rollout.vllm.tensor_parallel_size: 5 workers cannot share the 16 attention heads of",
        ),
        (
            ["teachers.0.eos_remap={151643: 151936}"],
            "teachers.teacher.eos_remap: 151936 is no token of Qwen/Qwen3-8B, whose head has "
            "151936 rows",
        ),
        (
            ["teachers.0.eos_remap={200000: 151645}"],
            "teachers.teacher.eos_remap: 200000 is no token of Qwen/Qwen3-0.6B-Base, whose head",
        ),
        (["rollout.vllm={max_num_seq: 4}"], "rollout.vllm.max_num_seq: unknown key; did you mean"),
        (
            ["learner.deepspeed={overlap_comm: true}"],
            "learner.deepspeed.overlap_comm: unknown key; did you mean zero_optimization.overlap",
        ),
        (
            ["student.lora.target_modules=q_prj"],
            "student.lora.target_modules: 'q_prj' matches no layer of Qwen3ForCausalLM",
        ),
        (["cluster.address=http://head:8265"], "http://head:8265 is the job server"),
    ],
)
def test_mistakes_are_found_by_the_numbers_of_the_models(tmp_path, overrides, message):
    model_facts.write_cache(tmp_path / "hub")
    with pytest.raises(ConfigError) as caught:
        recipe("qwen3-0.6b-math", *overrides)

    assert message in str(caught.value)


def test_key_value_heads_are_shared_or_divided(tmp_path):
    facts = dict(model_facts.ON_THE_HUB)
    facts[PAIR[1]] = {**facts[PAIR[1]], "num_attention_heads": 24, "num_key_value_heads": 4}
    model_facts.write_cache(tmp_path / "hub", facts)
    for workers in (1, 2, 4, 8):
        recipe("qwen3-0.6b-math", *engine_of(workers))

    with pytest.raises(ConfigError, match="6 workers cannot share the 4 key-value heads of"):
        recipe("qwen3-0.6b-math", *engine_of(6))


def engine_of(workers: int) -> list[str]:
    """The settings of a teacher's engine with so many workers."""
    return [f"teachers.0.vllm={{tensor_parallel_size: {workers}}}", f"teachers.0.gpus={workers}"]


def test_a_vocabulary_below_top_k_is_found(tmp_path):
    facts = {name: {**model_facts.ON_THE_HUB[name], "vocab_size": 12} for name in PAIR}
    model_facts.write_cache(tmp_path / "hub", facts)
    with pytest.raises(ConfigError, match=r"loss.top_k: 16 is larger than .* 12 tokens of Qwen/"):
        recipe("qwen3-0.6b-math", "teachers.0.eos_remap={}")


@pytest.fixture
def whole(checked_model, tmp_path):
    """Check a config of a model and rows that are here as a whole; returns the lines."""
    rows = [json.dumps({"prompt": f"few words {n}", "answer": "1"}) for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    settings = [
        f"student={{model: {checked_model}, dtype: float32}}",
        f"teachers=[{{model: {checked_model}, dtype: float32}}]",
        "prompts={data: rows.jsonl, held_out: rows.jsonl, max_tokens: 64}",
        "evaluation={max_response_tokens: 32, prompts: 2}",
        "rollout.max_response_tokens=32",
    ]
    return lambda *overrides: recipe("tiny", *settings, *overrides)


def test_what_is_here_is_read_as_always(whole, checked_model, tmp_path):
    lines = whole()
    assert not [line for line in lines if "not here" in line]
    assert "prompts.data: 3 prompts" in lines and "prompts.held_out: 3 prompts" in lines
    with pytest.raises(ConfigError, match=r"longer than prompts.max_tokens 3"):
        whole("prompts.max_tokens=3")

    with pytest.raises(ConfigError, match=r"teachers.teacher: .*eos_remap: the student ends no"):
        whole("teachers.0.eos_remap={5: 5}")

    cut = tmp_path / "cut"
    shutil.copytree(checked_model, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"^student.model: .* is cut short, or no"):
        whole(f"student.model={cut}")

    weights.unlink()
    assert whole(f"student.model={cut}")[0].endswith("; weights not here: not checked")


def test_rows_are_read_where_a_part_of_them_or_a_tokenizer_is_missing(
    whole, checked_model, tmp_path
):
    assert whole("prompts.data=[rows.jsonl, no.jsonl]")[2:4] == [
        f"prompts.data.1: {tmp_path}/no.jsonl is not here: not checked",
        "prompts.data.0: 3 rows, not rendered: a part or a tokenizer is not here",
    ]
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(ConfigError, match=r"bad.jsonl:1.*prompt"):
        whole("prompts.data=[bad.jsonl, no.jsonl]")

    bench = "evaluation.benchmarks=[{name: m, data: [no/data:test, rows.jsonl]}]"
    lines = whole(bench, "flow.filter.function=no_such:module", "prompts.data=no.jsonl")
    assert "flow.filter.function: not tried, without prompts" in lines
    key = "evaluation.benchmarks.m.data"
    assert f"{key}.0: no/data:test is not here: not checked" in lines
    assert f"{key}.1: 3 rows, not rendered: a part or a tokenizer is not here" in lines


def test_teachers_are_not_started_offline(eopd):
    done = eopd("check", "--offline", "--live", ROOT / "configs/tiny.yaml")
    assert done.code == 2
    assert done.err.startswith("error: --live: starts the teachers, which --offline does without")
