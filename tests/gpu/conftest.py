"""What only a GPU shows: ``make gpu``. Everywhere else these tests are skipped, with the reason.

The tests of the loss and of attention need torch, transformers, pydantic and numpy alone.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()  # several types in one process are more kernels than it keeps
