"""Precision by processor: a table of machines, and what a config says of its own."""

import fakes
import pytest

from eopd.config import dump_config, load_config, processor
from eopd.config.processor import choose_dtype, dtype_notes, processor_flags

AVX2 = {"sse4_2", "avx", "avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
BF16 = AVX512 | {"avx512_bf16"}

MACHINES = {  # flags as the kernel names them
    "Haswell, Skylake, Zen 1 to 3": (AVX2, "float32"),
    "Alder Lake (AVX-VNNI, no AVX-512)": (AVX2 | {"avx_vnni"}, "float32"),
    "Skylake-SP, Cascade Lake": (AVX512, "float32"),
    "Ice Lake-SP": (AVX512 | {"avx512_bitalg", "avx512_vbmi2"}, "float32"),
    "Cooper Lake": (BF16, "bfloat16"),
    "Zen 4": (BF16, "bfloat16"),
    "Sapphire Rapids": (BF16 | {"avx512_fp16", "amx_bf16", "amx_tile"}, "bfloat16"),
    "Graviton 2": ({"fp", "asimd", "asimddp"}, "float32"),
    "Graviton 3": ({"fp", "asimd", "asimddp", "sve", "i8mm", "bf16"}, "bfloat16"),
    "a machine that does not tell": (set(), "float32"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_bfloat16_where_its_instructions_are(machine):
    flags, expected = MACHINES[machine]
    here, _ = choose_dtype(gpus=0, flags=flags, environment={})
    assert here == expected
    on_gpus, _ = choose_dtype(gpus=0.5, flags=flags, environment={})
    assert on_gpus == "bfloat16", "whatever the processor"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "bfloat16"),
        ("ONEDNN_MAX_CPU_ISA", "AVX10_1_512_AMX", "bfloat16"),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", "bfloat16"),
        ("ATEN_CPU_CAPABILITY", "avx2", "float32"),
        ("ATEN_CPU_CAPABILITY", "avx512", "bfloat16"),
    ],
)
def test_instructions_that_are_held_back_do_not_count(name, value, expected):
    dtype, reason = choose_dtype(gpus=0, flags=BF16, environment={name: value})
    assert dtype == expected
    assert (name in reason) == (expected == "float32")


def test_flags_are_read_as_the_kernel_writes_them(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )
    assert processor_flags(file) == {"fpu", "avx2", "avx512_bf16"}
    file.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert "bf16" in processor_flags(file)
    assert processor_flags(tmp_path / "missing") == frozenset()


@pytest.fixture
def load(tmp_path, monkeypatch):
    def load(flags, *overrides):
        for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
            monkeypatch.delenv(name, raising=False)

        monkeypatch.setattr(processor, "processor_flags", lambda: frozenset(flags))
        return load_config(fakes.write_config(tmp_path), overrides)

    return load


def test_what_was_chosen_and_why_stands_in_the_resolved_config(load, tmp_path):
    config = load(AVX2)
    lacks = "this processor has no bfloat16 instructions"
    reason = f"auto: {lacks} (neither AVX-512 BF16 nor AMX)"
    for model in (config.student, config.teachers[0]):
        assert model.dtype == "float32"
        assert model.dtype_reason == reason

    (note,) = dtype_notes(config)
    assert note == f"student.dtype, teachers.teacher.dtype: float32 ({reason})"
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    assert resolved.read_text().count("dtype_reason: 'auto: ") == 2
    assert load_config(resolved) == config


def test_gpus_of_learner_and_engines_decide_for_the_student(load):
    assert load(AVX2, "learner.gpus=1").student.dtype == "float32"
    assert load(AVX2, "learner.gpus=1", "rollout.gpus=1").student.dtype == "bfloat16"
    assert load(AVX2, "teachers.0.gpus=1").teachers[0].dtype == "bfloat16"


def test_a_dtype_that_is_written_stays(load):
    config = load(AVX2, "student.dtype=bfloat16", "teachers.0.dtype=float32")
    assert config.student.dtype == "bfloat16"
    assert config.student.dtype_reason is None
    (note,) = dtype_notes(config)
    lacks = "this processor has no bfloat16 instructions"
    assert note.startswith(f"student.dtype: bfloat16, although {lacks}")
    assert "about 20 times as slow as float32" in note
    able = load(BF16, "student.dtype=bfloat16", "teachers.0.dtype=bfloat16")
    assert dtype_notes(able) == []
