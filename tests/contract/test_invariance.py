"""The learner on real DeepSpeed: neither the cut of a batch nor ranks nor ZeRO stage change what is
learnt.

DeepSpeed averages gradients over ranks, and AdamW hides a constant factor, so losses alone prove
nothing: here the gradient itself is read. Ranks run with an optimiser that puts the gradient it is
handed where the weight was, and the weight back in its next step (``Handed``). DeepSpeed then
spreads the gradient as it spreads weights, so that after a step the model *is* the whole gradient,
after reduction, averaging and clipping, in the same way under ZeRO-0, -1, -2 and -3, and to the
last bit. (DeepSpeed's own ``safe_get_full_grad`` knows no clipping, and must be called between
backward and step.) Unclipped gradients are those under a limit that no norm reaches.

``run_rank`` is the program of a rank: it runs cases and saves what it saw.
"""

import itertools
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from gang import TOP_K, run_gangs, scored_trajectory, start_learner, store, write_models
from plain_torch import dense_logprobs, gates_of, sampled, token_losses
from torch import Tensor
from transformers import AutoModelForCausalLM

from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.models.tiny import Family
from eopd.packing import pack_batch
from eopd.types import OptimizerStep, PackedBatch, ScoredTrajectory, Stored

SEED, TEMPERATURE, ALPHA = 7, 0.7, 1.5
STAGES, WORLD_SIZES = (0, 1, 2, 3), (1, 2, 3)
FAMILIES: tuple[Family, ...] = ("qwen3", "llama")  # with a tied head, and without

# --- gradients of one batch, in many cuts

GATES: dict[str, dict[str, Any]] = {
    "hard": {"kind": "hard", "tau": 2.0},
    "quantile": {"kind": "quantile", "top": 0.3},
    "sigmoid": {"kind": "sigmoid", "tau": 2.0, "scale": 0.5},
    "random": {"kind": "random", "rate": 0.4},
    "always": {"kind": "always"},
    "never": {"kind": "never"},
}
# Model, and limit of the gradient norm, which only the second one reaches.
CLIPPING: dict[str, tuple[Family, float]] = {"free": ("qwen3", 1e6), "clipped": ("llama", 0.5)}
SETTINGS = list(itertools.product(GATES, CLIPPING))
# Every gate, clipped or not, under one stage, and one gate under all.
RUNS = [
    (gate, clipping, stage)
    for number, (gate, clipping) in enumerate(SETTINGS)
    for stage in STAGES
    if gate == "quantile" or stage == number % len(STAGES)
]

# Prompt and response tokens, and how sharp the teacher is: its entropy rises from trajectory to
# trajectory, so that no rank's quantile is that of the batch.
SHAPES = [
    *((3, 30, 6.0), (1, 2, 6.0), (6, 38, 5.0), (2, 5, 4.0), (5, 1, 4.0), (1, 18, 3.0)),
    *((4, 9, 3.0), (6, 24, 2.0), (2, 3, 2.0), (7, 12, 1.0), (1, 27, 1.0), (3, 1, 0.5)),
]
UNHEARD = 6  # a trajectory without a single loss token

# Micro-batches of every rank, some of them empty; the second of three ranks has nothing at all.
BY_HAND = {
    1: [[[4, 0], [], [7, 9], [8, 1, 2, 6, 3, 5, 11, 10]]],
    2: [[[0, 6], [5, 4]], [[8, 1, 2, 3, 10, 11, 7, 9], []]],
    3: [[[7, 3], [0, 6]], [[], []], [[8], [5, 4, 2, 11, 1, 9, 10]]],
}
TOKEN_BUDGETS = (44, 75, 300)
IN_PARTS = "in parts"


def make_batch() -> list[ScoredTrajectory]:
    return [
        scored_trajectory(
            np.random.default_rng((SEED, index)),
            epoch=0,
            index=index,
            prompt_length=prompt_length,
            loss_mask=(np.arange(length) % 4 != 2) & (index != UNHEARD),
            sharpness=np.full((length, 1), sharpness),
        )
        for index, (prompt_length, length, sharpness) in enumerate(SHAPES)
    ]


def cut_by_hand(ranks: Sequence[Sequence[Sequence[int]]]) -> PackedBatch:
    batch = [store(scored) for scored in make_batch()]
    num_loss_tokens = 0
    shares = []

    for rank in ranks:
        micros = []
        for indices in rank:
            micro = tuple(batch[index] for index in indices)
            num_loss_tokens += sum(stored.header.num_loss_tokens for stored in micro)
            micros.append(micro)

        shares.append(tuple(micros))

    step = OptimizerStep(num_loss_tokens=num_loss_tokens, ranks=tuple(shares))
    return PackedBatch(steps=(step,), alpha=ALPHA)


def cuts(world_size: int) -> dict[str, Sequence[PackedBatch]]:
    """Cuts of the batch for so many ranks; ``alone`` is the unpacked one. Where the batch comes in
    several parts, no threshold is of the whole of it.
    """
    batch = [store(scored) for scored in make_batch()]

    def pack(trajectories: Sequence[Stored[ScoredTrajectory]], budget: int) -> PackedBatch:
        return pack_batch(
            trajectories,
            steps=1,
            ranks=world_size,
            token_budget=budget,
            alpha=ALPHA,
        )

    found = {f"pack {budget}": [pack(batch, budget)] for budget in TOKEN_BUDGETS}
    if world_size == 1:
        one_by_one = [[index] for index in range(len(batch))]
        found["alone"] = [cut_by_hand([one_by_one])]

    found["by hand"] = [cut_by_hand(BY_HAND[world_size])]
    found[IN_PARTS] = [pack(batch[start:end], 75) for start, end in ((0, 4), (4, 5), (5, 12))]
    return found


def loss_config(gate: str) -> LossConfig:
    return LossConfig(top_k=TOP_K, gate=GATES[gate], alpha=ALPHA)


# else ZeRO-3 keeps tiny parameters whole
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}

# --- the program of a rank


class Handed(torch.optim.AdamW):
    """Each step exchanges weights for the gradients that came with them; the next one undoes it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weights: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.exchange(parameter)

    def exchange(self, parameter: Tensor) -> None:
        if parameter in self.weights:
            parameter.copy_(self.weights.pop(parameter))
        else:
            self.weights[parameter] = parameter.clone()
            parameter.copy_(parameter.grad)


def run_rank(
    rank: int, world_size: int, port: int, directory: Path, cases: list[tuple[str, str, int]]
) -> None:
    import deepspeed

    from eopd.learner.learner import LearnerRank

    def learner_of(family: Family, config: LearnerConfig, loss: LossConfig) -> LearnerRank:
        return start_learner(
            StudentConfig(model=directory / family, dtype="float32"),
            config,
            loss,
            temperature=TEMPERATURE,
            total_batches=100,
            seed=SEED,
            root=directory,
            rank=rank,
            world_size=world_size,
            port=port,
        )

    def whole(learner: LearnerRank) -> Tensor:
        parameters = list(learner.model.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            return flat(parameters)

    def gradients(gate: str, clipping: str, stage: int) -> dict[str, Any]:
        family, limit = CLIPPING[clipping]
        with mock.patch("torch.optim.AdamW", Handed):
            config = LearnerConfig(
                zero_stage=stage,
                max_grad_norm=limit,
                logit_chunk_tokens=16,
                deepspeed=SHARDED,
            )
            learner = learner_of(family, config, loss_config(gate))

        weights, found = whole(learner), {}
        one_token = cut_by_hand([[[4]], *[[[]]] * (world_size - 1)]).share(rank)

        for name, parts in cuts(world_size).items():
            if name == IN_PARTS and gate == "quantile":
                continue

            for part in parts[:-1]:
                learner.accumulate(part.share(rank))

            metrics = dict(learner.step(parts[-1].share(rank)).metrics)
            found[name] = {"metrics": metrics, "gradient": whole(learner)}
            learner.step(one_token)
            assert torch.equal(whole(learner), weights)  # ready for the next cut

        return found

    torch.save(
        {tuple(run): gradients(*run) for run in cases}, directory / f"seen-{world_size}-{rank}.pt"
    )


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(
        tmp_path_factory.mktemp("invariance"),
        *FAMILIES,
        layers=1,
        hidden=32,
    )


@pytest.fixture(scope="module")
def seen(directory: Path) -> dict[int, list[dict[str, Any]]]:
    """By world size, what every rank saw."""
    cases = [(*run, size) for run in RUNS for size in WORLD_SIZES]
    found = {}
    for size in run_gangs(directory, __file__, cases):
        files = [directory / f"seen-{size}-{rank}.pt" for rank in range(size)]
        found[size] = [torch.load(file) for file in files]

    return found


# --- the oracle: plain torch


def batch_loss(
    logprobs: Sequence[Tensor], batch: Sequence[ScoredTrajectory], config: LossConfig
) -> Tensor:
    """The mean over all loss tokens, from the student's log-probabilities [R, V] of every
    trajectory.
    """
    gates = gates_of(batch, config, seed=SEED)
    losses = [
        token_losses(student, sampled(student, scored).detach(), scored, gate, config)
        for student, scored, gate in zip(logprobs, batch, gates, strict=True)
    ]
    masks = [torch.tensor(scored.trajectory.loss_mask) for scored in batch]
    return torch.cat(losses)[torch.cat(masks)].mean()


def sequence_of(scored: ScoredTrajectory) -> Tensor:
    """Prompt and response."""
    trajectory = scored.trajectory
    ids = np.concatenate([trajectory.prompt.token_ids, trajectory.response_ids])
    return torch.tensor(ids).long()


def padded_logprobs(model: Any, batch: Sequence[ScoredTrajectory]) -> list[Tensor]:
    """As ``dense_logprobs`` for every trajectory, from one padded run with an attention mask."""
    prompts = [len(scored.trajectory.prompt.token_ids) for scored in batch]
    sequences = [sequence_of(scored) for scored in batch]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=5)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=ids, attention_mask=mask).logits

    return [
        (row[prompt - 1 : length - 1] / TEMPERATURE).log_softmax(-1)
        for row, prompt, length in zip(logits, prompts, lengths.tolist(), strict=True)
    ]


@cache
def expected(gate: str, family: Family, padded: bool, root: Path) -> tuple[float, Tensor]:
    """Loss and gradient before clipping, in float64 (norms and rotations are float32 in any
    dtype).
    """
    model = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.float64)
    batch = make_batch()
    if padded:
        logprobs = padded_logprobs(model, batch)
    else:
        logprobs = [dense_logprobs(model, scored, TEMPERATURE) for scored in batch]

    loss = batch_loss(logprobs, batch, loss_config(gate))
    loss.backward()

    return loss.item(), flat(parameter.grad for parameter in model.parameters())


# --- tests

every_setting = pytest.mark.parametrize(("gate", "clipping"), SETTINGS)


def found(
    seen: dict[int, list[dict[str, Any]]], gate: str, clipping: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Metrics [N] and gradients [N, W], float64, over stages, world sizes and cuts."""
    cut_results = [
        result
        for ranks in seen.values()
        for (a_gate, a_clipping, _), results in ranks[0].items()
        for result in results.values()
        if (a_gate, a_clipping) == (gate, clipping)
    ]
    metrics = {}
    for name in cut_results[0]["metrics"]:
        values = [result["metrics"][name] for result in cut_results]
        metrics[name] = torch.tensor(values, dtype=torch.float64)

    gradients = [result["gradient"] for result in cut_results]
    return metrics, torch.stack(gradients).double()


def spread(values: Tensor) -> float:
    """How far the rows [N, ...] are apart, relative to the largest entry."""
    return ((values.amax(0) - values.amin(0)).max() / values.abs().max()).item()


@every_setting
def test_loss_gradient_and_norm_do_not_depend_on_cut_ranks_or_stage(seen, gate, clipping):
    metrics, gradients = found(seen, gate, clipping)
    assert len(gradients) == (13 * len(STAGES) if gate == "quantile" else 16)
    assert spread(metrics["eopd_loss"]) < 1e-6
    assert spread(metrics["eopd_grad_norm"]) < 1e-6
    assert len(set(metrics["eopd_gate_ratio"].tolist())) == 1
    assert spread(gradients) < 1e-5


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
@every_setting
def test_loss_gradient_and_norm_are_those_of_plain_torch(seen, directory, gate, clipping, padded):
    metrics, gradients = found(seen, gate, clipping)
    family, limit = CLIPPING[clipping]
    loss, gradient = expected(gate, family, padded, directory)
    norm = gradient.norm()
    assert ((metrics["eopd_loss"] - loss).abs() < 1e-6 * abs(loss)).all()
    assert ((metrics["eopd_grad_norm"] - norm).abs() < 1e-6 * norm).all()  # before clipping
    handed = gradient * min(1.0, limit / norm.item())
    assert (gradients - handed).abs().max() < 1e-5 * handed.abs().max()


@every_setting
def test_what_reaches_the_optimiser_is_clipped(seen, directory, gate, clipping):
    metrics, gradients = found(seen, gate, clipping)
    limit = CLIPPING[clipping][1]
    assert (metrics["eopd_grad_norm"] > limit).all() == (clipping == "clipped")
    expected_norms = metrics["eopd_grad_norm"].clamp(max=limit)
    assert torch.allclose(gradients.norm(dim=1), expected_norms, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_saw_the_same(seen, world_size):
    first, *others = seen[world_size]
    for run, results in first.items():
        for name, result in results.items():
            twins = [other[run][name] for other in others]
            assert all(twin["metrics"] == result["metrics"] for twin in twins)
            assert all(torch.equal(twin["gradient"], result["gradient"]) for twin in twins)


def test_the_data_tell_gates_and_ranks_apart(directory):
    gradients = [expected(gate, "qwen3", False, directory)[1] for gate in GATES]
    pairs = itertools.combinations(gradients, 2)
    assert all(spread(torch.stack(pair)) > 0.01 for pair in pairs)
    config = loss_config("quantile")
    batch = make_batch()
    keys = [scored.trajectory.key for scored in batch]
    gates = dict(zip(keys, gates_of(batch, config, seed=SEED), strict=True))

    whole = [parts[0] for parts in (*cuts(2).values(), *cuts(3).values()) if len(parts) == 1]
    for cut in whole:
        ranks = [bodies_of(rank) for rank in cut.steps[0].ranks]
        counts = [num_loss_tokens(rank) for rank in ranks]
        assert len(set(counts)) > 1

        for rank, count in zip(ranks, counts, strict=True):
            if count:
                of_rank = torch.cat(gates_of(rank, config, seed=SEED))
                of_batch = torch.cat([gates[scored.trajectory.key] for scored in rank])
                assert not torch.equal(of_rank, of_batch)


def bodies_of(micros: Sequence[Sequence[Stored[ScoredTrajectory]]]) -> list[ScoredTrajectory]:
    return [stored.body for micro in micros for stored in micro]


def num_loss_tokens(batch: Sequence[ScoredTrajectory]) -> int:
    return sum(int(scored.trajectory.loss_mask.sum()) for scored in batch)
