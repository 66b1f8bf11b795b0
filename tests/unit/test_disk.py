"""Whether checkpoints fit the disk is known before a run starts."""

import json
import math
import shutil
from types import SimpleNamespace

import fakes
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from eopd.config import ConfigError, load_config
from eopd.preflight.disk import disk_notes, least_bytes, require_disk
from eopd.run.directory import RunDirectory
from eopd.runtime.resume import take_up


@pytest.fixture
def config(tmp_path, checked_model):
    path = fakes.write_whole_config(tmp_path, checked_model)
    return lambda *overrides: load_config(path, overrides)


@pytest.fixture
def num_parameters(checked_model):
    with safe_open(checked_model / "model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


@pytest.fixture
def free(monkeypatch):
    def leave(number, total=1):
        usage = SimpleNamespace(free=number, total=total)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return leave


@pytest.mark.parametrize(
    ("student", "of_parameter"),
    [
        ("student.dtype=float32", 4 + 8),
        ("student.dtype=bfloat16", 4 + 8),
        ("student.lora={rank: 4}", 4),
    ],
)
def test_a_checkpoint_has_weights_and_moments(config, num_parameters, student, of_parameter):
    found = least_bytes(config("student.dtype=float32", student))
    assert found == of_parameter * num_parameters


def test_a_tied_head_that_a_file_holds_twice_counts_once(config, tmp_path, checked_model):
    student = tmp_path / "student"
    shutil.copytree(checked_model, student)
    tensors = load_file(student / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    assert json.loads((student / "config.json").read_text())["tie_word_embeddings"]
    assert least_bytes(config(f"student.model={student}")) == least_bytes(config())


def test_a_run_is_refused_before_it_starts_where_no_checkpoint_fits(config, free):
    asked = config("checkpoint={keep_last: 2, every: 10}", "run.batches=30")
    size = least_bytes(asked)
    free(size - 1)
    message = r"run.directory: .* are free where .*/runs/r lies, and one checkpoint .* or more"
    for check in (require_disk, lambda config: take_up(config, {})):
        with pytest.raises(ConfigError, match=message):
            check(asked)

    free(size)
    take_up(asked, {})
    (note,) = disk_notes(asked)
    assert note.startswith("checkpoint.keep_last: the 3 checkpoints that lie there at a time take ")
    assert list(disk_notes(config("checkpoint.every=50", "run.batches=30"))) == []
    free(3 * size)
    assert list(disk_notes(asked)) == []


def test_a_run_that_goes_on_and_a_disk_that_says_nothing_are_not_refused(config, free):
    asked = config()
    free(0)
    directory = RunDirectory.create(asked)
    directory.metrics.write_text('{"step": 1}\n')
    require_disk(asked)
    assert list(disk_notes(asked)) == []
    free(0, total=0)
    require_disk(config("run.name=other"))


def test_a_student_whose_files_do_not_say_its_size_is_left_to_others(config, tmp_path, free):
    free(0)
    (tmp_path / "empty").mkdir()
    require_disk(config(f"student.model={tmp_path}/empty"))
