"""The gang that trains: its ranks, its optimiser, and what goes to DeepSpeed."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from eopd.config.base import (
    MAX_TOKENS,
    Actors,
    Count,
    Cpus,
    Gpus,
    NativeOptions,
    Seconds,
    Section,
    Threads,
    refuse,
)
from eopd.config.document import show

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

_BATCHES: Final = "learner.token_budget and .optimizer_steps_per_batch cut the batches"
_DTYPE: Final = "student.dtype says it"
OWNED_BY_LEARNER: Final = {
    "train_batch_size": _BATCHES,
    "train_micro_batch_size_per_gpu": _BATCHES,
    "gradient_accumulation_steps": _BATCHES,
    "gradient_clipping": "learner.max_grad_norm says it",
    "optimizer": "it is AdamW, with learner.lr, .betas and .weight_decay",
    "scheduler": "learner.schedule and .warmup_batches say it",
    "bf16": _DTYPE,
    "bfloat16": _DTYPE,  # its old name, which DeepSpeed still reads
    "fp16": _DTYPE,
    "torch_autocast": _DTYPE,
    "checkpoint": "the checkpoint section says it",
}
_OWN_ADAM: Final = "it needs DeepSpeed's compiled Adam; the optimiser here is that of torch"
_OLD_OFFLOAD: Final = "write offload_optimizer: {device: cpu} or offload_param: {device: cpu}"


class LearnerConfig(Section):
    """The DeepSpeed gang. ``max_skipped_steps`` optimiser steps of a run may be skipped for a loss
    or gradient that is not finite; the next one ends the run. Ranks that do not answer within
    ``timeout_s`` are started again from the last checkpoint. ``peak_flops`` is what the device of
    one rank can do in a second at best: with it there is an MFU. ``deepspeed`` goes to the engine
    untouched; keys this project must own are refused there.
    """

    ranks: Actors = 1
    cpus: Cpus = 1.0
    gpus: Gpus = 0.0
    threads: Threads = 1
    optimizer_steps_per_batch: int = Field(1, ge=1, le=1_000_000)
    token_budget: int = Field(8192, ge=1, le=10 * MAX_TOKENS)
    logit_chunk_tokens: int = Field(256, ge=1, le=10 * MAX_TOKENS)
    lr: float = Field(1e-6, gt=0.0, le=1.0)  # a step of AdamW moves every weight by about as much
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_batches: Count = 0
    weight_decay: float = Field(0.01, ge=0.0, le=10.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, ge=1e-6, le=1e30)
    max_skipped_steps: Count = 3
    zero_stage: Literal[0, 1, 2, 3] = 1
    activation_checkpointing: bool = False
    timeout_s: Seconds = 3600.0
    peak_flops: float | None = Field(None, ge=1e9, le=1e18)
    deepspeed: NativeOptions = {}

    @model_validator(mode="after")
    def _ours_stay_ours(self) -> Self:
        refuse("deepspeed", self.deepspeed, OWNED_BY_LEARNER)
        zero = self.deepspeed.get("zero_optimization")
        if isinstance(zero, dict):
            refuse("deepspeed.zero_optimization", zero, {"stage": "learner.zero_stage says it"})
            _refuse_offload(zero, self.zero_stage)

        return self

    @model_validator(mode="after")
    def _one_gpu_is_of_one_rank(self) -> Self:
        if self.gpus > 1.0:
            raise ValueError(
                f"gpus: one rank uses one GPU (is {self.gpus:g}); raise learner.ranks for more"
            )

        if 0.0 < self.gpus < 1.0 and self.ranks > 1:
            raise ValueError(
                f"gpus: {self.ranks} ranks may not share a GPU, since NCCL joins them "
                f"(is {self.gpus:g}); write 1, or ranks: 1"
            )

        return self

    @property
    def ranks_may_change(self) -> bool:
        """Whether another number of ranks may continue a checkpoint.

        Not under ``round_robin_gradients``: DeepSpeed 0.19.8 shards in one order of the parameters
        and writes down another (``_link_all_hp_params`` in stage_1_and_2.py).
        """
        zero = self.deepspeed.get("zero_optimization")
        return not (
            self.zero_stage in (1, 2)
            and isinstance(zero, dict)
            and zero.get("round_robin_gradients")
        )


def _refuse_offload(zero: NativeOptions, zero_stage: int) -> None:
    """Refuse offloading that DeepSpeed 0.19.8 ignores, does with its own Adam alone, or leaves out
    of checkpoints.

    Raises:
        ValueError: names the option and what to write.
    """
    where = "deepspeed.zero_optimization"
    for name, lowest_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        options = zero.get(name) or {}
        device = options.get("device", "none") if isinstance(options, dict) else options
        if device not in ("none", "cpu"):
            raise ValueError(
                f"{where}.{name}: must be {{device: cpu}} or {{device: none}} (is {show(device)})"
            )

        if device == "cpu" and zero_stage < lowest_stage:
            raise ValueError(
                f"{where}.{name}: needs zero_stage {lowest_stage} or more (is {zero_stage})"
            )

        if isinstance(options, dict):
            refuse(f"{where}.{name}", options, {"ratio": _OWN_ADAM, "super_offload": _OWN_ADAM})

    refuse(where, zero, {"cpu_offload": _OLD_OFFLOAD, "cpu_offload_param": _OLD_OFFLOAD})
