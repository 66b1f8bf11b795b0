"""Opens the sinks for the rows of a run, without the console."""

from eopd.config import Config
from eopd.config.load import flatten
from eopd.run.directory import RunDirectory
from eopd.runtime import cluster
from eopd.telemetry.prometheus import PrometheusSink
from eopd.telemetry.sinks import JsonlSink, Sink
from eopd.telemetry.trackers import BackgroundSink, tracker


def open_sinks(
    config: Config, directory: RunDirectory
) -> tuple[list[Sink], PrometheusSink | None, list[BackgroundSink], list[str]]:
    """Open every sink of a run.

    Args:
        config: the run's.
        directory: where its files go.

    Returns:
        All sinks; of them the one for Prometheus, and the trackers; and messages for people.
    """
    telemetry, run = config.telemetry, config.run
    sinks: list[Sink] = [JsonlSink(directory.metrics)]
    notes: list[str] = []

    prometheus = None
    if telemetry.port is not None:
        prometheus = PrometheusSink(telemetry.host, telemetry.port, run=run.name)
        sinks.append(prometheus)
        notes.append(f"metrics at http://{prometheus.address}/metrics")

    settings = flatten(config.model_dump(mode="json"))
    trackers = [tracker(name, directory.path, run.name, settings) for name in telemetry.trackers]
    if cluster.is_job_copy(directory.path):
        notes.append(
            "this is Ray's copy of the working directory: set run.directory to "
            "keep what the run writes"
        )

    return [*sinks, *trackers], prometheus, trackers, notes
