"""The ``vllm.general_plugins`` entry point registers what vLLM's engine and worker processes need.

They are spawned, so that they do not see what their parent registers: each calls ``register``
when it starts.
"""

from eopd.teacher import head
from eopd.weights import vllm_receiver


def register() -> None:
    """Registers the scoring head and the weight-transfer engine; vLLM may call this more than once."""
    head.register()
    vllm_receiver.register()
