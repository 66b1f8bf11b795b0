"""What only the whole batch can say of a trajectory: its gate and its advantage, before anything is
cut.

The share of every rank goes in, thresholds and baselines are taken over all ranks, one
``Weighting`` per trajectory comes out; no result depends on how the batch is cut or spread.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor

from eopd.config import LossConfig
from eopd.config.loss import QuantileGate, RandomGate
from eopd.config.teacher import EntropyBound
from eopd.learner.collate import Weighting
from eopd.learner.ranks import gather_all
from eopd.loss.gate import gate_weights, quantile_threshold, random_draws
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
    """Computes weightings; ``entropy_bounds`` says by teacher what its gate reads where only
    bounds are known.
    """

    loss: LossConfig
    entropy_bounds: Mapping[str, EntropyBound]
    seed: int

    def __call__(
        self, headers: Sequence[Header], bodies: Sequence[ScoredTrajectory]
    ) -> list[Weighting]:
        """One weighting per trajectory of this rank; collective."""
        gate, bounds = self.loss.gate, [entropy_bounds(scored.signal) for scored in bodies]
        entropies = [
            self._read(scored.signal.teacher, *pair)
            for scored, pair in zip(bodies, bounds, strict=True)
        ]
        threshold = None
        if isinstance(gate, QuantileGate):
            kept = [
                h[torch.tensor(s.trajectory.loss_mask) & h.isfinite()]
                for h, s in zip(entropies, bodies, strict=True)
            ]
            threshold = quantile_threshold(torch.cat(gather_all(kept)), gate.top)

        bonuses = self._bonuses(headers)
        weightings = []

        for header, scored, (low, high), entropy in zip(
            headers, bodies, bounds, entropies, strict=True
        ):
            draws = (
                random_draws(self.seed, header.key, len(entropy))
                if isinstance(gate, RandomGate)
                else None
            )
            at_low, at_high, here = (
                gate_weights(h, gate, threshold=threshold, draws_T=draws)
                for h in (low, high, entropy)
            )
            weightings.append(
                Weighting(
                    entropy_R=entropy,
                    gate_R=here.masked_fill(~_sound(scored, entropy), torch.nan),
                    gate_uncertain=float(
                        (at_high - at_low)[torch.tensor(scored.trajectory.loss_mask)].sum()
                    ),
                    advantage_bonus=bonuses.get(header.key),
                )
            )

        return weightings

    def _read(self, teacher: str, low_R: Tensor, high_R: Tensor) -> Tensor:
        match self.entropy_bounds[teacher]:
            case "low":
                return low_R
            case "high":
                return high_R
            case "mid":
                return low_R + (high_R - low_R) * 0.5

    def _bonuses(self, headers: Sequence[Header]) -> Mapping[TrajectoryKey, float]:
        if self.loss.reward is None:
            return {}

        rewards = dict(gather_all([(header.key, _reward(header)) for header in headers]))
        return {key: self.loss.reward.weight * value for key, value in advantages(rewards).items()}


def _sound(scored: ScoredTrajectory, entropy_R: Tensor) -> Tensor:
    """Where sampler and teacher gave numbers, bool [R]; of a candidate or the tail, "impossible" is
    one.

    Elsewhere the gate is NaN: the step is then refused and the row named, whichever of them the
    loss reads.
    """
    signal = scored.signal
    outcomes_RO = np.column_stack([signal.topk_logprobs, signal.tail_logprobs])
    numbers = np.isfinite(scored.trajectory.rollout_logprobs) & np.isfinite(signal.token_logprobs)
    return torch.from_numpy(numbers & (outcomes_RO < np.inf).all(1)) & entropy_R.isfinite()


def batch_metrics(
    applied: Sequence[Stored[ScoredTrajectory]], weightings: Mapping[TrajectoryKey, Weighting]
) -> dict[str, float]:
    """Of these trajectories, on all ranks: how far bounds leave the gate open, gate and entropy by
    teacher, how the entropy spreads over loss tokens, how much responses repeat themselves, and the
    reward; collective, 4 bytes a token.
    """
    mine = []
    for stored in applied:
        header, scored = stored.header, cast(ScoredTrajectory, stored.body)
        weighting, mask = weightings[header.key], torch.tensor(scored.trajectory.loss_mask)
        gate, entropy = float(weighting.gate_R[mask].sum()), weighting.entropy_R[mask].numpy()
        repeated = repetition(scored.trajectory.response_ids)
        mine.append(
            (
                scored.signal.teacher,
                gate,
                weighting.gate_uncertain,
                entropy,
                repeated,
                header.reward,
            )
        )

    everybody = gather_all(mine)
    teachers, gates, uncertain, entropies, repetitions, rewards = zip(*everybody, strict=True)
    entropy = np.concatenate(entropies)
    metrics = {
        "eopd_gate_uncertain_ratio": sum(uncertain) / max(len(entropy), 1),
        "eopd_repetition_ratio": sum(repetitions) / len(repetitions),
    }

    for teacher in sorted(set(teachers)):
        of_teacher = [
            (gate, h)
            for name, gate, h in zip(teachers, gates, entropies, strict=True)
            if name == teacher
        ]
        if num_tokens := sum(len(h) for _, h in of_teacher):
            gate, total = (
                sum(gate for gate, _ in of_teacher),
                sum(float(h.sum()) for _, h in of_teacher),
            )
            metrics[series("eopd_gate_by_teacher_ratio", teacher=teacher)] = gate / num_tokens
            metrics[series("eopd_entropy_by_teacher_nats", teacher=teacher)] = total / num_tokens

    if len(entropy):
        for level, value in zip(
            _ENTROPY_LEVELS, np.quantile(entropy, _ENTROPY_LEVELS), strict=True
        ):
            metrics[series("eopd_teacher_entropy_quantile_nats", q=str(level))] = float(value)

    given = [reward for reward in rewards if reward is not None]

    return metrics | ({"eopd_reward_mean": sum(given) / len(given)} if given else {})


def repetition(response_ids_R: Int32Array) -> float:
    """Share of the response's runs of four tokens that occur in it before; 0 below four tokens.

    For example 1 2 1 2 1 2 1 has the runs 1212, 2121, 1212, 2121: two of four are repeated.
    """
    ids = response_ids_R.tolist()
    runs = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def entropy_bounds(signal: TeacherSignal) -> tuple[Tensor, Tensor]:
    """Lowest and highest teacher entropy, each [R] in nats; equal where it is exact."""
    return torch.tensor(signal.entropy_low), torch.tensor(signal.entropy_high)


def advantages(rewards: Mapping[TrajectoryKey, float]) -> dict[TrajectoryKey, float]:
    """Reward less the mean reward of the prompt's other samples: unbiased, since no sample is in
    its own baseline.

    (REINFORCE leave-one-out, Ahmadian et al., arXiv 2402.14740.) Rewards 1, 0, 0 give 1, -1/2,
    -1/2.

    Raises:
        ValueError: a prompt has one sample only.
    """
    groups: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    for key, reward in rewards.items():
        groups[key.epoch, key.prompt_id].append(reward)

    if alone := [name for name, group in groups.items() if len(group) == 1]:
        raise ValueError(
            f"no baseline for the reward of {alone[0]}: it has one sample in this batch"
        )

    def advantage(key: TrajectoryKey, reward: float) -> float:
        group = groups[key.epoch, key.prompt_id]
        return reward - (sum(group) - reward) / (len(group) - 1)

    return {key: advantage(key, reward) for key, reward in rewards.items()}


def _reward(header: Header) -> float:
    if header.reward is None:
        raise ValueError(
            f"trajectory {tuple(header.key)}: has no reward, though loss.reverse_kl.reward is set"
        )

    return header.reward
