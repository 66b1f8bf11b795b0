"""The cut changes nothing, masked rows cost nothing, no [T, V] tensor exists, and autograd is
served in every mode.
"""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eopd.config import LossConfig
from eopd.loss import kernels
from eopd.loss.chunked import LossTokens
from eopd.loss.gate import gate_weights, quantile_threshold, random_draws
from eopd.loss.objective import LossTerms, objective, token_statistics
from eopd.metrics import reduce
from eopd.types import TrajectoryKey

GATES = ("hard", "quantile", "sigmoid", "random", "always", "never")
DEFAULT = LossConfig()


def rows_of(case, start, stop):
    values = {f.name: getattr(case.tokens, f.name) for f in fields(LossTokens)}
    tokens = LossTokens(
        **{name: None if v is None else v[start:stop] for name, v in values.items()}
    )
    return replace(case, hidden=case.hidden[start:stop], tokens=tokens)


def padded(case, count):
    """``count`` masked rows in front, full of NaN and of ids that do not exist."""
    tokens = case.tokens
    poison = {}

    for f in fields(LossTokens):
        value = getattr(tokens, f.name)
        if value is not None:
            junk = (
                False
                if value.dtype == torch.bool
                else (float("nan") if value.is_floating_point() else 10**6)
            )
            front = torch.full((count, *value.shape[1:]), junk, dtype=value.dtype)
            poison[f.name] = torch.cat([front, value])

    nan = torch.full((count, case.hidden.shape[1]), float("nan"), dtype=case.hidden.dtype)

    return replace(
        case,
        hidden=torch.cat([nan, case.hidden]),
        tokens=LossTokens(**poison),
    )


@pytest.mark.parametrize("kind", GATES)
def test_the_cut_changes_nothing(kind, case, run):
    config = LossConfig.model_validate({"gate": {"kind": kind}})
    whole = case(6, t=30, v=40, d=8, old=True)
    entropy, mask = whole.tokens.teacher_entropy_T, whole.tokens.loss_mask_T
    gate = gate_weights(
        entropy,
        config.gate,
        threshold=quantile_threshold(entropy[mask], 0.2),
        draws_T=random_draws(1, TrajectoryKey(0, "a", 0), 30),
    )
    whole = replace(
        whole.with_tokens(gate_T=gate), hidden=whole.hidden.float(), weight=whole.weight.float()
    )
    num = int(mask.sum())
    reference, terms = run(whole, config, num=num, chunk_tokens=64)

    for cut in ([0, 30], [0, 1, 2, 17, 30], [0, 10, 20, 30], [0, 0, 29, 30, 30]):
        pairs = list(itertools.pairwise(cut))
        parts = [
            run(padded(rows_of(whole, a, b), a % 3), config, num=num, chunk_tokens=1 + a)
            for a, b in pairs
        ]
        losses = sum(part.loss for part, _ in parts)
        assert losses.item() == pytest.approx(reference.loss.item(), rel=1e-6)
        hidden = torch.cat(
            [
                part.gradients[0][a % 3 :]
                for (part, _), (a, _) in zip(
                    parts,
                    pairs,
                    strict=True,
                )
            ]
        )
        weight = sum(part.gradients[1] for part, _ in parts)
        for one, other in zip((hidden, weight), reference.gradients, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()

        expected = pytest.approx(reduce([terms.metrics(num)]), rel=1e-5, abs=1e-7)
        total = LossTerms.from_vector(sum(part_terms.vector() for _, part_terms in parts))
        assert reduce([total.metrics(num)]) == expected

        of_ranks = []
        for (_, part_terms), (a, b) in zip(parts, pairs, strict=True):
            of_ranks.append(part_terms.metrics(int(mask[a:b].sum())))

        assert reduce(of_ranks) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_any_size_change_nothing(dtype, case, run, monkeypatch):
    random = case(4, t=20, v=50, d=8, bias=True, softcap=3.0)
    random = replace(
        random, **{name: getattr(random, name).to(dtype) for name in ("hidden", "weight", "bias")}
    )
    whole, blocks = [], []

    for found, logit_rows, head_rows in ((whole, 64, 64), (blocks, 3, 7)):
        monkeypatch.setattr(kernels, "_BLOCK_COLUMNS", logit_rows)
        monkeypatch.setattr(kernels, "_LOGIT_BLOCK_ROWS", logit_rows)
        monkeypatch.setattr(kernels, "_HEAD_BLOCK_ROWS", head_rows)
        result, _ = run(random, DEFAULT, chunk_tokens=8)
        found += [result.loss, *result.gradients, torch.tensor(list(result.metrics.values()))]

    # Sums run over up to 50 terms, in another order: each addition may round once. What a product
    # rounds depends on the processor.
    sums = torch.promote_types(dtype, torch.float32)
    rounding = max(50 * torch.finfo(sums).eps, 4 * torch.finfo(dtype).eps)
    for one, other in zip(blocks, whole, strict=True):
        assert (one - other).abs().max() <= rounding * other.abs().max()


@pytest.mark.parametrize("t", [0, 6])
def test_a_batch_without_loss_tokens_still_runs_backward(t, case, run):
    empty = case(0, t=t, bias=True)
    empty = padded(empty.with_tokens(loss_mask_T=torch.zeros(t, dtype=torch.bool)), 2)

    for num in (0, 7):
        result, terms = run(empty, DEFAULT, num=num)
        assert result.loss.item() == 0.0
        assert [g.shape for g in result.gradients] == [
            empty.hidden.shape,
            empty.weight.shape,
            empty.bias.shape,
        ]
        assert all((g == 0).all() for g in result.gradients)
        assert set(reduce([terms.metrics(0)]).values()) == {0.0}


def test_masked_rows_are_never_read(case, run):
    clean, dirty = case(1), padded(case(1), 5)
    one, other = run(clean, DEFAULT)[0], run(dirty, DEFAULT)[0]
    torch.testing.assert_close(other.loss, one.loss)
    torch.testing.assert_close(other.gradients[0][5:], one.gradients[0])
    assert (other.gradients[0][:5] == 0).all()


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())

        return result


@pytest.mark.parametrize("differentiate", [True, False])
def test_no_tensor_is_larger_than_a_chunk(differentiate, case):
    big = case(0, t=128, v=512, d=4)
    arguments = (big.hidden.requires_grad_(differentiate), big.head(big.weight), big.tokens)

    with LargestTensor() as largest:
        loss, _ = objective(
            *arguments,
            DEFAULT,
            num_loss_tokens=1,
            alpha=1.0,
            chunk_tokens=8,
        )
        if differentiate:
            loss.backward()

        token_statistics(*arguments, chunk_tokens=8)

    assert largest.numel == 8 * 512


def test_only_what_requires_a_gradient_gets_one(case):
    random = case(0)
    for wants in ([True, False], [False, True], [True, True]):
        leaves = [
            x.clone().requires_grad_(want)
            for x, want in zip((random.hidden, random.weight), wants, strict=True)
        ]
        arguments = (leaves[0], random.head(leaves[1]), random.tokens, DEFAULT)
        loss, _ = objective(*arguments, num_loss_tokens=5, alpha=1.0)
        loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == wants

    with torch.no_grad():
        silent, _ = objective(*arguments, num_loss_tokens=5, alpha=1.0)

    assert silent == loss
    assert not silent.requires_grad


def test_a_tied_head_gets_both_gradients(case, oracle):
    random = case(0)
    ids = random.tokens.target_ids_T
    table = random.weight.clone().requires_grad_()
    loss, _ = objective(
        table[ids].tanh(),
        random.head(table),
        random.tokens,
        DEFAULT,
        num_loss_tokens=20,
        alpha=1.0,
    )
    loss.backward()
    separate = oracle(replace(random, hidden=random.weight[ids].tanh()), DEFAULT)
    other = random.weight.clone().requires_grad_()
    other[ids].tanh().backward(separate.gradients[0])
    torch.testing.assert_close(table.grad, other.grad + separate.gradients[1])


def test_backward_scales_and_runs_once(case, run):
    random = case(0)
    hidden, weight = random.leaves()
    loss, _ = objective(
        hidden, random.head(weight), random.tokens, DEFAULT, num_loss_tokens=20, alpha=1.0
    )
    (3.0 * loss).backward(retain_graph=True)
    torch.testing.assert_close(
        [hidden.grad, weight.grad], [3.0 * g for g in run(random, DEFAULT)[0].gradients]
    )
    with pytest.raises(RuntimeError, match="already handed out"):
        loss.backward()


def test_autocast_does_not_lower_the_precision(case, run):
    random = case(0, t=20, v=50, d=16)
    random = replace(random, hidden=random.hidden.float(), weight=random.weight.float())
    plain = run(random, DEFAULT)[0]
    arguments = (random.hidden, random.head(random.weight), random.tokens)

    with torch.autocast("cpu", torch.bfloat16):
        inside = run(random, DEFAULT)[0]
        inside_statistics = token_statistics(*arguments)

    assert inside.loss == plain.loss
    torch.testing.assert_close(inside.gradients, plain.gradients, rtol=0.0, atol=0.0)
    assert (inside_statistics == token_statistics(*arguments)).all()


def test_tokens_that_a_bias_makes_impossible_leave_the_rest_as_it_was(case, run):
    """Padded vocabularies: -inf in float32 and float64, in the value, the gradients and the
    diagnostics.
    """
    random = case(5, t=9, v=12, k=3, bias=True)
    wider = replace(
        random,
        weight=torch.cat([random.weight, torch.randn(4, 3, dtype=torch.float64)]),
        bias=torch.cat([random.bias, torch.full((4,), -torch.inf, dtype=torch.float64)]),
    )
    plain, padded = run(random, DEFAULT)[0], run(wider, DEFAULT)[0]
    assert padded.metrics == pytest.approx(plain.metrics, rel=1e-12)
    for found, expected in zip(padded.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(
            found[: len(expected)],
            expected,
            rtol=1e-10,
            atol=1e-12,
        )
        assert not found[len(expected) :].any()


class CountOperations(TorchDispatchMode):
    """Counts operations that a device is given; views cost it nothing."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (function.is_view or "empty" in str(function))
        return function(*args, **(kwargs or {}))


def test_a_gpu_is_given_few_operations(case, request):
    if "cuda" not in request.node.name:
        pytest.skip("a CPU is given many small blocks on purpose")

    big = case(0, t=4096, v=300, d=4, k=16)
    arguments = (big.hidden.requires_grad_(), big.head(big.weight.requires_grad_()), big.tokens)
    with CountOperations() as operations:
        loss, _ = objective(*arguments, DEFAULT, num_loss_tokens=1, alpha=1.0, chunk_tokens=2048)
        loss.backward()

    # It was 4,527 for as many tokens in chunks of 256.
    assert operations.count <= 480


@pytest.mark.parametrize(
    ("vocabulary", "gibibytes", "expected"),
    [
        (151_936, None, 256),
        (151_936, 140, 4096),
        (151_936, 80, 2048),
        (151_936, 24, 512),
        (151_936, 8, 256),
        (32_000, 24, 4096),
        (32_000, 1000, 4096),
    ],
)
def test_chunks_are_as_large_as_the_memory_of_a_gpu_allows(vocabulary, gibibytes, expected):
    gpu_bytes = None if gibibytes is None else gibibytes * 2**30
    assert kernels.choose_chunk_tokens(vocabulary, gpu_bytes=gpu_bytes) == expected
