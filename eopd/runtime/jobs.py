"""Jobs of a Ray cluster: submitted, followed, looked up and stopped through its job server.

In: an address such as ``http://HEAD:8265``. Out: ``Jobs``, whose errors are one line each. Left out:
what a job's folder holds (``job_files.py``), and the run itself, which goes on without this process.

The job client of Ray was checked against 2.60. It prefers ``RAY_API_SERVER_ADDRESS`` to the address
that it is given, waits for an answer without a limit, and knows the cluster's version as
``_server_ray_version``. The job's supervisor reads ``RAY_JOB_STOP_WAIT_TIME_S`` in the environment
of the job.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import httpx
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from eopd.config import ConfigError
from eopd.types import RunFailedError

API_ADDRESS: Final = "RAY_API_SERVER_ADDRESS"
STOP_WAIT: Final = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S: Final = 3600  # a step and a checkpoint of the largest runs
RUN: Final = "eopd_run"  # the metadata of a job that holds its run directory
AGAIN: Final = "eopd_again"  # and the one that holds the command which continues it
ANSWER_S: Final = 10.0  # a head that is busy takes seconds
POLL_S: Final = 1.0
AWAY_S: Final = 120.0  # a head that is started again under a run that goes on
AGENT_S: Final = 60.0  # a head that has just started has no agent yet, which is what starts jobs
_NO_AGENT: Final = "No available agent"  # after 10 s; job_head.py of Ray 2.60
_TAKEN: Final = "already exists"  # an id; job_manager.py of Ray 2.60
_LONGEST: Final = 300
_ENDED: Final = ("SUCCEEDED", "FAILED", "STOPPED")

logger = logging.getLogger("eopd")


@dataclass(frozen=True, slots=True)
class Job:
    """A job as its server knows it.

    ``exit_code`` is None where the command did not end by itself. ``run`` is its run directory,
    ``again`` the command that continues it, and ``ends_softly`` says whether it is given time for a
    checkpoint; these are known of what ``eopd submit`` has submitted.
    """

    name: str
    status: str
    command: str
    exit_code: int | None
    message: str
    run: Path | None
    again: str | None
    ends_softly: bool

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in _ENDED


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, client: JobSubmissionClient, address: str) -> None:
        self.address = address
        self._client = client

    def submit(
        self,
        command: str,
        directory: Path,
        variables: Mapping[str, str],
        *,
        run: Path,
        again: str,
        name: str | None,
    ) -> str:
        """Uploads a directory and runs a command in the copy of it.

        Args:
            command: a line for the shell.
            directory: what the job's working directory holds.
            variables: of the job's environment; it also gets time for a checkpoint when it is
                stopped.
            run: the run directory.
            again: the command that continues the run, where it was submitted.
            name: the id of the job; else Ray gives it one.

        Returns:
            The id.

        Raises:
            ConfigError: the server does not take it, for example because the id was used before, or
                the head of the cluster is not ready for jobs within ``AGENT_S``.
        """
        environment = {STOP_WAIT: str(STOP_WAIT_S), **variables}

        def submit() -> str:
            job = self._client.submit_job(
                entrypoint=command,
                runtime_env={"working_dir": str(directory), "env_vars": environment},
                metadata={RUN: str(run), AGAIN: again},
                submission_id=name,
            )
            return str(job)

        try:
            with _in_one_line(self.address):
                return _once_ready(submit)
        except ConfigError as error:
            if name is None or _TAKEN not in str(error):
                raise

            raise ConfigError(
                f"--name: the cluster had a job {name} already, and takes each id once; leave "
                "--name out, or choose another id"
            ) from None

    def look_up(self, name: str) -> Job:
        """Returns what is known of a job.

        Raises:
            ConfigError: there is none of this id, or nobody answers.
        """
        with _in_one_line(self.address):
            details = self._client.get_job_info(name)

        metadata = details.metadata or {}
        run = metadata.get(RUN)
        variables = (details.runtime_env or {}).get("env_vars") or {}
        return Job(
            name=name,
            status=str(getattr(details.status, "value", details.status)),
            command=details.entrypoint,
            exit_code=details.driver_exit_code,
            message=details.message or "",
            run=None if run is None else Path(run),
            again=metadata.get(AGAIN),
            ends_softly=STOP_WAIT in variables,
        )

    def log_of(self, name: str) -> str:
        """Returns what a job has written; raises as ``look_up`` does."""
        with _in_one_line(self.address):
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, write: Callable[[str], None], skipped: int = 0) -> Job:
        """Hands on what a job writes until it ends, behind its first ``skipped`` characters. A
        connection that is cut is made again, and nothing comes twice.

        Raises:
            RunFailedError: the server does not answer any more; the job may go on.
        """
        is_told = False
        while True:
            before = skipped
            skipped, fault = asyncio.run(self._read_on(name, write, skipped))
            job = self._look_up_again(name)
            if fault is not None and not (is_told and skipped == before):
                logger.warning("the log of job %s was cut: %s; reading on", name, _reason(fault))
                is_told = True

            if job.is_over:
                return job

            time.sleep(POLL_S)

    def stop(self, name: str) -> None:
        """Asks a job to end, as SIGTERM does; raises as ``look_up`` does."""
        with _in_one_line(self.address):
            self._client.stop_job(name)

    def wait(self, name: str) -> Job:
        """Returns a job once it has ended; raises as ``follow`` does."""
        while not (job := self._look_up_again(name)).is_over:
            time.sleep(POLL_S)

        return job

    def _look_up_again(self, name: str) -> Job:
        """Returns a job that was there, for as long as ``AWAY_S`` again and again."""
        end, is_told = time.monotonic() + AWAY_S, False
        while True:
            try:
                return self.look_up(name)
            except ConfigError as error:
                if time.monotonic() > end:
                    raise RunFailedError(f"{error}; job {name} may go on") from None

                if not is_told:
                    logger.warning("%s; trying again for %g s", error, AWAY_S)
                    is_told = True

            time.sleep(POLL_S)

    async def _read_on(
        self, name: str, write: Callable[[str], None], skipped: int
    ) -> tuple[int, Exception | None]:
        """Reads a log until its connection ends; returns how much of it was handed on, and what has
        cut it.
        """
        read, fault = 0, None
        try:
            async for text in self._client.tail_job_logs(name):
                if fresh := text[max(0, skipped - read) :]:
                    write(fresh)

                read += len(text)
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            fault = error

        return max(skipped, read), fault


def server_address(option: str | None) -> str:
    """Returns the address of the job server: that of ``--address``, or else of
    ``RAY_API_SERVER_ADDRESS``, or of ``RAY_ADDRESS`` where that begins with http.

    Raises:
        ConfigError: there is none, or it is no address of a job server.
    """
    variable = os.environ.get("RAY_ADDRESS", "")
    places = {
        "--address": option or "",
        API_ADDRESS: os.environ.get(API_ADDRESS, ""),
        "RAY_ADDRESS": variable if variable.startswith(("http://", "https://")) else "",
    }
    key, address = next(((key, text) for key, text in places.items() if text), ("", ""))
    if not address:
        raise ConfigError(
            "--address: is missing; name the job server of the cluster, such as "
            f"http://HEAD:8265, or set {API_ADDRESS}"
        )

    if "@" in address:
        raise ConfigError(f"{key}: takes no user and password, since the address is printed")

    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")

    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{key}: {address} is no job server; write its address as http://HEAD:8265"
        )

    return address.rstrip("/")


def connect(address: str) -> Jobs:
    """Returns the jobs of the cluster whose job server is at an address.

    Raises:
        ConfigError: nobody answers, the token is not right, or the cluster runs another Ray.
    """
    _require_answer(address)
    os.environ[API_ADDRESS] = address
    with _in_one_line(address):
        client = JobSubmissionClient(address)

    there, here = str(client._server_ray_version), str(ray.__version__)
    if there.split(".")[:2] != here.split(".")[:2]:
        raise ConfigError(
            f"{address}: the cluster runs Ray {there}, and this eopd needs {here}; install the "
            "same lock file on all machines"
        )

    return Jobs(client, address)


def _require_answer(address: str) -> None:
    """Checks that a job server answers in time. Nothing secret is sent, so its certificate does not
    matter yet.
    """
    try:
        answer = httpx.get(
            f"{address}/api/version", timeout=ANSWER_S, verify=False, follow_redirects=True
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        is_late = isinstance(error, httpx.TimeoutException)
        said = f"within {ANSWER_S:.0f} s" if is_late else f"there ({_reason(error)})"
        raise ConfigError(f"{address}: no job server answers {said}") from None

    wants_token = answer.status_code in (401, 403)
    if not wants_token and not (answer.is_success and "ray_version" in answer.text):
        raise ConfigError(
            f"{address}: is no job server of Ray {ray.__version__} (it answers /api/version with "
            f"status {answer.status_code}); its port is 8265 unless `ray start` was told another"
        )


def _once_ready(submit: Callable[[], str]) -> str:
    """Submits a job as soon as the head of the cluster is ready for jobs.

    Raises:
        RuntimeError: the job was refused, or the head is not ready within ``AGENT_S``. It never is
            where another Ray of its machine has the port of its agent.
    """
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            return submit()
        except RuntimeError as error:
            if _NO_AGENT not in str(error):
                raise

            if time.monotonic() > deadline:
                raise RuntimeError(
                    "the head takes no jobs: its agent has not come up (dashboard_agent.log in the "
                    "head's logs says why; a second Ray on one machine needs another `ray start "
                    "--dashboard-agent-listen-port`)"
                ) from error

        logger.warning("the head of the cluster is not ready for jobs yet; trying again")
        time.sleep(POLL_S)


@contextmanager
def _in_one_line(address: str) -> Iterator[None]:
    """Raises the errors of Ray's job client in the block as a ConfigError of one line."""
    try:
        yield
    except AuthenticationError:
        raise ConfigError(
            f"{address}: the cluster wants its token: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to that of the cluster"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{address}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Returns Ray's reason in one line: of a traceback of the server its last."""
    text = re.sub(r"^Request failed with status code \d+: ", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    if len(lines) > 1 and "Traceback" in text:
        lines = [re.sub(r"^[\w.]+: ", "", lines[-1])]

    reason = " ".join(" ".join(lines).split()).rstrip(".") or type(error).__name__
    return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."
