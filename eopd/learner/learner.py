"""One rank of the learner: one update of the student from one batch.

    share of a PackedBatch ──▶ weightings ──▶ packed micro-batches
        ──▶ forward and backward of each ──▶ optimiser step ──▶ metrics

A batch may come in parts. ``accumulate`` adds up the gradients of the *summed* loss; ``step`` does so
with the last part, and divides by the loss tokens of all parts, which are known only then.

All methods are collective: every rank calls the same method with its share of the same batch.
Denominators, gates and metrics are those of the whole batch, so that neither the cut into
micro-batches nor the number of ranks changes the result. Left out: fetching bodies and running as
an actor (``runtime/``), sending weights to the engines (``weights/``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel

from eopd.adapters import CheckpointTensor
from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.config.loss import Gate, HardGate, QuantileGate, SigmoidGate
from eopd.config.teacher import EntropyBound
from eopd.hub import model_directory
from eopd.learner.attention import check_mask
from eopd.learner.backend import Backend, OpenBackend
from eopd.learner.collate import Packed, Weighting, body_of, collate, collate_text
from eopd.learner.export import write_student
from eopd.learner.lora import adapter_tensors, save_adapter, whole_tensors
from eopd.learner.measuring import entropy_counts, eval_stats, token_sums
from eopd.learner.nonfinite import BrokenRow, NonFiniteUpdateError, dump, explain, find_rows
from eopd.learner.ranks import gather_all, join
from eopd.learner.student import load_student
from eopd.learner.weighting import Weigher, trajectory_metrics
from eopd.loss.chunked import Head
from eopd.loss.kernels import choose_chunk_tokens
from eopd.loss.objective import LossTerms, objective, token_statistics
from eopd.metrics import Metric, Same, Sum, reduce
from eopd.types import (
    EvalStats,
    Float32Array,
    Int32Array,
    LearnerStats,
    MicroBatch,
    OptimizerStep,
    PackedBatch,
    PolicyVersion,
    ScoredTrajectory,
    Stored,
    TrajectoryKey,
)


@dataclass(slots=True)
class _Accumulated:
    """What was accumulated of an optimiser step on this rank, a list item for each micro-batch; the
    loss tokens are those of all ranks.
    """

    micros: list[MicroBatch] = field(default_factory=list)
    packs: list[Packed] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    terms: list[Tensor] = field(default_factory=list)
    num_loss_tokens: int = 0

    def trajectories(self) -> Sequence[Stored[ScoredTrajectory]]:
        """Returns all of them, in the order of the micro-batches."""
        return list(chain.from_iterable(self.micros))


class LearnerRank:
    """One of ``world_size`` ranks; the roles' ``Learner`` is the gang of them.

    Args:
        open_backend: makes what holds the student and updates it.
        student: what to train.
        learner: how to train it.
        loss: the objective.
        temperature: the one of the rollouts; the student's logits are divided by it.
        total_batches: length of the learning-rate schedule.
        seed: the run's; it decides the draws of the random gate and the first adapters.
        entropy_bounds: for each teacher, what the gate reads where only bounds on its entropy are
            known.
        broken: directory for optimiser steps that were not finite.
        rank: of this process, from 0.
        world_size: number of ranks.
        master_address: where rank 0 runs.
        master_port: a free port there.
        num_tokens: ids from here on are padding of the head, and have no probability; None where
            the head has no padding.
    """

    def __init__(
        self,
        open_backend: OpenBackend,
        student: StudentConfig,
        learner: LearnerConfig,
        loss: LossConfig,
        *,
        temperature: float,
        total_batches: int,
        seed: int,
        entropy_bounds: Mapping[str, EntropyBound],
        broken: Path,
        rank: int,
        world_size: int,
        master_address: str,
        master_port: int,
        num_tokens: int | None = None,
    ) -> None:
        torch.set_num_threads(learner.threads)
        torch.manual_seed(seed)
        self._source = model_directory(student.model)
        self._loss, self._rank, self._broken = loss, rank, broken
        self._weigh = Weigher(loss=loss, entropy_bounds=entropy_bounds, seed=seed)
        self._weigh_to_measure = replace(self._weigh, loss=LossConfig(gate=_yardstick(loss.gate)))
        self._max_skipped, self._num_skipped = learner.max_skipped_steps, 0
        self._temperature = temperature
        self._device = join(
            rank=rank,
            world_size=world_size,
            master_address=master_address,
            master_port=master_port,
            timeout_s=learner.timeout_s,
        )
        self._backend = open_backend(
            load_student(
                student,
                activation_checkpointing=learner.activation_checkpointing,
                device=self._device,
                seed=seed,
                num_tokens=num_tokens,
            ),
            learner,
            dtype=student.chosen_dtype,
            total_steps=total_batches * learner.optimizer_steps_per_batch,
        )
        gpu_bytes = None
        if self._device.type == "cuda":
            gpu_bytes = torch.cuda.get_device_properties(self._device).total_memory

        self._chunk_tokens = learner.logit_chunk_tokens or choose_chunk_tokens(
            self.model.config.get_text_config().vocab_size, gpu_bytes=gpu_bytes
        )
        check_mask(self.model, device=self._device, token_budget=learner.token_budget)
        self._accumulated = _Accumulated()
        self._weightings: dict[TrajectoryKey, Weighting] = {}
        # of the weights held now; the actor sets the incarnation
        self.version = PolicyVersion(0, 0)

    @property
    def backend(self) -> Backend:
        """The holder of the student, optimiser and schedule."""
        return self._backend

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model; its parameters are partitioned under ZeRO-3."""
        return self._backend.student.model

    def accumulate(self, share: PackedBatch) -> None:
        """Add up the gradients of a part of a batch, which ``step`` will complete.

        Args:
            share: this rank's share of the part: one optimiser step, not yet applied.
        """
        (packs,), weightings = self._pack(share, self._weigh)
        (part,) = share.steps
        self._weightings |= weightings
        self._accumulate(part, packs, share.alpha, last=False)

    def step(self, share: PackedBatch) -> LearnerStats:
        """Update the student from one batch, in as many optimiser steps as it is cut into.

        An optimiser step whose loss or gradient is not finite is applied on no rank. Its
        micro-batches are written to ``broken``, and at most ``learner.max_skipped_steps`` of a run
        are skipped so.

        Args:
            share: this rank's share of the batch, or of its last part: ``steps[i].ranks`` holds its
                micro-batches alone, as many as every other rank has.

        Returns:
            The metrics of the optimiser steps applied, over all ranks: means over their loss
            tokens, the mean gradient norm before clipping, the last learning rate. Where none was
            applied there is only the count of loss tokens.

        Raises:
            NonFiniteUpdateError: one step too many was not finite. It names the rows, the same on
                all ranks.
        """
        steps, weightings = self._pack(share, self._weigh)
        self._weightings |= weightings
        if len(steps) > 1:  # one optimiser step is its own "policy at the start of the batch"
            steps = [list(map(self._with_old_logprobs, step)) for step in steps]

        terms, norms, rates = [], [], []
        applied: list[Stored[ScoredTrajectory]] = []
        before, after = self.version.step, self.version.step + 1

        for number, (packs, step) in enumerate(zip(steps, share.steps, strict=True)):
            rate = self._backend.learning_rate
            self._accumulate(step, packs, share.alpha, last=True)
            accumulated, self._accumulated = self._accumulated, _Accumulated()
            norm = self._backend.step(accumulated.num_loss_tokens)
            if not math.isfinite(norm):
                self._skip(self._broken / f"batch-{before:06d}-step-{number}", accumulated)
                continue

            # at once: where a later step ends the run, these are not the weights of before
            self.version = PolicyVersion(self.version.incarnation, after)
            terms += accumulated.terms
            norms.append(norm)
            rates.append(rate)
            applied += accumulated.trajectories()

        self.version = PolicyVersion(self.version.incarnation, after)
        metrics = _metrics_of_steps(terms, norms, rates, applied)
        if terms:
            metrics["eopd_alpha_ratio"] = Same(share.alpha)

        weightings, self._weightings = self._weightings, {}
        of_trajectories = [
            trajectory_metrics(stored, weightings[stored.header.key]) for stored in applied
        ]

        return LearnerStats(
            version=self.version,
            metrics=reduce(gather_all([metrics, *of_trajectories])),
            skipped_steps=self._num_skipped,
        )

    def evaluate(self, share: PackedBatch) -> EvalStats:
        """Measure student against teacher on the prompts of all ranks, without an update."""
        sums: list[Sequence[float]] = []
        counts: list[list[list[int]]] = []
        steps, _ = self._pack(share, self._weigh_to_measure)

        for packed in chain.from_iterable(steps):
            columns = self._statistics(packed, self._temperature)[1:].cpu()
            gate_T = packed.tokens.gate_T
            sums += [token_sums(columns[:, rows], gate_T[rows]) for rows in packed.rows]
            counts += [entropy_counts(columns[:, rows]) for rows in packed.rows]

        headers = [stored.header for stored in share.stored()]
        prompts = [(header.key.prompt_id, header.source) for header in headers]

        return eval_stats(gather_all(sums), gather_all(prompts), gather_all(counts))

    def probe(self, token_ids: Int32Array) -> Float32Array:
        """Returns log-probabilities of a text int32[N] at temperature 1, float32[N - 1] in nats.

        ``weights/probe.py`` compares them with those of the engines.
        """
        logprobs_T = self._student_logprobs(collate_text(token_ids), 1.0)
        return cast(Float32Array, logprobs_T.float().cpu().numpy())

    def save(self, directory: Path) -> None:
        """Write weights, optimiser, schedule, random state and version.

        ``load`` continues from them under the same ZeRO stage.
        """
        self._backend.save(directory, self.version._asdict() | {"num_skipped": self._num_skipped})

    def frozen(self) -> list[int]:
        """Returns a checksum of each parameter that is not trained; collective."""
        checksums = []
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                with self._backend.gathered([parameter]):
                    checksum = torch.hash_tensor(parameter.detach())
                    checksums.append(int(checksum.view(torch.int64)))

        return checksums

    def load(self, directory: Path, *, fresh_optimizer: bool = False) -> None:
        """Continue from what ``save`` wrote, under the incarnation that ``version`` has now.

        Bit-equal with as many ranks as saved; with another number up to the rounding of sums over
        ranks.

        Args:
            directory: the learner's part of a checkpoint.
            fresh_optimizer: whether the optimiser's moments begin at zero, rather than as saved.

        Raises:
            FileNotFoundError: the directory holds no checkpoint.
            ValueError: it is that of another number of ranks, and the options do not let that
                change.
        """
        saved = self._backend.load(directory)
        if fresh_optimizer:
            self._backend.forget_moments()

        self.version = PolicyVersion(self.version.incarnation, saved["step"])
        self._num_skipped = saved["num_skipped"]

    def export(self, directory: Path, adapter_directory: Path | None = None) -> None:
        """Write the student as a plain Hugging Face directory, whole or not at all; replaces an
        older one.

        With LoRA that is the merged model, and ``adapter_directory``, as a rule ``adapter`` beside
        it, is the adapter in peft's format.
        """
        weights = self._on_rank_0(whole_tensors(self.model))
        if self._rank == 0:
            write_student(directory, self.model, weights, source=self._source)

        if adapter := self._on_rank_0(adapter_tensors(self.model)):
            target = adapter_directory or directory.with_name("adapter")
            save_adapter(target, self.model, adapter, source=self._source)

        dist.barrier()

    def _on_rank_0(self, tensors: Mapping[str, CheckpointTensor]) -> dict[str, Tensor]:
        """Returns whole tensors on the CPU, and none on other ranks; collective."""
        copies = {}
        for name, tensor in tensors.items():
            with self._backend.gathered(tensor.parts):
                if self._rank == 0:
                    copies[name] = tensor.whole().to("cpu", copy=True)

        return copies

    def close(self) -> None:
        """Leave the gang; its threads must not outlive the interpreter."""
        dist.destroy_process_group()

    def _pack(
        self, share: PackedBatch, weigh: Weigher
    ) -> tuple[list[list[Packed]], dict[TrajectoryKey, Weighting]]:
        """Returns the micro-batches of every optimiser step, and the weightings of all trajectories
        of this rank.
        """
        weightings = weigh(share.stored())

        def pack(micro: MicroBatch) -> Packed:
            of_micro = [weightings[stored.header.key] for stored in micro]
            return collate(list(map(body_of, micro)), of_micro)

        steps = []
        for step in share.steps:
            (micros,) = step.ranks
            steps.append(list(map(pack, micros)))

        return steps, weightings

    def _with_old_logprobs(self, packed: Packed) -> Packed:
        """Returns the same micro-batch, with the student's log-probabilities before the first
        optimiser step.
        """
        old_logprobs_T = self._student_logprobs(packed, self._temperature).cpu()
        return replace(packed, tokens=replace(packed.tokens, old_logprobs_T=old_logprobs_T))

    def _student_logprobs(self, packed: Packed, temperature: float) -> Tensor:
        """Returns log-probabilities of the tokens [T], 0 where masked, without gradient."""
        return self._statistics(packed, temperature)[0]

    def _statistics(self, packed: Packed, temperature: float) -> Tensor:
        """Returns ``token_statistics`` [7, T] of a micro-batch that is on the CPU."""
        on_device = packed.to(self._device)

        def statistics(hidden_TD: Tensor, head: Head) -> Tensor:
            policy_head = replace(head, temperature=temperature)
            return token_statistics(
                hidden_TD, policy_head, on_device.tokens, chunk_tokens=self._chunk_tokens
            )

        with torch.no_grad():
            return self._backend.run(on_device, statistics)

    def _accumulate(
        self, step: OptimizerStep, packs: Sequence[Packed], alpha: float, *, last: bool
    ) -> None:
        """Adds up the gradients of an optimiser step, or of a part of one; ``last`` closes it."""
        accumulated, (micros,) = self._accumulated, step.ranks
        if not micros:
            raise ValueError("an optimiser step has no micro-batch")

        accumulated.num_loss_tokens += step.num_loss_tokens

        for index, (packed, micro) in enumerate(zip(packs, micros, strict=True)):
            loss, terms_N = self._loss_of(packed.to(self._device), alpha)
            self._backend.accumulate(loss, last=last and index == len(packs) - 1)
            accumulated.micros.append(micro)
            accumulated.packs.append(packed)
            accumulated.losses.append(loss.detach())
            accumulated.terms.append(terms_N)

    def _skip(self, directory: Path, accumulated: "_Accumulated") -> None:
        """Records an optimiser step that was refused, and raises when too many were; collective."""
        are_finite = gather_all([bool(loss.isfinite()) for loss in accumulated.losses])
        quantity = "gradient" if all(are_finite) else "loss"
        rows: list[BrokenRow] = []
        keys: list[TrajectoryKey] = []
        for packed, micro in zip(accumulated.packs, accumulated.micros, strict=True):
            names = [stored.header.key for stored in micro]
            keys += names
            logprobs_T = self._student_logprobs(packed, self._temperature).cpu()
            rows += find_rows(packed, names, logprobs_T)

        every_row, every_key = gather_all(rows), gather_all(keys)
        message = explain(quantity, every_row, every_key, directory)

        faults = []
        try:
            dump(
                directory, quantity, every_row, every_key, rank=self._rank, packs=accumulated.packs
            )
        except OSError as error:
            faults.append(f"which could not be written: {error}")

        for fault in gather_all(faults):
            raise NonFiniteUpdateError(f"{message}, {fault}")

        if self._num_skipped == self._max_skipped:
            why = f"learner.max_skipped_steps is {self._max_skipped}, and they are used up"
            raise NonFiniteUpdateError(f"{message} ({why})")

        self._num_skipped += 1

    def _loss_of(self, packed: Packed, alpha: float) -> tuple[Tensor, Tensor]:
        """Returns the sum of a micro-batch's loss over its tokens, and its sums [N] of the loss
        terms.
        """

        def loss_and_terms(hidden_TD: Tensor, head: Head) -> tuple[Tensor, Tensor]:
            loss, terms = objective(
                hidden_TD,
                replace(head, temperature=self._temperature),
                packed.tokens,
                self._loss,
                num_loss_tokens=1,  # the backend divides by that of the whole step
                alpha=alpha,
                chunk_tokens=self._chunk_tokens,
            )
            return loss, terms.vector()

        return self._backend.run(packed, loss_and_terms)


def _metrics_of_steps(
    terms: list[Tensor],
    norms: Sequence[float],
    rates: Sequence[float],
    applied: Sequence[Stored[ScoredTrajectory]],
) -> dict[str, Metric]:
    """Returns what optimiser steps add to the metrics of their batch, on this rank: the loss ``terms``
    of its micro-batches, gradient norms, learning rates, and the trajectories of steps applied.
    """
    num_loss_tokens = sum(stored.header.num_loss_tokens for stored in applied)
    metrics: dict[str, Metric] = {"eopd_loss_tokens": Sum(float(num_loss_tokens))}
    if terms:
        metrics |= LossTerms.from_vector(torch.stack(terms).sum(0)).metrics(num_loss_tokens)
        metrics |= {
            "eopd_grad_norm": Same(sum(norms) / len(norms)),
            "eopd_learning_rate": Same(rates[-1]),
        }

    return metrics


def _yardstick(gate: Gate) -> Gate:
    """Returns the gate by which a measurement calls the teacher unsure: the run's where that reads
    the entropy, otherwise the paper's.
    """
    return gate if isinstance(gate, HardGate | QuantileGate | SigmoidGate) else HardGate()
