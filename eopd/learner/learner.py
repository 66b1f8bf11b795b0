"""One rank of the learner: one update of the student from one batch.

    share of a PackedBatch -> gates -> packed micro-batches -> forward and backward of each -> optimiser step -> metrics

All methods are collective: every rank calls the same method with its share of the same batch. Denominators, gates and
metrics are those of the whole batch, so that neither the cut into micro-batches nor the number of ranks changes the
result. What was left out: fetching bodies and running as an actor (``runtime/``), sending weights to the engines
(``weights/``).
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch import distributed as dist
from transformers import AutoTokenizer, PreTrainedModel

from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.config.loss import QuantileGate, RandomGate
from eopd.learner.collate import Packed, collate, teacher_entropy
from eopd.learner.deepspeed_engine import Engine, join
from eopd.learner.student import Head, load_student
from eopd.loss.chunked import token_statistics
from eopd.loss.gate import gate_weights, quantile_threshold, random_draws
from eopd.loss.objective import LossTerms, objective
from eopd.types import (
    Estimate,
    EvalStats,
    LearnerStats,
    OptimizerStep,
    PackedBatch,
    PolicyVersion,
    ScoredTrajectory,
    Stored,
)

T = TypeVar("T")
Float64Array = npt.NDArray[np.float64]

_ESTIMATES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")


class Projection(TypedDict):
    """How hidden states become log-probabilities, as the functions of ``eopd.loss`` take it."""

    head_bias_V: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    chunk_tokens: int


class NonFiniteUpdateError(RuntimeError):
    """A loss or gradient was not finite. Its optimiser step was applied on no rank; earlier ones of the batch were."""


class LearnerRank:
    """One of ``world_size`` ranks; the roles' ``Learner`` is the gang of them.

    Args:
        student: what to train.
        learner: how to train it.
        loss: the objective.
        temperature: that of the rollouts; the student's logits are divided by it.
        total_batches: length of the learning-rate schedule.
        seed: that of the run; names the draws of the random gate.
        rank: of this process, from 0.
        world_size: number of ranks.
        master_address: where rank 0 runs.
        master_port: a free port there.
    """

    def __init__(
        self,
        student: StudentConfig,
        learner: LearnerConfig,
        loss: LossConfig,
        *,
        temperature: float,
        total_batches: int,
        seed: int,
        rank: int,
        world_size: int,
        master_address: str,
        master_port: int,
    ) -> None:
        torch.set_num_threads(learner.threads)
        torch.manual_seed(seed)
        self._source, self._loss, self._seed, self._rank = student.model, loss, seed, rank
        self._temperature, self._chunk_tokens = temperature, learner.logit_chunk_tokens
        self._device = join(rank=rank, world_size=world_size, master_address=master_address, master_port=master_port)
        self._engine = Engine(
            load_student(student, activation_checkpointing=learner.activation_checkpointing),
            learner,
            dtype=student.dtype,
            total_steps=total_batches * learner.optimizer_steps_per_batch,
        )
        self._version = PolicyVersion(0, 0)

    @property
    def version(self) -> PolicyVersion:
        """The weights held now: completed ``step`` calls."""
        return self._version

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model; its parameters are partitioned under ZeRO-3."""
        return self._engine.student.model

    def step(self, share: PackedBatch) -> LearnerStats:
        """One update from one batch, in as many optimiser steps as it is cut into.

        Args:
            share: this rank's part: ``steps[i].ranks`` holds its micro-batches alone, as many as every other rank's.

        Returns:
            The metrics of the batch over all ranks: means over loss tokens, the mean gradient norm before clipping,
            and the learning rate of the last optimiser step.

        Raises:
            NonFiniteUpdateError: a loss or the gradient is not finite; names the trajectories, on all ranks alike.
        """
        steps = self._pack(share)
        if len(steps) > 1:  # one optimiser step is its own "policy at the start of the batch"
            steps = [[self._with_old_logprobs(packed) for packed in step] for step in steps]
        terms, norms = [], []
        for packs, step in zip(steps, share.steps, strict=True):
            learning_rate = self._engine.learning_rate
            sums, norm = self._update(step, packs, share.alpha)
            terms.append(sums)
            norms.append(norm)
        total = torch.stack(terms).sum(0)
        dist.all_reduce(total)
        self._version = PolicyVersion(self._version.incarnation, self._version.step + 1)
        num_loss_tokens = sum(step.num_loss_tokens for step in share.steps)
        metrics = LossTerms.from_vector(total).metrics(num_loss_tokens) | {
            "eopd_grad_norm": sum(norms) / len(norms),
            "eopd_learning_rate": learning_rate,
            "eopd_alpha_ratio": share.alpha,
            "eopd_loss_tokens": float(num_loss_tokens),
        }
        return LearnerStats(version=self._version, metrics=metrics)

    def evaluate(self, share: PackedBatch) -> EvalStats:
        """Student against teacher over the loss tokens of all ranks, without an update; see ``EvalStats``."""
        sums: list[list[float]] = []
        for packed in (packed for step in self._pack(share) for packed in step):
            columns = self._statistics(packed.to(self._device))
            sums += [columns[:, rows].sum(1).tolist() for rows in packed.rows]
        sums_MS = np.array(_gather_all(sums))
        counts_M = sums_MS[:, -1]
        return EvalStats(
            **{name: cluster_estimate(sums_MS[:, i], counts_M) for i, name in enumerate(_ESTIMATES)},
            num_trajectories=len(counts_M),
            num_tokens=round(counts_M.sum()),
        )

    def save(self, directory: Path) -> None:
        """Write weights, optimiser, schedule, random state and version, for ``load`` under the same stage and ranks."""
        self._engine.save(directory, self._version._asdict())

    def load(self, directory: Path) -> None:
        """Continue from what ``save`` wrote, under a new incarnation: engines may know later versions of the old one.

        Raises:
            FileNotFoundError: the directory holds no checkpoint.
        """
        saved = self._engine.load(directory)
        self._version = PolicyVersion(saved["incarnation"] + 1, saved["step"])

    def export(self, directory: Path) -> None:
        """Write the student as a plain Hugging Face directory, whole or not at all; replaces an older one."""
        weights: dict[str, Tensor] = {}
        for name, tensor in self._engine.whole_weights():
            if self._rank == 0:
                weights[name] = tensor.to("cpu", copy=True)
        if self._rank == 0:
            partial_directory = directory.with_name(f".{directory.name}.partial")
            shutil.rmtree(partial_directory, ignore_errors=True)
            self.model.save_pretrained(partial_directory, state_dict=weights)
            AutoTokenizer.from_pretrained(self._source).save_pretrained(partial_directory)
            shutil.rmtree(directory, ignore_errors=True)
            partial_directory.rename(directory)
        dist.barrier()

    def close(self) -> None:
        """Leave the gang; its threads must not outlive the interpreter."""
        dist.destroy_process_group()

    def _pack(self, share: PackedBatch) -> list[list[Packed]]:
        """The micro-batches of every optimiser step, with gates that were computed before the cut."""
        gates = dict(zip((stored.header.key for stored in share.stored()), self._gates(share), strict=True))
        return [
            [
                collate([_body(stored) for stored in micro], [gates[stored.header.key] for stored in micro])
                for micro in micros
            ]
            for (micros,) in (step.ranks for step in share.steps)
        ]

    def _gates(self, share: PackedBatch) -> list[Tensor]:
        """The gate [R] of each of this rank's trajectories; a quantile is taken over the loss tokens of all ranks."""
        gate, trajectories = self._loss.gate, [_body(stored) for stored in share.stored()]
        entropies = [torch.from_numpy(teacher_entropy(scored.signal).copy()) for scored in trajectories]
        threshold = None
        if isinstance(gate, QuantileGate):
            mine = [e[torch.tensor(s.trajectory.loss_mask)] for e, s in zip(entropies, trajectories, strict=True)]
            threshold = quantile_threshold(torch.cat(_gather_all(mine)), gate.top)
        draws = [
            random_draws(self._seed, s.trajectory.key, len(e)) if isinstance(gate, RandomGate) else None
            for e, s in zip(entropies, trajectories, strict=True)
        ]
        return [gate_weights(e, gate, threshold=threshold, draws_T=d) for e, d in zip(entropies, draws, strict=True)]

    def _with_old_logprobs(self, packed: Packed) -> Packed:
        """The same micro-batch, with the student's log-probabilities before the first optimiser step."""
        on_device = packed.to(self._device)

        def logprobs(hidden_TD: Tensor, head: Head) -> Tensor:
            found = token_statistics(hidden_TD, head.weight_VD, on_device.tokens, **self._projection(head))
            return found.student_logprobs_T

        with torch.no_grad():
            old_logprobs_T = self._engine.run(on_device, logprobs)
        return replace(packed, tokens=replace(packed.tokens, old_logprobs_T=old_logprobs_T.cpu()))

    def _update(self, step: OptimizerStep, packs: Sequence[Packed], alpha: float) -> tuple[Tensor, float]:
        """One optimiser step: this rank's sums of the loss terms [N], and the gradient norm of all ranks."""
        losses, sums = [], []
        for index, packed in enumerate(packs):
            loss, terms_N = self._loss_of(packed.to(self._device), step.num_loss_tokens, alpha)
            self._engine.accumulate(loss, last=index == len(packs) - 1)
            losses.append(loss.detach())
            sums.append(terms_N)
        norm = self._engine.step()
        if not math.isfinite(norm):
            raise NonFiniteUpdateError(_explain(step, losses))
        return torch.stack(sums).sum(0), norm

    def _loss_of(self, packed: Packed, num_loss_tokens: int, alpha: float) -> tuple[Tensor, Tensor]:
        """A micro-batch's share of the loss, with gradient, and its sums [N] of the loss terms."""

        def loss_and_terms(hidden_TD: Tensor, head: Head) -> tuple[Tensor, Tensor]:
            loss, terms = objective(
                hidden_TD,
                head.weight_VD,
                packed.tokens,
                self._loss,
                num_loss_tokens=num_loss_tokens,
                alpha=alpha,
                **self._projection(head),
            )
            return loss, terms.vector()

        return self._engine.run(packed, loss_and_terms)

    def _statistics(self, packed: Packed) -> Tensor:
        """Rows of ``_ESTIMATES`` and, last, the loss mask: float64 [6, T], zeros where masked."""
        tokens = packed.tokens
        mask_T, entropy_T = tokens.loss_mask_T, tokens.teacher_entropy_T
        assert entropy_T is not None  # collate sets it

        def statistics(hidden_TD: Tensor, head: Head) -> Tensor:
            projection = self._projection(head)
            projection["temperature"] = 1.0  # held-out responses are sampled at 1, whatever training samples at
            found = token_statistics(hidden_TD, head.weight_VD, tokens, **projection)
            columns = [found.reverse_kl_T, found.forward_kl_T, found.student_entropy_T, entropy_T * mask_T]
            return torch.stack([column.double() for column in (*columns, found.top1_agreement_T, mask_T)])

        with torch.no_grad():
            return self._engine.run(packed, statistics)

    def _projection(self, head: Head) -> Projection:
        return {
            "head_bias_V": head.bias_V,
            "logit_scale": head.logit_scale,
            "logit_softcap": head.logit_softcap,
            "temperature": self._temperature,
            "chunk_tokens": self._chunk_tokens,
        }


def cluster_estimate(sums_M: Float64Array, counts_M: Float64Array) -> Estimate:
    """Mean per token and its standard error, where the tokens of a trajectory are one cluster.

    The ratio estimator: mean = sum s / sum n, and se = sqrt(m / (m - 1) sum (s_i - mean n_i)^2) / sum n for m
    trajectories with sums s_i over n_i tokens (Cochran, Sampling Techniques, chapter 6). Infinite for one trajectory,
    which shows no spread.
    """
    mean = sums_M.sum() / counts_M.sum()
    num_clusters = len(counts_M)
    if num_clusters < 2:
        return Estimate(mean=float(mean), standard_error=math.inf)
    spread = np.sum((sums_M - mean * counts_M) ** 2) * num_clusters / (num_clusters - 1)
    return Estimate(mean=float(mean), standard_error=float(np.sqrt(spread) / counts_M.sum()))


def _explain(step: OptimizerStep, losses: Sequence[Tensor]) -> str:
    """Name the trajectories of micro-batches whose loss is not finite, or all, when only the gradient is not."""
    (micros,) = step.ranks
    names = [[str(tuple(stored.header.key)) for stored in micro] for micro in micros]
    broken = [name for micro, loss in zip(names, losses, strict=True) if not loss.isfinite() for name in micro]
    every_broken, every_name = _gather_all(broken), _gather_all([name for micro in names for name in micro])
    what = "loss" if every_broken else "gradient"
    return f"the {what} is not finite, nothing was applied; trajectories: {', '.join(every_broken or every_name)}"


def _gather_all(mine: list[T]) -> list[T]:
    """The items of all ranks, in the order of the ranks."""
    of_ranks: list[list[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return [item for of_rank in of_ranks for item in of_rank]


def _body(stored: Stored[ScoredTrajectory]) -> ScoredTrajectory:
    return cast(ScoredTrajectory, stored.body)
