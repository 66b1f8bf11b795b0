"""The learner on real DeepSpeed, against plain torch on dense logits, one trajectory at a time.

``run_rank`` is the program of a rank: it runs cases and writes what it saw as JSON. The tests
compare that with an oracle that knows neither packing nor DeepSpeed nor chunks.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import TOP_K, asked_for, read_seen, run_gangs, scored_trajectory, store, write_models
from plain_torch import dense_logprobs, gates_of, sampled, token_losses
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.hyperclovax import HyperCLOVAXConfig

from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.evaluation.summary import measurements
from eopd.learner.attention import VARLEN
from eopd.learner.student import Student, load_student
from eopd.loss.chunked import Head
from eopd.types import (
    LearnerStats,
    OptimizerStep,
    PackedBatch,
    PolicyVersion,
    ScoredTrajectory,
)

NUM_TRAJECTORIES, NUM_BATCHES, LR, SEED = 8, 5, 3e-3, 7
# where NaNs are slipped in, before this batch: one in each half
BAD_BATCH, BAD_TRAJECTORIES = 2, (2, 6)


@dataclass(frozen=True)
class Case:
    """One setting of the learner, run under some ZeRO stages: with the other cases, every stage
    meets what matters to it. Checkpoints and adapters have modules of their own.
    """

    family: str
    stages: tuple[int, ...]
    dtype: str = "float32"
    temperature: float = 1.0
    learner: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    schedule_factors: tuple[float, ...] = (1.0,) * NUM_BATCHES

    @property
    def steps_per_batch(self) -> int:
        return self.learner.get("optimizer_steps_per_batch", 1)

    @property
    def streams(self) -> bool:
        """Whether a batch may come in parts: not where thresholds are of the whole batch."""
        gate = self.loss.get("gate", {"kind": "hard"})
        return self.steps_per_batch == 1 and gate["kind"] != "quantile"


CLIPPED = {"max_grad_norm": 0.05, "schedule": "cosine", "warmup_batches": 2}
CASES = {
    "tied": Case(
        family="qwen3",
        stages=(0, 3),
        learner=CLIPPED,
        loss={"gate": {"kind": "hard", "tau": 2.0}},
        schedule_factors=(0.5, 1.0, 1.0, 0.8535534, 0.5),
    ),
    "untied": Case(
        family="llama",
        stages=(1, 2),
        temperature=0.7,
        learner={"max_grad_norm": 1e3},
        loss={
            "gate": {"kind": "quantile", "top": 0.3},
            "forward_kl": {"kind": "tail"},
            "alpha": 0.5,
        },
    ),
    "several_steps": Case(
        family="qwen3",
        stages=(1,),
        learner={"optimizer_steps_per_batch": 2, "max_grad_norm": 1e3},
        loss={"reverse_kl": {"kind": "sampled", "clip": 0.02, "importance_cap": 1.2}},
    ),
    "recomputed": Case(
        family="qwen3",
        stages=(3,),
        learner=CLIPPED | {"activation_checkpointing": True},
        loss={"gate": {"kind": "hard", "tau": 2.0}},
        schedule_factors=(0.5, 1.0, 1.0, 0.8535534, 0.5),
    ),
    "half": Case(
        family="qwen3",
        stages=(0, 1, 2, 3),
        dtype="bfloat16",
        learner=CLIPPED,
        loss={"gate": {"kind": "hard", "tau": 2.0}},
        schedule_factors=(0.5, 1.0, 1.0, 0.8535534, 0.5),
    ),
}
RUNS = [(name, stage) for name, case in CASES.items() for stage in case.stages]
RESUMES = [("tied", 0), ("tied", 3), ("untied", 2), ("half", 0), ("half", 2)]


# ---- data --------------------------------------------------------------------------------------------------


def make_trajectory(batch: int, index: int) -> ScoredTrajectory:
    rng = np.random.default_rng((batch, index))
    prompt_length, length = int(rng.integers(1, 8)), int(rng.integers(2, 12))
    return scored_trajectory(
        rng,
        epoch=batch,
        index=index,
        prompt_length=prompt_length,
        loss_mask=np.arange(length) != 1,
        sharpness=rng.choice([0.5, 3.0, 12.0], size=(length, 1)),
    )


def make_batch(batch: int) -> list[ScoredTrajectory]:
    return [make_trajectory(batch, index) for index in range(NUM_TRAJECTORIES)]


def spoil(batch: list[ScoredTrajectory], *bad: int) -> list[ScoredTrajectory]:
    def broken(scored: ScoredTrajectory) -> ScoredTrajectory:
        logprobs = np.full_like(scored.signal.token_logprobs, np.nan)
        return dataclasses.replace(
            scored, signal=dataclasses.replace(scored.signal, token_logprobs=logprobs)
        )

    return [broken(scored) if index in bad else scored for index, scored in enumerate(batch)]


def cut(
    batch: Sequence[ScoredTrajectory], *, world_size: int, steps: int, alpha: float
) -> PackedBatch:
    """Uneven on purpose: with two ranks the second one has an empty micro-batch."""

    def step_of(part: Sequence[ScoredTrajectory]) -> OptimizerStep:
        stored = [store(scored) for scored in part]
        ranks = (
            [[stored[:3], stored[3:]]]
            if world_size == 1
            else [[stored[:1], stored[1:2]], [stored[2:], []]]
        )
        return OptimizerStep(
            num_loss_tokens=sum(int(scored.trajectory.loss_mask.sum()) for scored in part),
            ranks=tuple(tuple(tuple(micro) for micro in rank) for rank in ranks),
        )

    size = len(batch) // steps
    return PackedBatch(
        steps=tuple(step_of(batch[i * size : (i + 1) * size]) for i in range(steps)), alpha=alpha
    )


# ---- the program of a rank ---------------------------------------------------------------------------------


def run_rank(
    rank: int, world_size: int, port: int, directory: Path, cases: list[tuple[str, int]]
) -> None:
    from eopd.learner.deepspeed_backend import DeepspeedBackend
    from eopd.learner.learner import LearnerRank, NonFiniteUpdateError

    def learner_of(case: Case, stage: int, broken: Path) -> LearnerRank:
        return LearnerRank(
            DeepspeedBackend,
            StudentConfig(model=directory / case.family, dtype=case.dtype),
            LearnerConfig(
                lr=LR,
                weight_decay=0.1,
                zero_stage=stage,
                logit_chunk_tokens=16,
                max_skipped_steps=2 * case.steps_per_batch + 1,
                # else ZeRO-3 keeps parameters as small as these whole
                deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
                **case.learner,
            ),
            LossConfig(top_k=TOP_K, **case.loss),
            temperature=case.temperature,
            total_batches=NUM_BATCHES + 1,
            seed=SEED,
            entropy_bounds={"teacher": "mid"},
            broken=broken,
            rank=rank,
            world_size=world_size,
            master_address="127.0.0.1",
            master_port=port,
        )

    def share_of(case: Case, batch: Sequence[ScoredTrajectory]) -> PackedBatch:
        alpha = case.loss.get("alpha", 1.0)
        return cut(
            batch,
            world_size=world_size,
            steps=case.steps_per_batch,
            alpha=alpha,
        ).share(rank)

    def step(
        learner: LearnerRank, case: Case, batch: Sequence[ScoredTrajectory], *, in_parts: bool
    ) -> LearnerStats:
        """Trains on a batch, of which the first half may come before the other one is there; what may
        be asked of the learner in between changes nothing.
        """
        if in_parts:
            half = len(batch) // 2
            learner.accumulate(share_of(case, batch[:half]))
            learner.evaluate(share_of(case, batch[half:]))
            learner.probe(batch[0].trajectory.response_ids)
            learner.save(learner._broken.with_name(f"between-{learner.version.step}"))
            batch = batch[half:]

        return learner.step(share_of(case, batch))

    def train(learner: LearnerRank, case: Case, batches: Sequence[int]) -> list[dict[str, float]]:
        """Every other batch in parts, where the case allows that."""
        metrics = []
        for number in batches:
            in_parts = case.streams and number % 2 == 1
            metrics.append(
                dict(
                    step(
                        learner,
                        case,
                        make_batch(number),
                        in_parts=in_parts,
                    ).metrics
                )
            )

        return metrics

    def poisoned_step(learner: LearnerRank, case: Case) -> dict[str, float]:
        """A step on a sound batch, in parts where the case allows that, in which one gradient on
        rank 0 alone is not finite.
        """
        parameter = next(p for name, p in learner.model.named_parameters() if "down_proj" in name)
        hook = parameter.register_hook(
            lambda gradient: gradient * math.nan if rank == 0 else gradient
        )
        stats = step(learner, case, make_batch(BAD_BATCH), in_parts=case.streams)
        hook.remove()
        return counted(stats)

    def counted(stats: LearnerStats) -> dict[str, float]:
        return {**stats.metrics, "skipped": stats.skipped_steps}

    seen: dict[str, Any] = {}

    for name, stage in cases:
        case, run_directory = CASES[name], directory / f"{name}-{stage}-{world_size}"
        learner = learner_of(case, stage, run_directory / "broken")
        with pytest.raises(FileNotFoundError):
            learner.load(run_directory / "checkpoint")

        before = train(learner, case, range(BAD_BATCH))
        bad_batch = spoil(make_batch(BAD_BATCH), *BAD_TRAJECTORIES)
        skipped = counted(learner.step(share_of(case, bad_batch)))
        broken_gradient = poisoned_step(learner, case)
        if (name, stage) in RESUMES:
            learner.save(run_directory / "checkpoint")

        after = train(learner, case, range(BAD_BATCH, NUM_BATCHES))
        found = learner.evaluate(share_of(case, make_batch(NUM_BATCHES)))
        learner.export(run_directory / "hf")
        if stage < 3 and rank == 0:
            ids = torch.arange(9)[None]
            torch.save(learner.model(input_ids=ids).logits, run_directory / "logits.pt")

        half_bad = learner.step(share_of(case, spoil(make_batch(BAD_BATCH), BAD_TRAJECTORIES[0])))
        with pytest.raises(NonFiniteUpdateError) as refused:
            learner.step(share_of(case, bad_batch))

        seen[f"{name}-{stage}"] = {
            "metrics": before + after,
            "skipped": [skipped, broken_gradient, counted(half_bad)],
            "refused": str(refused.value),
            "version": learner.version,
            "evaluation": dataclasses.asdict(found),
        }
        before_it = learner.version.step
        last_is_bad = BAD_TRAJECTORIES[case.steps_per_batch - 1]
        with pytest.raises(NonFiniteUpdateError):
            learner.step(share_of(case, spoil(make_batch(BAD_BATCH), last_is_bad)))

        seen[f"{name}-{stage}"]["moved"] = learner.version.step - before_it
        if (name, stage) in RESUMES:
            resumed = learner_of(case, stage, run_directory / "broken-again")
            resumed.version = PolicyVersion(7, 0)
            resumed.load(run_directory / "checkpoint")
            metrics = train(resumed, case, range(BAD_BATCH, NUM_BATCHES))
            seen[f"{name}-{stage}"]["resumed"] = {"metrics": metrics, "version": resumed.version}

    (directory / f"seen-{world_size}-{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("learner"), "qwen3", "llama")


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, directory: Path) -> dict[int, list[dict[str, Any]]]:
    """By world size, what every rank saw."""
    sizes = run_gangs(
        directory,
        __file__,
        asked_for(request, "name", "stage", "world_size"),
    )
    return {world_size: read_seen(directory, world_size) for world_size in sizes}


# ---- the oracle: plain torch -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    losses: list[float]
    norms: list[float]  # before clipping, the mean over the optimiser steps of a batch
    model: torch.nn.Module


@cache
def oracle(name: str, root: Path) -> Expected:
    case = CASES[name]
    config = LossConfig(top_k=TOP_K, **case.loss)
    model = AutoModelForCausalLM.from_pretrained(root / case.family, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    losses, norms = [], []

    for number in range(NUM_BATCHES):
        batch = make_batch(number)
        gates = gates_of(batch, config, seed=SEED)

        with torch.no_grad():
            old = [
                sampled(
                    dense_logprobs(
                        model,
                        scored,
                        case.temperature,
                    ),
                    scored,
                )
                for scored in batch
            ]

        masks = [torch.tensor(scored.trajectory.loss_mask) for scored in batch]
        total, step_norms, size = 0.0, [], len(batch) // case.steps_per_batch
        for group in optimizer.param_groups:
            group["lr"] = LR * case.schedule_factors[number]

        for start in range(0, len(batch), size):
            part = range(start, start + size)
            values = [
                token_losses(
                    dense_logprobs(model, batch[i], case.temperature),
                    old[i],
                    batch[i],
                    gates[i],
                    config,
                )[masks[i]]
                for i in part
            ]
            loss = torch.cat(values).mean()
            optimizer.zero_grad()
            loss.backward()
            limit = case.learner["max_grad_norm"]
            step_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item())
            optimizer.step()
            total += torch.cat(values).sum().item()

        losses.append(total / sum(int(mask.sum()) for mask in masks))
        norms.append(sum(step_norms) / len(step_norms))

    return Expected(losses, norms, model)


# ---- tests -------------------------------------------------------------------------------------------------

EXACT_RUNS = [(name, stage) for name, stage in RUNS if CASES[name].dtype == "float32"]
HALF_RUNS = [(name, stage) for name, stage in RUNS if CASES[name].dtype == "bfloat16"]
every_world = pytest.mark.parametrize("world_size", [1, 2])


def column(run: dict[str, Any], metric: str) -> list[float]:
    return [metrics[metric] for metrics in run["metrics"]]


@every_world
@pytest.mark.parametrize(("name", "stage"), EXACT_RUNS)
def test_losses_and_gradient_norms_are_those_of_plain_torch(
    seen, directory, name, stage, world_size
):
    run, expected = seen[world_size][0][f"{name}-{stage}"], oracle(name, directory)
    assert column(run, "eopd_loss") == pytest.approx(expected.losses, abs=1e-4)
    assert column(run, "eopd_grad_norm") == pytest.approx(expected.norms, rel=1e-3)
    assert expected.losses[0] - expected.losses[-1] != pytest.approx(0, abs=1e-2)


@every_world
@pytest.mark.parametrize(("name", "stage"), HALF_RUNS)
def test_bfloat16_stays_near(seen, directory, name, stage, world_size):
    run, expected = seen[world_size][0][f"{name}-{stage}"], oracle(name, directory)
    assert column(run, "eopd_loss") == pytest.approx(expected.losses, rel=0.01)
    assert column(run, "eopd_grad_norm") == pytest.approx(expected.norms, rel=0.02)


def test_clipping_was_active_and_was_not(directory):
    assert min(oracle("tied", directory).norms) > 2 * CLIPPED["max_grad_norm"]
    assert max(oracle("untied", directory).norms) < CASES["untied"].learner["max_grad_norm"]


@every_world
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_all_ranks_return_the_same(seen, name, stage, world_size):
    first, *others = [of_rank[f"{name}-{stage}"] for of_rank in seen[world_size]]
    assert len(others) == world_size - 1
    assert all(other == first for other in others)


@every_world
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_the_schedule_and_the_counts_are_reported(seen, name, stage, world_size):
    run, case = seen[world_size][0][f"{name}-{stage}"], CASES[name]
    assert column(run, "eopd_learning_rate") == pytest.approx(
        [LR * f for f in case.schedule_factors]
    )
    assert column(run, "eopd_alpha_ratio") == [case.loss.get("alpha", 1.0)] * NUM_BATCHES
    counts = [
        sum(int(s.trajectory.loss_mask.sum()) for s in make_batch(b)) for b in range(NUM_BATCHES)
    ]
    assert column(run, "eopd_loss_tokens") == counts
    # three more batches had steps that were skipped
    assert run["version"] == list(PolicyVersion(0, NUM_BATCHES + 3))


def bad_rows(*bad: int) -> list[dict[str, Any]]:
    """The loss rows of spoilt trajectories, as ``rows.json`` names them."""
    batch = make_batch(BAD_BATCH)
    return [
        {
            "trajectory": list(batch[i].trajectory.key),
            "position": int(r),
            "columns": ["teacher_logprobs_T"],
        }
        for i in bad
        for r in np.flatnonzero(batch[i].trajectory.loss_mask)
    ]


def read_rows(directory: Path) -> dict[str, Any]:
    record = json.loads((directory / "rows.json").read_text())
    return record | {
        "rows": sorted(record["rows"], key=lambda row: (row["trajectory"], row["position"]))
    }


@every_world
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_a_non_finite_loss_or_gradient_is_skipped_by_all_ranks(
    seen, directory, name, stage, world_size
):
    # That nothing of it was applied is shown by the losses after it: they are the oracle's, which
    # never saw it.
    run, steps = seen[world_size][0][f"{name}-{stage}"], CASES[name].steps_per_batch
    of_loss, of_gradient, half = run["skipped"]
    assert of_loss == {"eopd_loss_tokens": 0.0, "skipped": steps}
    assert of_gradient == {"eopd_loss_tokens": 0.0, "skipped": 2 * steps}
    assert half["skipped"] == 2 * steps + 1
    second = make_batch(BAD_BATCH)[NUM_TRAJECTORIES // steps :]
    assert half["eopd_loss_tokens"] == sum(
        int(scored.trajectory.loss_mask.sum()) for scored in second
    )
    assert ("eopd_loss" in half) == (steps > 1)
    broken = directory / f"{name}-{stage}-{world_size}" / "broken"
    records = {
        step: read_rows(broken / f"batch-{BAD_BATCH + 1:06d}-step-{step}") for step in range(steps)
    }
    assert all((record["what"], record["rows"]) == ("gradient", []) for record in records.values())


@every_world
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_a_skipped_step_is_written_down_whole(seen, directory, name, stage, world_size):
    steps = CASES[name].steps_per_batch
    part = cut(make_batch(BAD_BATCH), world_size=world_size, steps=steps, alpha=1.0)

    for number, step in enumerate(part.steps):
        broken = (
            directory
            / f"{name}-{stage}-{world_size}"
            / "broken"
            / f"batch-{BAD_BATCH:06d}-step-{number}"
        )
        record = read_rows(broken)
        assert record["what"] == "loss"
        assert record["rows"] == bad_rows(*BAD_TRAJECTORIES[number::steps])
        keys = [stored.header.key for rank in step.ranks for micro in rank for stored in micro]
        assert record["trajectories"] == [list(key) for key in keys]

        for rank, micros in enumerate(step.ranks):
            written = load_file(broken / f"rank-{rank}.safetensors")
            for index, micro in enumerate(micros):
                ids = [stored.body.trajectory.response_ids for stored in micro]
                mask = written[f"{index}.loss_mask_T"]
                masks = [stored.body.trajectory.loss_mask for stored in micro]
                expected = np.concatenate(ids)[np.concatenate(masks)].tolist() if micro else []
                assert written[f"{index}.target_ids_T"][mask].tolist() == expected
                assert (f"{index}.old_logprobs_T" in written) == (steps > 1)


@every_world
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_one_skipped_step_too_many_ends_it_and_names_rows(seen, name, stage, world_size):
    message = seen[world_size][0][f"{name}-{stage}"]["refused"]
    first = str(tuple(make_batch(BAD_BATCH)[BAD_TRAJECTORIES[0]].trajectory.key))
    assert message.startswith("the loss is not finite, nothing was applied; rows: ")
    assert f"{first} token 0 (teacher_logprobs_T)" in message
    assert "max_skipped_steps" in message


@every_world
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_a_batch_that_ends_the_run_after_a_step_of_it_has_another_version(
    seen, name, stage, world_size
):
    """So that its weights are not saved as those of the batch before."""
    moved = seen[world_size][0][f"{name}-{stage}"]["moved"]
    assert moved == (1 if CASES[name].steps_per_batch > 1 else 0)


@every_world
@pytest.mark.parametrize(("name", "stage"), RESUMES)
def test_a_loaded_checkpoint_continues_bit_equal_under_its_own_incarnation(
    seen, name, stage, world_size
):
    run = seen[world_size][0][f"{name}-{stage}"]
    assert run["resumed"]["metrics"] == run["metrics"][BAD_BATCH:]
    assert run["resumed"]["version"] == list(PolicyVersion(7, NUM_BATCHES + 2))


@every_world
@pytest.mark.parametrize(("name", "stage"), EXACT_RUNS)
def test_evaluation_is_that_of_dense_logits(seen, directory, name, stage, world_size):
    model = oracle(name, directory).model
    found = seen[world_size][0][f"{name}-{stage}"]["evaluation"]
    measured = measurements(found["by_prompt"])
    tokens: dict[str, list[np.ndarray]] = {}

    for scored in make_batch(NUM_BATCHES):
        signal, kept = scored.signal, scored.trajectory.loss_mask
        with torch.no_grad():
            logprobs = dense_logprobs(model, scored, CASES[name].temperature)

        ids, top = torch.tensor(signal.topk_ids).long(), torch.tensor(signal.topk_logprobs)
        rest, teacher_rest = (
            logprobs.scatter(1, ids, -torch.inf).logsumexp(-1),
            torch.tensor(signal.tail_logprobs),
        )
        values = {
            "reverse_kl": sampled(logprobs, scored) - torch.tensor(signal.token_logprobs),
            "forward_kl": (top.exp() * (top - logprobs.gather(1, ids))).sum(-1)
            + teacher_rest.exp() * (teacher_rest - rest),
            "student_entropy": -(logprobs.exp() * logprobs).sum(-1),
            "teacher_entropy": torch.tensor(signal.entropy.entropy),
            "top1_agreement": (logprobs.argmax(-1) == ids[:, 0]).float(),
        }
        for metric, value in values.items():
            tokens.setdefault(metric, []).append(value.double().numpy()[kept])

    for metric, clusters in tokens.items():
        mean = np.concatenate(clusters).mean()
        size = np.mean([len(one) for one in clusters])
        residuals = [(one.sum() - mean * len(one)) / size for one in clusters]
        error = np.std(residuals, ddof=1) / math.sqrt(len(clusters))
        assert measured[metric].mean == pytest.approx(mean, rel=2e-3, abs=2e-4), metric
        assert measured[metric].standard_error == pytest.approx(
            error,
            rel=2e-3,
            abs=2e-4,
        ), metric
        means = {f"prompt-{index}": one.mean() for index, one in enumerate(clusters)}
        assert found["by_prompt"][metric] == pytest.approx(
            means,
            rel=2e-3,
            abs=2e-3,
        ), metric

    edges = [*(0.2 * np.arange(60)), np.inf]

    for metric in ("student_entropy", "teacher_entropy"):
        counts = np.histogram(np.concatenate(tokens[metric]), edges)[0]
        # past an edge, by rounding
        moved = np.abs(np.cumsum(found[f"{metric}_counts"]) - np.cumsum(counts)).max()
        assert moved <= 1 and len(found[f"{metric}_counts"]) == 60, metric
        assert sum(found[f"{metric}_counts"]) == counts.sum() > 0

    counts = {f"prompt-{index}": len(one) for index, one in enumerate(tokens["reverse_kl"])}
    assert len(counts) == NUM_TRAJECTORIES
    assert found["by_prompt"]["tokens"] == counts


@every_world
@pytest.mark.parametrize(("name", "stage"), EXACT_RUNS)
def test_an_export_is_the_trained_student(seen, directory, name, stage, world_size):
    hf = directory / f"{name}-{stage}-{world_size}" / "hf"
    exported = AutoModelForCausalLM.from_pretrained(hf)
    trained = oracle(name, directory).model  # where it is the first to ask, it is trained here
    ids = torch.arange(9)[None]

    with torch.no_grad():
        actual, expected = exported(input_ids=ids).logits, trained(input_ids=ids).logits

    assert torch.allclose(actual, expected, atol=1e-3)
    assert not list(hf.parent.glob(".hf*"))
    tokenizer, source = (
        AutoTokenizer.from_pretrained(hf),
        AutoTokenizer.from_pretrained(directory / CASES[name].family),
    )
    assert tokenizer.get_vocab() == source.get_vocab()
    assert tokenizer.chat_template == source.chat_template
    assert exported.generation_config.eos_token_id == source.eos_token_id


@every_world
@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stage in RUNS if stage < 3])
def test_an_export_has_the_very_weights_and_dtype(seen, directory, name, stage, world_size):
    run_directory = directory / f"{name}-{stage}-{world_size}"
    exported = AutoModelForCausalLM.from_pretrained(run_directory / "hf", dtype="auto")
    assert exported.dtype == getattr(torch, CASES[name].dtype)
    with torch.no_grad():
        logits = exported(input_ids=torch.arange(9)[None]).logits

    assert torch.equal(logits, torch.load(run_directory / "logits.pt"))


# ---- the student alone -----------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def tiny_student(config: PreTrainedConfig, directory: Path, dtype: str = "float32") -> Student:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return load_student(StudentConfig(model=directory, dtype=dtype), activation_checkpointing=False)


@pytest.mark.parametrize(("checkpointed", "times"), [(False, 1), (True, 2)])
def test_activation_checkpointing_runs_every_layer_again_in_backward(checkpointed, times, tmp_path):
    tiny_student(LlamaConfig(**TINY, attention_dropout=0.5), tmp_path)
    config = StudentConfig(model=tmp_path, dtype="float32")
    student = load_student(config, activation_checkpointing=checkpointed)
    runs: list[int] = []
    for layer in student.model.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    ids = torch.arange(6)
    hidden = student(ids, ids, lambda hidden_TD, _head: hidden_TD)
    again = student(ids, ids, lambda hidden_TD, _head: hidden_TD.detach())
    runs_before = len(runs)
    hidden.sum().backward()
    assert len(runs) - runs_before == (times - 1) * TINY["num_hidden_layers"]
    assert torch.equal(hidden, again)  # dropout stays off


@pytest.mark.parametrize(
    ("config", "scale", "softcap", "attention"),
    [
        (LlamaConfig(**TINY), 1.0, None, VARLEN),
        (Qwen2Config(**TINY), 1.0, None, VARLEN),
        (Qwen3Config(**TINY, head_dim=32), 1.0, None, VARLEN),
        (
            Gemma2Config(
                **TINY,
                head_dim=32,
                final_logit_softcapping=5.0,
            ),
            1.0,
            5.0,
            "eager",
        ),
        (Gemma3TextConfig(**TINY, head_dim=32, sliding_window=3), 1.0, None, VARLEN),
        (CohereConfig(**TINY, logit_scale=0.25), 0.25, None, VARLEN),
        (GraniteConfig(**TINY, logits_scaling=8.0), 0.125, None, VARLEN),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_packed_logits_are_those_of_each_sequence_alone(
    tmp_path, config, scale, softcap, attention
):
    student = tiny_student(config, tmp_path)
    sequences = [
        torch.tensor([5, 9, 2, 250]),
        torch.tensor([7]),
        torch.tensor([7, 8, 9, 10, 11, 12]),
    ]

    def logits_of(hidden_TD: torch.Tensor, head: Head) -> torch.Tensor:
        assert (head.logit_scale, head.logit_softcap) == (scale, softcap)
        return head.logits(hidden_TD)

    with torch.no_grad():
        alone = torch.cat([student.model(input_ids=ids[None]).logits[0] for ids in sequences])
        positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
        packed = student(torch.cat(sequences), positions, logits_of)

    assert torch.allclose(packed, alone, atol=1e-5)
    assert student.model.config._attn_implementation == attention


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unknown_way_to_logits_is_refused(tmp_path, dtype):
    # multiplies, where Granite divides by the same key
    config = HyperCLOVAXConfig(**TINY, logits_scaling=8.0)
    with pytest.raises(ValueError, match="HyperCLOVAXForCausalLM makes its logits in a way"):
        tiny_student(config, tmp_path, dtype)


def test_a_state_that_leaks_between_packed_sequences_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FalconH1ForCausalLM sees other sequences"):
        tiny_student(FalconH1Config(**TINY, mamba_d_ssm=64, mamba_n_heads=8), tmp_path)


def test_weights_that_are_not_finite_are_told_from_what_leaks(tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    torch.nn.init.constant_(model.get_input_embeddings().weight, torch.nan)
    model.save_pretrained(tmp_path)
    config = StudentConfig(model=tmp_path, dtype="float32")
    with pytest.raises(ValueError, match="gives numbers that are not finite: its weights hold"):
        load_student(config, activation_checkpointing=False)


# ---- options and schedule -------------------------------------------------------------------------------------------


def test_native_options_are_merged_section_by_section_and_win():
    from eopd.learner.deepspeed_backend import native_config

    native = {
        "zero_optimization": {"reduce_bucket_size": 10},
        "communication_data_type": "bf16",
        "wall_clock_breakdown": 1,
    }
    merged = native_config(
        LearnerConfig(zero_stage=2, max_grad_norm=0.5, deepspeed=native), "bfloat16"
    )
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 10}
    assert (merged["communication_data_type"], merged["wall_clock_breakdown"]) == ("bf16", 1)
    assert (merged["gradient_clipping"], merged["bf16"]) == (0.5, {"enabled": True})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.85355, 0.5, 0.14645]),
    ],
)
def test_the_schedule_counts_optimiser_steps(kind, expected):
    from eopd.learner.deepspeed_backend import schedule

    factor = schedule(
        LearnerConfig(
            schedule=kind,
            warmup_batches=2,
            optimizer_steps_per_batch=2,
        ),
        total_steps=8,
    )
    assert [factor(step) for step in range(8)] == pytest.approx(expected, abs=1e-5)
