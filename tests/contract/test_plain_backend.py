"""Another backend is one file: the learner on a few lines of plain torch, in this process."""

import socket
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from gang import TOP_K, scored_trajectory, store, write_models
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.learner.learner import LearnerRank
from eopd.learner.lora import whole_tensors
from eopd.packing import pack_batch
from eopd.weights.layout import ModelSource, cut_into_buckets


class PlainBackend:
    """A ``Backend`` of one process."""

    def __init__(self, student, config, *, dtype, total_steps):
        self.student, self._max_norm = student, config.max_grad_norm
        self._optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr)

    @property
    def learning_rate(self):
        return self._optimizer.param_groups[0]["lr"]

    def run(self, packed, use_head):
        return self.student(packed.input_ids_T, packed.position_ids_T, use_head)

    def accumulate(self, loss, *, last):
        loss.backward()

    def step(self, num_loss_tokens):
        for parameter in self.student.parameters():
            parameter.grad /= num_loss_tokens

        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self._max_norm).item()
        if np.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def save(self, directory, state):
        directory.mkdir()
        parts = self.student.state_dict(), self._optimizer.state_dict(), state
        torch.save(parts, directory / "all.pt")

    def load(self, directory):
        weights, moments, state = torch.load(directory / "all.pt")
        self.student.load_state_dict(weights)
        self._optimizer.load_state_dict(moments)
        return state

    def forget_moments(self):
        self._optimizer.state.clear()

    def shape(self, parameter):
        return parameter.shape

    def gathered(self, parameters):
        return nullcontext(False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), "qwen3") / "qwen3"


@pytest.fixture
def learner(model, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    learner = LearnerRank(
        PlainBackend,
        StudentConfig(model=model, dtype="float32"),
        LearnerConfig(lr=1e-2, max_skipped_steps=1),
        LossConfig(top_k=TOP_K),
        temperature=1.0,
        total_batches=10,
        seed=1,
        entropy_bounds={"teacher": "mid"},
        broken=tmp_path / "broken",
        rank=0,
        world_size=1,
        master_address="127.0.0.1",
        master_port=port,
    )
    yield learner
    learner.close()
    assert not dist.is_initialized()


def batch(nan: bool = False):
    rng = np.random.default_rng(3)
    scored = [
        scored_trajectory(
            rng,
            epoch=0,
            index=index,
            prompt_length=3,
            loss_mask=np.ones(8, np.bool_),
            sharpness=2.0,
        )
        for index in range(4)
    ]
    if nan:
        scored[1].signal.token_logprobs[0] = np.nan
    return pack_batch(
        list(map(store, scored)),
        steps=1,
        ranks=1,
        token_budget=64,
        alpha=1.0,
    )


def weights_of(learner):
    return {name: tensor.whole().clone() for name, tensor in whole_tensors(learner.model).items()}


def test_it_learns_and_a_step_that_is_not_finite_changes_nothing(learner, tmp_path):
    losses = [learner.step(batch().share(0)).metrics["eopd_loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    before = weights_of(learner)
    stats = learner.step(batch(nan=True).share(0))
    assert stats.skipped_steps == 1 and (tmp_path / "broken").is_dir()
    assert all(torch.equal(before[name], now) for name, now in weights_of(learner).items())
    found = learner.evaluate(batch().share(0))
    assert found.num_prompts == 4
    assert all(map(np.isfinite, found.by_prompt["reverse_kl"].values()))


def test_an_update_from_nothing_is_refused(learner):
    nothing = pack_batch([], steps=1, ranks=1, token_budget=64, alpha=1.0)
    with pytest.raises(ValueError, match="no micro-batch"):
        learner.step(nothing.share(0))


def test_it_goes_on_from_what_it_saved(learner, tmp_path):
    learner.step(batch().share(0))
    learner.save(tmp_path / "saved")
    learner.step(batch().share(0))
    after, version = weights_of(learner), learner.version
    learner.load(tmp_path / "saved")
    assert learner.version.step == 1
    learner.step(batch().share(0))
    assert learner.version == version
    assert all(torch.equal(after[name], now) for name, now in weights_of(learner).items())


def test_its_weights_leave_as_they_are(learner, tmp_path):
    learner.step(batch().share(0))
    learner.export(tmp_path / "hf")
    source = ModelSource(
        whole_tensors(learner.model),
        rank=0,
        shape=learner.backend.shape,
        gathered=learner.backend.gathered,
    )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    (bucket,) = cut_into_buckets(source.metadata(), 2**40)
    sent = dict(zip([meta.name for meta in bucket], source.gather(bucket), strict=True))
    assert set(sent) == set(weights_of(learner))
    assert [meta.shape for meta in bucket] == [tuple(tensor.shape) for tensor in sent.values()]
    assert all(torch.equal(exported[name], tensor) for name, tensor in sent.items())
