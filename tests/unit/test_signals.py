"""Which signals end a run softly, and who else sees them."""

import asyncio
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from eopd.config import ConfigError
from eopd.run import stopping
from eopd.run.lock import held, last_holder
from eopd.runtime import signals
from eopd.runtime.signals import (
    ASK_TO_END,
    OF_THE_DRIVER,
    Interruption,
    Requests,
    caught,
    ignored_by_children,
    obeyed,
    require_main_thread,
)


async def test_a_request_to_stop_that_cannot_be_removed_yet_is_heard_later(tmp_path, monkeypatch):
    def stale(directory):
        raise OSError(116, "Stale file handle")

    interruption = Interruption()
    monkeypatch.setattr(signals, "POLL_S", 0.01)
    with held(tmp_path), obeyed(tmp_path, interruption, asyncio.create_task(asyncio.sleep(9))):
        with monkeypatch.context() as patch:
            patch.setattr(stopping, "withdraw", stale)
            stopping.ask_to_stop(tmp_path, last_holder(tmp_path), now=False)
            await asyncio.sleep(0.1)
            assert not interruption.requested

        await asyncio.sleep(0.1)
        assert interruption.requested and stopping.is_taken(tmp_path)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGUSR1,
    ],
)
async def test_every_signal_that_asks_to_end_is_taken_softly_first(number):
    taken = []
    with caught(lambda kind: not taken.append(kind), asyncio.current_task()):
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)

    assert taken == [number]


@pytest.mark.parametrize("number", ASK_TO_END)
async def test_where_nothing_can_end_softly_the_run_is_cancelled(number):
    async def main():
        with caught(lambda kind: False, asyncio.current_task()):
            os.kill(os.getpid(), number)
            await asyncio.sleep(10)

    with pytest.raises(asyncio.CancelledError):
        await main()


async def test_the_first_signal_ends_softly_where_the_run_can_and_the_second_at_once():
    messages, closed = [], []
    interruption = Interruption()
    interruption.say = messages.append

    async def close():
        closed.append(True)

    with interruption.ends_softly(close):
        assert interruption.take() and interruption.requested
        await asyncio.sleep(0)
        assert closed == [True]
        assert not interruption.take()

    assert messages == [
        "stopping after the step under way, with a checkpoint; once more to stop at once",
        "stopping now",
    ]


async def test_a_signal_that_comes_in_two_ways_is_one_request(monkeypatch):
    """Ray sends SIGTERM to a sweep and to its runs, and the sweep then SIGINT to its runs."""
    messages = []
    interruption = Interruption()
    interruption.say = messages.append

    async def close():
        pass

    def both():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)

    async def main():
        with (
            caught(interruption.take, asyncio.current_task()),
            interruption.ends_softly(close),
        ):
            both()
            await asyncio.sleep(0.1)
            assert len(messages) == 1 and messages[0].startswith("stopping after the step")
            both()
            await asyncio.sleep(10)

    with pytest.raises(asyncio.CancelledError):
        await main()

    assert messages[1:] == ["stopping now"]


def test_who_is_in_a_hurry_repeats_the_same_or_comes_later(monkeypatch):
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    term, ctrl_c, usr1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
    for kinds, count in [
        ([ctrl_c, ctrl_c], [True, True]),
        ([None, None], [True, True]),  # of `eopd stop`
        ([term, ctrl_c, term, ctrl_c], [True, False, True, False]),
        ([None, ctrl_c, ctrl_c], [True, False, True]),
    ]:
        requests = Requests()
        assert [requests.add(kind) for kind in kinds] == count

    requests = Requests()
    assert requests.add(usr1)  # of Slurm, before the time is up
    now += signals.ECHO_S
    assert requests.add(term)  # and when it is up


async def test_outside_of_what_ends_softly_the_first_signal_stops_at_once():
    messages = []
    interruption = Interruption()
    interruption.say = messages.append

    async def close():
        pytest.fail("closed what had ended")

    with interruption.ends_softly(close):
        pass

    assert not interruption.take() and messages == ["stopping now"]


async def test_a_job_in_the_background_of_a_script_can_be_interrupted():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    taken = []
    try:
        with caught(lambda kind: not taken.append(True), asyncio.current_task()):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.05)
    finally:
        signal.signal(signal.SIGINT, before)

    assert taken == [True]


async def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with caught(lambda kind: pytest.fail("taken"), asyncio.current_task()):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.05)

        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_started_within_ignore_the_driver_s_signals():
    tell = (
        "import signal; print(*(signal.getsignal(n).name for n in (signal.SIGHUP, "
        "signal.SIGUSR1, signal.SIGTERM)))"
    )
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {tell!r}])"

    with ignored_by_children():
        within = subprocess.run(
            [sys.executable, "-c", nested],
            capture_output=True,
            text=True,
            check=True,
        )

    assert within.stdout.split() == ["SIG_IGN", "SIG_IGN", "SIG_DFL"]
    assert all(signal.getsignal(number) is signal.SIG_DFL for number in OF_THE_DRIVER)


def test_a_run_is_refused_where_it_can_take_no_signals():
    with ThreadPoolExecutor(1) as threads:
        refused = threads.submit(require_main_thread).exception()

    assert isinstance(refused, ConfigError)
    assert "main thread" in str(refused)
    require_main_thread()


async def test_a_run_is_refused_in_a_notebook():
    with pytest.raises(ConfigError, match="as in a notebook; start the run as a process"):
        require_main_thread()
