"""What is said where a disk does not take a file: of space where it is full, and of rights otherwise."""

import errno
import os

import pytest

from eopd.cli.paths import blame_user
from eopd.config import ConfigError
from eopd.run import storage
from eopd.run.storage import StorageError, write_whole


def refused(number):
    return OSError(number, os.strerror(number))


def test_space_is_advised_where_it_is_short(tmp_path):
    full = str(StorageError.of(tmp_path / "f", refused(errno.ENOSPC), "Continue."))
    assert full.startswith(
        f"{tmp_path}/f could not be written: [Errno 28] No space left on device; "
    )
    assert full.endswith(" bytes were free there: free some space. Continue.")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_rights_are_advised_where_they_are_missing(tmp_path, number):
    closed = str(StorageError.of(tmp_path / "f", refused(number), "Continue."))
    assert closed.endswith(f"{os.strerror(number)}; look at who may write there. Continue.")


def test_a_disk_that_is_away_is_not_said_to_be_full(tmp_path, monkeypatch):
    away = str(StorageError.of(tmp_path / "f", refused(errno.EIO), "Continue."))
    assert " Input/output error; look at that disk; " in away
    assert away.endswith(" bytes were free there. Continue.")

    def gone(path):
        raise refused(errno.ESTALE)

    monkeypatch.setattr(storage.shutil, "disk_usage", gone)
    stale = str(StorageError.of(tmp_path / "f", refused(errno.ESTALE), "Continue."))
    assert stale.endswith("an unknown number of bytes were free there. Continue.")


def test_a_file_that_a_command_cannot_write_is_a_mistake_of_its_path(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"gone/\.stop.json.partial: No such file"),
        blame_user(tmp_path),
    ):
        write_whole(tmp_path / "gone" / "stop.json", "{}")
