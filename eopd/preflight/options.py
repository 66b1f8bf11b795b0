"""Native options of vLLM and DeepSpeed are checked by name, type and bounds before an engine starts.

The types are those that the installed libraries declare in their source (checked against vLLM
0.32.0 and DeepSpeed 0.19.8). Where a library is not installed, its options are not checked. Left
out: options that are mappings of vLLM's own, such as ``compilation_config``.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, Field, ValidationError

from eopd.config import ConfigError
from eopd.config.messages import explain
from eopd.preflight.declared import Declarations, options_model, source_of

_Dtype = Literal["fp32", "fp16", "bf16", "float32", "float16", "bfloat16"]
_Level = Literal["debug", "info", "warning", "error", "critical"]
# Options that DeepSpeed reads one by one (runtime/config.py), without a class that declares them.
# Left out are batches, precision, optimiser and checkpoints, which the config of the run decides.
_DEEPSPEED_KEYS: Final[Mapping[str, object]] = {
    "steps_per_print": int | None,
    "dump_state": bool,
    "disable_python_gc": bool,
    "disable_allgather": bool,
    "communication_data_type": _Dtype | None,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "zero_allow_untested_optimizer": bool,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "log_level": _Level | None,
    "vocabulary_size": int | None,
}
_DEEPSPEED_SECTIONS: Final[Mapping[str, Mapping[str, object]]] = {  # read one by one too
    "activation_checkpointing": {
        "partition_activations": bool,
        "number_checkpoints": int | None,
        "contiguous_memory_optimization": bool,
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
        "cpu_checkpointing": bool,
    },
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str | None,
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "data_types": {
        "grad_accum_dtype": _Dtype | None,
        "param_dtype": _Dtype | None,
        "buffer_dtype": _Dtype | None,
        "keep_in_fp32_modules": list[str],
    },
}
_DEEPSPEED_CLASSES: Final[Mapping[str, str]] = {
    "zero_optimization": "DeepSpeedZeroConfig",
    "comms_logger": "CommsLoggerConfig",
    "compile": "CompileConfig",
    "tensorboard": "TensorBoardConfig",
    "wandb": "WandbConfig",
    "csv_monitor": "CSVConfig",
    "comet": "CometConfig",
}
_DEEPSPEED_BASE: Final = "DeepSpeedConfigModel"


def require_vllm_options(key: str, options: Mapping[str, object]) -> None:
    """Compares ``options`` with those of the installed vLLM's engine.

    Raises:
        ConfigError: there is no such option, or its value is not allowed.
    """
    root = source_of("vllm")
    if not options or root is None:
        return

    files = [root / "engine" / "arg_utils.py", *(root / "config").glob("*.py")]
    declared = Declarations.read(
        [*files, root / "model_executor" / "layers" / "quantization" / "__init__.py"]
    )
    narrower: dict[str, object] = {"kv_cache_memory_bytes": Annotated[int | None, Field(gt=0)]}
    if not _vllm_plugins():
        narrower["quantization"] = declared.alias("QuantizationMethods")

    _require(
        key,
        options,
        declared.model("EngineArgs", "AsyncEngineArgs", only=options, instead=narrower),
    )


def _vllm_plugins() -> list[str]:
    """Returns the plugins of other packages: they may add to vLLM, e.g. methods of quantization."""
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    return [
        plugin.value for plugin in plugins if plugin.value.split(".")[0] not in ("eopd", "vllm")
    ]


def require_deepspeed_options(key: str, options: Mapping[str, object]) -> None:
    """Compares ``options`` with those of the installed DeepSpeed, which ignores unknown ones.

    Raises:
        ConfigError: there is no such option, or its value is not allowed.
    """
    root = source_of("deepspeed")
    if not options or root is None:
        return

    files = [file for file in root.rglob("*.py") if "config" in file.stem]
    declared = Declarations.read(files)
    sections = {
        name: declared.model(kind, nested=_DEEPSPEED_BASE)
        for name, kind in _DEEPSPEED_CLASSES.items()
    }
    sections |= {name: options_model(name, keys) for name, keys in _DEEPSPEED_SECTIONS.items()}
    sections["timers"] = options_model(
        "timers",
        {"throughput": declared.model("DeepSpeedThroughputTimerConfig", nested=_DEEPSPEED_BASE)},
    )
    model = options_model("DeepSpeed", {**_DEEPSPEED_KEYS, **sections})
    _require(key, _as_deepspeed_reads(options), model)


def _as_deepspeed_reads(options: Mapping[str, object]) -> dict[str, object]:
    """Returns options as DeepSpeed reads them: ``5e8`` is a whole number, ``auto`` is left out."""
    return {name: _whole(value) for name, value in options.items() if value != "auto"}


def _whole(value: object) -> object:
    if isinstance(value, Mapping):
        return _as_deepspeed_reads(value)

    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require(key: str, options: Mapping[str, object], model: type[BaseModel]) -> None:
    try:
        model.model_validate_json(json.dumps(options))
    except ValidationError as error:
        lines = [explain(detail, model)[1] for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{key}.{line}" for line in dict.fromkeys(lines))) from None
