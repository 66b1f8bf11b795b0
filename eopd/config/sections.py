"""Every knob of a run. A room receives its own section; only ``runtime/`` and ``cli/`` see the whole."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from eopd.config.base import AbsolutePath, DataSpec, NativeOptions, Section, refuse
from eopd.config.loss import LossConfig
from eopd.config.teacher import OWNED_BY_ENGINES, OWNED_BY_ROWS, Names, TeacherConfig

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

OWNED_BY_LEARNER = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "bfloat16",  # its old name, which DeepSpeed still reads
    "fp16",
    "torch_autocast",  # student.dtype says it
    "checkpoint",
)
OWNED_BY_ROLLOUT = (
    *OWNED_BY_ENGINES,
    "scheduling_policy",
    "logprobs_mode",
    "weight_transfer_config",
    "worker_extension_cls",
    "generation_config",
)


class RunConfig(Section):
    """The run itself: ``directory/name`` is where everything it writes goes.

    When no step has finished for ``stall_after_s``, the run says who waits for whom; ``on_stall: end`` ends it too.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    directory: AbsolutePath = Path("runs")
    seed: int = Field(0, ge=0)
    batches: int = Field(ge=1)
    stall_after_s: float = Field(1800.0, gt=0.0)
    on_stall: Literal["report", "end"] = "report"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory / self.name


class LoraConfig(Section):
    """Low-rank adapters, scaled by ``alpha / rank``; everything else is frozen.

    ``target_modules`` name linear layers by the end of their path; ``all-linear`` is all but the output head.
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0.0)
    target_modules: Names = Field(("all-linear",), min_length=1)


class StudentConfig(Section):
    """The model that learns: a Hugging Face directory. ``dtype`` is that of the learner and of the engines; ``auto``
    is chosen when the config is loaded, and ``dtype_reason`` says why.

    ``lora`` trains adapters instead of the whole model.
    """

    model: AbsolutePath
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    dtype_reason: str | None = None
    lora: LoraConfig | None = None

    @property
    def chosen_dtype(self) -> Literal["float32", "bfloat16"]:
        """``dtype`` of a config that was loaded, where nothing is ``auto`` any more."""
        if self.dtype == "auto":
            raise ValueError("student.dtype: auto is chosen by load_config")
        return self.dtype


class PromptsConfig(Section):
    """Training and held-out rows: JSONL, Parquet, or a ``datasets`` name.

    ``template``: ``chat`` renders rows with the student's chat template, ``none`` takes ``prompt`` as it is.
    ``template_options`` go to that template. ``suffix`` is appended to the last user text before either.
    """

    data: DataSpec
    held_out: DataSpec
    template: Literal["chat", "none"] = "chat"
    template_options: NativeOptions = {}
    suffix: str = ""
    max_tokens: int = Field(1024, ge=1)
    overlong: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _options_reach_a_template(self) -> Self:
        refuse("template_options", self.template_options, OWNED_BY_ROWS)
        if self.template == "none" and self.template_options:
            raise ValueError("template_options: go to a chat template; template is none")
        return self


class RolloutConfig(Section):
    """The engines that write. Training samples come from the plain softmax at ``temperature``; the learner uses the
    same. An engine that does not finish a response within ``timeout_s`` has failed; the response is tried elsewhere.
    """

    engines: int = Field(1, ge=1)
    cpus: float = Field(1.0, ge=0.0)
    gpus: float = Field(0.0, ge=0.0)
    threads: int = Field(1, ge=1)
    samples_per_prompt: int = Field(1, ge=1)
    max_response_tokens: int = Field(1024, ge=1)
    temperature: float = Field(1.0, gt=0.0)
    timeout_s: float = Field(1800.0, gt=0.0)
    vllm: NativeOptions = {}

    @model_validator(mode="after")
    def _ours_stay_ours(self) -> Self:
        refuse("vllm", self.vllm, OWNED_BY_ROLLOUT)
        return self


class FlowConfig(Section):
    """``max_staleness`` 0 is synchronous. ``lookahead`` lets a batch take trajectories out of issue order (see
    ``buffer.py``).
    """

    batch_prompts: int = Field(ge=1)
    max_staleness: int = Field(0, ge=0)
    lookahead: int = Field(0, ge=0)
    max_attempts: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _lookahead_fits(self) -> Self:
        if self.lookahead > self.max_staleness:
            raise ValueError(
                f"lookahead {self.lookahead} is above max_staleness {self.max_staleness}: "
                "out-of-order taking costs that many versions"
            )
        return self


class LearnerConfig(Section):
    """The DeepSpeed gang. ``max_skipped_steps`` optimiser steps of a run may be skipped for a loss or gradient that is
    not finite; the next one ends the run. Ranks that do not answer within ``timeout_s`` are started again from the last
    checkpoint. ``peak_flops`` is what the device of one rank can do in a second at best: with it there is an MFU.
    ``deepspeed`` goes to the engine untouched; keys this project must own are refused there.
    """

    ranks: int = Field(1, ge=1)
    cpus: float = Field(1.0, ge=0.0)
    gpus: float = Field(0.0, ge=0.0)
    threads: int = Field(1, ge=1)
    optimizer_steps_per_batch: int = Field(1, ge=1)
    token_budget: int = Field(8192, ge=1)
    logit_chunk_tokens: int = Field(256, ge=1)
    lr: float = Field(1e-6, gt=0.0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_batches: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0.0)
    max_skipped_steps: int = Field(3, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 1
    activation_checkpointing: bool = False
    timeout_s: float = Field(3600.0, gt=0.0)
    peak_flops: float | None = Field(None, gt=0.0)
    deepspeed: NativeOptions = {}

    @model_validator(mode="after")
    def _ours_stay_ours(self) -> Self:
        refuse("deepspeed", self.deepspeed, OWNED_BY_LEARNER)
        zero = self.deepspeed.get("zero_optimization")
        if isinstance(zero, dict) and "stage" in zero:
            raise ValueError("deepspeed.zero_optimization.stage: set by zero_stage, not here")
        if isinstance(zero, dict):
            _refuse_offload(zero, self.zero_stage)
        return self

    @property
    def ranks_may_change(self) -> bool:
        """Whether another number of ranks may continue a checkpoint.

        Not under ``round_robin_gradients``: DeepSpeed 0.19.8 shards in one order of the parameters and writes down
        another (``_link_all_hp_params`` in stage_1_and_2.py).
        """
        zero = self.deepspeed.get("zero_optimization")
        return not (self.zero_stage in (1, 2) and isinstance(zero, dict) and zero.get("round_robin_gradients"))


def _refuse_offload(zero: NativeOptions, zero_stage: int) -> None:
    """Refuse offloading that DeepSpeed 0.19.8 ignores, does with its own Adam alone, or leaves out of checkpoints.

    Raises:
        ValueError: names the option and what to write.
    """
    where = "deepspeed.zero_optimization"
    for name, lowest_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        options = zero.get(name) or {}
        device = options.get("device", "none") if isinstance(options, dict) else options
        if device not in ("none", "cpu"):
            raise ValueError(f"{where}.{name}: must be {{device: cpu}} or {{device: none}} (is {device!r})")
        if device == "cpu" and zero_stage < lowest_stage:
            raise ValueError(f"{where}.{name}: needs zero_stage {lowest_stage} or more (is {zero_stage})")
        if isinstance(options, dict):
            refuse(f"{where}.{name}", options, ("ratio", "super_offload"))
    refuse(where, zero, ("cpu_offload", "cpu_offload_param"))


class WeightsConfig(Section):
    """The wire from learner to engines: ``gloo`` through host memory, ``nccl`` between GPUs.

    ``connect_timeout_s`` is for all engines to join, ``timeout_s`` for one bucket to reach them all. At the first and
    every ``verify_every``-th sync each engine must give a fixed text the learner's log-probabilities; 0 never asks.
    """

    backend: Literal["gloo", "nccl"] = "gloo"
    bucket_bytes: int = Field(64 * 1024 * 1024, ge=1024)
    connect_timeout_s: float = Field(60.0, gt=0.0)
    timeout_s: float = Field(120.0, gt=0.0)
    verify_every: int = Field(10, ge=0)


class CheckpointConfig(Section):
    """``every`` batches and at the end of the run; the newest ``keep_last`` are kept."""

    every: int = Field(50, ge=1)
    keep_last: int = Field(2, ge=1)


class EvaluationConfig(Section):
    """Held-out measurement before the first and after the last batch: T 1, fixed seeds."""

    prompts: int = Field(64, ge=1)
    max_response_tokens: int = Field(1024, ge=1)
    seed: int = Field(1234, ge=0)
    samples: int = Field(3, ge=0)


class TelemetryConfig(Section):
    """Where Prometheus scrapes the driver; port 0 takes a free one, null switches the endpoint off. ``log_format`` is
    that of the files in ``logs/``. ``trackers`` get every row too.
    """

    host: str = "127.0.0.1"
    port: int | None = Field(0, ge=0, le=65535)
    log_format: Literal["text", "json"] = "text"
    trackers: list[TrackerName] = []


class ClusterConfig(Section):
    """``address`` joins a running Ray cluster (as RAY_ADDRESS does); otherwise Ray is started here.

    Engines, teachers and learner ranks that are lost are started again, unless that happens more than ``max_restarts``
    times within ``restart_window_s``.
    """

    address: str | None = None
    cpus: float | None = Field(None, gt=0.0)
    start_timeout_s: float = Field(600.0, gt=0.0)
    max_restarts: int = Field(10, ge=0)
    restart_window_s: float = Field(3600.0, gt=0.0)


class Config(Section):
    """One run."""

    run: RunConfig
    student: StudentConfig
    teachers: tuple[TeacherConfig, ...]
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    flow: FlowConfig
    loss: LossConfig = LossConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    cluster: ClusterConfig = ClusterConfig()

    def teacher_of(self, source: str) -> TeacherConfig | None:
        """Who teaches a source of prompts: the teacher that names it, else the one that names none."""
        named = (teacher for teacher in self.teachers if source in teacher.sources)
        return next(named, next((teacher for teacher in self.teachers if not teacher.sources), None))

    @property
    def max_response_tokens(self) -> int:
        """The longest response, in training or in evaluation."""
        return max(self.rollout.max_response_tokens, self.evaluation.max_response_tokens)

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt and response together."""
        return self.prompts.max_tokens + self.max_response_tokens

    def max_teacher_tokens(self, teacher: TeacherConfig) -> int:
        """The same as ``teacher`` reads it."""
        return (teacher.max_prompt_tokens or self.prompts.max_tokens) + self.max_response_tokens

    @property
    def batch_trajectories(self) -> int:
        """Trajectories in one training batch."""
        return self.flow.batch_prompts * self.rollout.samples_per_prompt

    @model_validator(mode="after")
    def _teachers_differ(self) -> Self:
        if not self.teachers:
            raise ValueError("teachers: there must be at least one")
        names = [teacher.name for teacher in self.teachers]
        sources = [source for teacher in self.teachers for source in teacher.sources]
        for what, values in (("name", names), ("source", sources)):
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"teachers: {what} {twice[0]!r} is there twice")
        if len(defaults := [teacher.name for teacher in self.teachers if not teacher.sources]) > 1:
            raise ValueError(f"teachers: {' and '.join(defaults)} name no sources; only one can be the default")
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.learner.token_budget < self.max_sequence_tokens:
            raise ValueError(
                f"learner.token_budget {self.learner.token_budget} is below prompts.max_tokens + max_response_tokens "
                f"= {self.max_sequence_tokens}: the longest trajectory would fit no micro-batch"
            )
        if self.weights.backend == "nccl" and not (self.learner.gpus and self.rollout.gpus):
            raise ValueError("weights.backend nccl moves weights between GPUs: learner.gpus and rollout.gpus are 0")
        if self.loss.reward is not None and (self.rollout.samples_per_prompt < 2 or self.flow.lookahead):
            raise ValueError(
                "loss.reverse_kl.reward compares a prompt's samples within one batch: it needs "
                f"rollout.samples_per_prompt of 2 or more (is {self.rollout.samples_per_prompt}) and flow.lookahead 0 "
                f"(is {self.flow.lookahead})"
            )
        if self.prompts.template == "none" and any(teacher.template_options for teacher in self.teachers):
            raise ValueError("teachers.template_options: go to a chat template; prompts.template is none")
        if self.batch_trajectories < self.learner.optimizer_steps_per_batch * self.learner.ranks:
            raise ValueError(
                f"a batch of {self.batch_trajectories} trajectories cannot be cut into "
                f"{self.learner.optimizer_steps_per_batch} optimiser steps on {self.learner.ranks} ranks"
            )
        return self
