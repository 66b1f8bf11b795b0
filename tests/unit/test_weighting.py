"""Weightings: what other ranks hold counts, how a batch is cut does not."""

import dataclasses
import sys

import fakes
import numpy as np
import pytest
import torch

from eopd.config import ConfigError, LossConfig
from eopd.config.loss import CustomGate
from eopd.learner import weighting
from eopd.learner.weighting import Weigher, advantages, repetition, trajectory_metrics
from eopd.loss.gate import GateError
from eopd.metrics import reduce
from eopd.types import (
    Bounds,
    Exact,
    Header,
    ScoredTrajectory,
    Stored,
    TeacherSignal,
    TrajectoryKey,
)


def scored(
    prompt_id: str,
    entropy: Exact | Bounds,
    mask: list[bool],
    sample_index: int = 0,
    teacher: str = "t",
) -> ScoredTrajectory:
    length = len(mask)
    zeros = np.zeros(length, np.float32)
    return ScoredTrajectory(
        trajectory=fakes.trajectory(
            range(length),
            of=fakes.prompt(prompt_id, [1]),
            mask=mask,
            sample_index=sample_index,
        ),
        signal=TeacherSignal(
            teacher=teacher,
            token_logprobs=zeros,
            entropy=entropy,
            topk_ids=np.zeros((length, 1), np.int32),
            topk_logprobs=zeros[:, None],
            tail_logprobs=zeros,
        ),
    )


def header_of(one: ScoredTrajectory, reward: float | None = None) -> Header:
    return Header.of(one.trajectory, {}, reward)


def exact(*entropy: float) -> Exact:
    return Exact(np.array(entropy, np.float32))


def bounds(low: list[float], high: list[float]) -> Bounds:
    return Bounds(low=np.array(low, np.float32), high=np.array(high, np.float32))


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """What another rank adds, one list for each gathering in turn."""
    queue: list[list] = []
    monkeypatch.setattr(
        weighting,
        "gather_all",
        lambda mine: [*mine, *(queue.pop(0) if queue else [])],
    )
    return queue


def weigh(bodies, *, bound="mid", rewards=None, **loss):
    headers = [
        header_of(one, reward)
        for one, reward in zip(bodies, rewards or [None] * len(bodies), strict=True)
    ]
    weigher = Weigher(
        loss=LossConfig(**loss),
        entropy_bounds={"t": bound, "u": bound},
        seed=3,
    )
    weightings = weigher(list(map(Stored, headers, bodies)))
    assert list(weightings) == [header.key for header in headers]
    return headers, list(weightings.values())


def metrics_of(bodies, rewards=None, **options):
    headers, weightings = weigh(bodies, rewards=rewards, **options)
    stored = map(Stored, headers, bodies)
    return reduce(map(trajectory_metrics, stored, weightings))


@pytest.mark.parametrize(
    ("bound", "gates", "entropies"),
    [
        ("low", [0, 0, 1], [0.1, 0.5, 1.0]),
        ("mid", [0, 1, 1], [0.2, 1.0, 1.5]),
        ("high", [0, 1, 1], [0.3, 1.5, 2.0]),
    ],
)
def test_the_policy_decides_between_the_bounds(others, bound, gates, entropies):
    # tau = 0.8 lies between the bounds of the second token alone; the fourth is masked.
    known = bounds([0.1, 0.5, 1.0, 0.0], [0.3, 1.5, 2.0, 9.0])
    bodies = [scored("a", known, [True, True, True, False])]
    _, (weighting,) = weigh(bodies, bound=bound)
    assert weighting.gate_R[:3].tolist() == gates
    assert weighting.entropy_R[:3].tolist() == pytest.approx(entropies)
    found = metrics_of(bodies, bound=bound)
    assert found["eopd_gate_uncertain_ratio"] == pytest.approx(1 / 3)


def test_quantiles_of_the_entropy_are_over_the_loss_tokens_of_all_trajectories(others):
    found = metrics_of(
        [
            scored("a", exact(0.0, 99.0, 1.0), [True, False, True]),
            scored("b", exact(*range(2, 11)), [True] * 9),
            scored("c", exact(99.0), [False]),
        ]
    )
    assert {key: value for key, value in found.items() if "quantile" in key} == {
        'eopd_teacher_entropy_quantile_nats{q="0.5"}': pytest.approx(5.0),
        'eopd_teacher_entropy_quantile_nats{q="0.9"}': pytest.approx(9.0),
        'eopd_teacher_entropy_quantile_nats{q="0.99"}': pytest.approx(9.9),
    }


def test_repetition_is_a_mean_over_trajectories(others):
    repeated = scored("a", exact(*[1.0] * 7), [True] * 7)
    again = dataclasses.replace(
        repeated.trajectory, response_ids=np.array([1, 2, 1, 2, 1, 2, 1], np.int32)
    )
    bodies = [
        dataclasses.replace(repeated, trajectory=again),
        scored(
            "b",
            exact(1.0),
            [True],
        ),
    ]
    assert metrics_of(bodies)["eopd_repetition_ratio"] == pytest.approx((0.5 + 0.0) / 2)


def test_gate_and_entropy_are_told_by_teacher(others):
    # tau = 0.8: one token of two of the first trajectory is above it, and all of the others
    found = metrics_of(
        [
            scored("a", exact(0.5, 99.0, 1.5), [True, False, True]),
            scored("b", exact(1.0, 2.0, 3.0), [True] * 3, teacher="u"),
            scored("c", exact(2.0, 4.0), [True] * 2),
        ]
    )
    assert {key: value for key, value in found.items() if "by_teacher" in key} == {
        'eopd_gate_by_teacher_ratio{teacher="t"}': pytest.approx(3 / 4),
        'eopd_entropy_by_teacher_nats{teacher="t"}': pytest.approx(8 / 4),
        'eopd_gate_by_teacher_ratio{teacher="u"}': pytest.approx(1.0),
        'eopd_entropy_by_teacher_nats{teacher="u"}': pytest.approx(2.0),
    }


def test_a_teacher_without_loss_tokens_has_no_metrics(others):
    found = metrics_of([scored("a", exact(1.0), [False])])
    assert found == {"eopd_gate_uncertain_ratio": 0.0, "eopd_repetition_ratio": 0.0}


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([7] * 10, 6 / 7),
        ([1, 2, 1, 2, 1, 2, 1], 0.5),
        ([1, 2, 3, 4, 5], 0.0),
        ([1, 1, 1], 0.0),
    ],
)
def test_repetition_is_the_share_of_runs_that_were_there_before(ids, share):
    assert repetition(np.array(ids, np.int32)) == pytest.approx(share)


def test_an_unsure_sigmoid_counts_by_how_far_it_may_move(others):
    known = bounds([0.8, 0.8], [0.8, 1.0])
    _, (weighting,) = weigh(
        [
            scored(
                "a",
                known,
                [True, True],
            )
        ],
        gate={"kind": "sigmoid", "tau": 0.8, "scale": 0.1},
    )
    assert weighting.gate_uncertain == pytest.approx(1 / (1 + np.exp(-2)) - 0.5, abs=1e-6)


@pytest.mark.parametrize("kind", ["always", "never", "random"])
def test_gates_that_do_not_read_the_entropy_are_certain(others, kind):
    _, (weighting,) = weigh(
        [scored("a", bounds([0.0] * 9, [5.0] * 9), [True] * 9)], gate={"kind": kind}
    )
    assert weighting.gate_uncertain == 0.0


def test_a_quantile_is_taken_over_all_ranks(others):
    others.append([torch.tensor([5.0, 6.0, 7.0])])
    one = scored("a", exact(1.0, 4.0, 2.0, 9.0), [True, True, True, False])
    _, (weighting,) = weigh([one], gate={"kind": "quantile", "top": 4 / 6})
    assert weighting.gate_R[:3].tolist() == [0, 1, 0]  # here alone it would be open on two of three


def test_a_quantile_follows_the_bound_that_the_policy_reads(others):
    known = bounds([0.0, 1.0, 2.0], [9.0, 2.0, 2.5])
    opened = {
        bound: weigh(
            [scored("a", known, [True] * 3)],
            bound=bound,
            gate={"kind": "quantile", "top": 1 / 3},
        )
        for bound in ("low", "high", "mid")
    }
    assert {bound: one[0].gate_R.tolist() for bound, (_, one) in opened.items()} == {
        "low": [0, 0, 1], "high": [1, 0, 0], "mid": [1, 0, 0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("entropy", np.nan),
        ("entropy", np.inf),
        ("rollout_logprobs", -np.inf),
        ("rollout_logprobs", np.nan),
        ("token_logprobs", -np.inf),
        ("topk_logprobs", np.inf),
        ("topk_logprobs", np.nan),
        ("tail_logprobs", np.nan),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        "hard",
        "quantile",
        "sigmoid",
        "random",
        "always",
        "never",
    ],
)
def test_a_token_without_numbers_has_no_gate(others, kind, column, value):
    entropy = np.array([3.0, 1.0, 2.0], np.float32)
    wrong = np.zeros(3, np.float32)
    wrong[0] = value
    one = scored(
        "a",
        Exact(np.where(wrong == 0, entropy, wrong) if column == "entropy" else entropy),
        [True] * 3,
    )
    if column == "rollout_logprobs":
        one = dataclasses.replace(
            one, trajectory=dataclasses.replace(one.trajectory, rollout_logprobs=wrong)
        )
    elif column != "entropy":
        column_of = {column: wrong[:, None] if column == "topk_logprobs" else wrong}
        one = dataclasses.replace(one, signal=dataclasses.replace(one.signal, **column_of))

    _, (weighting,) = weigh([one], gate={"kind": kind})
    assert weighting.gate_R.isnan().tolist() == [True, False, False]
    if column == "entropy" and kind == "quantile":  # the top fifth of two tokens is one
        assert weighting.gate_R[1:].tolist() == [0, 1]


def test_a_freed_slot_and_an_empty_tail_are_numbers(others):
    one = scored("a", exact(1.0, 1.0), [True, True])
    signal = dataclasses.replace(
        one.signal,
        topk_logprobs=np.array([[-np.inf], [0.0]], np.float32),
        tail_logprobs=np.array([0.0, -np.inf], np.float32),
    )
    _, (weighting,) = weigh([dataclasses.replace(one, signal=signal)])
    assert weighting.gate_R.tolist() == [1, 1]


def test_an_unknown_teacher_is_an_error(others):
    strange = scored("a", exact(1.0), [True])
    strange = dataclasses.replace(
        strange, signal=dataclasses.replace(strange.signal, teacher="stranger")
    )
    with pytest.raises(KeyError, match="stranger"):
        weigh([strange])


# --- reward


REWARD = {"reverse_kl": {"kind": "sampled", "reward": {"function": "exact", "weight": 0.5}}}


def test_the_advantage_leaves_its_own_sample_out():
    keys = [TrajectoryKey(0, "a", i) for i in range(3)] + [
        TrajectoryKey(1, "a", i) for i in range(2)
    ]
    found = advantages(dict(zip(keys, [1.0, 0.0, 0.0, 0.0, 1.0], strict=True)))
    assert [found[key] for key in keys] == [1.0, -0.5, -0.5, -1.0, 1.0]


def test_a_lone_sample_has_nothing_to_be_compared_with():
    keys = [TrajectoryKey(0, "a", 0), TrajectoryKey(0, "b", 0), TrajectoryKey(0, "b", 1)]
    assert list(advantages(dict(zip(keys, [1.0, 0.25, 1.0], strict=True))).values()) == [
        0.0,
        -0.75,
        0.75,
    ]


def test_rewards_of_other_ranks_are_part_of_the_baseline(others):
    others.append([(TrajectoryKey(0, "a", 1), 0.0), (TrajectoryKey(0, "a", 2), 1.0)])
    bodies = [scored("a", exact(1.0), [True])]
    _, (weighting,) = weigh(bodies, rewards=[1.0], **REWARD)
    assert weighting.advantage_bonus == pytest.approx(0.5 * (1.0 - 0.5))


def test_the_reward_is_a_mean_over_trajectories_that_have_one(others):
    bodies = [scored("a", exact(1.0), [True], sample_index=i) for i in range(3)]
    assert metrics_of(bodies, [1.0, 0.0, None])["eopd_reward_mean"] == 0.5
    assert "eopd_reward_mean" not in metrics_of(bodies)


def test_a_missing_reward_is_in_no_baseline_and_adds_nothing(others):
    bodies = [scored("a", exact(1.0), [True], sample_index=i) for i in range(3)]
    assert [w.advantage_bonus for w in weigh(bodies)[1]] == [None, None, None]
    found = weigh(bodies, rewards=[1.0, None, 0.25], **REWARD)[1]
    assert [w.advantage_bonus for w in found] == [0.375, 0.0, -0.375]


# --- a gate of the user

GATES = """
def half_where_unlikely(tokens, *, nats=1.0):
    return 0.5 * (tokens.teacher_entropy > nats)

def opens_beyond(tokens):
    return tokens.teacher_entropy
"""


@pytest.fixture
def gates(tmp_path, monkeypatch):
    (tmp_path / "made_up_gates.py").write_text(GATES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "made_up_gates:"

    sys.modules.pop("made_up_gates", None)


def test_a_gate_of_the_user_is_asked_once_for_each_trajectory(others, gates):
    gate = {"kind": "custom", "function": gates + "half_where_unlikely", "options": {"nats": 1.2}}
    known = bounds([0.0, 1.0, 2.0], [1.0, 1.6, 3.0])
    bodies = [scored("a", known, [True, True, True]), scored("b", exact(9.0), [False])]

    found = weigh(bodies, gate=gate)[1]

    assert [w.gate_R.tolist() for w in found] == [[0.0, 0.5, 0.5], [0.5]]
    # between the bounds only the second token may be on either side
    assert [w.gate_uncertain for w in found] == [0.5, 0.0]


def test_where_the_gate_of_a_rank_fails_all_ranks_raise(others, gates):
    gate = {"kind": "custom", "function": gates + "opens_beyond"}
    bodies = [scored("a", exact(0.5), [True])]
    assert weigh(bodies, gate=gate)[1][0].gate_R.tolist() == [0.5]

    others.append(["loss.gate.function: the other rank's"])
    with pytest.raises(GateError, match="the other rank's"):
        weigh(bodies, gate=gate)

    with pytest.raises(GateError, match="made_up_gates:opens_beyond: returned 2 to 2; a gate is"):
        weigh([scored("a", exact(2.0), [True])], gate=gate)


def test_a_gate_that_is_not_found_is_told_at_once(gates):
    gate = CustomGate(function=gates + "nothing")
    with pytest.raises(ConfigError, match="there is no 'nothing'"):
        Weigher(loss=LossConfig(gate=gate), entropy_bounds={}, seed=0)
