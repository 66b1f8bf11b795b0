"""The series that say what a run is and what it does: for Prometheus alone, since rows carry numbers."""

import hashlib
import re
import socket
import time
from typing import Final, Literal, get_args

from eopd import __version__
from eopd.config import Config, dump_config
from eopd.config.names import shown
from eopd.run.record import Row
from eopd.telemetry.series import series

Phase = Literal["starting", "training", "measuring", "saving", "ended"]
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)
_HASH_DIGITS: Final = 12


def info_row(config: Config, incarnation: int, commit: str | None) -> Row:
    """Returns the series of ``eopd_run_info``.

    Args:
        config: the run's.
        incarnation: of the learner.
        commit: of the working directory; None where it is in no repository.
    """
    digest = hashlib.sha256(dump_config(config).encode()).hexdigest()
    values = {
        "version": __version__,
        "commit": commit or "none",
        "incarnation": str(incarnation),
        "student": shown(config.student.model),
        "teachers": "+".join(shown(teacher.model) for teacher in config.teachers),
        "config": digest[:_HASH_DIGITS],
        "node": socket.gethostname(),
    }
    labels = {name: re.sub(r"[^\w.@/+-]", "_", value) for name, value in values.items()}
    return {series("eopd_run_info", **labels): 1.0}


def phase_row(phase: Phase) -> Row:
    """Returns the series of a phase that begins now."""
    row = {series("eopd_phase", phase=name): float(name == phase) for name in PHASES}
    return {**row, "eopd_phase_timestamp_seconds": time.time()}
