"""A whole plan: read the models, reckon each role, and say what is odd."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from eopd.config import Config
from eopd.hub import require_cached_directory
from eopd.planning.architecture import read_architecture
from eopd.planning.fitting import advice
from eopd.planning.needs import USABLE, Hardware, Models, Need, needs_of
from eopd.planning.traffic import Traffic, traffic_of

_INLINED = 100_000  # bytes: Ray keeps smaller objects in the process that owns them


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run needs, and whether it fits."""

    models: Models
    hardware: Hardware
    needs: Sequence[Need]
    traffic: Traffic
    advice: Sequence[str]
    notes: Sequence[str]

    @property
    def memory_bytes(self) -> int:
        """The memory of all machines together: of roles without a GPU, and beside GPUs."""
        return sum(need.memory_bytes for need in self.needs)

    @property
    def fits(self) -> bool | None:
        """Whether each GPU offers what its role needs; None where no role has a GPU."""
        verdicts = [need.fits for need in self.needs if need.fits is not None]
        return all(verdicts) if verdicts else None


def read_models(config: Config) -> Models:
    """Reads the shapes of all models of a config, from this machine alone.

    Raises:
        ConfigError: a ``config.json`` is not here, or describes no model that transformers knows.
    """
    student = read_architecture(require_cached_directory(config.student.model), config.student.lora)
    teachers = {
        teacher.name: read_architecture(require_cached_directory(teacher.model))
        for teacher in config.teachers
        if teacher.backend == "vllm"
    }
    return Models(student=student, teachers=teachers)


def plan_run(config: Config, models: Models, hardware: Hardware) -> RunPlan:
    """Plans a run."""
    needs = needs_of(config, models, hardware)
    traffic = traffic_of(config, models.student, hardware)
    return RunPlan(
        models=models,
        hardware=hardware,
        needs=needs,
        traffic=traffic,
        advice=advice(config, models, hardware, needs),
        notes=list(_notes(config, models, hardware, needs, traffic)),
    )


def _notes(
    config: Config, models: Models, hardware: Hardware, needs: Sequence[Need], traffic: Traffic
) -> Iterator[str]:
    """Yields what was assumed, and what is left out, in this plan."""
    if any(need.on_gpu for need in needs):
        yield (
            f"A GPU has {hardware.gpu_bytes / 1e9:.0f} GB, of which a learner rank may take "
            f"{USABLE:.0%} and an engine what gpu_memory_utilization says."
        )

    yield "Left out: what a process takes before it has a model (0.3 to 0.9 GB each)."
    if config.weights_backend == "auto":
        yield f"weights.backend auto is counted as {traffic.wire}, for --nodes {hardware.nodes}."

    if traffic.body_bytes < _INLINED:
        yield "Bodies below 100 kB are kept by Ray in the driver's memory, not in the object store."

    for name, model in models.teachers.items():
        if model.quantised:
            yield (
                f"teachers.{name}.model is quantised ({model.quantised}); its weights are counted as "
                "if it were not, which is more than they take."
            )
