"""Killed between any two steps of any two tasks, and resumed, a run trains every trajectory once.

The event loop itself dies: after a random number of callbacks ``_run`` raises and nothing else of
that life runs, as after ``kill -9``. What survives is what was on disk: ``trained.jsonl`` and the
newest checkpoint's ledger.
"""

import asyncio
import itertools
import json
import random
import selectors
from collections import Counter
from pathlib import Path
from zlib import crc32

import fakes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eopd.ledger import Ledger
from eopd.prompts import PromptOrder
from eopd.run.directory import RunDirectory
from eopd.run.storage import write_whole
from eopd.types import TrajectoryKey

BATCH, BATCHES, EVERY, PROMPTS, SAMPLES = 4, 11, 3, 5, 2
# tokens a micro-batch: two ranks take a batch of five tokens a trajectory whole, or two at a time
WHOLE, IN_PARTS = 16, 5
MODES = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
LONGEST_LIFE = 500  # callbacks; an undisturbed run takes about 650


class Killed(SystemExit):
    """Passes through every task and the loop."""


class Impatient(selectors.DefaultSelector):
    """Nobody here waits for the world: a loop that has nothing to run, and nothing planned,
    never will.
    """

    def select(self, timeout=None):
        assert timeout is not None, "every task waits for another one"
        return super().select(timeout)


class MortalLoop(asyncio.SelectorEventLoop):
    """Dies after so many callbacks."""

    def __init__(self, life: int) -> None:
        super().__init__(Impatient())
        self.life = life

    def call_soon(self, callback, *args, context=None):
        return super().call_soon(self._run, callback, args, context=context)

    def _run(self, callback, args):
        callback(*args)
        self.life -= 1  # never 0 for one that was born with -1
        if self.life == 0:
            raise Killed


class World(fakes.World):
    """Each answer takes a random number of turns of the loop. Now and then one is lost."""

    def __init__(self, seed: int, step: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.version = self.served = step
        self.trained: dict[int, list[TrajectoryKey]] = {}

    async def turns(self, most: int) -> None:
        for _ in range(self.random.randrange(most)):
            await asyncio.sleep(0)

    async def generate(self, prompt, sample_index, sampling):
        version = self.served
        await self.turns(12)
        if self.random.random() < 0.05:
            return fakes.lost(prompt, sample_index)

        ids = [prompt.epoch, int(prompt.prompt_id), sample_index]

        return fakes.stored(
            fakes.trajectory(ids, of=prompt, sample_index=sample_index, version=version)
        )

    async def score(self, stored):
        await self.turns(6)
        return stored

    async def accumulate(self, part):
        await self.turns(4)
        await super().accumulate(part)

    async def step(self, batch):
        await self.turns(4)
        self.trained[self.version + 1] = sorted(stored.header.key for stored in self.whole(batch))
        return await super().step(batch)

    async def publish(self, version, on_sent):
        await self.turns(4)
        on_sent()
        await self.turns(12)
        return await super().publish(version)


class Run:
    """A run over several lives. ``history`` is what the learner saw of steps that were not
    undone.
    """

    def __init__(
        self,
        path: Path,
        staleness: int,
        lookahead: int,
        turns: tuple[int, int] | None = None,
        token_budget: int = WHOLE,
    ) -> None:
        path.mkdir()
        self.directory = RunDirectory(path)
        self.checkpoint = path / "ledger.json"
        self.history: dict[int, list[TrajectoryKey]] = {}
        self.mode = staleness, lookahead
        self.turns = turns
        self.token_budget = token_budget

    def order(self) -> PromptOrder:
        return fakes.order(prompts=PROMPTS, samples=SAMPLES, turns=self.turns)

    def live(self, seed: int, life: int) -> bool:
        """Go on from the checkpoint until the end, or death; says whether it came to the end."""
        saved = json.loads(self.checkpoint.read_text()) if self.checkpoint.exists() else {"step": 0}
        start = saved.pop("step")
        ledger = Ledger.restore(**saved) if saved else Ledger()
        self.directory.drop_rows_after(start)
        world = World(seed, start)
        loop = MortalLoop(life)

        try:
            loop.run_until_complete(self._train(world, ledger, start))
            ended = True
        except Killed:
            ended = False

        survived = range(1, start + 1)
        self.history = {step: self.history[step] for step in survived} | world.trained
        self._bury(loop)

        return ended

    def _bury(self, loop: MortalLoop) -> None:
        """A dead process leaves no tasks to the garbage collector; and nothing on disk may
        come of ending these.
        """
        before = {path: path.read_bytes() for path in self.directory.path.iterdir()}
        loop.life = -1
        if tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()

            loop.run_until_complete(asyncio.wait(tasks))

        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        assert before == {path: path.read_bytes() for path in self.directory.path.iterdir()}

    async def _train(self, world: World, ledger: Ledger, start: int) -> None:
        staleness, lookahead = self.mode
        plan = {"batch": BATCH, "batches": BATCHES, "max_attempts": 9}
        line = fakes.pipeline(
            world,
            of=self.order(),
            ledger=ledger,
            max_staleness=staleness,
            lookahead=lookahead,
            token_budget=self.token_budget,
            **plan,
        )

        async for done in line.steps(start):
            step = done.stats.version.step
            self.directory.add_trained(step, done.trained)
            if step % EVERY == 0 or step == BATCHES:
                state = json.dumps({"step": step, **ledger.state()})
                await world.turns(6)  # the ranks write their part
                write_whole(self.checkpoint, state)

    def trained(self) -> list[list[int]]:
        """Issue numbers by step, of ``trained.jsonl``; its checksums are checked on the way."""
        order = self.order()
        rows = [json.loads(line) for line in self.directory.trained.read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, BATCHES + 1))

        for row in rows:
            keys = [
                TrajectoryKey(
                    p.epoch,
                    p.prompt_id,
                    k,
                )
                for p, k in map(order.at, row["issues"])
            ]
            assert sorted(keys) == self.history[row["step"]]  # what it says is what the learner saw
            ids = [
                np.array([key.epoch, int(key.prompt_id), key.sample_index], "<i4") for key in keys
            ]
            assert row["crc32"] == [crc32(one.tobytes()) for one in ids]

        return [row["issues"] for row in rows]


@pytest.fixture(autouse=True)
def no_disk_is_forced(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize(("staleness", "lookahead"), MODES)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32),
    lives=st.lists(st.integers(1, LONGEST_LIFE), min_size=3, max_size=6),
    turns=st.sampled_from([None, (3, 1), (2, 5)]),
    token_budget=st.sampled_from([WHOLE, IN_PARTS]),
)
def test_killed_and_resumed_it_trains_what_an_undisturbed_run_trains(
    tmp_path_factory, staleness, lookahead, seed, lives, turns, token_budget
):
    root = tmp_path_factory.mktemp("once")
    undisturbed, killed = (
        Run(root / name, staleness, lookahead, turns, token_budget)
        for name in ("undisturbed", "killed")
    )
    assert undisturbed.live(seed, life=-1)
    ended = [killed.live(seed + number, life) for number, life in enumerate([*lives, -1])]
    assert ended[-1]
    expected = undisturbed.trained()
    found = killed.trained()
    once = Counter(range(BATCH * BATCHES))
    assert Counter(itertools.chain(*found)) == once
    assert Counter(itertools.chain(*expected)) == once
    keys = list(itertools.chain(*killed.history.values()))
    assert len(keys) == len(set(keys))
    if lookahead == 0:
        # the same batches in the same order, not only the same trajectories
        assert found == expected


@pytest.mark.parametrize(("staleness", "lookahead"), MODES)
def test_the_longest_life_of_these_tests_ends_before_the_run(tmp_path, staleness, lookahead):
    """Were a run over after fewer callbacks than lives are drawn from, the test above would
    kill nothing.
    """
    run = Run(tmp_path / "run", staleness, lookahead)
    assert not run.live(seed=1, life=LONGEST_LIFE)
    assert run.history and run.checkpoint.exists()
