"""Every knob of a run. A room receives its own section; only ``runtime/`` and ``cli/`` see
the whole.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from eopd.config.base import (
    AbsolutePath,
    Count,
    DataSpec,
    Names,
    NativeOptions,
    Positive,
    PromptText,
    Seconds,
    Section,
    Seed,
    Tokens,
    each_once,
    refuse,
)
from eopd.config.document import show
from eopd.config.learner import LearnerConfig
from eopd.config.loss import LossConfig, NoReverseKl
from eopd.config.rollout import RolloutConfig
from eopd.config.teacher import NAME, NAME_WORDS, OWNED_BY_TEMPLATE, TeacherConfig

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class RunConfig(Section):
    """The run itself: ``directory/name`` is where everything it writes goes.

    When no step has finished for ``stall_after_s``, the run says who waits for whom; ``on_stall:
    end`` ends it too. A run that will take more than twice its ``expected_minutes`` says so after
    three steps, and what to change.
    """

    name: str = Field(pattern=NAME, max_length=200, description=NAME_WORDS)
    directory: AbsolutePath = Path("runs")
    seed: Seed = 0
    batches: Positive
    expected_minutes: float | None = Field(None, gt=0.0, le=1e7)
    stall_after_s: Seconds = 1800.0
    on_stall: Literal["report", "end"] = "report"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory / self.name


class LoraConfig(Section):
    """Low-rank adapters, scaled by ``alpha / rank``; everything else is frozen.

    ``target_modules`` name linear layers by the end of their path; ``all-linear`` is all but the
    output head.
    """

    rank: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32.0, gt=0.0, le=1e6)
    target_modules: Names = Field(("all-linear",), min_length=1)


class StudentConfig(Section):
    """The model that learns: a Hugging Face directory. ``dtype`` is that of the learner and of the
    engines; ``auto`` is chosen when the config is loaded, and ``dtype_reason`` says why.

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

    ``template``: ``chat`` renders rows with the student's chat template, ``none`` takes ``prompt``
    as it is. ``template_options`` go to that template. ``suffix`` is appended to the last user text
    before either.
    """

    data: DataSpec
    held_out: DataSpec
    template: Literal["chat", "none"] = "chat"
    template_options: NativeOptions = {}
    suffix: PromptText = ""
    max_tokens: Tokens = 1024
    overlong: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _options_reach_a_template(self) -> Self:
        refuse("template_options", self.template_options, OWNED_BY_TEMPLATE)
        if self.template == "none" and self.template_options:
            raise ValueError("template_options: go to a chat template; template is none")

        return self


class FlowConfig(Section):
    """``max_staleness`` 0 is synchronous. ``lookahead`` lets a batch take trajectories out of issue
    order (see ``buffer.py``). A trajectory that is lost ``max_attempts`` times is dropped, and the
    next one takes its place; more than ``max_dropped_ratio`` of the run's trajectories end it.
    """

    batch_prompts: int = Field(ge=1, le=1_000_000)
    max_staleness: int = Field(0, ge=0, le=1_000_000)
    lookahead: int = Field(0, ge=0, le=1_000_000)
    max_attempts: int = Field(3, ge=1, le=1_000_000)
    max_dropped_ratio: float = Field(0.01, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _lookahead_fits(self) -> Self:
        if self.lookahead > self.max_staleness:
            raise ValueError(
                f"lookahead: {self.lookahead} is above flow.max_staleness {self.max_staleness}; "
                "a batch that overtakes makes the others that much staler"
            )

        return self


class WeightsConfig(Section):
    """The wire from learner to engines: ``gloo`` through host memory, ``nccl`` between GPUs.

    ``connect_timeout_s`` is for all engines to join, ``timeout_s`` for one bucket to reach them
    all. At the first and every ``verify_every``-th sync each engine must give a fixed text the
    learner's log-probabilities; 0 never asks.
    """

    backend: Literal["gloo", "nccl"] = "gloo"
    bucket_bytes: int = Field(64 * 1024 * 1024, ge=1024, le=2**40)
    connect_timeout_s: Seconds = 60.0
    timeout_s: Seconds = 120.0
    verify_every: Count = 10


class CheckpointConfig(Section):
    """``every`` batches and at the end of the run; the newest ``keep_last`` are kept."""

    every: Positive = 50
    keep_last: Positive = 2


class EvaluationConfig(Section):
    """Held-out measurement before the first and after the last batch: sampled at
    ``rollout.temperature``, with fixed seeds.
    """

    prompts: Positive = 64
    max_response_tokens: Tokens = 1024
    seed: Seed = 1234
    samples: Count = 3


class TelemetryConfig(Section):
    """Where Prometheus scrapes the driver; port 0 takes a free one, null switches the endpoint off.
    ``log_format`` is that of the files in ``logs/``. ``trackers`` get every row too.
    """

    host: str = Field("127.0.0.1", pattern=r"^[^\s/]+$", description="the name or number of a host")
    port: int | None = Field(0, ge=0, le=65535)
    log_format: Literal["text", "json"] = "text"
    trackers: Annotated[list[TrackerName], AfterValidator(each_once("tracker"))] = []


class ClusterConfig(Section):
    """``address`` joins a running Ray cluster (as RAY_ADDRESS does); otherwise Ray is started here.

    Engines, teachers and learner ranks that are lost are started again, unless more than
    ``max_restarts`` for every 8 of them are lost within ``restart_window_s``. With none of a kind
    left, and none up within ``start_timeout_s``, the run ends.
    """

    address: str | None = Field(None, min_length=1)
    cpus: float | None = Field(None, gt=0.0, le=100_000.0)
    start_timeout_s: Seconds = 600.0
    max_restarts: Count = 10
    restart_window_s: Seconds = 3600.0


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
        """Who teaches a source of prompts: the teacher that names it, else the one that names
        none.
        """
        named = (teacher for teacher in self.teachers if source in teacher.sources)
        return next(
            named, next((teacher for teacher in self.teachers if not teacher.sources), None)
        )

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
            raise ValueError("teachers: there must be at least one; write - {model: ...} below it")

        names = [teacher.name for teacher in self.teachers]
        sources = [source for teacher in self.teachers for source in teacher.sources]
        for what, values in (("name", names), ("source", sources)):
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"teachers: the {what} {show(twice[0])} stands twice")

        if len(defaults := [teacher.name for teacher in self.teachers if not teacher.sources]) > 1:
            raise ValueError(
                f"teachers: {' and '.join(defaults)} name no sources; only one can be the default"
            )

        return self

    @model_validator(mode="after")
    def _there_is_data(self) -> Self:
        for name, data in (("data", self.prompts.data), ("held_out", self.prompts.held_out)):
            if not data.strip():
                raise ValueError(
                    f"prompts.{name}: must be a .jsonl or .parquet file, or a "
                    "data set's name (is '')"
                )

        return self

    @model_validator(mode="after")
    def _a_batch_can_be_trained(self) -> Self:
        if self.learner.token_budget < self.max_sequence_tokens:
            raise ValueError(
                f"learner.token_budget: {self.learner.token_budget} is below "
                f"prompts.max_tokens + max_response_tokens = {self.max_sequence_tokens}; the "
                "longest trajectory would fit no micro-batch"
            )

        if self.batch_trajectories < self.learner.optimizer_steps_per_batch * self.learner.ranks:
            raise ValueError(
                f"flow.batch_prompts: a batch of {self.batch_trajectories} trajectories "
                f"cannot be cut into {self.learner.optimizer_steps_per_batch} optimiser "
                f"steps on {self.learner.ranks} ranks"
            )

        if self.loss.reward is not None:
            why = "loss.reverse_kl.reward: compares a prompt's samples within one batch; it needs"
            if (samples := self.rollout.samples_per_prompt) < 2:
                raise ValueError(f"{why} rollout.samples_per_prompt of 2 or more (is {samples})")

            if self.flow.lookahead:
                raise ValueError(f"{why} flow.lookahead 0 (is {self.flow.lookahead})")

        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        learner, rollout = self.learner.gpus, self.rollout.gpus
        if self.weights.backend == "nccl" and not (
            learner.is_integer() and rollout.is_integer() and learner * rollout
        ):
            raise ValueError(
                "weights.backend: nccl moves weights between GPUs that are not shared; it "
                f"needs learner.gpus 1 (is {learner:g}) and rollout.gpus of 1 or more (is "
                f"{rollout:g}); else write gloo"
            )

        if isinstance(self.loss.reverse_kl, NoReverseKl) and not self.loss.forward_counts:
            raise ValueError(
                "loss.reverse_kl: none leaves no loss at all where loss.alpha is 0 or "
                "loss.gate never opens"
            )

        if self.prompts.template == "none" and any(
            teacher.template_options for teacher in self.teachers
        ):
            raise ValueError(
                "teachers.template_options: go to a chat template; prompts.template is none"
            )

        return self
