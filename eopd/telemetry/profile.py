"""Says where the time of a step goes, what the machine could do, and what to change in the config.

    rows of some steps ─┐
    stages, each alone ─┼─▶ summarise ─▶ Profile ─▶ advice, print_profile, as_record
    CPU and wall clock ─┘

Everything here is a pure function of numbers; ``runtime/profile.py`` measures them. Left out: GPUs
that several roles share. What the machine could do is then too good, by as much as they disturb
each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import rich.console
from rich.table import Table

from eopd.config import Config
from eopd.run.record import Row
from eopd.telemetry.plain import say, terminal
from eopd.telemetry.step import PARTS

STAGES: Final = ("generate", "score", "train", "weights")
FULL: Final = 0.85  # of the time that its CPU work allows, a step cannot be much faster
WAITS: Final = 0.10  # of a step, a wait is worth a word
LONG_WEIGHTS: Final = 0.20  # of a step
BUSY: Final = 0.90  # of a step, engines have no pauses
MOST_SENTENCES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A profile holds means over ``steps`` steps, in seconds of a step.

    ``busy_s`` says how long each stage was at work, at the same time as others. ``alone_s`` is its
    cost where nothing overlaps. ``parts_s`` has what the learner did, one after the other: two
    waits, training, and the weights. ``step_s`` is the wall time of a step up to the start of the
    next one, by a clock of its own. ``cpu_s`` is the CPU time that a step needs: the lower of what
    it took alone and overlapped, since a process that waits burns some, too.
    """

    steps: int
    step_s: float
    tokens_per_s: float
    busy_s: Mapping[str, float]
    alone_s: Mapping[str, float]
    parts_s: Mapping[str, float]
    between_s: float
    cpu_s: float | None
    cores: int

    @property
    def accounted(self) -> float:
        """The share of the wall time that has a stage or a cause of waiting."""
        return (sum(self.parts_s.values()) + self.between_s) / self.step_s

    @property
    def waits(self) -> float:
        """The share of the wall time in which the learner waits for engines or teachers."""
        return (self.parts_s["wait_rollout"] + self.parts_s["wait_teacher"]) / self.step_s

    @property
    def longest(self) -> str:
        """The stage that costs most, alone."""
        return max(STAGES, key=lambda stage: self.alone_s[stage])

    @property
    def cpu_bound_s(self) -> float:
        """The seconds in which all cores together can do the work of a step; 0 where that is not
        known.
        """
        return (self.cpu_s or 0.0) / self.cores

    @property
    def best_s(self) -> float:
        """The seconds below which a step cannot fall with this config on this machine: those of the
        longest stage, or of the CPU work.
        """
        return max(self.alone_s[self.longest], self.cpu_bound_s)


def summarise(
    rows: Sequence[Row],
    alone_s: Mapping[str, float],
    *,
    wall_s: float,
    cpu_s: tuple[float, float] | None,
    cores: int,
) -> Profile:
    """Returns the profile of steps that followed one another.

    Args:
        rows: of the steps, as ``telemetry.step.step_row`` makes them.
        alone_s: mean seconds of each stage of a batch where nothing overlaps.
        wall_s: of the steps together, by a clock outside of the loop.
        cpu_s: the mean CPU seconds of all processes in a batch where nothing overlaps, and in one of
            the steps; None where those processes are not all on this machine.
        cores: of this machine.
    """
    steps = len(rows)

    def mean_s(name: str) -> float:
        return sum(row[f"eopd_{name}_seconds"] for row in rows) / steps

    tokens = sum(row["eopd_response_tokens_per_second"] * row["eopd_step_seconds"] for row in rows)
    return Profile(
        steps=steps,
        step_s=wall_s / steps,
        tokens_per_s=tokens / wall_s,
        busy_s={stage: mean_s(stage) for stage in STAGES},
        alone_s=alone_s,
        parts_s={part: mean_s(part) for part in PARTS},
        between_s=mean_s("between_steps"),
        cpu_s=None if cpu_s is None else min(cpu_s),
        cores=cores,
    )


def advice(profile: Profile, config: Config) -> list[str]:
    """Returns one to three sentences on what would make the step faster, the first one first. Each
    names a key of the config and its present value.
    """
    if profile.cpu_bound_s >= FULL * profile.step_s:
        return [_machine_is_full(profile, config)]

    found = []
    if profile.waits >= WAITS and profile.best_s < BUSY * profile.step_s:
        found += _on_waits(profile, config)

    if profile.alone_s[profile.longest] >= profile.cpu_bound_s:
        found.append(_on_stage(profile, config))

    if profile.longest != "weights" and profile.parts_s["weights"] >= LONG_WEIGHTS * profile.step_s:
        found.append(_on_weights(profile, config))

    return found[:MOST_SENTENCES] or [_machine_is_next(profile, config)]


def _machine_is_full(profile: Profile, config: Config) -> str:
    return (
        f"The machine is full: the CPU work of a step keeps {profile.cores} cores busy for "
        f"{profile.cpu_bound_s:.2f} of its {profile.step_s:.2f} s. Only more cores or GPUs help "
        f"({_cpus(config)}), or less work: a shorter rollout.max_response_tokens (now "
        f"{config.rollout.max_response_tokens})."
    )


def _machine_is_next(profile: Profile, config: Config) -> str:
    return (
        f"Nothing stands out: a step takes {profile.step_s:.2f} s, and the CPU work alone keeps "
        f"{profile.cores} cores busy for {profile.cpu_bound_s:.2f} s of it ({_cpus(config)})."
    )


def _cpus(config: Config) -> str:
    cpus = config.cluster.cpus
    return f"cluster.cpus is {'null: all of this machine' if cpus is None else cpus}"


def _on_waits(profile: Profile, config: Config) -> list[str]:
    """Says how the learner can wait less, where that is a matter of the flow."""
    flow = config.flow
    begins = f"The learner waits {profile.waits:.0%} of a step"
    if flow.max_staleness == 0:
        return [
            f"{begins}, since engines write a batch only when the weights of the last one are "
            f"there: set flow.max_staleness to 1 (now 0). A step then takes {profile.best_s:.2f} s "
            f"at best, in place of {profile.step_s:.2f} s."
        ]

    if profile.busy_s["generate"] < BUSY * profile.step_s:
        return [
            f"{begins}, while engines stand still for want of slots: raise flow.max_staleness (now "
            f"{flow.max_staleness})."
        ]

    return []


def _on_stage(profile: Profile, config: Config) -> str:
    """Says how the longest stage becomes shorter."""
    stage = profile.longest
    begins = f"is the longest stage ({profile.alone_s[stage]:.2f} s of a step alone):"
    if stage == "generate":
        return (
            f"Generating {begins} more rollout.engines (now {config.rollout.engines}) write a "
            "batch in less time."
        )

    if stage == "score":
        replicas = ", ".join(
            f"teachers.{number}.replicas (now {teacher.replicas})"
            for number, teacher in enumerate(config.teachers)
        )
        return f"Scoring {begins} raise {replicas}."

    if stage == "weights":
        return _on_weights(profile, config)

    learner = config.learner
    threads = "" if learner.gpus else f" or learner.threads (now {learner.threads})"
    return (
        f"Training {begins} raise learner.ranks (now {learner.ranks}){threads}; a higher "
        f"learner.token_budget (now {learner.token_budget}) makes fewer and larger micro-batches, "
        "where memory allows."
    )


def _on_weights(profile: Profile, config: Config) -> str:
    share = profile.parts_s["weights"] / profile.step_s
    return (
        f"Bringing weights to the engines takes {share:.0%} of a step, whatever its size: a larger "
        f"flow.batch_prompts (now {config.flow.batch_prompts}) needs it less often."
    )


def rates(profile: Profile, config: Config) -> dict[str, float]:
    """Returns the response tokens a second of one engine, one replica and one rank, each stage alone:
    what ``eopd plan --rates`` takes.
    """
    tokens = profile.tokens_per_s * profile.step_s
    workers = {
        "generate": config.rollout.engines,
        "score": sum(teacher.replicas for teacher in config.teachers),
        "train": config.learner.ranks,
    }
    return {stage: tokens / profile.alone_s[stage] / number for stage, number in workers.items()}


def as_record(profile: Profile, config: Config) -> dict[str, object]:
    """Returns everything that ``print_profile`` shows, as JSON."""
    return asdict(profile) | {
        "accounted": profile.accounted,
        "longest": profile.longest,
        "cpu_bound_s": profile.cpu_bound_s if profile.cpu_s is not None else None,
        "best_s": profile.best_s,
        "rates": rates(profile, config),
        "advice": advice(profile, config),
    }


def print_profile(
    profile: Profile, config: Config, *, output: rich.console.Console | None = None
) -> None:
    """Prints a profile as a table and sentences.

    Args:
        profile: the numbers.
        config: of the run that was measured.
        output: else the terminal.
    """
    output = output or terminal()
    table = Table(title="seconds of a step", title_justify="left", title_style="bold", box=None)
    table.add_column(no_wrap=True)
    for heading in ("alone", "in the run", "share of the step"):
        table.add_column(heading, justify="right", header_style="dim", no_wrap=True)

    def add(name: str, spent: float, alone: str = "") -> None:
        table.add_row(f"  {name}", alone, f"{spent:.2f}", f"{spent / profile.step_s:.0%}")

    table.add_row("stages", style="dim")
    for stage in STAGES:
        add(stage, profile.busy_s[stage], f"{profile.alone_s[stage]:.2f}")

    table.add_row("the learner", style="dim")
    for part, name in PARTS.items():
        add(name, profile.parts_s[part])

    add("between two steps", profile.between_s)
    table.add_row("accounted for", "", "", f"{profile.accounted:.1%}", style="dim")

    output.print(table)
    output.print()
    for line in (*_pace(profile), *advice(profile, config), _for_plan(profile, config)):
        say(output, line)


def _for_plan(profile: Profile, config: Config) -> str:
    told = ",".join(f"{stage}={rate:.4g}" for stage, rate in rates(profile, config).items())
    return f"To balance more devices: eopd plan CONFIG --devices N --rates {told}"


def _pace(profile: Profile) -> list[str]:
    """Returns what the run does, and what the machine could do."""
    longest = profile.alone_s[profile.longest]
    limits = [f"{profile.longest} is the longest stage, {longest:.2f} s"]
    if profile.cpu_s is not None:
        limits.append(
            f"{profile.cpu_s:.2f} s of CPU work are {profile.cpu_bound_s:.2f} s on "
            f"{profile.cores} cores"
        )

    return [
        f"The run does {profile.step_s:.2f} s a step, {profile.tokens_per_s:.1f} response tokens/s "
        f"(means of {profile.steps} steps).",
        f"The machine could do {profile.best_s:.2f} s a step: {'; '.join(limits)}.",
    ]
