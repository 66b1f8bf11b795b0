"""Memory that the sender and the workers of its host share."""

import gc
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from eopd.weights.shared import SharedMemory, is_reachable, map_messages

SIZES = [100, 64, 7]


@pytest.fixture
def memory():
    memory = SharedMemory(SIZES)
    memory.mark("secret")
    memory.reserve()
    return memory


def test_what_the_sender_writes_is_what_a_worker_reads(memory):
    theirs = map_messages(memory.path, SIZES)
    for value in (1, 2):
        for index, message_B in enumerate(memory.reserve()):
            message_B.fill_(10 * value + index)

        assert [message_B.unique().tolist() for message_B in theirs] == [
            [10 * value + index] for index in range(3)
        ]

    assert [len(message_B) for message_B in theirs] == SIZES
    assert all(message_B.data_ptr() % 64 == 0 for message_B in theirs)


def test_what_is_no_memory_is_neither_waited_for_nor_read(tmp_path):
    """On another host the same path may lead to a pipe of somebody else."""
    reading, writing = os.pipe()
    os.write(writing, b"theirs")
    os.mkfifo(tmp_path / "fifo")
    for path in (f"/proc/self/fd/{reading}", tmp_path / "fifo", tmp_path, tmp_path / "none"):
        assert not is_reachable(str(path), "secret")

    assert os.read(reading, 100) == b"theirs"
    os.close(reading)
    os.close(writing)


def test_a_worker_of_another_process_reads_it(memory):
    memory.reserve()[1].fill_(7)
    program = (
        "from eopd.weights.shared import is_reachable, map_messages\n"
        f"assert is_reachable({memory.path!r}, 'secret')\n"
        f"print(map_messages({memory.path!r}, {SIZES})[1].sum().item())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(printed.stdout) == 7 * 64


def test_what_a_worker_writes_stays_its_own(memory):
    one, other = (map_messages(memory.path, SIZES)[0] for _ in range(2))
    memory.reserve()[0].fill_(1)
    one.fill_(9)
    assert memory.reserve()[0].unique().tolist() == [1]
    assert other.unique().tolist() == [1]


def test_a_path_leads_to_the_memory_only_with_the_mark_of_the_group(memory, tmp_path):
    assert is_reachable(memory.path, "secret")
    assert not is_reachable(memory.path, "of another group")
    assert not is_reachable(str(tmp_path / "none"), "secret")
    (tmp_path / "empty").touch()
    assert not is_reachable(str(tmp_path / "empty"), "secret")
    memory.mark("of another group")
    assert not is_reachable(memory.path, "secret")


def num_open(inode: int) -> int:
    """How many descriptors of this process are of a file."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # others come and go
            found.append(os.fstat(int(descriptor)).st_ino)

    return found.count(inode)


def test_a_map_outlives_the_sender_and_nothing_is_left_behind():
    memory = SharedMemory(SIZES)
    memory.reserve()[0].fill_(5)
    path, inode = memory.path, os.stat(memory.path).st_ino
    assert num_open(inode) == 2, "the file, and the sender's map of it"
    theirs = map_messages(path, SIZES)
    del memory
    gc.collect()
    assert theirs[0].unique().tolist() == [5]
    del theirs
    gc.collect()
    assert num_open(inode) == 0


def test_nothing_is_reserved_before_it_is_asked_for():
    memory = SharedMemory([1 << 40])
    assert os.stat(memory.path).st_size == 0
    memory.mark("secret")
    assert os.stat(memory.path).st_size == 64
    assert is_reachable(memory.path, "secret")
