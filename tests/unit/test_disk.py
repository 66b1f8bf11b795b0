"""Whether checkpoints fit the disk is known before a run starts."""

import math
from types import SimpleNamespace

import fakes
import pytest
from safetensors import safe_open

from eopd.config import ConfigError, load_config
from eopd.preflight import disk
from eopd.preflight.disk import checkpoint_bytes, disk_notes, require_disk
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
    def leave(number):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=number))

    return leave


@pytest.mark.parametrize(
    ("student", "of_parameter"),
    [
        ("student.dtype=float32", 4 + 8),
        ("student.dtype=bfloat16", 2 + 8 + 4),
        ("student.lora={rank: 4}", 4),
    ],
)
def test_a_checkpoint_has_weights_moments_and_masters(
    config, num_parameters, student, of_parameter
):
    found = checkpoint_bytes(config("student.dtype=float32", student))
    assert found == of_parameter * num_parameters


def test_a_run_is_refused_before_it_starts_where_no_checkpoint_fits(config, free):
    asked = config("checkpoint.keep_last=2")
    size = checkpoint_bytes(asked)
    free(size - 1)
    message = r"run.directory: .* are free where .*/runs/r lies, and one checkpoint .* or more"
    for check in (require_disk, lambda config: take_up(config, {})):
        with pytest.raises(ConfigError, match=message):
            check(asked)

    free(size)
    take_up(asked, {})
    (note,) = disk_notes(asked)
    assert note.startswith("checkpoint.keep_last: 3 checkpoints, the newest beside those")
    free(3 * size)
    assert list(disk_notes(asked)) == []


def test_a_student_whose_files_do_not_say_its_size_is_left_to_others(config, tmp_path, free):
    free(0)
    (tmp_path / "empty").mkdir()
    require_disk(config(f"student.model={tmp_path}/empty"))
