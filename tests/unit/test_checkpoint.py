"""A checkpoint is whole or none: on a disk that is full, after a kill, and when a file of it is cut
short later.

A full disk is played by the kernel's limit on the size of a file, which fails a write as a disk
does: with a part of it written.
"""

import asyncio
import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import fakes
import pytest

from eopd.run.checkpoint import (
    DIGEST_BYTES,
    DriverState,
    broken_checkpoints,
    fault,
    list_checkpoints,
    write_checkpoint,
)
from eopd.run.storage import StorageError, write_whole

FILES = ("learner/big", "learner/deep/small", "state.json", "manifest.json")


async def save(directory: Path) -> None:
    (directory / "deep").mkdir(parents=True)
    (directory / "big").write_bytes(b"w" * (DIGEST_BYTES + 1))
    (directory / "deep" / "small").write_bytes(b"small")


def write(root: Path, *steps: int, keep_last: int = 9, save=fakes.save_weights) -> None:
    for step in steps:
        state = fakes.driver_state(step)
        asyncio.run(write_checkpoint(root, state, save, keep_last=keep_last))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def whole(root: Path) -> list[str]:
    return [path.name for path in list_checkpoints(root)]


@contextmanager
def files_of_at_most(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_newest_checkpoints_are_kept_and_read_back(tmp_path):
    write(tmp_path, 1, 2, 3, keep_last=2, save=save)
    assert names(tmp_path) == whole(tmp_path) == ["step-000002", "step-000003"]
    assert DriverState.read(list_checkpoints(tmp_path)[-1]) == fakes.driver_state(3)
    assert (tmp_path / "step-000003/learner/deep/small").read_text() == "small"
    assert set(json.loads((tmp_path / "step-000003/manifest.json").read_text())["files"]) == set(
        FILES[:3]
    )


def test_the_step_is_a_number_also_beyond_six_digits(tmp_path):
    write(tmp_path, 999_999, 1_000_000, keep_last=1)
    assert whole(tmp_path) == ["step-1000000"]


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_file_cut_short_or_gone_is_none(tmp_path, name):
    write(tmp_path, 1, 2, save=save)
    damaged = tmp_path / "step-000002" / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    cut = fault(damaged.parents[len(Path(name).parts) - 1])
    assert whole(tmp_path) == ["step-000001"]
    assert list(broken_checkpoints(tmp_path)) == [tmp_path / "step-000002"]
    damaged.unlink()
    gone = fault(tmp_path / "step-000002")
    assert whole(tmp_path) == ["step-000001"]
    if name == "manifest.json":
        assert cut == "manifest.json is not what was written"
        assert gone == "manifest.json cannot be read (No such file or directory)"
    else:
        assert cut == f"{name} has {len(content) - 1} bytes instead of {len(content)}"
        assert gone == f"{name} is missing"

    damaged.write_bytes(content)
    assert whole(tmp_path) == ["step-000001", "step-000002"]


def test_no_beginning_of_a_manifest_is_one(tmp_path):
    write(tmp_path, 1)
    manifest = tmp_path / "step-000001/manifest.json"
    text = manifest.read_bytes()
    for length in range(len(text)):
        manifest.write_bytes(text[:length])
        assert fault(tmp_path / "step-000001") == "manifest.json is not what was written"


def test_small_files_are_known_by_their_bytes(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-000001/.learner.universal").mkdir()
    assert whole(tmp_path) == ["step-000001"]
    (tmp_path / "step-000001/learner/weights").write_bytes(b"v")
    assert fault(tmp_path / "step-000001") == "learner/weights has other bytes than were written"


@pytest.mark.parametrize(
    ("limit", "save", "what"),
    [
        (DIGEST_BYTES, save, "the learner's part"),
        (100, fakes.save_weights, "state.json"),
        (250, fakes.save_weights, "manifest.json"),
    ],
)
def test_on_a_full_disk_the_old_checkpoint_stays_and_is_the_one(tmp_path, limit, save, what):
    write(tmp_path, 1)
    with files_of_at_most(limit), pytest.raises(StorageError) as caught:
        write(tmp_path, 2, keep_last=1, save=save)

    assert names(tmp_path) == whole(tmp_path) == ["step-000001"], what
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}/step-000002 could not be written: [Errno 27] File too large; "
    )
    assert "bytes were free there: free some space. step-000001 is whole and kept" in message
    assert message.endswith("continue from it with --resume.")


def test_a_full_disk_without_a_checkpoint_says_to_start_again(tmp_path):
    async def on_a_full_device(directory):
        Path("/dev/full").write_bytes(b"w")

    with pytest.raises(
        StorageError,
        match=r"\[Errno 28\] No space left on device; .*There is no older checkpoint\.",
    ):
        write(tmp_path / "new", 2, save=on_a_full_device)

    assert names(tmp_path / "new") == []


def test_what_an_actor_raised_is_told_without_its_traceback(tmp_path):
    from ray.exceptions import RayTaskError

    async def remote(directory):
        raise RayTaskError(
            "save",
            "Traceback: many lines",
            OSError(28, "No space left"),
        ).as_instanceof_cause()

    with pytest.raises(
        StorageError, match=r"written: \[Errno 28\] No space left; [\d,]+ bytes were free"
    ):
        write(tmp_path, 1, save=remote)


@pytest.mark.parametrize(
    "error",
    [
        ArithmeticError("no number"),
        asyncio.CancelledError(),
    ],
)
def test_what_is_not_the_disk_s_comes_out_as_it_is(tmp_path, error):
    async def broken(directory):
        await save(directory)
        raise error

    with pytest.raises(type(error)):
        write(tmp_path, 1, save=broken)

    assert names(tmp_path) == []


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor):
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, to: (seen.append("rename"), rename(self, to)),
    )
    write(tmp_path / "checkpoints", 1, save=save)
    partial = "checkpoints/.step-000001.partial"
    assert seen[-2:] == ["rename", "checkpoints"]
    assert set(seen[:3]) == {f"{partial}/{name}" for name in FILES[:3]}
    assert seen[3] == f"{partial}/manifest.json"
    assert set(seen[4:-2]) == {partial, f"{partial}/learner", f"{partial}/learner/deep"}


def test_only_whole_checkpoints_count_as_kept(tmp_path):
    write(tmp_path, 1, 2, 5)
    # the run went back to 2, and has now come to 3
    (tmp_path / "step-000005/state.json").write_text("{}")
    write(tmp_path, 3, keep_last=2)
    assert whole(tmp_path) == ["step-000002", "step-000003"]
    # not this run's to remove before it has a whole one of its own
    assert names(tmp_path)[-1] == "step-000005"
    write(tmp_path, 4, 5, keep_last=1)
    assert names(tmp_path) == whole(tmp_path) == ["step-000005"]


def test_the_one_just_written_is_kept_also_where_newer_ones_lie(tmp_path):
    write(tmp_path, 2, 5)
    write(tmp_path, 3, keep_last=1)
    assert whole(tmp_path) == ["step-000003", "step-000005"]


def test_a_broken_one_before_the_kept_goes_too(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "step-000001/state.json").unlink()
    write(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_what_a_killed_driver_left_is_removed_by_the_next_save(tmp_path):
    (tmp_path / ".step-000007.partial/learner").mkdir(parents=True)
    write(tmp_path, 8)
    assert names(tmp_path) == ["step-000008"]


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_whole(path, "old")

    with (
        files_of_at_most(100),
        pytest.raises(StorageError, match=r"summary.json could not be written: .* --resume"),
    ):
        write_whole(path, "n" * 101)

    assert path.read_text() == "old"
    assert names(tmp_path) == ["summary.json"]
    with pytest.raises(StorageError, match=r"gone/too/summary.json could not be written"):
        write_whole(tmp_path / "gone" / "too" / "summary.json", "new")

    write_whole(path, "new")
    assert path.read_text() == "new"
