"""Names of models and data sets: what is one, which files of it are needed, and how a run that goes
on keeps its commit. No Hub is asked.
"""

import errno
import os

import pytest

from eopd.config import Config, ConfigError, StudentConfig, dump_config, load_config
from eopd.config.names import DataName, ModelName
from eopd.hub.faults import told
from eopd.hub.models import model_directory, needed
from eopd.preflight import pin_model, pinned
from eopd.prompts.named import cached_data, pin_data

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("Qwen/Qwen3-8B", ModelName("Qwen/Qwen3-8B")),
        ("Qwen/Qwen2.5_x@v1.0", ModelName("Qwen/Qwen2.5_x", "v1.0")),
        ("a/b@refs/pr/1", ModelName("a/b", "refs/pr/1")),
        (f"a/b@{COMMIT}", ModelName("a/b", COMMIT)),
        ("gpt2", None),
        ("models/Qwen3-8B", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("../b", None),
        ("/a/b", None),
        ("~/b", None),
        ("a/b/", None),
        ("a/..", None),
        ("a/b@", None),
        ("a/b@x y", None),
        ("a b/c", None),
    ],
)
def test_a_name_is_two_words_and_anything_else_is_a_path(spec, name):
    assert ModelName.parse(spec) == name
    if name is not None:
        assert str(name) == spec


def test_a_path_that_exists_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert StudentConfig(model="org/name").model == "org/name"
    assert StudentConfig(model="./org/name").model == f"{tmp_path}/org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert StudentConfig(model="org/name").model == f"{tmp_path}/org/name"
    assert StudentConfig(model="org/name@main").model == "org/name@main"
    assert model_directory(f"{tmp_path}/org/name") == tmp_path / "org" / "name"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("gsm8k", DataName("gsm8k")),
        ("openai/gsm8k@v1", DataName("openai/gsm8k", "v1")),
        ("a/b:test", DataName("a/b", None, ("test",))),
        (
            f"a/b@{COMMIT}:main:train[:5%]",
            DataName(
                "a/b",
                COMMIT,
                ("main", "train[:5%]"),
            ),
        ),
        ("a/b@v1:train[10:20]", DataName("a/b", "v1", ("train[10:20]",))),
    ],
)
def test_a_data_set_has_a_revision_behind_its_name(spec, name):
    assert DataName.parse(spec) == name
    assert str(name) == spec
    assert name.split == (name.parts[-1] if name.parts else "train")
    assert name.subset == ("main" if len(name.parts) == 2 else None)


@pytest.mark.parametrize("spec", ["a@:train", "@v1", "a:b:c:d", "a@v1::train"])
def test_a_data_set_with_an_empty_part_is_refused(spec):
    with pytest.raises(ConfigError, match=r"DATA: .* must be NAME, .*NAME@REVISION"):
        pin_data("DATA", spec, {})


def test_a_full_disk_is_not_told_as_a_missing_network():
    message = r"^a/b: the cache .* cannot be read or written \(No space left on device\)$"
    with pytest.raises(ConfigError, match=message), told("a/b", "model", "a/b"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


SMALL = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
USELESS = [
    ".gitattributes",
    "README.md",
    "onnx/model.onnx",
    "original/model.safetensors",
    "flax_model.msgpack",
    "training_args.pt",
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (
            [*SHARDS, "model.safetensors.index.json", "pytorch_model.bin.index.json"],
            [*SHARDS, "model.safetensors.index.json"],
        ),
        (["a.safetensors", "pytorch_model.bin"], ["a.safetensors"]),
        (["pytorch_model.bin", "other.bin"], ["pytorch_model.bin"]),
        (
            ["pytorch_model-1.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"],
            ["pytorch_model-1.bin", "pytorch_model.bin.index.json"],
        ),
        (["model.gguf"], []),
    ],
)
def test_of_weights_in_several_formats_one_is_taken(there, taken):
    files = [*SMALL, *USELESS, "additional_chat_templates/rag.jinja", *there]
    small = sorted([*SMALL, "additional_chat_templates/rag.jinja"])
    assert needed(files, weights=True) == sorted([*small, *taken])
    assert needed(files, weights=False) == small


@pytest.fixture
def config(tmp_path) -> Config:
    (tmp_path / "c.yaml").write_text(
        "run: {name: x, batches: 1}\n"
        f"student: {{model: org/student@{COMMIT}}}\n"
        f"teachers: [{{model: org/teacher@{OTHER}}}]\n"
        f"prompts: {{data: 'org/data@{COMMIT}:main:train', held_out: rows.jsonl}}\n"
        "flow: {batch_prompts: 1}\n"
        "learner: {token_budget: 10000}\n"
        f"evaluation: {{benchmarks: [{{name: m, data: [b.jsonl, 'org/m@{COMMIT}']}}]}}\n"
    )
    return load_config(tmp_path / "c.yaml")


def test_a_pinned_config_is_loaded_as_it_was_written(config, tmp_path):
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert f"model: org/student@{COMMIT}\n" in dump_config(config)


def test_a_name_without_revision_keeps_the_commit_of_the_run_that_goes_on(config, monkeypatch):
    downloaded = []
    monkeypatch.setattr(
        "eopd.preflight.pinning.model_directory",
        lambda spec, weights: downloaded.append((spec, weights)),
    )
    student = config.student.model_copy(update={"model": "org/student"})
    (teacher,) = config.teachers
    teacher = teacher.model_copy(update={"model": "org/teacher"})
    (part,) = config.prompts.data
    part = part.model_copy(update={"data": "org/data:main:train"})
    prompts = config.prompts.model_copy(update={"data": (part,)})
    (benchmark,) = config.evaluation.benchmarks
    one, two = benchmark.data
    data = (one, two.model_copy(update={"data": "org/m"}))
    benchmark = benchmark.model_copy(update={"data": data})
    evaluation = config.evaluation.model_copy(update={"benchmarks": (benchmark,)})
    bare = config.model_copy(
        update={
            "student": student,
            "teachers": (teacher,),
            "prompts": prompts,
            "evaluation": evaluation,
        }
    )

    assert pinned(bare, config) == config
    assert downloaded == [(f"org/student@{COMMIT}", True), (f"org/teacher@{OTHER}", True)]


def test_a_commit_that_is_named_is_not_replaced(monkeypatch):
    monkeypatch.setattr("eopd.preflight.pinning.model_directory", lambda spec, weights: None)
    before = {"MODEL": f"org/name@{COMMIT}", "DATA": f"org/data@{COMMIT}"}
    assert (
        pin_model(
            "MODEL",
            f"org/name@{OTHER}",
            before,
            weights=True,
        )
        == f"org/name@{OTHER}"
    )
    assert (
        pin_data(
            "DATA",
            f"org/data@{OTHER}:train",
            before,
        )
        == f"org/data@{OTHER}:train"
    )


@pytest.mark.parametrize("spec", ["/a/rows.jsonl", "rows.csv", "./folder", "/a/folder:train"])
def test_files_and_directories_of_rows_are_not_looked_up(spec):
    assert pin_data("DATA", spec, {}) == spec


def test_a_directory_of_rows_wins_over_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "rows").mkdir(parents=True)
    assert pin_data("DATA", "org/rows:train", {}) == "org/rows:train"


def test_a_file_with_a_split_behind_it_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"a file has no splits; write data/rows\.jsonl"):
        cached_data("prompts.data", "data/rows.jsonl:train")
