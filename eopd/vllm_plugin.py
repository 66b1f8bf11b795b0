"""The ``vllm.general_plugins`` entry point registers what vLLM's engine and worker processes need.

They are spawned, so that they do not see what their parent registers: each calls ``register``
when it starts.
"""

import atexit
import gc

from eopd.teacher import head
from eopd.weights import vllm_receiver


def register() -> None:
    """Registers the scoring head and the weight-transfer engine; vLLM may call this more than once.

    What was imported until now stays, so that no collection need look at it: vLLM makes five whole
    ones before an engine is up (0.32.0), of half a second each. At the end of the process it may be
    collected, or libraries would report it as leaked.
    """
    head.register()
    vllm_receiver.register()
    gc.freeze()
    atexit.register(gc.unfreeze)
