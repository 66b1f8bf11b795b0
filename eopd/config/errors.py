"""The errors of everything that a user gets wrong, or may only have to wait for."""

from typing import ClassVar


class ConfigError(Exception):
    """A user's mistake: shown as one message, exit code 2, no traceback."""

    exit_code: ClassVar[int] = 2


class UnavailableError(ConfigError):
    """A cluster that has no room now, or does not answer: the same command may work later. Its exit
    code is that of sysexits.h for it, ``EX_TEMPFAIL``.
    """

    exit_code: ClassVar[int] = 75
