"""A table tells for every key of the config whether it may change when a run continues.

``always``    changes nothing that is computed: resources, memory, time-outs, paths, what is reported
``noted``     changes what is computed from then on: logged at the start, kept in ``changes.jsonl``, marked in reports
``contents``  names files: what they hold decides (``runtime/inputs.py``), not how they are named
``never``     makes another run: a checkpoint could not be loaded, or its issue numbers would stand for other prompts

The longest entry that a key begins with decides; a key without any is ``noted``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Final, Literal

import yaml

from eopd.config import Config, LearnerConfig, Part
from eopd.config.load import flatten
from eopd.config.prompts import keys_of

Kind = Literal["always", "noted", "contents", "never"]

OTHER_CONTENTS: Final = "other contents"

_VLLM_MEMORY: Final = (
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "cpu_offload_gb",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "enforce_eager",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "distributed_executor_backend",
    "disable_custom_all_reduce",
    "disable_log_stats",
)
_ZERO_MEMORY: Final = (
    "allgather_bucket_size",
    "contiguous_gradients",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
)

TABLE: Final[Mapping[str, Kind]] = {
    "checkpoint": "always",
    "cluster": "always",
    "evaluation.every": "always",
    "evaluation.samples": "always",
    "flow.max_attempts": "always",
    "flow.max_dropped_ratio": "always",
    "guard": "always",
    "learner.activation_checkpointing": "always",
    "learner.cpus": "always",
    "learner.gpus": "always",
    "learner.logit_chunk_tokens": "always",
    "learner.max_skipped_steps": "always",
    "learner.node_labels": "always",
    "learner.peak_flops": "always",
    "learner.ranks": "always",
    "learner.threads": "always",
    "learner.timeout_s": "always",
    "learner.token_budget": "always",
    **{f"learner.deepspeed.zero_optimization.{name}": "always" for name in _ZERO_MEMORY},
    "learner.deepspeed.zero_optimization.round_robin_gradients": "never",
    "learner.deepspeed.zero_optimization.sub_group_size": "never",
    "learner.zero_stage": "never",
    "learner.zero_stage_reason": "always",
    "prompts": "contents",
    "prompts.data[].weight": "never",
    "rollout.cpus": "always",
    "rollout.engines": "always",
    "rollout.gpus": "always",
    "rollout.node_labels": "always",
    "rollout.samples_per_prompt": "never",
    "rollout.threads": "always",
    "rollout.timeout_s": "always",
    **{f"rollout.vllm.{name}": "always" for name in _VLLM_MEMORY},
    "run.directory": "always",
    "run.expected_minutes": "always",
    "run.name": "always",
    "run.on_stall": "always",
    "run.seed": "never",
    "run.stall_after_s": "always",
    "run.upload": "always",
    "student.dtype": "never",
    "student.dtype_reason": "always",
    "student.lora": "never",
    "student.lora.alpha": "noted",
    "student.model": "contents",
    "teachers[].cpus": "always",
    "teachers[].dtype_reason": "always",
    "teachers[].gpus": "always",
    "teachers[].node_labels": "always",
    "teachers[].replicas": "always",
    "teachers[].server.api_key_env": "always",
    "teachers[].server.max_attempts": "always",
    "teachers[].server.max_connections": "always",
    "teachers[].server.timeout_s": "always",
    "teachers[].server.url": "always",
    "teachers[].threads": "always",
    "teachers[].timeout_s": "always",
    **{f"teachers[].vllm.{name}": "always" for name in _VLLM_MEMORY},
    "telemetry": "always",
    "weights": "always",
}


def kind_of(knob: str) -> Kind:
    """Returns the kind of a change to a key, e.g. ``learner.lr`` or ``teachers[].vllm.seed``."""
    parts = knob.split(".")
    beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((TABLE[name] for name in beginnings if name in TABLE), "noted")


@dataclass(frozen=True, slots=True)
class Change:
    """A change is a key with another value than before; a list is one value, and None is no value.

    ``before`` is ``OTHER_CONTENTS`` for a path that does not hold what it held.
    """

    key: str
    before: object
    after: object
    kind: Kind

    def __str__(self) -> str:
        if self.before == OTHER_CONTENTS:
            return f"{self.key}: {self.after} does not hold what it held"

        return f"{self.key} {_yaml(self.before)} -> {_yaml(self.after)}"


def changes(before: Config, after: Config) -> list[Change]:
    """Returns every key that differs, teachers by name (``teachers.b.temperature``), and parts of the
    prompts by number where there are several (``prompts.data.1.weight``).
    """
    changed = list(_differences("", _plain(before), _plain(after)))
    changed += _of_parts("prompts.data", before.prompts.data, after.prompts.data)
    changed += _of_parts(
        "prompts.held_out",
        before.prompts.held_out,
        after.prompts.held_out,
    )
    old = {teacher.name: teacher for teacher in before.teachers}
    new = {teacher.name: teacher for teacher in after.teachers}

    for name in sorted(old.keys() | new.keys()):
        key = f"teachers.{name}"
        if name not in old:
            changed.append(Change(key, None, new[name].model, "noted"))
        elif name not in new:
            changed.append(Change(key, old[name].model, None, "noted"))
        else:
            was, becomes = old[name].model_dump(mode="json"), new[name].model_dump(mode="json")
            changed += _differences(f"{key}.", was, becomes, knob="teachers[].")

    kinds = _learner_kinds(before.learner, after.learner)

    return [replace(change, kind=kinds.get(change.key, change.kind)) for change in changed]


def _of_parts(key: str, before: Sequence[Part], after: Sequence[Part]) -> Iterator[Change]:
    """Yields the keys that differ between parts of the same number; that of a part itself stands for
    its ``data``.
    """
    keys = keys_of(key, max(before, after, key=len))
    for name, was, becomes in zip_longest(keys, before, after):
        old, new = (part.model_dump(mode="json") if part else {} for part in (was, becomes))
        for change in _differences(f"{name}.", old, new, knob=f"{key}[]."):
            yield replace(change, key=change.key.removesuffix(".data"))


def _learner_kinds(before: LearnerConfig, after: LearnerConfig) -> dict[str, Kind]:
    """Returns the kinds that depend on which checkpoints DeepSpeed can load."""
    ranks_may_change = before.ranks_may_change and after.ranks_may_change
    same_shards = {before.zero_stage, after.zero_stage} == {1, 2}
    return {
        "learner.ranks": "always" if ranks_may_change else "never",
        "learner.zero_stage": "always" if same_shards else "never",
    }


def _differences(
    prefix: str, before: Mapping[str, object], after: Mapping[str, object], knob: str | None = None
) -> Iterator[Change]:
    """Yields the leaves that differ. ``knob`` is the prefix of the keys in the table, where it differs
    from ``prefix``.
    """
    old, new = flatten(before, lists=False), flatten(after, lists=False)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            kind = kind_of(f"{prefix if knob is None else knob}{key}")
            yield Change(f"{prefix}{key}", old.get(key), new.get(key), kind)


def _plain(config: Config) -> dict[str, object]:
    parts = {"data", "held_out"}
    return config.model_dump(mode="json", exclude={"teachers": True, "prompts": parts})


def _yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.strip().removesuffix("\n...").strip()
