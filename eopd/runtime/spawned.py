"""Actors and the command line import this module before heavy libraries. It makes garbage
collection rarer.

Importing torch, transformers and vLLM makes millions of objects that stay. Python 3.11 looks for
garbage after every 700 new ones, which takes a fifth of the import's CPU seconds (9.4 against 7.4).

Python's ``spawn`` runs the main script of the parent in each child. An actor's main script is Ray's
worker, of which vLLM's processes need nothing: they are pointed here instead.
"""

import gc
import sys

NEW_OBJECTS = 50_000  # between two collections of the youngest generation

gc.set_threshold(NEW_OBJECTS, 50, 50)


def stand_in_for_main() -> None:
    """Lets the children of this process run this file in place of Ray's worker script (Ray 2.60,
    Python 3.11).
    """
    sys.modules["__main__"].__file__ = __file__
