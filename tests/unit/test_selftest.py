"""The self-test on a teacher of ten lines, and on one whose every property is broken in turn."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from eopd.config import TeacherConfig
from eopd.teacher import selftest
from eopd.teacher.end_tokens import to_student
from eopd.teacher.selftest import (
    CONTINUATION_TOKENS,
    TeacherSelfTestError,
    check_temperature,
    self_test,
)
from eopd.types import (
    Bounds,
    Exact,
    LostReason,
    LostTrajectory,
    ScoredTrajectory,
    Stored,
    TeacherSignal,
)

VOCAB, TOP_K = 40, 5
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)


def logits_of(seed: int = 0) -> np.ndarray:
    """A bigram teacher: row t are the logits of what follows token t, and that is likely t + 7."""
    favourites = np.roll(np.eye(VOCAB), 7, axis=1) * 6.0
    return np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * 2 + favourites


Change = Callable[[TeacherSignal], TeacherSignal]


class Bigram:
    """``shift`` moves its rows, ``change`` what it says, ``remap`` its end tokens."""

    def __init__(
        self,
        logits: np.ndarray,
        *,
        shift: int = 0,
        change: Change = lambda signal: signal,
        remap: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.logits = logits
        self.shift = shift
        self.change = change
        self.remap = remap
        self.calls = 0

    async def score(self, stored):
        self.calls += 1
        trajectory = stored.body
        tokens = np.concatenate((trajectory.prompt.token_ids, trajectory.response_ids))
        rows = np.arange(len(trajectory.prompt.token_ids), len(tokens))
        logprobs = self.logits[tokens[np.minimum(rows - 1 + self.shift, len(tokens) - 1)]]
        logprobs = logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
        order = np.argsort(-logprobs, axis=1)
        ranked = np.take_along_axis(logprobs, order, axis=1)
        signal = TeacherSignal(
            teacher="t",
            token_logprobs=logprobs[range(len(rows)), trajectory.response_ids].astype(np.float32),
            entropy=Exact(-(np.exp(logprobs) * logprobs).sum(1).astype(np.float32)),
            topk_ids=order[:, :TOP_K].astype(np.int32),
            topk_logprobs=ranked[:, :TOP_K].astype(np.float32),
            tail_logprobs=np.logaddexp.reduce(ranked[:, TOP_K:], axis=1).astype(np.float32),
        )
        signal = to_student(signal, trajectory.response_ids, self.remap, num_tokens=VOCAB)

        return Stored(
            stored.header, ScoredTrajectory(trajectory=trajectory, signal=self.change(signal))
        )


async def run(*replicas: object, dtype: str = "float32", rounded: bool = False):
    return await self_test(
        replicas,
        prompt_ids=PROMPT,
        vocab_size=VOCAB,
        dtype=dtype,
        rounded_logits=rounded,
    )


async def test_a_good_teacher_passes_with_its_greedy_continuation():
    report = await run(Bigram(logits_of()), Bigram(logits_of()))
    expected, token = [], PROMPT[-1]
    for _ in range(CONTINUATION_TOKENS):
        token = logits_of()[token].argmax()
        expected.append(int(token))

    assert report.continuation == tuple(expected)
    assert (report.teacher, report.replicas) == ("t", 2)
    assert set(report.worst) == {"mass", "entropy", "alignment", "context", "repeat", "replicas"}
    assert max(report.worst.values()) < 1e-5


def bounded(signal: TeacherSignal, low: float, high: float) -> TeacherSignal:
    exact = signal.entropy.entropy
    return replace(signal, entropy=Bounds(exact + np.float32(low), exact + np.float32(high)))


@pytest.mark.parametrize(
    "change",
    [lambda s: bounded(s, -0.1, 0.2), lambda s: bounded(s, -9.0, 9.0)],
    ids=["bounds", "wide bounds"],
)
async def test_bounds_on_the_entropy_pass(change):
    await run(Bigram(logits_of(), change=change))


async def test_merged_end_tokens_pass():
    """Two candidates of a half each, merged, leave an entropy that is log 2 above what the
    candidates say.
    """
    logits = logits_of()
    logits[:, :2] = logits.max(axis=1, keepdims=True) + 5.0
    report = await run(Bigram(logits, remap={0: 1}))
    assert report.continuation == (0,) * CONTINUATION_TOKENS


BROKEN: dict[str, tuple[str, Change]] = {
    "unsorted": (
        "mass",
        lambda s: replace(
            s,
            topk_logprobs=s.topk_logprobs[:, ::-1],
            topk_ids=s.topk_ids[:, ::-1],
        ),
    ),
    "a candidate twice": ("mass", lambda s: replace(s, topk_ids=s.topk_ids[:, [0, 0, 1, 2, 3]])),
    "a tail too heavy": (
        "mass",
        lambda s: replace(s, tail_logprobs=np.logaddexp(s.tail_logprobs, np.log(0.01))),
    ),
    "not a number": ("mass", lambda s: replace(s, tail_logprobs=s.tail_logprobs * np.nan)),
    "an entropy of two temperatures": (
        "entropy",
        lambda s: replace(s, entropy=Exact(s.entropy.entropy * 2.0 + 1.0)),
    ),
    "an entropy below its candidates'": (
        "entropy",
        lambda s: replace(s, entropy=Exact(s.entropy.entropy * 0.0)),
    ),
    "bounds the wrong way round": ("entropy", lambda s: bounded(s, 0.003, -0.003)),
    "tokens of another temperature": (
        "alignment",
        lambda s: replace(s, token_logprobs=s.token_logprobs * 0.5),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_teacher_that_says_what_none_can_say_is_refused(name):
    check, change = BROKEN[name]
    with pytest.raises(
        TeacherSelfTestError, match=rf"teacher t, replica 1: {check} is off by .*allowed is"
    ):
        await run(Bigram(logits_of()), Bigram(logits_of(), change=change))


@pytest.mark.parametrize(
    ("shift", "check"),
    [
        (1, "alignment"),
        (-1, "context"),
    ],
)
async def test_shifted_rows_are_noticed_either_way(shift, check):
    with pytest.raises(TeacherSelfTestError, match=f"replica 0: {check}"):
        await run(Bigram(logits_of(), shift=shift))


class Fickle(Bigram):
    by = 0.01

    async def score(self, stored):
        scored = await super().score(stored)
        noise = np.float32(self.by * (self.calls % 2))
        signal = replace(
            scored.body.signal, token_logprobs=scored.body.signal.token_logprobs - noise
        )
        return Stored(scored.header, replace(scored.body, signal=signal))


async def test_an_answer_that_changes_is_within_half_precision_only():
    with pytest.raises(TeacherSelfTestError, match=r"repeat is off by 0\.01, allowed is 0\.0001"):
        await run(Fickle(logits_of()))

    report = await run(Fickle(logits_of()), dtype="bfloat16")
    assert report.worst["repeat"] == pytest.approx(0.01, abs=1e-5)


class Rounded(Fickle):
    by = 0.125


async def test_one_step_of_a_bfloat16_logit_is_allowed():
    for dtype, rounded in (("bfloat16", False), ("float16", True), ("float32", True)):
        with pytest.raises(TeacherSelfTestError, match=r"is off by 0\.125"):
            await run(Rounded(logits_of()), dtype=dtype, rounded=rounded)

    report = await run(Rounded(logits_of()), dtype="bfloat16", rounded=True)
    assert report.worst["repeat"] == report.worst["alignment"] == pytest.approx(0.125, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "rounded"),
    [
        ({}, False),
        ({"head_dtype": "model"}, True),
        ({"backend": "openai", "server": {"url": "http://a", "model": "m"}}, True),
        ({"backend": "eopd", "server": {"url": "http://a"}}, False),
    ],
)
def test_heads_of_the_model_s_own_precision_round_logits(options, rounded):
    assert TeacherConfig(model="/m", **options).logits_are_rounded == rounded


async def test_a_replica_with_slightly_other_weights_is_named():
    other = logits_of()
    other[PROMPT[-1]] += np.where(
        np.arange(VOCAB) == other[PROMPT[-1]].argmax(),
        0.02,
        0.0,
    )
    with pytest.raises(TeacherSelfTestError, match=r"replica 2: replicas is off by 0\.0"):
        await run(Bigram(logits_of()), Bigram(logits_of()), Bigram(other))


async def test_a_teacher_that_does_not_answer_is_named():
    class Silent:
        async def score(self, stored):
            return LostTrajectory(
                key=stored.header.key,
                reason=LostReason.TEACHER_FAILED,
                detail="no route to host",
            )

    with pytest.raises(
        TeacherSelfTestError, match="replica 1: it does not answer: no route to host"
    ):
        await run(Bigram(logits_of()), Silent())


async def at(temperature: float) -> TeacherSignal:
    return await selftest._score(Bigram(logits_of() / temperature), 0, PROMPT, PROMPT)


async def test_a_temperature_is_told_from_another_one():
    check_temperature(await at(0.7), await at(1.4), 1.4, expected=0.7)
    for own, other in ((0.7, 0.7), (1.4, 1.4), (1.0, 1.4), (1 / 0.7, 1 / 1.4)):
        with pytest.raises(
            TeacherSelfTestError,
            match=r"t: it scores at temperature [\d.]+ where 0.7 is configured",
        ):
            check_temperature(await at(own), await at(other), 1.4, expected=0.7)
