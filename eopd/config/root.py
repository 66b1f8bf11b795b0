"""The whole of a run: its sections, and what must hold between them."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import model_validator

from eopd.config.base import Section, functions_of
from eopd.config.document import show
from eopd.config.learner import LearnerConfig
from eopd.config.loss import LossConfig, NoReverseKl, QuantileGate
from eopd.config.prompts import PromptsConfig
from eopd.config.rollout import RolloutConfig
from eopd.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    FlowConfig,
    GuardConfig,
    RunConfig,
    StudentConfig,
    TelemetryConfig,
    WeightsConfig,
)
from eopd.config.teacher import TeacherConfig


class Config(Section):
    """One run. Every key belongs to one of these sections."""

    run: RunConfig
    """The name of the run, its length, and where it writes."""

    student: StudentConfig
    """The model that learns."""

    teachers: tuple[TeacherConfig, ...]
    """The models that read along, one or more."""

    prompts: PromptsConfig
    """The data, and how prompts are rendered."""

    rollout: RolloutConfig = RolloutConfig()
    """The engines that write responses."""

    flow: FlowConfig
    """How trajectories flow from the engines to the learner."""

    loss: LossConfig = LossConfig()
    """The objective, which the learner minimises."""

    learner: LearnerConfig = LearnerConfig()
    """The gang of ranks that trains the student."""

    weights: WeightsConfig = WeightsConfig()
    """The wire on which weights go from the learner to the engines."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written, and which stay."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """The measurements before, during and after training."""

    guard: GuardConfig = GuardConfig()
    """What happens when the student collapses."""

    telemetry: TelemetryConfig = TelemetryConfig()
    """The metrics endpoint, the logs and the trackers."""

    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster, and what it may lose."""

    def teacher_of(self, source: str) -> TeacherConfig | None:
        """The teacher of a source of prompts: the one that names it, else the one that names
        none.
        """
        specialists = (teacher for teacher in self.teachers if source in teacher.sources)
        generalists = (teacher for teacher in self.teachers if not teacher.sources)
        return next(specialists, next(generalists, None))

    @property
    def weights_backend(self) -> Literal["auto", "shared", "gloo", "nccl"]:
        """Returns ``weights.backend``, with ``auto`` decided as far as the config says; where the
        engines are is known once they meet the learner.
        """
        is_open = self.weights.backend == "auto"
        return "nccl" if is_open and self._has_whole_gpus else self.weights.backend

    @property
    def may_send_adapters(self) -> bool:
        """Whether engines are sent adapters alone, if they find the weights in the model's files.
        ``load_format``, even vLLM's default, turns it off.
        """
        return self.student.lora is not None and "load_format" not in self.rollout.vllm

    @property
    def _has_whole_gpus(self) -> bool:
        gpus = self.learner.gpus, self.rollout.gpus
        return all(share >= 1.0 and share.is_integer() for share in gpus)

    @property
    def reads_rows(self) -> bool:
        """Whether a reward or a filter reads the rows of the training data."""
        return self.loss.reward is not None or self.flow.filter is not None

    @property
    def functions(self) -> Mapping[str, str]:
        """The user's functions: their import paths by the key that names each."""
        return dict(functions_of(self))

    @property
    def max_response_tokens(self) -> int:
        """The longest response that a teacher and the learner read, in training or held out."""
        return max(self.rollout.max_response_tokens, self.held_out_response_tokens)

    @property
    def held_out_response_tokens(self) -> int:
        """The longest held-out response."""
        return self.evaluation.max_response_tokens or self.rollout.max_response_tokens

    @property
    def longest_response(self) -> str:
        """The key that says ``max_response_tokens``, for messages."""
        held_out = self.held_out_response_tokens > self.rollout.max_response_tokens
        return f"{'evaluation' if held_out else 'rollout'}.max_response_tokens"

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt and response together that an engine writes, benchmarks included."""
        lengths = (benchmark.max_response_tokens for benchmark in self.evaluation.benchmarks)
        longest = max((length for length in lengths if length), default=0)
        return self.prompts.max_tokens + max(self.max_response_tokens, longest)

    def max_teacher_tokens(self, teacher: TeacherConfig) -> int:
        """The longest prompt and response together, as ``teacher`` reads them."""
        return (teacher.max_prompt_tokens or self.prompts.max_tokens) + self.max_response_tokens

    @property
    def batch_trajectories(self) -> int:
        """Trajectories in one training batch."""
        return self.flow.batch_prompts * self.rollout.samples_per_prompt

    @property
    def waits_for_batch(self) -> str | None:
        """What each step of the learner needs its whole batch for; None where it begins before the
        batch is complete.
        """
        if self.learner.optimizer_steps_per_batch > 1:
            return "learner.optimizer_steps_per_batch above 1"

        if isinstance(self.loss.gate, QuantileGate):
            return "loss.gate: quantile"

        return "loss.reverse_kl.reward" if self.loss.reward is not None else None

    @model_validator(mode="after")
    def _teachers_differ(self) -> Self:
        if not self.teachers:
            raise ValueError("teachers: there must be at least one; write - {model: ...} below it")

        names = [teacher.name for teacher in self.teachers]
        sources = [source for teacher in self.teachers for source in teacher.sources]
        for noun, values in (("name", names), ("source", sources)):
            if duplicates := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"teachers: the {noun} {show(duplicates[0])} stands twice")

        if len(defaults := [teacher.name for teacher in self.teachers if not teacher.sources]) > 1:
            raise ValueError(
                f"teachers: {' and '.join(defaults)} name no sources; only one can be the default"
            )

        return self

    @model_validator(mode="after")
    def _a_batch_can_be_trained(self) -> Self:
        longest = self.prompts.max_tokens + self.max_response_tokens
        if self.learner.token_budget < longest:
            raise ValueError(
                f"learner.token_budget: {self.learner.token_budget} is below "
                f"prompts.max_tokens + {self.longest_response} = {longest}; the "
                "longest trajectory would fit no micro-batch"
            )

        if self.batch_trajectories < self.learner.optimizer_steps_per_batch * self.learner.ranks:
            raise ValueError(
                f"flow.batch_prompts: a batch of {self.batch_trajectories} trajectories "
                f"cannot be cut into {self.learner.optimizer_steps_per_batch} optimiser "
                f"steps on {self.learner.ranks} ranks"
            )

        if self.loss.reward is not None:
            need = "loss.reverse_kl.reward: compares a prompt's samples within one batch; it needs"
            if (samples := self.rollout.samples_per_prompt) < 2:
                raise ValueError(f"{need} rollout.samples_per_prompt of 2 or more (is {samples})")

            if self.flow.lookahead:
                raise ValueError(f"{need} flow.lookahead 0 (is {self.flow.lookahead})")

        return self

    @model_validator(mode="after")
    def _the_best_is_measured(self) -> Self:
        if (keep_best := self.checkpoint.keep_best) is None:
            return self

        evaluation = self.evaluation
        name, _, metric = keep_best.metric.partition("/")
        if name not in evaluation.names:
            raise ValueError(
                f"checkpoint.keep_best.metric: nothing is measured as {name}; there is "
                f"{', '.join(evaluation.names)} (evaluation.benchmarks)"
            )

        if metric not in (metrics := evaluation.metrics(name)):
            raise ValueError(
                f"checkpoint.keep_best.metric: {name} has no {metric}; it has {', '.join(metrics)}"
            )

        period = evaluation.period(name)
        if period is None or period > self.run.batches:
            raise ValueError(
                f"checkpoint.keep_best.metric: {name} is not measured while training; set "
                f"evaluation.every to at most run.batches {self.run.batches} "
                f"(is {'null' if period is None else period})"
            )

        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        learner, rollout = self.learner.gpus, self.rollout.gpus
        if self.weights.backend == "nccl" and not self._has_whole_gpus:
            raise ValueError(
                "weights.backend: nccl moves weights between GPUs that are not shared; it "
                f"needs learner.gpus 1 (is {learner:g}) and rollout.gpus of 1 or more (is "
                f"{rollout:g}); else write auto"
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
