"""The error of everything that a user gets wrong."""


class ConfigError(Exception):
    """A user's mistake: shown as one message, exit code 2, no traceback."""
