"""The gate of every trajectory, and the bonus of its reward: from the whole batch, where they are
relative to the others.

The share of every rank goes in, thresholds and baselines are taken over all ranks, and one
``Weighting`` per trajectory comes out. So no result depends on how the batch is cut into parts and
micro-batches, or spread over ranks.

For example a hard gate with tau = 0.8 nats, on a teacher of which bounds on the entropy are known,
and that is to be read in the middle (``teachers[].entropy_bound: mid``):

    token                  1      2      3      4, not in the loss
    lowest entropy       0.1    0.5    1.0    0.0
    highest entropy      0.3    1.5    2.0    9.0
    entropy_R            0.2    1.0    1.5    4.5
    gate_R                 0      1      1      1
    low and high gate    0, 0   0, 1   1, 1           gate_uncertain is 1: token 2 may be closed

A quantile gate that opens for a third of the loss tokens would open on token 3 alone, if these were
all loss tokens of the batch.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from eopd.config import LossConfig
from eopd.config.loss import CustomGate, QuantileGate, RandomGate
from eopd.config.teacher import EntropyBound
from eopd.learner.collate import Weighting, body_of
from eopd.learner.ranks import gather_all
from eopd.loss.gate import (
    GateError,
    custom_gate,
    gate_weights,
    load_gate,
    quantile_threshold,
    random_draws,
)
from eopd.metrics import Mean, Metric, Quantile
from eopd.plugins import GateFunction, GateTokens
from eopd.telemetry.series import series
from eopd.types import (
    Header,
    Int32Array,
    ScoredTrajectory,
    Stored,
    TeacherSignal,
    TrajectoryKey,
)

_ENTROPY_LEVELS: Final = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weigher:
    """Computes weightings.

    ``entropy_bounds`` has for each teacher what the gate reads where only bounds are known.

    Raises:
        ConfigError: a user's gate cannot be loaded.
    """

    loss: LossConfig
    entropy_bounds: Mapping[str, EntropyBound]
    seed: int
    _custom: GateFunction | None = field(init=False)

    def __post_init__(self) -> None:
        gate = self.loss.gate
        custom = load_gate(gate) if isinstance(gate, CustomGate) else None
        object.__setattr__(self, "_custom", custom)

    def __call__(self, share: Sequence[Stored[ScoredTrajectory]]) -> dict[TrajectoryKey, Weighting]:
        """Returns the weightings of this rank's trajectories; collective.

        Raises:
            GateError: a user's gate failed on some rank; all ranks raise it.
        """
        headers, bodies = [stored.header for stored in share], list(map(body_of, share))
        entropies = [self._entropy(scored.signal) for scored in bodies]
        threshold = self._threshold(entropies, bodies)
        bonuses = self._bonuses(headers)
        weightings, faults = {}, list[str]()

        try:
            for header, scored, entropy_R in zip(headers, bodies, entropies, strict=True):
                gate_of = self._gate_of(header, scored, entropy_R, threshold)
                low_R, high_R = entropy_bounds(scored.signal)
                uncertain_R = (gate_of(high_R) - gate_of(low_R)).abs()
                weightings[header.key] = Weighting(
                    entropy_R=entropy_R,
                    gate_R=gate_of(entropy_R).masked_fill(~_finite(scored, entropy_R), torch.nan),
                    gate_uncertain=float(uncertain_R[_loss_mask(scored)].sum()),
                    advantage_bonus=bonuses[header.key],
                )
        except GateError as error:
            faults = [str(error)]

        if self._custom is not None and (faults := gather_all(faults)):
            raise GateError(faults[0])

        return weightings

    def _gate_of(
        self,
        header: Header,
        scored: ScoredTrajectory,
        entropy_R: Tensor,
        threshold: float | None,
    ) -> Callable[[Tensor], Tensor]:
        """Returns the gate of a trajectory as a function of the entropies that it reads."""
        gate, custom = self.loss.gate, self._custom
        if isinstance(gate, CustomGate) and custom is not None:
            counted_R = _finite(scored, entropy_R)
            return lambda read_R: custom_gate(
                gate.function, custom, gate_tokens(scored, read_R), counted_R
            )

        draws_R = None
        if isinstance(gate, RandomGate):
            draws_R = random_draws(self.seed, header.key, len(entropy_R))

        return partial(gate_weights, gate=gate, threshold=threshold, draws_T=draws_R)

    def _entropy(self, signal: TeacherSignal) -> Tensor:
        """Returns the entropy that the gate reads, [R] in nats."""
        low_R, high_R = entropy_bounds(signal)
        match self.entropy_bounds[signal.teacher]:
            case "low":
                return low_R
            case "high":
                return high_R
            case "mid":
                return low_R + (high_R - low_R) * 0.5

    def _threshold(
        self, entropies: Sequence[Tensor], bodies: Sequence[ScoredTrajectory]
    ) -> float | None:
        """Returns the threshold of a quantile gate, over the loss tokens of all ranks."""
        gate = self.loss.gate
        if not isinstance(gate, QuantileGate):
            return None

        counted = [
            entropy_R[_loss_mask(scored) & entropy_R.isfinite()]
            for entropy_R, scored in zip(entropies, bodies, strict=True)
        ]
        return quantile_threshold(torch.cat(gather_all(counted)), gate.top)

    def _bonuses(self, headers: Sequence[Header]) -> Mapping[TrajectoryKey, float | None]:
        """Returns the bonus of each trajectory: None without a reward of the run, and 0 for one
        that has none.
        """
        keys, reward = [header.key for header in headers], self.loss.reward
        if reward is None:
            return dict.fromkeys(keys)

        mine = [(header.key, header.reward) for header in headers if header.reward is not None]
        found = advantages(dict(gather_all(mine)))
        return {key: reward.weight * found.get(key, 0.0) for key in keys}


def gate_tokens(scored: ScoredTrajectory, entropy_R: Tensor) -> GateTokens:
    """Returns the tokens of a trajectory as a user's gate sees them, with these entropies [R]."""
    signal = scored.signal
    return GateTokens(
        teacher_entropy=entropy_R,
        teacher_logprobs=torch.tensor(signal.token_logprobs),
        teacher_topk_logprobs=torch.tensor(signal.topk_logprobs),
        teacher_tail_logprobs=torch.tensor(signal.tail_logprobs),
        rollout_logprobs=torch.tensor(scored.trajectory.rollout_logprobs),
        loss_mask=_loss_mask(scored),
    )


def _loss_mask(scored: ScoredTrajectory) -> Tensor:
    return torch.tensor(scored.trajectory.loss_mask)


def _finite(scored: ScoredTrajectory, entropy_R: Tensor) -> Tensor:
    """Returns where sampler and teacher gave numbers, bool [R]; -inf is one for candidate and tail.

    Elsewhere the gate is NaN: the step is then refused and the row named, whichever of the numbers
    the loss reads.
    """
    signal = scored.signal
    outcomes_RO = np.column_stack([signal.topk_logprobs, signal.tail_logprobs])
    numbers = np.isfinite(scored.trajectory.rollout_logprobs) & np.isfinite(signal.token_logprobs)
    return torch.from_numpy(numbers & (outcomes_RO < np.inf).all(1)) & entropy_R.isfinite()


def trajectory_metrics(stored: Stored[ScoredTrajectory], weighting: Weighting) -> dict[str, Metric]:
    """Returns what one trajectory contributes to the metrics of its batch.

    They are how far bounds on the entropy leave the gate open, gate and entropy by teacher, the
    quantiles of the entropy over loss tokens (4 bytes a token), repetition, and the reward.
    """
    header, scored = stored.header, body_of(stored)
    mask = _loss_mask(scored)
    entropy, gate = weighting.entropy_R[mask].numpy(), float(weighting.gate_R[mask].sum())
    teacher, num_tokens = scored.signal.teacher, len(entropy)
    metrics: dict[str, Metric] = {
        "eopd_gate_uncertain_ratio": Mean(weighting.gate_uncertain, num_tokens),
        "eopd_repetition_ratio": Mean(repetition(scored.trajectory.response_ids), 1),
    }
    if header.reward is not None:
        metrics["eopd_reward_mean"] = Mean(header.reward, 1)

    if num_tokens == 0:
        return metrics

    gate_name = series("eopd_gate_by_teacher_ratio", teacher=teacher)
    entropy_name = series("eopd_entropy_by_teacher_nats", teacher=teacher)
    metrics[gate_name] = Mean(gate, num_tokens)
    metrics[entropy_name] = Mean(float(entropy.sum()), num_tokens)
    for level in _ENTROPY_LEVELS:
        name = series("eopd_teacher_entropy_quantile_nats", q=str(level))
        metrics[name] = Quantile(entropy, level)

    return metrics


def repetition(response_ids_R: Int32Array) -> float:
    """Returns the share of the response's runs of four tokens that occur in it before.

    For example 1 2 1 2 1 2 1 has the runs 1212, 2121, 1212, 2121: two of four are repeated. A
    response below four tokens has none, and gives 0.
    """
    ids = response_ids_R.tolist()
    runs = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def entropy_bounds(signal: TeacherSignal) -> tuple[Tensor, Tensor]:
    """Returns lowest and highest teacher entropy, each [R] in nats; equal where it is exact."""
    return torch.tensor(signal.entropy_low), torch.tensor(signal.entropy_high)


def advantages(rewards: Mapping[TrajectoryKey, float]) -> dict[TrajectoryKey, float]:
    """Returns each reward less the mean reward of the prompt's other samples: unbiased, since no
    sample is in its own baseline. A sample without others has nothing to be compared with: 0.

    Rewards 1, 0, 0 give 1, -1/2, -1/2 (REINFORCE leave-one-out, Ahmadian et al., arXiv 2402.14740).
    """
    groups: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    for key, reward in rewards.items():
        groups[key.epoch, key.prompt_id].append(reward)

    def advantage(key: TrajectoryKey, reward: float) -> float:
        group = groups[key.epoch, key.prompt_id]
        return reward - (sum(group) - reward) / (len(group) - 1) if len(group) > 1 else 0.0

    return {key: advantage(key, reward) for key, reward in rewards.items()}
