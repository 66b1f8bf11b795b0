"""Which precision a machine computes in: bfloat16 where its instructions are, float32 elsewhere.

Without them bfloat16 is emulated. Forward and backward of a 99 M student on 512 tokens took 62 s in
bfloat16 and 2.9 s in float32 on two cores with AVX2 alone.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, TypeVar

from eopd.config.root import Config
from eopd.config.sections import StudentConfig
from eopd.config.teacher import TeacherConfig

ChosenDtype = Literal["float32", "bfloat16"]
Model = TypeVar("Model", StudentConfig, TeacherConfig)

SLOWER = 20  # times, bfloat16 without its instructions

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # Intel and AMD; bf16 is Arm's
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # both imitate a lesser processor


def choose_dtype(
    *, gpus: float, flags: Collection[str], environment: Mapping[str, str]
) -> tuple[ChosenDtype, str]:
    """Chooses the precision of a model by where it runs, and says why, as half a sentence.

    Args:
        gpus: GPUs that one of its actors asks for.
        flags: flags of the processor, as ``/proc/cpuinfo`` names them.
        environment: variables of the process; ``ONEDNN_MAX_CPU_ISA`` and ``ATEN_CPU_CAPABILITY`` may hold
            instructions back.
    """
    if gpus:
        return "bfloat16", "runs on GPUs"

    if held_back := [name for name in _LIMITS if _holds_back(environment.get(name, ""))]:
        name = held_back[0]
        return "float32", f"{name}={environment[name]} keeps bfloat16 instructions from use"

    if instructions := [flag for flag in _BFLOAT16_FLAGS if flag in flags]:
        return "bfloat16", f"this processor has bfloat16 instructions ({instructions[0]})"

    return "float32", "this processor has no bfloat16 instructions (neither AVX-512 BF16 nor AMX)"


def _holds_back(limit: str) -> bool:
    """Whether a limit of either library lies below bfloat16 instructions (oneDNN 3, torch 2.13)."""
    reaches = (
        "",
        "all",
        "default",
        "avx512_core_bf16",
        "avx512_core_fp16",
        "avx512_core_amx",
        "avx512",
    )
    return limit.lower() not in reaches and not limit.lower().startswith(
        ("avx10", "avx512_core_amx")
    )


def processor_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Returns the flags of this machine's first processor; none where they cannot be read."""
    return frozenset(of_processor("flags", "Features", cpuinfo=cpuinfo).split())


def of_processor(*names: str, cpuinfo: Path = _CPUINFO) -> str:
    """Returns what the kernel says of the first processor under one of these names; it may be nothing."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""

    found = (line.partition(":")[2].strip() for line in lines if line.startswith(names))
    return next(found, "")


def with_dtypes(config: Config) -> Config:
    """Returns the config with every ``dtype: auto`` chosen for this machine.

    Learner and engines share the student's; it runs on GPUs when both do.
    """
    teachers = tuple(chosen(teacher, gpus=teacher.gpus) for teacher in config.teachers)
    student = chosen(config.student, gpus=min(config.learner.gpus, config.rollout.gpus))
    return config.model_copy(update={"student": student, "teachers": teachers})


def with_student_dtype_of(before: Config, now: Config) -> Config:
    """Returns a config that continues another one, in the precision of the latter where ``auto``
    chose one here: machines differ.
    """
    if now.student.dtype_reason is None:
        return now

    precision = {"dtype": before.student.dtype, "dtype_reason": before.student.dtype_reason}
    return now.model_copy(update={"student": now.student.model_copy(update=precision)})


def chosen(model: Model, *, gpus: float) -> Model:
    """Returns a model's section with its ``dtype: auto`` chosen for this machine; one that names
    a dtype stays as it is.
    """
    if model.dtype != "auto":
        return model

    dtype, reason = "bfloat16", "what most servers compute in"
    if _runs_here(model):
        dtype, reason = choose_dtype(gpus=gpus, flags=processor_flags(), environment=os.environ)

    return model.model_copy(update={"dtype": dtype, "dtype_reason": f"auto: {reason}"})


def dtype_notes(config: Config) -> list[str]:
    """Returns notes on the precisions of a loaded config: which were chosen and why, and which
    are slow.
    """
    models: list[tuple[str, StudentConfig | TeacherConfig, float]] = [
        ("student.dtype", config.student, min(config.learner.gpus, config.rollout.gpus)),
        *((f"teachers.{teacher.name}.dtype", teacher, teacher.gpus) for teacher in config.teachers),
    ]
    notes: dict[str, list[str]] = {}

    for key, model, gpus in models:
        dtype, reason = choose_dtype(gpus=gpus, flags=processor_flags(), environment=os.environ)
        if model.dtype_reason:
            notes.setdefault(f"{model.dtype} ({model.dtype_reason})", []).append(key)
        elif model.dtype != "float32" and dtype == "float32" and _runs_here(model):
            slow = f"{model.dtype}, although {reason}: about {SLOWER} times as slow as float32"
            notes.setdefault(f"{slow}; write auto, or float32", []).append(key)

    return [f"{', '.join(keys)}: {text}" for text, keys in notes.items()]


def _runs_here(model: StudentConfig | TeacherConfig) -> bool:
    return isinstance(model, StudentConfig) or model.backend == "vllm"
