"""What goes wrong between here and the Hub becomes one line that says what to do."""

import errno
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Final, Literal, TypeVar

from eopd.config import ConfigError
from eopd.daemon import in_daemon

Kind = Literal["model", "dataset"]
T = TypeVar("T")

ANSWER_S: Final = 6.0  # the library itself would wait for minutes
DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
WORDS: Final = {"model": "model", "dataset": "data set"}


@contextmanager
def told(
    spec: str, kind: Kind, repository: str, revision: str | None = None, *, upload: bool = False
) -> Iterator[None]:
    """Raises what the Hub, the network or the cache does as one line that begins with ``spec``.

    ``upload`` is of a repository that is written to: no cache would help.

    Raises:
        ConfigError: the block failed so.
    """
    import httpx2
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RevisionResolutionError,
    )

    try:
        yield
    except (
        EntryNotFoundError,
        HFValidationError,
        RevisionResolutionError,
        httpx2.HTTPError,
        OSError,
    ) as error:
        # what the library says in many lines has its cause in the first error of the chain
        command = "" if upload else _download_command(kind, repository, revision)
        reason = _reason(_first(error), kind, repository, command)
        raise ConfigError(f"{spec}: {reason}") from error


def in_time(ask: Callable[[], T]) -> T:
    """Returns ``ask()``, which asks the Hub one short question.

    It runs in a thread of its own: nothing else ends a look-up of a host's address.

    Raises:
        TimeoutError: there was no answer in time; the thread is left behind.
    """
    answer = in_daemon(ask, "hub")
    if wait([answer], ANSWER_S).not_done:
        raise TimeoutError(f"no answer in {ANSWER_S:g} s")

    return answer.result()


def access(page: str) -> str:
    """Returns what to do about a page that the Hub does not show."""
    from huggingface_hub import get_token

    if get_token() is None:
        return "set HF_TOKEN on every node, or log in with `hf auth login`"

    return f"the token that is set (HF_TOKEN, or of `hf auth login`) must be allowed to read {page}"


def _reason(error: BaseException, kind: Kind, repository: str, command: str) -> str:
    """Says what an error means, and what to do; ``command`` fills the cache, if that would help."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    page = f"{hub}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    lack = f", and the cache {constants.HF_HUB_CACHE} does not hold all of it" if command else ""
    fill = f", or fill the cache with `{command}` where there is a network" if command else ""

    match error:
        case GatedRepoError():
            return f"is gated; accept its conditions at {page}, and {access(page)}"
        case RepositoryNotFoundError():
            return f"{hub} has no such {WORDS[kind]}, or it is private; then {access(page)}"
        case RevisionNotFoundError():
            return f"{repository} has no such revision; {page}/tree/main lists its branches"
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{hub} refuses to show it; {access(page)}"
        case HfHubHTTPError():
            return f"{hub} answers {error.response.status_code}{lack}; try again later{fill}"
        case HFValidationError():
            return f"is no name that {hub} could know"
        case OfflineModeIsEnabled():
            return f"HF_HUB_OFFLINE is set{lack}; unset it{fill}"
        case OSError() if error.filename or error.errno in DISK:
            where = error.filename or f"the cache {constants.HF_HUB_CACHE}"
            return f"{where} cannot be read or written ({error.strerror})"

    return f"{hub} cannot be reached ({error}){lack}; look at the network and HF_ENDPOINT{fill}"


def _download_command(kind: Kind, repository: str, revision: str | None) -> str:
    """Returns the command that downloads a repository into the cache."""
    what = "--type dataset " if kind == "dataset" else ""
    which = f" --revision {revision}" if revision else ""
    return f"hf download {what}{repository}{which}"


def _first(error: BaseException) -> BaseException:
    """Returns the error that one of the library was raised for, as the library itself met it."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    while not isinstance(error, HfHubHTTPError | OfflineModeIsEnabled) and error.__cause__:
        error = error.__cause__

    return error
