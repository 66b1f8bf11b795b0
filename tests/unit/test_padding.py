"""Rows of the head that name no token: the student's distribution, and the loss, are those of
a head without them.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eopd.config import LossConfig, StudentConfig
from eopd.learner.student import load_student
from eopd.loss.chunked import LossTokens
from eopd.loss.objective import objective, token_statistics
from eopd.models.tiny import build_model, train_tokenizer, write_model
from eopd.tokenizer import num_tokens

PADDING = 24


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(request, tmp_path_factory):
    """A directory, the same one padded with rows that would win every draw, and the number of
    tokens.
    """
    root = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(["a few words to cut into pieces"], 280)
    model = build_model(request.param, tokenizer, seed=0, scale=0.2)
    bare = write_model(root / "bare", model, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(bare)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + PADDING)
    with torch.no_grad():
        model.get_output_embeddings().weight[size:] = 9.0 * torch.randn(PADDING, 64)

    return bare, write_model(root / "padded", model, tokenizer), size


def tokens_of(size: int, length: int = 7, top_k: int = 5) -> LossTokens:
    rng = np.random.default_rng(0)
    logprobs = torch.from_numpy(np.log(rng.dirichlet(np.full(size, 0.2), length).clip(1e-12)))
    top = logprobs.topk(top_k)
    rest = logprobs.scatter(1, top.indices, -torch.inf).logsumexp(1)
    targets = torch.from_numpy(rng.integers(size, size=length))

    return LossTokens(
        target_ids_T=targets,
        loss_mask_T=torch.ones(length, dtype=torch.bool),
        rollout_logprobs_T=torch.full((length,), -3.0),
        gate_T=torch.ones(length),
        teacher_logprobs_T=logprobs.gather(1, targets[:, None])[:, 0],
        teacher_topk_ids_TK=top.indices,
        teacher_topk_logprobs_TK=top.values,
        teacher_tail_logprobs_T=rest,
        teacher_entropy_T=-(logprobs.exp() * logprobs).sum(1),
    )


def test_padding_begins_above_the_last_token_that_has_a_row(pair):
    bare, padded, size = pair
    assert num_tokens(bare) == num_tokens(padded) == size


def test_padding_of_a_head_changes_nothing(pair):
    bare, padded, size = pair
    ids, tokens = torch.arange(7), tokens_of(size)
    losses, gradients, statistics = [], [], []

    for directory in (bare, padded):
        config = StudentConfig(model=directory, dtype="float32")
        student = load_student(config, activation_checkpointing=False, num_tokens=size)

        def measure(hidden_TD, head):
            loss, _ = objective(
                hidden_TD, head, tokens, LossConfig(top_k=5), num_loss_tokens=7, alpha=1.0
            )
            return loss, token_statistics(hidden_TD.detach(), head, tokens)

        loss, found = student(ids, ids, measure)
        loss.backward()
        losses.append(loss.item())
        gradients.append(student.whole_head_VD.grad)
        statistics.append(found)

    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(statistics[1], statistics[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1][:size], gradients[0], rtol=1e-4, atol=1e-6)
    assert gradients[1].shape[0] == size + PADDING
    assert (gradients[1][size:] == 0).all()


def test_without_a_number_of_tokens_all_rows_count(pair):
    _, padded, size = pair
    ids, tokens = torch.arange(7), tokens_of(size)
    logprobs = []

    for number in (None, size, size + PADDING, size + 2 * PADDING):
        config = StudentConfig(model=padded, dtype="float32")
        student = load_student(config, activation_checkpointing=False, num_tokens=number)
        found = student(
            ids,
            ids,
            lambda hidden, head: token_statistics(hidden, head, tokens),
        )
        logprobs.append(found[0])

    assert torch.equal(logprobs[0], logprobs[2])
    assert torch.equal(logprobs[0], logprobs[3])
    assert (logprobs[1] - logprobs[0]).median() > 9.0  # the padding had nearly all the probability
