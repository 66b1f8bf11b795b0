"""Processes of tests are forked from one that has imported, once a session, what they need. Python's
``spawn``, which vLLM asks for, imports it in each: 5 to 6 CPU seconds of the 9 of an engine.
"""

import multiprocessing
import os
from multiprocessing.context import ForkServerProcess

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "eopd.learner.learner",
        "eopd.learner.lora",
        "eopd.weights.vllm_receiver",
        "pytest",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
    ]
)


class ForkedEngine(ForkServerProcess):
    """A process that sees the environment of its parent. One that is forked has that of the process it
    is forked from, which libraries have read when they were loaded.
    """

    def start(self) -> None:
        self._variables = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._variables)
        super().run()
