"""The file by which Prometheus finds a run: what is in it, and when it is there."""

import json
import os
import socket
from pathlib import Path

import pytest

from eopd.config import ConfigError
from eopd.telemetry.discovery import announced, require_discovery

RUN = Path("/runs/math")


def read(folder: Path) -> dict[str, object]:
    (file,) = folder.glob("*.json")
    (target,) = json.loads(file.read_text())
    assert isinstance(target, dict)
    return target


def test_a_file_has_the_target_while_the_block_runs(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "targets"
    with announced(folder, "127.0.0.1:9400", RUN, {"run": "math"}):
        assert read(folder) == {
            "targets": ["127.0.0.1:9400"],
            "labels": {"run": "math", "node": socket.gethostname()},
        }

    assert list(folder.iterdir()) == []


def test_every_user_may_read_the_file_as_the_one_of_prometheus_must(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with announced(tmp_path, "127.0.0.1:9400", RUN, {"run": "r"}):
            (path,) = tmp_path.glob("*.json")
            assert path.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_the_file_of_a_process_that_failed_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), announced(tmp_path, "a:1", RUN, {}):
        raise RuntimeError

    assert read(tmp_path)["targets"] == ["a:1"]


def test_a_file_that_was_left_is_replaced_and_that_of_another_run_of_the_name_is_not(
    tmp_path: Path,
) -> None:
    with announced(tmp_path, "127.0.0.1:1", RUN, {"run": "math"}):
        (file,) = tmp_path.iterdir()
        left = file.read_bytes()

    file.write_bytes(left)  # as after a kill
    with (
        announced(tmp_path, "127.0.0.1:2", RUN, {"run": "math"}),
        announced(tmp_path, "127.0.0.1:3", Path("/elsewhere/math"), {"run": "math"}),
    ):
        files = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
        assert sorted(target["targets"][0] for (target,) in files) == ["127.0.0.1:2", "127.0.0.1:3"]


@pytest.mark.parametrize(
    ("served", "written"),
    [
        ("0.0.0.0:9400", f"{socket.gethostname()}:9400"),
        (":::9400", f"{socket.gethostname()}:9400"),
        ("::1:9400", "[::1]:9400"),
        ("head:9400", "head:9400"),
    ],
)
def test_an_address_that_is_no_address_becomes_the_machines_name(
    tmp_path: Path, served: str, written: str
) -> None:
    with announced(tmp_path, served, RUN, {}):
        assert read(tmp_path)["targets"] == [written]


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    with announced(None, "a:1", RUN, {}):
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"telemetry.discovery: .*/file/below takes no files"):
        require_discovery(tmp_path / "file" / "below")

    require_discovery(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []
