"""A run is asked to end from any machine that sees its directory: by a file, ``stop.json``.

    eopd stop ──writes──▶ stop.json ──is read and removed by──▶ the process that holds run.lock

The file names the process that it is for, so that no later one takes it. That it is gone is the
answer: the process has taken it, and treats it like a signal.
"""

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from eopd.run.lock import Holder, last_holder
from eopd.run.place import STOP
from eopd.run.storage import write_whole


def ask_to_stop(directory: Path, holder: Holder, *, now: bool) -> None:
    """Asks a process to end its run: after the step under way, or at once."""
    write_whole(directory / STOP, json.dumps({"holder": asdict(holder), "now": now}) + "\n")


def is_taken(directory: Path) -> bool:
    """Tells whether the request was taken."""
    return not (directory / STOP).exists()


def withdraw(directory: Path) -> None:
    """Removes a request that nobody has taken."""
    (directory / STOP).unlink(missing_ok=True)


def take_request(directory: Path) -> bool | None:
    """Takes the request to the process that holds the lock, which is this one. One to an earlier
    process is removed.

    Returns:
        Whether it asks to end at once; None where there is no such request, or it could not be read
        or removed, which is tried again.
    """
    try:
        request = json.loads((directory / STOP).read_bytes())
        holder = TypeAdapter(Holder).validate_python(request["holder"])
        now = bool(request["now"])
        withdraw(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return None

    return now if holder == last_holder(directory) else None
