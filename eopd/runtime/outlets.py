"""Everything that shows what a run does: its rows, its messages, and who is up now."""

from collections.abc import Sequence

from eopd.config import Config
from eopd.config.load import flatten
from eopd.run.directory import RunDirectory
from eopd.run.record import Row
from eopd.runtime import cluster
from eopd.runtime.logs import logger
from eopd.telemetry.console import Console
from eopd.telemetry.prometheus import PrometheusSink
from eopd.telemetry.sinks import JsonlSink, Sink, Telemetry
from eopd.telemetry.trackers import BackgroundSink, tracker


def open_trackers(config: Config, directory: RunDirectory) -> list[BackgroundSink]:
    """Opens the trackers of a config; they outlive the other outlets, since they are told how the
    run ended.
    """
    settings = flatten(config.model_dump(mode="json"))
    return [
        tracker(name, directory.path, config.run.name, settings)
        for name in config.telemetry.trackers
    ]


class Outlets:
    """The terminal, the log, ``metrics.jsonl``, Prometheus and the trackers of a run.

    Args:
        config: the run's.
        directory: where its files go.
        trackers: those of ``open_trackers``.
    """

    def __init__(
        self, config: Config, directory: RunDirectory, trackers: Sequence[BackgroundSink]
    ) -> None:
        run, telemetry = config.run, config.telemetry
        self._prometheus: PrometheusSink | None = None
        sinks: list[Sink] = [JsonlSink(directory.metrics), *trackers]
        if telemetry.port is not None:
            self._prometheus = PrometheusSink(telemetry.host, telemetry.port, run=run.name)
            sinks.append(self._prometheus)

        self._console = Console(
            run=run.name, batches=run.batches, expected_minutes=run.expected_minutes
        )
        self._telemetry = Telemetry([*sinks, self._console])
        self._is_job_copy = cluster.is_job_copy(directory.path)

    @property
    def notes(self) -> list[str]:
        """Returns what a person should know of the outlets."""
        notes = []
        if self._prometheus is not None:
            notes.append(f"metrics at http://{self._prometheus.address}/metrics")

        if self._is_job_copy:
            notes.append(
                "this is Ray's copy of the working directory: set run.directory to keep what the "
                "run writes"
            )

        return notes

    def say(self, text: str) -> None:
        """Prints a message, and logs it."""
        self._console.message(text)
        logger.info(text)

    def doing(self, text: str) -> None:
        """Shows what is under way, until the next row."""
        self._console.doing(text)

    def write(self, row: Row) -> None:
        """Writes the row of a completed step everywhere."""
        self._telemetry.write(row)

    def show_state(self, row: Row) -> None:
        """Lets Prometheus see who is up also while no step ends: that is when it matters."""
        if self._prometheus is not None:
            self._prometheus.write(row)

    def close(self) -> None:
        """Closes all but the trackers' threads."""
        self._telemetry.close()
