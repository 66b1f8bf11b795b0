"""An object store for tests, whose server is loaded for as long as it is needed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moto_store import Store

BUCKET = "bucket"
_LOADED = ("flask", "flask_cors", "moto", "moto_store", "werkzeug")


@contextmanager
def open_store() -> Iterator["Store"]:
    """Yields a running store. Afterwards its packages are gone from the process.

    A vLLM engine that starts on a CPU looks at every name of every module that is loaded
    (``vllm/triton_utils/dispatcher.py``, vLLM 0.32), and the names of Flask raise outside of a
    request.
    """
    from moto_store import Store

    store = Store(BUCKET)
    try:
        yield store
    finally:
        store.stop()
        for name in list(sys.modules):
            if name.partition(".")[0] in _LOADED:
                del sys.modules[name]
