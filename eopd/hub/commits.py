"""A revision of a model or a data set is looked up once, and is a commit from then on."""

from functools import partial

from eopd.config.names import is_commit
from eopd.hub.faults import Kind, in_time, told


def find_commit(kind: Kind, repository: str, revision: str | None, spec: str) -> str:
    """Returns the commit that a revision stands for now; a commit stands for itself.

    The Hub is asked, for a few seconds. Where it cannot be reached, and under ``HF_HUB_OFFLINE``,
    the answer is that of the last time, which the cache keeps.

    Args:
        kind: what the repository holds.
        repository: ``OWNER/NAME``.
        revision: a branch, a tag or a commit; None is the newest commit of the main branch.
        spec: what the user wrote, for messages.

    Raises:
        ConfigError: there is no such repository or revision, it may not be read, or the Hub cannot
            be reached and the cache does not know it.
    """
    from huggingface_hub import HfApi

    if revision is not None and is_commit(revision):
        return revision

    ask = partial(HfApi().resolve_revision, repository, repo_type=kind, revision=revision)
    with told(spec, kind, repository, revision):
        try:
            return in_time(ask).resolved
        except TimeoutError:
            if (commit := cached_commit(kind, repository, revision, spec)) is None:
                raise

            return commit


def cached_commit(kind: Kind, repository: str, revision: str | None, spec: str) -> str | None:
    """Returns the commit that a revision stood for when the Hub was last asked, or None. Nobody is
    asked now. The arguments are those of ``find_commit``.

    Raises:
        ConfigError: no repository can have such a name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    if revision is not None and is_commit(revision):
        return revision

    with told(spec, kind, repository, revision):
        try:
            found = HfApi().resolve_revision(
                repository, repo_type=kind, revision=revision, local_files_only=True
            )
        except RevisionResolutionError:
            return None

    return found.resolved


def require_commit(kind: Kind, repository: str, commit: str | None, spec: str) -> None:
    """Checks that the Hub shows a commit, before a library asks for it again and again.

    Raises:
        ConfigError: it does not, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with told(spec, kind, repository, commit):
        in_time(partial(HfApi().repo_info, repository, repo_type=kind, revision=commit))
