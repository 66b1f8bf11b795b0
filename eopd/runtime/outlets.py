"""Everything that shows what a run does: its rows, its messages, and who is up now."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial

from eopd.config import Config
from eopd.config.load import flatten
from eopd.run.directory import RunDirectory
from eopd.run.provenance import provenance
from eopd.run.record import Row
from eopd.runtime import cluster
from eopd.runtime.logs import logger
from eopd.telemetry.console import Console
from eopd.telemetry.discovery import announced
from eopd.telemetry.info import Phase, info_row, phase_row
from eopd.telemetry.prometheus import PrometheusSink
from eopd.telemetry.sinks import Telemetry, append_row
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


@contextmanager
def monitored(config: Config) -> Iterator[PrometheusSink | None]:
    """Serves the metrics of a run while the block runs, and tells Prometheus where; None where the
    config wants no endpoint. It outlives the other outlets, so that it can show that the run ended.

    Raises:
        ConfigError: the address cannot be served, or ``telemetry.discovery`` takes no files.
    """
    run, telemetry = config.run, config.telemetry
    if telemetry.port is None:
        yield None
        return

    endpoint = PrometheusSink(telemetry.host, telemetry.port, run=run.name)
    labels = {"run": run.name}
    with (
        closing(endpoint),
        announced(telemetry.discovery, endpoint.address, run.path, labels),
    ):
        yield endpoint


def show_end(endpoint: PrometheusSink | None) -> None:
    """Shows that a run has ended as it should, until that was scraped: nobody needs to be called."""
    if endpoint is not None:
        endpoint.write(phase_row("ended"))
        endpoint.wait_for_scrape()


class Outlets:
    """The terminal, the log, ``metrics.jsonl``, Prometheus and the trackers of a run.

    Args:
        config: the run's.
        directory: where its files go.
        trackers: those of ``open_trackers``.
        endpoint: that of ``monitored``.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        trackers: Sequence[BackgroundSink],
        endpoint: PrometheusSink | None,
    ) -> None:
        run = config.run
        self._config = config
        self._endpoint = endpoint
        self._commit = provenance().get("commit")
        self._console = Console(
            run=run.name, batches=run.batches, expected_minutes=run.expected_minutes
        )
        self._telemetry = Telemetry(
            {
                directory.metrics.name: partial(append_row, directory.metrics),
                **{sink.name: sink.write for sink in trackers},
                "the terminal": self._console.write,
            }
        )
        self._is_job_copy = cluster.is_job_copy(directory.path)
        self._phase: Phase = "starting"
        self.begin(self._phase)

    @property
    def notes(self) -> list[str]:
        """Returns what a person should know of the outlets."""
        notes = []
        if self._endpoint is not None:
            notes.append(f"metrics at http://{self._endpoint.address}/metrics")

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
        self.show_state(row)

    def show_state(self, row: Row) -> None:
        """Lets Prometheus see who is up also while no step ends: that is when it matters."""
        if self._endpoint is not None:
            self._endpoint.write(row)

    def show_incarnation(self, incarnation: int) -> None:
        """Lets Prometheus see what runs: the versions, models and config, and the learner's
        incarnation.
        """
        self.show_state(info_row(self._config, incarnation, self._commit))

    def begin(self, phase: Phase) -> None:
        """Lets Prometheus see what the run does from now on."""
        self._phase = phase
        self.show_state(phase_row(phase))

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Lets Prometheus see what the run does while the block runs."""
        before = self._phase
        self.begin(phase)
        try:
            yield
        finally:
            self.begin(before)

    def close(self) -> None:
        """Closes the live view, whose failure ends no run; the trackers' threads and the endpoint
        stay.
        """
        try:
            self._console.close()
        except Exception:  # noqa: BLE001 - see above
            logger.warning("the terminal failed", exc_info=True)
