"""What our plugin does to a process of vLLM."""

import subprocess
import sys

REGISTER = """
import gc
import vllm.v1.engine.async_llm
from eopd.vllm_plugin import register
register()
print(gc.get_freeze_count() > 100_000)
"""


def test_collections_pass_over_what_was_imported_and_nothing_is_reported_as_leaked():
    done = subprocess.run(
        [sys.executable, "-c", REGISTER], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "True"
    assert "leaked" not in done.stdout + done.stderr
