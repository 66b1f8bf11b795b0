"""A ``Backend`` on DeepSpeed: ZeRO, gradient accumulation, optimiser step, checkpoint. The only
file that knows DeepSpeed.

Four properties of DeepSpeed 0.19 shape this file.

* It averages gradients over ranks, and under ZeRO-3 cannot do otherwise. The objective is a sum over
  the loss tokens of all ranks, so ``accumulate`` multiplies by the world size.
* It divides gradients before it clips them only by a loss scale, which some of its optimisers have.
  ``step`` divides by the number of loss tokens, through that or in place.
* ZeRO-2 and -3 reduce at every backward, so all ranks must run equally many; the boundary is set by
  hand, since the number of micro-batches varies from step to step.
* Every stage refuses an update whose global gradient norm is not finite, on all ranks together, and
  forgets its gradients. ``accumulate`` turns a non-finite loss into non-finite gradients, so that
  one number decides; ZeRO-0 in float32 has no such check, and gets it here.
"""

import errno
import io
import math
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from eopd.config import LearnerConfig
from eopd.learner.collate import Packed
from eopd.learner.student import Student
from eopd.loss.chunked import Head

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read while deepspeed is imported
if without_mlflow := "mlflow" not in sys.modules:
    # DeepSpeed's autotuner, which is not used here, would take more than a second to import it.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
import deepspeed
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

if without_mlflow:
    del sys.modules["mlflow"]

# DeepSpeed compiles what it takes for useful here, on CPU its shared-memory reduction: a minute,
# and a compiler needed.
deepspeed.ops.__compatible_ops__ = {}

T = TypeVar("T")

_TAG = "deepspeed"
_STEPS = "optimizer_steps_per_batch"  # under which a checkpoint was written


class DeepspeedBackend:
    """A student, its optimiser and its schedule, sharded by ZeRO."""

    def __init__(
        self, student: Student, config: LearnerConfig, *, dtype: str, total_steps: int
    ) -> None:
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self._factor = factor = schedule(config, total_steps)
        self._engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=optimizer,
            lr_scheduler=lambda basic: LambdaLR(basic, factor),
            config=native_config(config, dtype),
        )
        if config.chosen_zero_stage == 0 and dtype == "bfloat16":
            # This wrapper has already stepped once, on zero gradients: forget its moments and its
            # weight decay.
            self._engine.optimizer.refresh_fp32_params()
            optimizer.state.clear()

        self.student = student
        self._config = config
        self._sharded = config.chosen_zero_stage == 3
        self._keeps_no_norm = config.chosen_zero_stage == 0 and dtype == "float32"
        if config.chosen_zero_stage == 3:
            deepspeed.zero.register_external_parameter(student, student.whole_head_VD)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._engine.get_lr()[0])

    def run(self, packed: Packed, use_head: Callable[[Tensor, Head], T]) -> T:
        """Run the student's forward pass; collective under ZeRO-3, with or without gradient."""
        result: T = self._engine(packed.input_ids_T, packed.position_ids_T, use_head)
        return result

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the loss; ``last`` closes the optimiser
        step. Collective.
        """
        poison = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * poison * dist.get_world_size(), scale_wrt_gas=False)

    def step(self, num_loss_tokens: int) -> float:
        """Divide what was accumulated by ``num_loss_tokens``, clip it and apply it, unless its norm
        is not finite; collective.

        Returns:
            The norm of the gradient over all ranks, before clipping. When it is not finite nothing
            was applied, on any rank.
        """
        divisor, optimizer = max(1, num_loss_tokens), self._engine.optimizer
        if self._keeps_no_norm:
            return self._step_in_float32(divisor)

        if isinstance(optimizer, BF16_Optimizer):  # has no loss scale
            for gradient in optimizer.fp32_groups_gradients_flat:
                gradient.div_(divisor)

            self._engine.step()
        else:
            optimizer.loss_scale = float(divisor)
            try:
                self._engine.step()
            finally:
                optimizer.loss_scale = 1.0  # a backward would multiply by it

        norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm) and self._engine.zero_cpu_offload():
            # In bfloat16 under ZeRO-1 and 2 DeepSpeed keeps the refused gradient, and adds all
            # later ones to it.
            gradients = optimizer.averaged_gradients
            gradients.update(dict.fromkeys(gradients))

        # bfloat16 under ZeRO-0 heeds a loss scale, and tells the norm as it was before
        return norm / divisor if isinstance(optimizer, FP16_UnfusedOptimizer) else norm

    def _step_in_float32(self, divisor: int) -> float:
        """Does what ``step`` does under ZeRO-0 in float32, where DeepSpeed tells no norm."""
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.div_(divisor)

        norm = torch.nn.utils.get_total_norm(gradients).item()
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()

        return norm

    def save(self, directory: Path, state: dict[str, int]) -> None:
        """Write weights, optimiser, schedule, ``state`` and this rank's random state; collective.

        Raises:
            OSError: the disk did not take it.
        """
        try:
            self._write(directory, state)
        except OSError:
            dist.barrier()  # the ranks that could write wait there for all
            raise

        dist.barrier()

    def _write(self, directory: Path, state: dict[str, int]) -> None:
        client_state = state | {_STEPS: self._config.optimizer_steps_per_batch}
        with full_disk_is_an_oserror():
            self._engine.save_checkpoint(
                str(directory), tag=_TAG, client_state=client_state, save_latest=False
            )
            torch.save(torch.get_rng_state(), directory / f"rng-{dist.get_rank()}.pt")

    def load(self, directory: Path) -> dict[str, int]:
        """Continue from what ``save`` wrote under the same stage (1 and 2 are alike), and return
        ``state``; collective.

        Learning rate, schedule, betas, weight decay and clipping are those of the config, not of
        the checkpoint.

        With as many ranks as saved it is bit-equal. With another number only their random states
        are not: rank r takes that of saved rank r modulo their number, and nothing draws from it.

        Raises:
            FileNotFoundError: the directory holds no checkpoint.
            ValueError: it is that of another number of ranks, and
                ``LearnerConfig.ranks_may_change`` is false.
        """
        if not (directory / _TAG).is_dir():
            raise FileNotFoundError(f"{directory}: holds no learner checkpoint")

        saved_ranks = len(list(directory.glob("rng-*.pt")))
        if saved_ranks == dist.get_world_size() or self._config.chosen_zero_stage == 0:
            _, state = self._engine.load_checkpoint(str(directory), tag=_TAG)
        elif not self._config.ranks_may_change:
            raise ValueError(
                f"{directory}: is of {saved_ranks} ranks, which "
                "round_robin_gradients does not let change"
            )
        else:
            state = self._load_universal(directory)

        torch.set_rng_state(torch.load(directory / f"rng-{dist.get_rank() % saved_ranks}.pt"))
        steps = self._config.optimizer_steps_per_batch
        self._as_configured(steps_before=state.get(_STEPS, steps))

        return {name: value for name, value in state.items() if name != _STEPS}

    def forget_moments(self) -> None:
        """Set AdamW's moments and its counts of steps to zero, on every rank for its own shard."""
        for moments in self._engine.basic_optimizer.state.values():
            for tensor in moments.values():
                tensor.zero_()

    def _as_configured(self, *, steps_before: int) -> None:
        """Set what a run may change when it goes on; torch and DeepSpeed (0.19.8) restore it from
        the checkpoint.

        Args:
            steps_before: optimiser steps of a batch that the schedule has counted so far.
        """
        config, scheduler = self._config, self._engine.lr_scheduler
        done = scheduler.last_epoch * config.optimizer_steps_per_batch // steps_before
        rate = config.lr * self._factor(done)
        groups = scheduler.optimizer.param_groups

        for group in groups:
            group.update(
                lr=rate, initial_lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
            )

        scheduler.last_epoch, scheduler.base_lrs = done, [config.lr] * len(groups)
        scheduler._last_lr = [rate] * len(groups)
        if not self._keeps_no_norm:  # ZeRO-0 in float32 clips by DeepSpeed's config alone
            self._engine.optimizer.clip_grad = config.max_grad_norm

    def _load_universal(self, directory: Path) -> dict[str, Any]:
        """Load through DeepSpeed's universal format, which knows no ranks.

        Rank 0 converts the checkpoint, into a directory next to it.
        """
        universal = directory.with_name(f".{directory.name}.universal")
        if dist.get_rank() == 0:
            shutil.rmtree(universal, ignore_errors=True)
            _convert(directory / _TAG, universal / _TAG)

        dist.barrier()
        # its key checkpoint.load_universal, for one call
        self._engine._config.load_universal_checkpoint = True
        _, state = self._engine.load_checkpoint(str(universal), tag=_TAG)
        self._engine._config.load_universal_checkpoint = False

        for weights, moments in self._engine.basic_optimizer.state.items():
            # Loaded on the CPU, and under ZeRO-3 as one tensor in all groups, which each of them
            # would count up.
            moments["step"] = moments["step"].to(weights.device, copy=True)

        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(universal)

        return dict(state)

    def shape(self, parameter: Tensor) -> Sequence[int]:
        """Return the full shape: ZeRO-3 empties a parameter, and keeps its shape as an attribute."""
        shape: Sequence[int] = parameter.ds_shape if self._sharded else parameter.shape  # type: ignore[attr-defined]
        return shape

    @contextmanager
    def gathered(self, parameters: Sequence[Tensor]) -> Iterator[bool]:
        """Gather parameters within a block under ZeRO-3; below it every rank has all of them."""
        with deepspeed.zero.GatheredParameters(list(parameters), enabled=self._sharded):
            yield self._sharded


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Returns the student's state dict from what ``DeepspeedBackend.save`` wrote, on the CPU and
    without a process group.

    Under ZeRO-3 these are the float32 master weights that the student's own are rounded from.

    Raises:
        FileNotFoundError: the directory holds no checkpoint.
    """
    of_rank_0 = directory / _TAG / "mp_rank_00_model_states.pt"
    if of_rank_0.exists():  # ZeRO-0 to 2, where every rank holds all weights
        weights: dict[str, Tensor] = torch.load(
            of_rank_0, map_location="cpu", mmap=True, weights_only=False
        )["module"]
        return weights

    with _silence():
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=_TAG))


def _convert(sharded: Path, universal: Path) -> None:
    arguments = Namespace(
        input_folder=str(sharded),
        output_folder=str(universal),
        num_extract_workers=1,  # in this process: it holds a process group and threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with _silence():
        ds_to_universal.main(arguments)


@contextmanager
def full_disk_is_an_oserror() -> Iterator[None]:
    """Raise ``OSError`` for what torch's writer makes a ``RuntimeError``: a disk that is full.

    All that it says is "[enforce fail at inline_container.cc:672] . unexpected pos".
    """
    try:
        yield
    except RuntimeError as error:
        if "inline_container.cc" not in str(error):
            raise

        what = f"torch could not write all of it; is the disk full? ({error})"
        raise OSError(errno.ENOSPC, what) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Silences DeepSpeed's tools, which print and draw bars; they raise what is wrong."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def native_config(config: LearnerConfig, dtype: str) -> dict[str, Any]:
    """Returns DeepSpeed's options: ours merged with ``learner.deepspeed``, which wins, section by
    section.

    In bfloat16 gradients are accumulated and reduced in float32. ZeRO-0 cannot do that, and does
    both in bfloat16.
    """
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.chosen_zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if dtype == "bfloat16":
        options["bf16"] = {"enabled": True}
        if config.chosen_zero_stage > 0:
            options["data_types"] = {"grad_accum_dtype": "fp32"}
            options["communication_data_type"] = "fp32"

    for key, value in config.deepspeed.items():
        both_sections = isinstance(value, dict) and isinstance(options.get(key), dict)
        options[key] = {**options[key], **value} if both_sections else value  # type: ignore[dict-item]

    return options


def schedule(config: LearnerConfig, total_steps: int) -> Callable[[int], float]:
    """Returns the factor on the learning rate at optimiser step s of ``total_steps``, from 0 on.

    Warm-up rises linearly and never starts at zero: with 4 steps of it the factors are 1/4, 1/2,
    3/4, 1. Then ``constant`` stays, ``linear`` and ``cosine`` fall to zero at ``total_steps``, one
    step after the last.
    """
    warmup = config.warmup_batches * config.optimizer_steps_per_batch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup

        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if config.schedule == "linear":
            return 1.0 - progress

        if config.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))

        return 1.0

    return factor
