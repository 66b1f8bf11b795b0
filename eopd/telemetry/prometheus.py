"""The newest row, and what has changed since, at ``http://host:port/metrics``, for Prometheus to
scrape.

A scrape reads every series as it was last written, so nothing is counted twice: counters in a row
are totals already. The registry is the sink's own, which keeps several runs in one process, and
their tests, apart.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from eopd.config import ConfigError
from eopd.run.record import Row
from eopd.telemetry.series import parse_series

_LAST_SCRAPE_S: Final = 35.0  # a Prometheus on Kubernetes comes every 30 s
_POLL_S: Final = 0.1
_FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}


def require_address(host: str, port: int) -> None:
    """Raise unless ``PrometheusSink`` could serve there now.

    Raises:
        ConfigError: the name does not resolve, or the port is taken or not for this user.
    """
    try:
        infos = socket.getaddrinfo(
            host,
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        family, kind, _, _, address = infos[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET,
                socket.SO_REUSEADDR,
                1,
            )  # as the server does
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise _cannot_serve(host, port, error) from None


def _name(key: str) -> str:
    return key.partition("{")[0]


def _cannot_serve(host: str, port: int, error: OSError | UnicodeError) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ConfigError(
        f"telemetry.host, telemetry.port: {host}:{port} cannot be served ({reason}); "
        "port 0 takes a free one, null serves no metrics"
    )


class _Handler(WSGIRequestHandler):
    """Answers without a word in the log, and closes a connection that says nothing: each has a
    thread.
    """

    timeout = 30

    def handle(self) -> None:
        with suppress(TimeoutError):
            super().handle()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class PrometheusSink(Collector):
    """Serves the newest row from construction to ``close``; every series carries the label
    ``run``.
    """

    def __init__(self, host: str, port: int, *, run: str) -> None:
        """Start serving; port 0 takes a free one.

        Raises:
            ConfigError: the address cannot be served.
        """
        self._run = run
        self._row: Row = {}
        self._scraped_at: float | None = None
        self._pause_s: float | None = None  # between the last two scrapes
        registry = CollectorRegistry()
        registry.register(self)

        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise _cannot_serve(host, port, error) from None

        self._server.RequestHandlerClass = _Handler

    @property
    def address(self) -> str:
        """``host:port`` as it is served."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def write(self, row: Row) -> None:
        """Show these series as they are now, and the others as they were last: not every step has
        them all, and state goes on when steps do not. All series of a metric are replaced together,
        so that none of an engine stays that is gone; those of measurements come one by one.
        """
        told = {_name(key) for key in row if not _name(key).startswith("eopd_eval_")}
        kept = {key: value for key, value in self._row.items() if _name(key) not in told}
        self._row = {**kept, **row}

    def wait_for_scrape(self) -> None:
        """Wait until what was written last has been scraped, where somebody does that regularly: for
        two of the pauses between scrapes, and no longer than ``_LAST_SCRAPE_S``. Ctrl-C ends the wait.
        """
        pause_s, seen, now = self._pause_s, self._scraped_at, time.monotonic()
        if seen is None or pause_s is None or now - seen > 2 * pause_s:
            return

        until = now + min(2 * pause_s, _LAST_SCRAPE_S)
        with suppress(KeyboardInterrupt):
            while self._scraped_at == seen and time.monotonic() < until:
                time.sleep(_POLL_S)

    def collect(self) -> Iterator[Metric]:
        """Yields the families of the newest row at each scrape, in the server's thread: it reads the
        row once, after it has noted the time.
        """
        now = time.monotonic()
        if self._scraped_at is not None:
            self._pause_s = now - self._scraped_at

        self._scraped_at = now
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for key, value in self._row.items():
            metric, labels = parse_series(key)
            if metric.name not in families:
                make = _FAMILIES[metric.kind]
                help_text = f"{metric.meaning} Unit: {metric.unit}."
                families[metric.name] = make(
                    metric.name,
                    help_text,
                    labels=("run", *metric.labels),
                )

            families[metric.name].add_metric(
                [self._run, *(labels[name] for name in metric.labels)], value
            )

        yield from families.values()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
