"""A function runs in processes of its own, which are limited in time.

What a user wrote, or a library that may take for ever, must not hold up an engine. A function is
asked by its import path (``eopd/plugins.py``); whatever becomes of it is a value. That no process
can be started is the machine's fault, and an error.

    FunctionPool ──▶ FunctionProcess ── pickled arguments ─▶ child: _serve ──▶ the function
                                     ◀── a line of JSON ───

Time is CPU time first: SIGPROF keeps its default action, so that the kernel ends the child at the
limit, whatever it is doing, and a busy machine changes no answer. A function that waits uses no
CPU, so there is a second limit by the clock. The next question starts a new child.
"""

import asyncio
import contextlib
import inspect
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BufferedRWPair
from typing import Final, cast

from eopd.config import ConfigError
from eopd.plugins import cause_of, load, search_path

CPU_LIMIT_S: Final = 10.0
CLOCK_LIMIT_S: Final = 120.0
SIDE_BY_SIDE: Final = 8  # calls at a time; a function may wait for somebody else
_CLOSE_S: Final = 5.0
_LONGEST_CAUSE: Final = 500
_CHILD: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from eopd.rewards.process import _serve; _serve()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A function that is asked, by its import path.

    ``kind`` is one of the Protocols of ``eopd/plugins.py``, and ``key`` the key of the config that
    names the function. ``clock_limit_s`` is the time that it has to take a question, and then to
    answer it.
    """

    key: str
    function: str
    kind: type
    options: Mapping[str, object] = field(default_factory=dict)
    cpu_limit_s: float = CPU_LIMIT_S
    clock_limit_s: float = CLOCK_LIMIT_S


@dataclass(frozen=True, slots=True)
class Returned:
    """A function returned a value: a number, text, true, false or None."""

    value: object


@dataclass(frozen=True, slots=True)
class Failed:
    """A function gave no answer. ``cause`` names it, and says why."""

    cause: str
    timed_out: bool = False


class FunctionProcess:
    """A function process is a child that calls one function. It is started when it is first
    needed, and again after it died. It is asked by one thread at a time.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: BufferedRWPair  # to the process and from it, while there is one

    def ask(self, *arguments: object) -> Returned | Failed:
        """Calls the function.

        Raises:
            ConfigError: as ``start``.
        """
        self.start()

        # a child that died while it was idle gives no reply either
        reply = self._exchange(arguments)
        if isinstance(reply, Failed):
            return reply

        if "failed" in reply:
            return Failed(f"{self._asked.function}: {reply['failed']}")

        return Returned(reply["value"])

    def start(self) -> None:
        """Starts the child where there is none.

        Raises:
            ConfigError: the function cannot be loaded there, or the machine takes no more processes
                or files.
        """
        asked = self._asked
        if self._process is not None:
            return

        # A session of its own: Ctrl-C in the terminal is for the parent, whose end closes the
        # stream. -P: no module of the working directory stands in for one of Python's.
        try:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.settimeout(asked.clock_limit_s)
                self._stream = ours.makefile("rwb")
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _CHILD, json.dumps(search_path())],
                    stdin=theirs.fileno(),
                    stdout=2,  # what the function prints
                    start_new_session=True,
                )
        except OSError as error:
            raise ConfigError(
                f"{asked.key}: {asked.function}: its process cannot be started: {error}"
            ) from None

        reply = self._exchange(asked)
        if isinstance(reply, Failed):
            raise ConfigError(f"{asked.key}: {reply.cause}, at its start")

        if "failed" in reply:
            self.close()
            raise ConfigError(str(reply["failed"]))

    def kill(self) -> None:
        """Ends the child and whatever it started, at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the child, which stops at the end of its input."""
        if self._process is None:
            return

        with contextlib.suppress(OSError):  # a question that was not sent
            self._stream.close()

        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

        self._process = None

    def _exchange(self, message: object) -> dict[str, object] | Failed:
        """Sends a message; returns the reply, or why there is none."""
        try:
            self._stream.write(pickle.dumps(message))
            self._stream.flush()
            line = self._stream.readline()
        except TimeoutError:
            self.kill()
            return self._ended(f"did not return within {self._asked.clock_limit_s:g} s")
        except OSError:  # the child is gone
            line = b""

        return cast(dict[str, object], json.loads(line)) if line else self._ended()

    def _ended(self, why: str = "") -> Failed:
        """Takes leave of a child that gave no reply; returns why, which ``why`` knows better."""
        asked, process = self._asked, self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CLOSE_S)  # it may have closed its output, and go on

        self.kill()  # also what it started
        code = process.wait()
        self.close()
        if not why and code == -signal.SIGPROF:
            why = f"used more than {asked.cpu_limit_s:g} s of CPU"

        cause = why or f"its process ended with code {code}"
        return Failed(f"{asked.function}: {cause}", timed_out=bool(why))


def ask_once(asked: Asked, *arguments: object) -> Returned | Failed:
    """Calls a function in a process that ends with the call.

    Raises:
        ConfigError: the function cannot be loaded there, or the process not be started.
    """
    with contextlib.closing(FunctionProcess(asked)) as process:
        process.start()
        return process.ask(*arguments)


class FunctionPool:
    """A function pool asks one function in as many processes as are busy at a time, up to
    ``SIDE_BY_SIDE``. The first is started at once.

    Raises:
        ConfigError: the function cannot be loaded.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._threads = ThreadPoolExecutor(max_workers=SIDE_BY_SIDE)
        self._all = [FunctionProcess(asked)]
        self._idle = list(self._all)
        self._all[0].start()

    async def ask(self, *arguments: object) -> Returned | Failed:
        """Calls the function, off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._ask, arguments)

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        for process in self._all:
            process.kill()

        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.close()

    def _ask(self, arguments: tuple[object, ...]) -> Returned | Failed:
        try:
            process = self._idle.pop()
        except IndexError:
            process = FunctionProcess(self._asked)
            self._all.append(process)

        try:
            return process.ask(*arguments)
        except ConfigError as error:  # another one was started, before
            return Failed(str(error))
        finally:
            self._idle.append(process)


def _serve() -> None:
    """Runs the child: it reads what to ask, then arguments again and again, and writes a line of
    JSON for each, until the input ends.
    """
    with socket.socket(fileno=os.dup(0)) as own:
        stream = own.makefile("rwb")

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the function reads is no question
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()

    def reply(**answer: object) -> None:
        stream.write(json.dumps(answer).encode() + b"\n")
        stream.flush()

    asked = cast(Asked, pickle.load(stream))
    try:
        function = load(asked.key, asked.function, asked.kind, asked.options)
    except ConfigError as error:
        return reply(failed=str(error))

    reply()
    with asyncio.Runner() as runner:
        while True:
            try:
                arguments = pickle.load(stream)
            except EOFError:
                return None

            signal.setitimer(signal.ITIMER_PROF, asked.cpu_limit_s)
            answer = _answer(function, arguments, runner)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            reply(**answer)


def _end_with(parent: int) -> None:
    """Ends this process, and what it started, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)

    os.killpg(0, signal.SIGKILL)


def _answer(
    function: Callable[..., object], arguments: tuple[object, ...], runner: asyncio.Runner
) -> dict[str, object]:
    async def awaited(value: Awaitable[object]) -> object:
        return await value

    try:
        value = function(*arguments)
        if inspect.isawaitable(value):
            value = runner.run(awaited(value))

        value = value.item() if hasattr(value, "item") else value  # of numpy or torch
    except BaseException as error:  # noqa: BLE001 - a user's function raises what it likes
        return {"failed": cause_of(error)[:_LONGEST_CAUSE]}

    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return {"failed": "returned a whole number beyond all others that are finite"}

    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}

    return {"failed": f"returned {type(value).__name__}"}
