"""The sections of a run but those of its prompts, its four roles and its objective, which have
files of their own.

A room receives its own section; only ``runtime/`` and ``cli/`` see the whole. What stands beneath
a field is its description: an editor shows it, and the reference page and the JSON schema are made
from it.
"""

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from eopd.config.base import (
    AbsolutePath,
    Count,
    FunctionName,
    ModelSpec,
    Names,
    NativeOptions,
    Positive,
    Seconds,
    Section,
    Seed,
    Tokens,
)
from eopd.config.benchmark import HELD_OUT, HELD_OUT_METRICS, BenchmarkConfig
from eopd.config.teacher import NAME, NAME_WORDS

UPLOAD: Final = r"^((s3|gs)://[^/@?#\s]+(/[^?#\s]*)?|file://(/[^?#\s]+))$"
UPLOAD_WORDS: Final = "s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, or file://ABSOLUTE_PATH"

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class RunConfig(Section):
    """The run itself: its name, its length, and the directory into which it writes everything."""

    name: str = Field(pattern=NAME, max_length=200, description=NAME_WORDS)
    """The name of the run. The run directory is ``run.directory/run.name``."""

    directory: AbsolutePath = Path("runs")
    """The directory in which run directories lie. On a cluster it must be the same one on every
    node, and every node must be able to write to it. A job needs an absolute one, since it runs in
    a copy of the working directory.
    """

    upload: str | None = Field(None, pattern=UPLOAD, description=UPLOAD_WORDS)
    """A folder elsewhere, in which the run is kept too: ``s3://BUCKET/FOLDER``,
    ``gs://BUCKET/FOLDER`` or ``file://ABSOLUTE_PATH``. The run lies in ``run.upload/run.name``, and
    ``--resume`` restores it from there. ``null`` keeps it in the run directory alone. The chapter
    docs/configuration.md#elsewhere says what is uploaded.
    """

    seed: Seed = 0
    """Seeds the order of the prompts and the samples. Another seed makes another run of the same
    config.
    """

    batches: Positive
    """The number of batches to train. A finished run is extended by a higher number and
    ``eopd train --resume``.
    """

    expected_minutes: float | None = Field(None, gt=0.0, le=1e7)
    """The minutes that the run should take. After three steps the run says how long it will take
    and, when that is more than twice as long, what to change. ``null`` expects nothing.
    """

    stall_after_s: Seconds = 1800.0
    """The seconds without a finished step after which the run says which part waits for which.
    Raise it where one step takes longer than half an hour.
    """

    on_stall: Literal["report", "end"] = "report"
    """What a stalled run does. ``report`` says who waits for whom and goes on; ``end`` also ends
    the run, with exit code 1 and without another checkpoint, for example to free a cluster.
    """

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory / self.name


class LoraConfig(Section):
    """Low-rank adapters (LoRA, through peft): each layer that has one computes W x + alpha / rank
    B A x, where A and B are trained and W is frozen, like everything else.

    ``true`` or ``{}`` takes the defaults. The chapter docs/configuration.md#adapters says what
    engines and checkpoints get.
    """

    rank: int = Field(16, ge=1, le=4096)
    """The inner dimension of A and B. A higher rank can express larger changes, and needs more
    memory.
    """

    alpha: float = Field(32.0, gt=0.0, le=1e6)
    """The adapters' scale: their product is multiplied by ``alpha / rank``. With the defaults
    that is 2.
    """

    target_modules: Names = Field(("all-linear",), min_length=1)
    """The layers that get an adapter. ``all-linear`` is every linear layer but the output head;
    other names are each the end of a layer's path, as in ``[q_proj, mlp.down_proj]``.
    """

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied by."""
        return self.alpha / self.rank


class StudentConfig(Section):
    """The model that learns."""

    model: ModelSpec
    """The student: a Hugging Face directory with weights, configuration and tokenizer, which every
    node must be able to read; or a model on the Hugging Face Hub, ``OWNER/NAME`` or
    ``OWNER/NAME@REVISION``. The chapter docs/configuration.md#models-and-data-by-name says how it
    is found.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The precision of the learner and of the rollout engines. ``auto`` is chosen when the config
    is loaded: bfloat16 on GPUs and on processors with bfloat16 instructions (AVX-512 BF16, AMX),
    float32 elsewhere.
    """

    dtype_reason: str | None = None
    """Why ``auto`` chose the precision it did. The program writes it; leave it out."""

    lora: LoraConfig | None = None
    """Trains adapters instead of the whole model. ``null`` trains every weight."""

    @property
    def chosen_dtype(self) -> Literal["float32", "bfloat16"]:
        """The ``dtype`` of a config that was loaded, where nothing is ``auto`` any more."""
        if self.dtype == "auto":
            raise ValueError("student.dtype: auto is chosen by load_config")

        return self.dtype


class FilterConfig(Section):
    """A filter of your own decides which scored responses are trained on.

    What it drops is counted, and the next response takes its place. Drops are no failures:
    ``flow.max_dropped_ratio`` does not count them.
    """

    function: FunctionName
    """The import path of the function, ``package.module:name``. The chapter
    docs/extending.md#your-own-functions says how it is written.
    """

    options: NativeOptions = {}
    """Keyword arguments of the function. None are given by default."""


class FlowConfig(Section):
    """How trajectories flow from the engines to the learner: how many make a batch, how old they
    may be, and how often one may be lost (``eopd/buffer.py`` has the rules of their order).
    """

    batch_prompts: int = Field(ge=1, le=1_000_000)
    """The number of prompts in a batch. A batch has ``flow.batch_prompts`` x
    ``rollout.samples_per_prompt`` trajectories.
    """

    max_staleness: int = Field(0, ge=0, le=1_000_000)
    """The most policy versions that a trajectory may be behind when it is trained on. 0 is
    synchronous: a batch is written by the newest weights, and the next one waits for the update. With
    1 or more, engines write the next batches meanwhile.
    """

    lookahead: int = Field(0, ge=0, le=1_000_000)
    """The number of batches by which a slow trajectory may be overtaken, at most
    ``flow.max_staleness``. 0 trains in the order of issue; more waits less for the longest
    responses.
    """

    max_attempts: int = Field(3, ge=1, le=1_000_000)
    """How often one trajectory may be lost before it is dropped, and the next one takes its
    place. A worker that dies costs its trajectories no attempt.
    """

    max_dropped_ratio: float = Field(0.01, ge=0.0, le=1.0)
    """The share of the run's trajectories that may be dropped, rounded up to a whole number. More
    end the run, with a checkpoint.
    """

    filter: FilterConfig | None = None
    """A function that keeps or drops each response once the teacher has scored it. ``null`` keeps
    all of them.
    """

    @model_validator(mode="after")
    def _lookahead_fits(self) -> Self:
        if self.lookahead > self.max_staleness:
            raise ValueError(
                f"lookahead: {self.lookahead} is above flow.max_staleness {self.max_staleness}; "
                "a batch that overtakes makes the others that much staler"
            )

        return self


class WeightsConfig(Section):
    """The wire on which weights go from the learner to the engines, and how they are verified."""

    backend: Literal["auto", "shared", "gloo", "nccl"] = "auto"
    """What carries the weights. ``shared`` is memory of one host, into which the learner writes them
    once; ``gloo`` goes over sockets; ``nccl`` goes between GPUs that are not shared. ``auto`` takes
    ``nccl`` where learner and engines have GPUs of their own, else ``shared`` where all engines are
    on the learner's host, else ``gloo``.
    """

    bucket_bytes: int = Field(64 * 1024 * 1024, ge=1024, le=2**40)
    """The size, in bytes, of the pieces in which weights travel; a larger parameter is a piece of
    its own. The default is 64 MiB.
    """

    connect_timeout_s: Seconds = 60.0
    """The seconds in which all engines must join a transfer."""

    timeout_s: Seconds = 120.0
    """The seconds in which one bucket must reach all engines, and in which they must load what they
    were sent. Raise it with ``weights.bucket_bytes``, on a slow network, or for a large model.
    """

    verify_every: Count = 10
    """The number of syncs from one verification to the next. At the first sync, and at every so
    many-th one, engines and learner give the log-probabilities of 256 prompt tokens, which must
    agree on average: to 0.001 nats in float32, to 0.2 in bfloat16. 0 never asks; choose it for
    engines whose numbers are meant to differ, such as quantised ones.
    """


class KeepBestConfig(Section):
    """Which checkpoints stay because they were measured best. Every evaluation that measures the
    metric then has a checkpoint of the same weights.
    """

    metric: str = Field(
        pattern=r"^[^/]+/[^/]+$", description="NAME/METRIC, such as held_out/reverse_kl"
    )
    """What checkpoints are compared by: ``held_out/`` and one of ``reverse_kl``, ``forward_kl`` and
    ``top1_agreement``, or a benchmark's name and one of ``avg_at_n``, ``pass_at_2``,
    ``pass_at_4`` and so on up to its ``samples``, ``response_tokens``, ``truncation_rate``,
    ``distinct_1`` and ``distinct_2``.
    """

    mode: Literal["min", "max"]
    """Whether the lowest (``min``) or the highest (``max``) value is the best. Of equal ones the
    earlier is.
    """

    n: Positive = 1
    """The number of best checkpoints that are kept."""


class CheckpointConfig(Section):
    """When checkpoints are written, and which of them stay."""

    every: Positive = 50
    """The number of batches between two checkpoints. There is one at the end of the run, too. An
    interrupted run loses at most so many batches.
    """

    keep_last: Positive = 2
    """The number of checkpoints that are kept, the newest ones. ``eopd train --resume --step N``
    can go back to any of them. The one to go back to from a collapse is kept beside them.
    """

    keep_best: KeepBestConfig | None = None
    """The best checkpoints by a metric of an evaluation, which are kept beside the newest.
    ``hf-best/`` is then the best student. ``null`` keeps the newest alone.
    """


class EvaluationConfig(Section):
    """What is measured before the first batch, after the last one, and now and then between: the
    held-out prompts, and benchmarks. Held-out responses are sampled at ``rollout.temperature``.
    Seeds and prompts are the same each time.
    """

    every: Positive | None = None
    """The number of batches between two evaluations. ``null`` measures before and after training
    alone.
    """

    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """Sets of prompts with answers, on which the student's own responses are graded."""

    prompts: Positive = 64
    """The number of held-out prompts that are measured. More make the standard errors smaller,
    and the measurement longer.
    """

    max_response_tokens: Tokens | None = None
    """The longest held-out response, in tokens; null for ``rollout.max_response_tokens``."""

    seed: Seed = 1234
    """The seed of the samples of every evaluation."""

    samples: Count = 3
    """The number of held-out responses whose text and tokens are kept, for the report to show."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of everything that is measured."""
        return (HELD_OUT, *(benchmark.name for benchmark in self.benchmarks))

    def period(self, name: str) -> int | None:
        """Returns the number of batches between two measurements of this name, or None."""
        own = [benchmark.every for benchmark in self.benchmarks if benchmark.name == name]
        return next(filter(None, own), self.every)

    def is_due(self, name: str, step: int) -> bool:
        """Returns whether this name is measured after a step, or before the first one."""
        period = self.period(name)
        return step == 0 or (period is not None and step % period == 0)

    def metrics(self, name: str) -> tuple[str, ...]:
        """Returns the metrics of this name by which checkpoints can be compared."""
        own = [benchmark.metrics for benchmark in self.benchmarks if benchmark.name == name]
        return HELD_OUT_METRICS if name == HELD_OUT else next(iter(own), ())

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = self.names
        if duplicates := [name for name in names if names.count(name) > 1]:
            taken = "is taken" if duplicates[0] == HELD_OUT else "stands twice"
            raise ValueError(f"benchmarks: the name {duplicates[0]!r} {taken}")

        return self


class GuardConfig(Section):
    """The guard looks for a collapse after every batch. The chapter
    docs/configuration.md#when-a-run-collapses has its rule.
    """

    on_collapse: Literal["off", "warn", "stop"] = "warn"
    """What a run does when the student collapses. ``warn`` says so, once for each collapse;
    ``stop`` also ends the run, with a checkpoint, an export and exit code 1; ``off`` does not look.
    """


class ResponsesConfig(Section):
    """Which training responses are kept in ``responses.jsonl``, for ``eopd show``."""

    every: Positive
    """The number of batches from one whose responses are kept to the next."""

    prompts: Positive = 4
    """The number of prompts of such a batch whose responses are kept, with all their samples. A
    token takes about 80 bytes.
    """


def _each_once(trackers: list[str]) -> list[str]:
    if duplicates := [tracker for tracker in trackers if trackers.count(tracker) > 1]:
        raise ValueError(f"tracker {duplicates[0]} stands twice")

    return trackers


class TelemetryConfig(Section):
    """Where the numbers of a run go besides its own files."""

    host: str = Field(
        "127.0.0.1",
        pattern=r"^[^\s/]+$",
        description="the name or number of a host",
    )
    """The address at which the driver's Prometheus endpoint listens. The default answers on this
    machine alone; ``0.0.0.0`` answers on every interface.
    """

    port: int | None = Field(0, ge=0, le=65535)
    """The port of the Prometheus endpoint. 0 takes a free one, ``null`` opens no endpoint."""

    discovery: AbsolutePath | None = None
    """A folder in which the run tells Prometheus its address while it is running: a file for
    ``file_sd_configs``. ``dashboards/prometheus.yml`` watches ``dashboards/targets``. ``null``
    writes none. The chapter docs/monitoring.md#several-runs says more.
    """

    log_format: Literal["text", "json"] = "text"
    """The lines of the files in ``logs/``: ``text``, or ``json`` objects with ``time``, ``role``,
    ``node``, ``pid`` and ``text``. A file of 64 MiB becomes ``<role>.log.1``, in place of the one
    before it.
    """

    trackers: Annotated[list[TrackerName], AfterValidator(_each_once)] = []
    """The experiment trackers to which every row of ``metrics.jsonl`` goes too; none by default.
    The chapter docs/configuration.md#trackers says how each is set up.
    """

    responses: ResponsesConfig | None = None
    """Keeps some responses of some batches, for people to look at. ``null`` keeps none."""

    @model_validator(mode="after")
    def _what_is_announced_is_served(self) -> Self:
        if self.discovery is not None and self.port is None:
            raise ValueError(
                "discovery: there is no endpoint to tell of, since telemetry.port is null; 0 takes "
                "a free one"
            )

        return self


class ClusterConfig(Section):
    """The Ray cluster, and what it may lose.

    Engines, teachers and learner ranks that are lost are started again. With none of a kind left,
    and none up within ``cluster.start_timeout_s``, the run ends.
    """

    address: str | None = Field(None, min_length=1)
    """The running Ray cluster to join: its ``HOST:PORT``, or ``auto`` on one of its machines. The
    variable ``RAY_ADDRESS`` does the same. ``null`` starts Ray on this machine. The chapter
    docs/configuration.md#the-machine says which addresses work.
    """

    cpus: int | None = Field(None, ge=1, le=100_000)
    """The CPUs of the Ray that the run starts, a whole number. ``null`` takes those of the machine."""

    wait_s: float = Field(0.0, ge=0.0, le=1e7)
    """The seconds to wait, before anything is started, for room in a cluster that is joined: until
    an autoscaler has added machines, or others have ended. A run that is resumed waits as long for
    the process that still runs it. With zero, either is an error at once.
    """

    spread: bool = False
    """Whether engines and teacher replicas start on the machines that have the most room left, and
    not on the smallest that have enough. The learner's ranks stay together. What replaces a lost
    worker starts wherever there is room.
    """

    start_timeout_s: Seconds = 600.0
    """The seconds in which every worker must be up; each of them, where roles share GPUs and so
    start one after the other. Raise it where models are loaded from slow disks.
    """

    max_restarts: Count = 10
    """The number of engines, teacher replicas and learner gangs that may be lost within
    ``cluster.restart_window_s``, for every 8 of them that the run has. One more ends the run, with
    the causes.
    """

    restart_window_s: Seconds = 3600.0
    """The length, in seconds, of the window in which lost workers are counted."""
