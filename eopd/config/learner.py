"""The gang that trains: its ranks, its optimiser, and what goes to DeepSpeed."""

from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from eopd.config.base import (
    MAX_TOKENS,
    Actors,
    Count,
    Cpus,
    Gpus,
    NativeOptions,
    NodeLabels,
    Seconds,
    Section,
    Threads,
    refuse,
)
from eopd.config.document import show

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
ZeroStage = Literal[0, 1, 2, 3]

# The ZeRO stages that can keep a state in host memory begin here (DeepSpeed 0.19.8).
LOWEST_STAGE: Final[Mapping[str, ZeroStage]] = {"offload_optimizer": 1, "offload_param": 3}

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
_SUMS: Final = "sums over the tokens of a batch leave the range of float16"
_OWN_ADAM: Final = "it needs DeepSpeed's compiled Adam; the optimiser here is that of torch"
_OLD_OFFLOAD: Final = "write offload_optimizer: {device: cpu} or offload_param: {device: cpu}"


class LearnerConfig(Section):
    """The gang of DeepSpeed ranks that trains the student, and its optimiser, which is AdamW."""

    ranks: Actors = 1
    """The number of DeepSpeed ranks. Each one uses one GPU, or none."""

    cpus: Cpus = 1.0
    """The CPUs of one rank, which Ray reserves; a fraction is allowed."""

    gpus: Gpus = 0.0
    """The GPUs of one rank, which Ray reserves: 1, or 0 on CPUs. A single rank may take a share of
    a GPU; several may not share one.
    """

    threads: Threads = 1
    """The compute threads of one rank, which are never taken from Ray. Where the optimiser is
    offloaded to host memory, they are the speed of its step.
    """

    node_labels: NodeLabels = {}
    """The labels that a machine must have for a rank, such as ``{ray.io/accelerator-type: H100}``,
    which Ray gives by itself, or those of ``ray start --labels``. With none, any machine will do.
    """

    optimizer_steps_per_batch: int = Field(1, ge=1, le=1_000_000)
    """The number of optimiser steps into which a batch is cut. The later ones of several train on
    samples of older weights, which ``loss.reverse_kl.clip`` limits.
    """

    token_budget: int = Field(8192, ge=1, le=10 * MAX_TOKENS)
    """The most tokens in a micro-batch. It must hold at least the longest prompt and response
    together. Lower it where memory runs out.
    """

    logit_chunk_tokens: int | None = Field(None, ge=1, le=10 * MAX_TOKENS)
    """The rows of logits that are held at once. Fewer need less memory and more time. Left out, there
    are 256 on CPUs, and on GPUs as many as a 32nd of the memory holds, from 256 to 4096.
    """

    lr: float = Field(1e-6, gt=0.0, le=1.0)
    """The learning rate of AdamW; one step moves every weight by about as much. Adapters want about
    ten times that of full fine-tuning.
    """

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after its warm-up. ``linear`` and ``cosine`` let it fall until
    the last batch.
    """

    warmup_batches: Count = 0
    """The number of batches over which the learning rate grows to ``learner.lr``."""

    weight_decay: float = Field(0.01, ge=0.0, le=10.0)
    """The weight decay of AdamW."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """The two decay rates of AdamW's moments."""

    max_grad_norm: float = Field(1.0, ge=1e-6, le=1e30)
    """The norm to which gradients are clipped."""

    max_skipped_steps: Count = 3
    """The number of optimiser steps of a run, resumed or not, that may be skipped because a loss
    or gradient was not finite. The next one ends the run.
    """

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """The ZeRO stage: what is sharded over the ranks. 0 is nothing, 1 the optimiser's state, 2 also
    gradients, 3 also weights. ``auto`` is chosen when the config is loaded: 0 on one rank in
    float32, else 1; where states are offloaded to host memory, the lowest that can. A run that
    continues keeps the stage of its checkpoints.
    """

    zero_stage_reason: str | None = None
    """Why ``auto`` chose the stage it did. The program writes it; leave it out."""

    activation_checkpointing: bool = False
    """Computes activations again in the backward pass, which needs less memory and more time."""

    timeout_s: Seconds = 3600.0
    """The seconds in which an update, or a part of one, must be done. When it takes longer, all ranks
    are started again from the newest checkpoint.
    """

    peak_flops: float | None = Field(None, ge=1e9, le=1e18)
    """The floating-point operations a second that a rank's device reaches at best, for example
    989.0e+12 for an H100 in bfloat16. With it there is a metric ``eopd_learner_mfu_ratio``.
    """

    deepspeed: NativeOptions = {}
    """Options of DeepSpeed, which go to it untouched. Those that this project decides, such as the
    optimiser and the batch sizes, are refused, and the message says which key decides instead. The
    chapter docs/configuration.md#offloading-to-host-memory has an example.
    """

    @model_validator(mode="after")
    def _ours_stay_ours(self) -> Self:
        refuse("deepspeed", self.deepspeed, OWNED_BY_LEARNER)
        if self.deepspeed.get("communication_data_type") == "fp16":
            raise ValueError(f"deepspeed.communication_data_type: may not be fp16: {_SUMS}")

        zero = self.deepspeed.get("zero_optimization")
        if isinstance(zero, dict):
            refuse(
                "deepspeed.zero_optimization",
                zero,
                {"stage": "learner.zero_stage says it"},
            )
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
    def chosen_zero_stage(self) -> ZeroStage:
        """The ``zero_stage`` of a config that was loaded, where nothing is ``auto`` any more."""
        if self.zero_stage == "auto":
            raise ValueError("learner.zero_stage: auto is chosen by load_config")

        return self.zero_stage

    @property
    def offloaded(self) -> tuple[str, ...]:
        """The options by which DeepSpeed is told to keep states in host memory."""
        zero = self.deepspeed.get("zero_optimization")
        named = zero if isinstance(zero, dict) else {}
        return tuple(name for name in LOWEST_STAGE if _device_of(named, name) == "cpu")

    @property
    def ranks_may_change(self) -> bool:
        """Returns whether another number of ranks may continue a checkpoint.

        Not under ``round_robin_gradients``: DeepSpeed 0.19.8 shards in one order of the parameters
        and writes down another (``_link_all_hp_params`` in stage_1_and_2.py).
        """
        zero = self.deepspeed.get("zero_optimization")
        return not (
            self.chosen_zero_stage in (1, 2)
            and isinstance(zero, dict)
            and zero.get("round_robin_gradients")
        )


def _device_of(zero: NativeOptions, name: str) -> object:
    options = zero.get(name) or {}
    return options.get("device", "none") if isinstance(options, dict) else options


def _refuse_offload(zero: NativeOptions, zero_stage: Literal["auto"] | ZeroStage) -> None:
    """Refuse offloading that DeepSpeed 0.19.8 ignores, does with its own Adam alone, or leaves out
    of checkpoints.

    Raises:
        ValueError: names the option and what to write.
    """
    key = "deepspeed.zero_optimization"
    for name, lowest_stage in LOWEST_STAGE.items():
        options, device = zero.get(name), _device_of(zero, name)
        if device not in ("none", "cpu"):
            raise ValueError(
                f"{key}.{name}: must be {{device: cpu}} or {{device: none}} (is {show(device)})"
            )

        if device == "cpu" and zero_stage != "auto" and zero_stage < lowest_stage:
            raise ValueError(
                f"{key}.{name}: needs zero_stage {lowest_stage} or more (is {zero_stage})"
            )

        if isinstance(options, dict):
            refuse(
                f"{key}.{name}",
                options,
                {"ratio": _OWN_ADAM, "super_offload": _OWN_ADAM},
            )

    refuse(key, zero, {"cpu_offload": _OLD_OFFLOAD, "cpu_offload_param": _OLD_OFFLOAD})
