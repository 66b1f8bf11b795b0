"""A student is uploaded to the Hub. Whether it may be is found out before it is exported."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from eopd.config import ConfigError
from eopd.config.names import ModelName
from eopd.hub.faults import in_time, told


def require_repository(repository: str, *, public: bool) -> str:
    """Checks that a student may be uploaded under a name, and makes its repository.

    Returns:
        A line that says what was made or is there.

    Raises:
        ConfigError: it is no name, there is no token, or it may not write there.
    """
    from huggingface_hub import HfApi, constants, get_token

    name = ModelName.parse(repository)
    if name is None or name.revision is not None:
        raise ConfigError(f"--push {repository}: must be OWNER/NAME")

    if get_token() is None:
        raise ConfigError(
            f"--push {repository}: needs a token that may write; set HF_TOKEN, or log in with "
            "`hf auth login`"
        )

    with _may_write(repository):
        if in_time(partial(HfApi().repo_exists, repository)):
            return f"{constants.ENDPOINT}/{repository} is there, and stays as visible as it is"

        in_time(partial(HfApi().create_repo, repository, private=not public, exist_ok=True))

    return f"made {constants.ENDPOINT}/{repository}, {'public' if public else 'private'}"


@contextmanager
def _may_write(repository: str) -> Iterator[None]:
    """Raises a refusal of the Hub as one of the token, and all else as ``told`` does."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with told(f"--push {repository}", "model", repository, upload=True):
            yield
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            raise ConfigError(
                f"--push {repository}: {constants.ENDPOINT} does not let this token write there; "
                f"{constants.ENDPOINT}/settings/tokens makes one that may"
            ) from error

        raise


def push(directory: Path, repository: str, message: str) -> str:
    """Uploads a directory as one commit; returns the address of the model.

    Raises:
        ConfigError: the Hub did not take it; the message says how to send it again.
    """
    from huggingface_hub import HfApi, constants

    try:
        with _may_write(repository):
            HfApi().upload_folder(
                repo_id=repository,
                folder_path=directory,
                commit_message=message,
            )
    except ConfigError as error:
        again = f"`hf upload {repository} {directory}` sends what was exported"
        raise ConfigError(f"{error}; {again}") from error

    return f"{constants.ENDPOINT}/{repository}"
