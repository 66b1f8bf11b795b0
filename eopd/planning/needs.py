"""From a config and the shapes of its models to what each role needs of one device.

    learner rank      states, activations, loss, packed weights
    rollout engine    weights, KV cache, the engine's own step, received weights
    teacher replica   weights, KV cache, the engine's own step, chunks of logits

What is not in the config has the defaults of DeepSpeed 0.19.8 and vLLM 0.32.0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from eopd.config import Config, LearnerConfig, RolloutConfig, TeacherConfig
from eopd.loss.kernels import choose_chunk_tokens
from eopd.planning.architecture import Architecture
from eopd.planning.memory import (
    FULL,
    Parts,
    engine_working,
    kv_bytes,
    learner_states,
    passes,
    scoring_buffers,
)

USABLE: Final = 0.9  # of a GPU's memory: the rest is its context, and what an allocator loses
_UTILISATION: Final = 0.92  # vLLM's gpu_memory_utilization
_CPU_CACHE: Final = 1 << 30  # bytes (``async_llm.cpu_options``)
_WIDTH: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_CPU_SCORING, _GPU_SCORING = (128, 16), (256, 256)  # rows of ``teacher/head.py``
_TENSOR, _PIPELINE = "tensor_parallel_size", "pipeline_parallel_size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The devices that a run is planned for. ``bandwidth`` is bytes a second between two nodes."""

    gpu_bytes: int
    nodes: int = 1
    gpus_per_node: int | None = None
    bandwidth: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The shapes of the student, and of each teacher by its name."""

    student: Architecture
    teachers: Mapping[str, Architecture]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one of ``actors`` needs: ``device`` on each of its GPUs, or of the machine's memory where it
    has none (``on_gpu``); ``host`` beside a GPU. ``limit`` is what a GPU offers it, None on CPUs. The
    first actor alone needs ``of_first`` bytes of the memory.
    """

    role: str
    key: str
    actors: int
    gpus: float
    device: Parts
    host: Parts = field(default_factory=dict)
    of_first: int = 0
    limit: int | None = None
    responses: int | None = None  # of full length, that an engine holds at a time

    @property
    def on_gpu(self) -> bool:
        """Whether the role has GPUs."""
        return self.gpus > 0

    @property
    def device_bytes(self) -> int:
        """The sum of one device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """The sum of host memory of one actor, beside its GPUs."""
        return sum(self.host.values())

    @property
    def memory_bytes(self) -> int:
        """The memory of machines that all actors need together."""
        each = self.host_bytes if self.on_gpu else self.device_bytes
        return self.of_first + self.actors * (each - self.of_first)

    @property
    def fits(self) -> bool | None:
        """Whether a GPU offers what is needed; None on CPUs, whose memory all share."""
        return None if self.limit is None else self.device_bytes <= self.limit


def needs_of(config: Config, models: Models, hardware: Hardware) -> tuple[Need, ...]:
    """Returns what each role of a run needs; a teacher behind a server needs nothing here."""
    teachers = [
        teacher_need(config, number, models.teachers[teacher.name], hardware)
        for number, teacher in enumerate(config.teachers)
        if teacher.backend == "vllm"
    ]
    return (
        learner_need(config, models.student, hardware),
        rollout_need(config, models.student, hardware),
        *teachers,
    )


def wire_of(config: Config, hardware: Hardware) -> str:
    """Returns the wire of the weights; that of ``auto`` by the number of nodes."""
    backend = config.weights_backend
    return backend if backend != "auto" else ("shared" if hardware.nodes == 1 else "gloo")


def weight_bytes(config: Config, model: Architecture) -> int:
    """Returns the bytes of the student's weights, without adapters."""
    return model.parameters * _WIDTH[config.student.chosen_dtype]


def sync_bytes(config: Config, model: Architecture) -> int:
    """Returns the bytes of a publish: all of the student's weights, or its adapters alone."""
    sent = model.trained if config.may_send_adapters else model.parameters
    return sent * _WIDTH[config.student.chosen_dtype]


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Returns what a checkpoint of a student takes at least: weights and AdamW's two moments in
    float32, or in half precision float32 masters too. Under LoRA it is the weights alone, in the
    student's type.
    """
    whole = config.student.lora is None
    return parameters * (12 if whole else _WIDTH[config.student.chosen_dtype])


def checkpoints_at_a_time(config: Config) -> int:
    """Returns how many checkpoints lie on disk at a time: the last and the best ones that are kept, and
    the one that is written before another is removed.
    """
    best = config.checkpoint.keep_best
    kept = config.checkpoint.keep_last + (0 if best is None else best.n)
    return min(kept + 1, math.ceil(config.run.batches / config.checkpoint.every))


def learner_need(config: Config, model: Architecture, hardware: Hardware) -> Need:
    """Returns what a rank of the learner needs; rank 0, which also sends the weights."""
    learner, width = config.learner, _WIDTH[config.student.chosen_dtype]
    wire = wire_of(config, hardware)
    if learner.logit_chunk_tokens is None:
        gpu_bytes = hardware.gpu_bytes if learner.gpus else None
        rows = choose_chunk_tokens(model.vocabulary, gpu_bytes=gpu_bytes)
        learner = learner.model_copy(update={"logit_chunk_tokens": rows})

    states = learner_states(model, learner, width)
    device, host = states.device | passes(model, learner, width), dict(states.host)
    bucket = max(config.weights.bucket_bytes, model.largest_tensor * width)
    sent = sync_bytes(config, model)
    bucket = min(bucket, sent)
    packed = sent if wire == "shared" else min(2 * bucket, sent)
    host["packed weights"] = packed
    merges = config.student.lora is not None and not config.may_send_adapters
    if wire == "nccl" or learner.chosen_zero_stage == 3 or merges:
        device["a bucket of weights"] = bucket

    return _placed(
        Need(
            role="learner rank",
            key="learner",
            actors=learner.ranks,
            gpus=learner.gpus,
            device=device,
            host=host,
            of_first=packed,
            limit=_limit(learner, hardware, USABLE),
        )
    )


def rollout_need(config: Config, model: Architecture, hardware: Hardware) -> Need:
    """Returns what a GPU of a rollout engine needs, or the engine where it runs on CPUs."""
    rollout, width = config.rollout, _WIDTH[config.student.chosen_dtype]
    workers, stages = split_of(rollout)
    longest, wire = config.max_sequence_tokens, wire_of(config, hardware)
    _, batched = _batch_limits(rollout, hardware)
    tokens = _option(rollout, "max_num_batched_tokens", max(batched, longest))
    device = {
        "weights": weight_bytes(config, model) // (workers * stages),
        "a step of the engine": engine_working(
            model,
            width=width,
            tokens=tokens,
            rows=seats_of(rollout, hardware),
            workers=workers,
        ),
    }
    host: Parts = {}
    if wire != "shared":
        host["received weights"] = sync_bytes(config, model)

    if wire == "nccl":
        bucket = max(config.weights.bucket_bytes, model.largest_tensor * width)
        device["a bucket of weights"] = min(bucket, sync_bytes(config, model))

    need = Need(
        role="rollout engine",
        key="rollout",
        actors=rollout.engines,
        gpus=rollout.gpus,
        device=device,
        host=host,
    )
    return _with_cache(need, rollout, model, longest, width, hardware)


def teacher_need(config: Config, number: int, model: Architecture, hardware: Hardware) -> Need:
    """Returns what a GPU of a teacher's replica needs, or the replica where it runs on CPUs."""
    teacher = config.teachers[number]
    width = _WIDTH[teacher.dtype]
    workers, stages = split_of(teacher)
    longest = config.max_teacher_tokens(teacher)
    exact = teacher.head_dtype == "float32"
    rows, passes = _GPU_SCORING if teacher.gpus else _CPU_SCORING
    _, batched = _batch_limits(teacher, hardware)
    tokens = _option(teacher, "max_num_batched_tokens", max(batched, longest))
    device = {
        "weights": model.parameters * width // (workers * stages),
        "a step of the engine": engine_working(
            model, width=width, tokens=tokens, rows=0, workers=workers
        ),
        "chunks of logits": scoring_buffers(
            model, rows=rows, passes=passes, width=FULL if exact else width
        ),
    }
    if exact and width < FULL and not teacher.gpus:
        device["float32 head"] = model.vocabulary * model.hidden * FULL

    need = Need(
        role=f"teacher {teacher.name}",
        key=f"teachers.{number}",
        actors=teacher.replicas,
        gpus=teacher.gpus,
        device=device,
    )
    return _with_cache(need, teacher, model, longest, width, hardware)


def _batch_limits(section: RolloutConfig | TeacherConfig, hardware: Hardware) -> tuple[int, int]:
    """Returns the most sequences and tokens of an engine's step by vLLM's defaults for the use that
    engines name (``async_llm.usage_context``). Those of an A100 are of the smaller GPUs.
    """
    if not section.gpus:
        return 128, 2048

    return (1024, 16384) if hardware.gpu_bytes >= 70 << 30 else (256, 8192)


def seats_of(section: RolloutConfig | TeacherConfig, hardware: Hardware) -> int:
    """Returns how many requests an engine holds at a time."""
    return _option(section, "max_num_seqs", _batch_limits(section, hardware)[0])


def split_of(section: RolloutConfig | TeacherConfig) -> tuple[int, int]:
    """Returns the workers that share every layer of an engine, and the stages that share the layers."""
    return _option(section, _TENSOR, 1), _option(section, _PIPELINE, 1)


def _with_cache(
    need: Need,
    section: RolloutConfig | TeacherConfig,
    model: Architecture,
    longest: int,
    width: int,
    hardware: Hardware,
) -> Need:
    """Returns the need with a KV cache: of the size that the config names; else all that
    ``gpu_memory_utilization`` leaves, and at least one sequence.
    """
    workers, stages = split_of(section)
    width = 1 if str(section.vllm.get("kv_cache_dtype", "auto")).startswith("fp8") else width
    of_one = kv_bytes(model, tokens=longest, width=width, workers=workers, stages=stages)
    named = section.vllm.get("kv_cache_memory_bytes")
    utilisation = section.vllm.get("gpu_memory_utilization", _UTILISATION)
    share = USABLE if named else float(str(utilisation))
    if isinstance(named, int):
        cache = named
    elif section.gpus:
        cache = max(int(share * hardware.gpu_bytes) - need.device_bytes, of_one)
    else:
        cache = _CPU_CACHE

    device = {"weights": need.device["weights"], "KV cache": cache, **need.device}
    return _placed(
        Need(
            role=need.role,
            key=need.key,
            actors=need.actors,
            gpus=need.gpus,
            device=device,
            host=need.host,
            limit=_limit(section, hardware, share),
            responses=cache // of_one,
        )
    )


def _placed(need: Need) -> Need:
    """Returns the need with all of it in one place, where the role has no GPU."""
    if need.on_gpu:
        return need

    device = dict(need.device)
    for name, size in need.host.items():
        device[name] = device.get(name, 0) + size

    return replace(need, device=device, host={}, limit=None)


def _limit(
    section: LearnerConfig | RolloutConfig | TeacherConfig, hardware: Hardware, share: float
) -> int | None:
    """Returns what a role may take of a GPU, of which it may have a fraction; None without one."""
    if not section.gpus:
        return None

    return int(min(share, section.gpus) * hardware.gpu_bytes)


def _option(section: RolloutConfig | TeacherConfig, name: str, default: int) -> int:
    value = section.vllm.get(name, default)
    return value if isinstance(value, int) else default
