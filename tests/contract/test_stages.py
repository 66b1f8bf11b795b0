"""What a worker of an engine does, by its stage of a pipeline."""

from types import SimpleNamespace

import pytest
import torch

from eopd.weights import vllm_receiver
from eopd.weights.vllm_receiver import WeightWorker


@pytest.fixture
def worker(monkeypatch):
    """A worker whose stage has no layer for logits, and whether it is the last one."""

    def make(is_last):
        group = SimpleNamespace(is_last_rank=is_last)
        monkeypatch.setattr(vllm_receiver, "get_pp_group", lambda: group)
        made = WeightWorker()
        made.model_runner = SimpleNamespace(get_model=lambda: torch.nn.Linear(2, 2))
        return made

    return make


def test_only_the_last_stage_computes_logits(worker):
    worker(is_last=False).leave_out_padding(5)
    with pytest.raises(TypeError, match="Linear has no LogitsProcessor"):
        worker(is_last=True).leave_out_padding(5)
