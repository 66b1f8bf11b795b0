"""An exported student: its own weights and config, and everything else as it was given."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eopd.config import StudentConfig
from eopd.learner.export import export_checkpoint, write_student
from eopd.learner.student import load_student
from eopd.models.tiny import build_model, train_tokenizer, write_model


@pytest.fixture
def source(tmp_path):
    tokenizer = train_tokenizer(["a few words to cut into pieces"], 280)
    return write_model(
        tmp_path / "source",
        build_model("qwen3", tokenizer, seed=0),
        tokenizer,
    )


def export(source, target):
    student = load_student(
        StudentConfig(model=source, dtype="float32"), activation_checkpointing=False
    )
    weights = {name: tensor + 1.0 for name, tensor in student.model.state_dict().items()}
    write_student(target, student.model, weights, source=source)
    return weights


@pytest.mark.parametrize(
    "given",
    [
        None,
        # transformers won't write it
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 0]},
        {"eos_token_id": 2, "of_a_later_version": {"x": 1}},
    ],
)
def test_the_generation_config_is_the_one_that_was_given(source, tmp_path, given):
    path = source / "generation_config.json"
    path.unlink()
    if given is not None:
        path.write_text(json.dumps(given, indent=7))

    weights = export(source, tmp_path / "hf")
    written = tmp_path / "hf" / "generation_config.json"
    assert written.exists() == path.exists()
    if given is not None:
        assert written.read_bytes() == path.read_bytes()

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_an_adapter_is_exported_only_beside_the_model_that_it_fits(source, tmp_path):
    """The merged model is of the checkpoint's own weights, whatever became of the directory."""
    student = StudentConfig.model_validate(
        {"model": str(source), "dtype": "float32", "lora": {"rank": 2}}
    )
    loaded = load_student(student, activation_checkpointing=False)
    states = tmp_path / "learner" / "deepspeed" / "mp_rank_00_model_states.pt"
    states.parent.mkdir(parents=True)
    torch.save({"module": loaded.state_dict()}, states)
    told = []
    export_checkpoint(student, tmp_path / "learner", tmp_path / "first", told.append)
    assert told == [] and (tmp_path / "first-adapter" / "adapter_model.safetensors").exists()

    tokenizer = AutoTokenizer.from_pretrained(source)
    write_model(source, build_model("qwen3", tokenizer, seed=1), tokenizer)
    export_checkpoint(student, tmp_path / "learner", tmp_path / "second", told.append)
    assert told == [f"the adapter is left out: {source} holds other weights than it was trained on"]
    assert not (tmp_path / "second-adapter").exists()
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_weights_may_be_read_by_whoever_may_read_the_rest(source, tmp_path):
    export(source, tmp_path / "hf")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_tokenizer_and_templates_are_the_ones_that_were_given(source, tmp_path):
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    settings = source / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"of_a_later_version": 1}))
    (source / "training_args.bin").write_text("of another training")
    (source / "README.md").write_text("of another model")
    export(source, tmp_path / "hf")

    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()

    assert not (tmp_path / "hf" / "training_args.bin").exists()
    assert not (tmp_path / "hf" / "README.md").exists()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
