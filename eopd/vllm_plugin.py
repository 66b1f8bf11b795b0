"""The ``vllm.general_plugins`` entry point: what must exist inside vLLM's engine and worker
processes.

Registering in the parent process only would be lost in the spawned ones.
"""

from eopd.teacher import head
from eopd.weights import vllm_receiver


def register() -> None:
    """Register the scoring head and the weight-transfer engine; vLLM may call this more than
    once.
    """
    head.register()
    vllm_receiver.register()
