"""Model directories with one thing wrong each: found by opening them, and told in one sentence that
begins with the user's key.
"""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from eopd.config import ConfigError
from eopd.models.tiny import build_model, train_tokenizer, write_model
from eopd.preflight import models

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n"
SIZES = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with nothing wrong, of one shard; ``sharded`` is the same of several."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a few words to cut into pieces"], 280)
    model = build_model("llama", tokenizer, seed=0, layers=2)
    write_model(root / "one", model, tokenizer)
    shutil.copytree(root / "one", root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(root / "sharded", max_shard_size="100KB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2

    return root


@pytest.fixture
def directory(whole, tmp_path):
    return shutil.copytree(whole / "one", tmp_path / "model")


@pytest.fixture
def sharded(whole, tmp_path):
    return shutil.copytree(whole / "sharded", tmp_path / "model")


def edit(path: Path, **changes: object) -> None:
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def refused(directory: Path, num_tokens: int = 64) -> str:
    with pytest.raises(ConfigError) as caught:
        models.require_model("student.model", directory, num_tokens=num_tokens)

    message = str(caught.value)
    assert message.startswith("student.model: ")
    assert "\n" not in message
    return message.replace(str(directory), "DIR")


def test_whole_directories_pass(directory, whole):
    models.require_model("student.model", directory, num_tokens=64)
    models.require_model("student.model", whole / "sharded", num_tokens=64)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_a_greedy_generation_config_with_a_temperature_passes(directory, capfd):
    edit(
        directory / "generation_config.json",
        do_sample=False,
        temperature=0.9,
        top_p=0.6,
    )
    models.require_model("student.model", directory, num_tokens=64)
    assert capfd.readouterr() == ("", "")


INDEX = "model.safetensors.index.json"


def end(directory: Path, value: object) -> None:
    edit(directory / "generation_config.json", eos_token_id=value)


def tensor(shape: list[int], num_bytes: int) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, num_bytes]}}


def header(directory: Path, tree: object) -> None:
    text = (tree if isinstance(tree, str) else json.dumps(tree)).encode()
    body = (
        bytes(max((one["data_offsets"][1] for one in tree.values()), default=0))
        if isinstance(tree, dict)
        else b""
    )
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "model.safetensors").unlink(),
            "DIR has no weights: it has none of *.safetensors, *.bin",
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "training_args.bin"),
            "DIR has no weights: it has none of *.safetensors, *.bin, but training_args.bin",
        ),
        (
            lambda d: (d / "model.safetensors").write_text(POINTER),
            "DIR/model.safetensors is a Git LFS pointer",
        ),
        (lambda d: (d / "model.safetensors").write_text(""), "DIR/model.safetensors is empty"),
        (lambda d: cut(d / "model.safetensors", 5), "DIR/model.safetensors is cut short"),
        (lambda d: cut(d / "model.safetensors", 500), "DIR/model.safetensors is cut short"),
        (
            lambda d: cut(d / "model.safetensors", 99_000),
            "DIR/model.safetensors is cut short, or no safetensors file (",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"),
            "DIR/model.safetensors is cut short, or no safetensors file (",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 999),
            "DIR/model.safetensors is cut short, or no",
        ),
        (
            lambda d: replace_by_directory(d / "model.safetensors"),
            "DIR/model.safetensors is a directory",
        ),
        (lambda d: cut(d / "config.json", 30), "DIR/config.json: is not JSON"),
        (
            lambda d: (d / "config.json").write_text("[1]"),
            "DIR/config.json: must hold a JSON object, is a list",
        ),
        (lambda d: (d / "config.json").write_text(POINTER), "DIR/config.json is a Git LFS pointer"),
        (
            lambda d: (d / "config.json").unlink(),
            "DIR is no Hugging Face model directory (it has no config.json)",
        ),
        (
            lambda d: edit(d / "config.json", vocab_size=None),
            "DIR/config.json: names no vocab_size",
        ),
        (
            lambda d: (d / "generation_config.json").write_text("{"),
            "DIR/generation_config.json: is not JSON",
        ),
        (
            lambda d: (d / "generation_config.json").write_text("[]"),
            "must hold a JSON object, is an empty list",
        ),
        (
            lambda d: edit(d / "generation_config.json", cache_implementation="bogus"),
            "DIR/generation_config.json: transformers cannot read it: Invalid "
            "`cache_implementation` (bogus)",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "model-1.safetensors"}}'
            ),
            "DIR lacks 1 of the 1 files of its weights, the first is model-1.safetensors",
        ),
        (
            lambda d: (d / "tokenizer.json").write_text(POINTER),
            "DIR/tokenizer.json is a Git LFS pointer",
        ),
        (lambda d: cut(d / "tokenizer.json", 99), "DIR/tokenizer.json: is not JSON: "),
        (
            lambda d: (d / "tokenizer_config.json").write_text("[1]"),
            "DIR/tokenizer_config.json: must hold a JSON",
        ),
        (
            lambda d: (d / "config.json").write_bytes(b'{"a": "\xe9"}'),
            "DIR/config.json: is not UTF-8: invalid",
        ),
        (
            lambda d: (d / "config.json").write_text("[" * 100_000),
            "DIR/config.json: is nested too deeply",
        ),
        (
            lambda d: edit(d / "config.json", hidden_size="32"),
            "DIR/config.json: transformers cannot read it: Validation error for field "
            "'hidden_size'",
        ),
        (
            lambda d: edit(d / "config.json", vocab_size="280"),
            "config.json: vocab_size must be a whole number of 1 or",
        ),
        (
            lambda d: edit(d / "config.json", vocab_size=0),
            "config.json: vocab_size must be a whole number of 1 or",
        ),
        (
            lambda d: end(d, [[2]]),
            "DIR/generation_config.json: eos_token_id must be the id of a token or a",
        ),
        (
            lambda d: end(d, {}),
            "eos_token_id must be the id of a token or a list of ids, has an object",
        ),
        (lambda d: end(d, "2"), 'eos_token_id must be the id of a token or a list of ids, has "2"'),
        (
            lambda d: end(d, True),
            "eos_token_id must be the id of a token or a list of ids, has true",
        ),
        (lambda d: header(d, {}), "DIR/model.safetensors holds no tensors"),
        (
            lambda d: header(d, tensor([-1], 0)),
            "no safetensors file (Error while deserializing header: invalid JSON in header: ",
        ),
        (lambda d: header(d, tensor([10**30], 0)), "invalid JSON in header: "),
        (lambda d: header(d, tensor([0, 10**30], 0)), "invalid JSON in header: "),
        (
            lambda d: header(d, tensor([9], 40)),
            "invalid shape, data type, or offset for tensor",
        ),
        (
            lambda d: header(d, "[" * 100_000),
            "DIR/model.safetensors is cut short, or no safetensors file (",
        ),
        (
            lambda d: (d / INDEX).write_text('{"weight_map"'),
            f"DIR/{INDEX} is not JSON: Expecting ':' delimiter (col",
        ),
        (
            lambda d: (d / INDEX).write_bytes(b"\xff"),
            f"DIR/{INDEX} is not UTF-8: invalid start byte at byte 0",
        ),
        (lambda d: (d / INDEX).write_text("[" * 100_000), f"DIR/{INDEX} is nested too deeply"),
        (
            lambda d: (d / INDEX).write_text('{"weight_map": {"a": [1]}}'),
            f"DIR/{INDEX}: weight_map: a: must be the name of a file, is a list",
        ),
        (
            lambda d: (d / "tokenizer.json").write_text(
                (d / "tokenizer.json").read_text().replace("BPE", "BPE2")
            ),
            "DIR: its tokenizer cannot be loaded: ",
        ),
    ],
)
def test_one_thing_wrong_is_told_in_one_sentence(directory, damage, message):
    damage(directory)
    assert message in refused(directory)


@pytest.mark.parametrize("method", ["exists", "open", "read_bytes"])
def test_what_may_not_be_read_is_named(directory, monkeypatch, method):
    def closed(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, closed)
    assert "cannot be read (Permission denied)" in refused(directory)


def test_files_that_no_run_reads_do_not_matter(directory):
    for name in ("trainer_state.json", "notes.txt", "optimizer.bin", "pytorch_model.bin"):
        (directory / name).write_text(POINTER)

    (directory / "requirements.txt").write_text("")
    models.require_model("student.model", directory, num_tokens=64)


def test_a_directory_without_a_vocabulary_has_no_tokenizer(directory):
    (directory / "tokenizer.json").unlink()  # transformers makes up an empty one for some families
    assert "DIR: has no tokenizer (tokenizer.json, *.model, " in refused(directory)


def test_the_whole_reason_is_told_and_not_its_first_line(directory, monkeypatch):
    from transformers import AutoTokenizer

    def fails(*_, **__):
        raise Exception("one of:\n(1) this\n(2) that")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    assert (
        refused(directory)
        == "student.model: DIR: its tokenizer cannot be loaded: one of: (1) this (2) that"
    )


def test_every_shard_is_there_and_holds_its_tensors(sharded):
    index = sharded / "model.safetensors.index.json"
    shards = sorted(sharded.glob("*.safetensors"))
    tree = json.loads(index.read_text())
    name = next(name for name, shard in tree["weight_map"].items() if shard == shards[1].name)
    stored = load_file(shards[1])
    save_file({k: v for k, v in stored.items() if k != name}, shards[1])
    assert (
        f"DIR/{shards[1].name} holds no tensor {name}, which model.safetensors.index.json says"
        in refused(sharded)
    )
    cut(shards[2], 3000)
    assert f"DIR/{shards[2].name} is cut short, or no safetensors file (" in refused(sharded)
    shards[1].unlink()
    assert (
        f"DIR lacks 1 of the {len(shards)} files of its weights, the first is {shards[1].name}"
        in refused(sharded)
    )
    index.write_text("{}")
    assert "DIR/model.safetensors.index.json has no weight_map" in refused(sharded)


@pytest.mark.parametrize("other", ["model_old.safetensors", "adapter_model.safetensors"])
def test_weights_that_vllm_would_load_besides_are_refused(directory, other):
    shutil.copy(directory / "model.safetensors", directory / other)
    message = refused(directory)
    assert message.startswith(f"student.model: DIR holds {other} beside model.safetensors; vLLM")


def test_a_model_may_be_there_in_mistral_s_format_too(directory):
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")
    models.require_model("student.model", directory, num_tokens=64)


def test_weights_beside_those_of_an_index_are_nobody_s(sharded):
    shutil.copy(next(sharded.glob("*.safetensors")), sharded / "old.safetensors")
    models.require_model("student.model", sharded, num_tokens=64)


def test_an_adapter_is_neither_a_model_nor_beside_one(directory):
    (directory / "adapter_config.json").write_text("{}")
    assert "DIR holds adapter_config.json beside the weights" in refused(directory)
    (directory / "config.json").unlink()
    assert "DIR is an adapter alone; merge it into its model" in refused(directory)


def test_weights_of_whole_numbers_are_refused(directory):
    names = {"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(3, dtype=torch.int32)}
    save_file(names, directory / "model.safetensors")
    assert "DIR: its weights are whole numbers (I32, I8)" in refused(directory)
    save_file({**names, "scale": torch.ones(1)}, directory / "model.safetensors")
    models.require_model("student.model", directory, num_tokens=64)


def test_weights_of_the_old_format_pass_and_a_cut_one_does_not(directory):
    (directory / "model.safetensors").unlink()
    old = directory / "pytorch_model.bin"
    torch.save({"x": torch.zeros(99)}, old)
    models.require_model("student.model", directory, num_tokens=64)
    torch.save({"x": torch.zeros(99)}, old, _use_new_zipfile_serialization=False)
    models.require_model("student.model", directory, num_tokens=64)
    torch.save({"x": torch.zeros(99)}, old)
    cut(old, 600)
    assert "DIR/pytorch_model.bin is cut short" in refused(directory)


def test_a_missing_directory_is_told_what_else_may_stand_there(tmp_path):
    message = refused(tmp_path / "Qwen" / "Qwen3-0.6B")
    assert message.startswith("student.model: there is no directory DIR; ")
    assert "a model on the Hugging Face Hub is named OWNER/NAME or OWNER/NAME@REVISION" in message
    (tmp_path / "file").write_text("")
    assert "is a file; name the Hugging Face model directory" in refused(tmp_path / "file")


def student(directory: Path, num_tokens: int = 64) -> str:
    """What is said of a directory as a student; nothing where it passes."""
    try:
        models.require_student(directory, num_tokens=num_tokens)
    except ConfigError as error:
        return str(error).replace(str(directory), "DIR")

    return ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        (
            {"architectures": None},
            "DIR/config.json: architectures is none; a student of model_type llama is ",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "write architectures: [LlamaForCausalLM] if that is",
        ),
        (
            {"model_type": "nonsense"},
            'DIR/config.json: model_type is "nonsense", which the installed transformers ',
        ),
        ({"architectures": "LlamaForCausalLM"}, "architectures is LlamaForCausalLM; a student of"),
        ({"architectures": [["x"]]}, "architectures is ['x']; a student of"),
        ({"model_type": ["llama"]}, "DIR/config.json: model_type is a list, which"),
        ({"model_type": None}, "DIR/config.json: model_type is null"),
        (
            {"hidden_size": "64"},
            "DIR/config.json: transformers cannot read it: Validation error for field "
            "'hidden_size'",
        ),
        ({"vocab_size": 0}, "DIR/config.json: transformers can make no model of it: "),
        (
            {"model_type": "clip_vision_model"},
            "DIR/config.json: model_type clip_vision_model is no causal language",
        ),
        ({"num_hidden_layers": 3}, "DIR: the weights lack model.layers.2."),
        (
            {"intermediate_size": 96},
            "DIR: model.layers.0.mlp.down_proj.weight has shape (64, 128), and config.json",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised (fp8)"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embedding (dynamic)",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary embedding (dynamic)"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, ""),
        ({"temperature": 0.5, "do_sample": True}, ""),
        (
            {"output_attentions": True},
            "transformers would not write it again for the trained student: ",
        ),
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_refused(directory, changes, message):
    edit(directory / "config.json", **changes)
    said = student(directory)
    assert message in said
    assert bool(message) == bool(said)


def test_weights_of_no_base_prefix_are_known_by_their_names(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name.removeprefix("model."): t for name, t in tensors.items()},
        directory / "model.safetensors",
    )
    assert student(directory) == ""
    save_file({f"other.{name}": t for name, t in tensors.items()}, directory / "model.safetensors")
    assert "the weights lack lm_head.weight, model.embed_tokens.weight, " in student(directory)
    assert "they hold other.lm_head.weight, " in student(directory)


@pytest.mark.parametrize("kept", ["same", "different", "one"])
def test_tied_weights_may_be_stored_twice_but_not_differ(tmp_path, kept):
    config = Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if kept != "one":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + float(
            kept == "different"
        )

    save_file(tensors, tmp_path / "model.safetensors")
    said = student(tmp_path)
    assert ("config.json ties lm_head.weight to model.embed_tokens.weight" in said) == (
        kept == "different"
    )
    assert bool(said) == (kept == "different")


def test_long_rotary_factors_are_refused_where_reached(tmp_path):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [16.0] * 8,
        "original_max_position_embeddings": 100,
    }
    config = Phi3Config(
        **SIZES,
        bos_token_id=1,
        original_max_position_embeddings=100,
        rope_parameters=rope,
    )
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    assert student(tmp_path, num_tokens=100) == ""
    assert "(longrope) changes above 100 tokens" in student(tmp_path, num_tokens=101)
    assert "is 101, and may be 100 at most" in student(tmp_path, num_tokens=101)


def test_experts_that_transformers_keeps_as_one_tensor_are_refused(tmp_path):
    config = Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    assert any(
        ".experts.3.down_proj." in name for name in load_file(tmp_path / "model.safetensors")
    )
    said = student(tmp_path)
    assert (
        "transformers keeps model.layers.0.mlp.experts.down_proj, "
        "model.layers.0.mlp.experts.gate_up_proj, " in said
    )
    words = "(fused experts, or weights under other names) can teach, and cannot be a student"
    assert words in said


def test_of_old_weights_only_names_are_unknown(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    assert models.read_tensors(directory, standard_names=True) is None


def test_weights_have_the_names_that_transformers_looks_for(directory):
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    models.require_model("teachers.t.model", directory, num_tokens=64)  # vLLM takes it

    with pytest.raises(
        ValueError, match=r"it has none of model\.safetensors, .*, but weights\.safetensors"
    ):
        models.read_tensors(directory, standard_names=True)


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["LlamaForCausalLM"], ""),
        (["Qwen2_5_VLForConditionalGeneration"], ""),
        (["SmolLM3ForCausalLM"], ""),
        (None, "names no architectures"),
        ([], "names no architectures"),
        (
            ["LlamaForSequenceClassification"],
            "names architecture LlamaForSequenceClassification; the installed vLLM",
        ),
        (["CLIPModel"], "which a teacher must be"),
        ([["x"]], "architectures must be names, has a list"),
        ([1], "architectures must be names, has the number 1"),
    ],
)
def test_a_teacher_is_a_language_model_that_vllm_knows(directory, architectures, message):
    edit(directory / "config.json", architectures=architectures)
    if not message:
        models.require_served("teachers.t.model", directory)
        return

    with pytest.raises(ConfigError, match=f"teachers.t.model: .*{message}"):
        models.require_served("teachers.t.model", directory)
