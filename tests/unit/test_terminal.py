"""What a command says, where nobody takes it."""

import io
import logging
import os
import subprocess
import sys

import pytest

from eopd.cli.terminal import Lasting, write_anything


def closed_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def full_disk() -> io.TextIOWrapper:
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


@pytest.mark.parametrize("made", [closed_pipe, full_disk])
@pytest.mark.parametrize("size", [7, 100_000])  # in a flush, and in the writing itself
def test_a_stream_that_nobody_reads_ends_nothing_and_is_told_once(made, size, caplog):
    with made() as stream, caplog.at_level(logging.WARNING):
        lasting = Lasting(stream)
        for _ in range(3):
            assert lasting.write("x" * size) == size
            lasting.flush()

        assert lasting.fileno() == stream.fileno() and lasting.encoding == stream.encoding

    (record,) = caplog.records
    assert "takes nothing more" in record.getMessage()


def test_where_nobody_handles_logs_a_closed_pipe_ends_nothing_either():
    program = (
        "import sys\n"
        "from eopd.cli.terminal import outlive_readers\n"
        "outlive_readers()\n"
        "for _ in range(3):\n"
        "    print('x', file=sys.stderr, flush=True)\n"
        "print('went on', flush=True)\n"
    )
    with closed_pipe() as stderr:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=stderr, text=True
        )

    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_stream_that_is_read_says_everything(tmp_path):
    with (tmp_path / "out").open("w") as stream:
        lasting = Lasting(stream)
        print("step 1", file=lasting, flush=True)

    assert (tmp_path / "out").read_text() == "step 1\n"


def test_what_an_encoding_lacks_is_a_question_mark(monkeypatch):
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding="ascii"))

    write_anything()
    sys.stdout.write("0.5 \u00b1 0.1")
    sys.stdout.flush()
    assert written.getvalue() == b"0.5 ? 0.1"


@pytest.mark.parametrize(("columns", "kept"), [("0", None), ("100", "100")])
def test_a_terminal_without_columns_has_the_usual_number(monkeypatch, columns, kept):
    monkeypatch.setenv("COLUMNS", columns)
    write_anything()
    assert os.environ.get("COLUMNS") == kept
