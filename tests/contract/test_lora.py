"""Adapters on real DeepSpeed and peft, against plain torch that forms W + s B A by hand and trains
A and B.

``run_rank`` is the program of a rank, as in ``test_learner.py``, from which trajectories and token
losses come.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gang import TOP_K, asked_for, read_seen, run_gangs, start_learner, write_models
from plain_torch import dense_logprobs, gates_of, sampled, token_losses
from safetensors.torch import load_file
from test_learner import NUM_BATCHES, SEED, Case, cut, make_batch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from eopd.adapters import merged
from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.learner.lora import adapter_tensors, whole_tensors

RANK, ALPHA, LR, WEIGHT_DECAY, SAVED_AT = 4, 12.0, 1e-2, 0.1, 2
SCALE = 3.0  # ALPHA / RANK
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraCase(Case):
    """What is adapted, and by which names the config says so."""

    target_modules: Any = ("all-linear",)
    adapted: Sequence[str] = (*ATTENTION, *MLP)
    learner: dict[str, Any] = field(default_factory=lambda: {"max_grad_norm": 1e3})


CASES = {
    "all": LoraCase(family="qwen3", stages=(0, 1, 2, 3), learner={"max_grad_norm": 0.05}),
    "some": LoraCase(
        family="llama",
        stages=(1, 3),
        learner={
            "max_grad_norm": 1e3,
            "activation_checkpointing": True,
            "optimizer_steps_per_batch": 2,
        },
        target_modules=["q_proj", "mlp.down_proj"],
        adapted=("q_proj", "down_proj"),
    ),
    "half": LoraCase(family="qwen3", stages=(0, 1, 2, 3), dtype="bfloat16"),
}
RUNS = [
    (name, stage, world)
    for name, case in CASES.items()
    for stage in case.stages
    for world in (1, 2)
]
QUICK = {("all", 1, 1), ("all", 1, 2), ("half", 2, 2), ("some", 3, 2)}  # the others are slow


# --- the program of a rank


def run_rank(
    rank: int, world_size: int, port: int, directory: Path, cases: list[tuple[str, int]]
) -> None:
    import deepspeed

    from eopd.learner.learner import LearnerRank
    from eopd.weights.layout import ModelSource, cut_into_buckets

    def learner_of(case: LoraCase, stage: int) -> LearnerRank:
        return start_learner(
            StudentConfig(
                model=directory / case.family,
                dtype=case.dtype,
                lora={"rank": RANK, "alpha": ALPHA, "target_modules": case.target_modules},
            ),
            LearnerConfig(
                lr=LR,
                weight_decay=WEIGHT_DECAY,
                zero_stage=stage,
                logit_chunk_tokens=16,
                # else ZeRO-3 keeps parameters as small as these whole, and nothing here would be
                # gathered
                deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
                **case.learner,
            ),
            LossConfig(top_k=TOP_K),
            total_batches=NUM_BATCHES,
            seed=SEED,
            root=directory,
            rank=rank,
            world_size=world_size,
            port=port,
        )

    def train(
        learner: LearnerRank, case: LoraCase, batches: Sequence[int]
    ) -> list[dict[str, float]]:
        metrics = []
        for number in batches:
            batch = cut(
                make_batch(number),
                world_size=world_size,
                steps=case.steps_per_batch,
                alpha=1.0,
            )
            metrics.append(dict(learner.step(batch.share(rank)).metrics))

        return metrics

    def publish(
        learner: LearnerRank, tensors_of: Callable[..., Any] = whole_tensors
    ) -> dict[str, Tensor]:
        source = ModelSource(
            tensors_of(learner.model),
            rank=rank,
            shape=learner.backend.shape,
            gathered=learner.backend.gathered,
        )
        published = {}

        for bucket in cut_into_buckets(source.metadata(), 30_000):
            tensors = source.gather(bucket)
            for meta, tensor in zip(bucket, tensors or (), strict=rank == 0):
                assert tuple(tensor.shape) == meta.shape
                assert tensor.dtype == meta.torch_dtype
                published[meta.name] = tensor.clone()

        return published

    def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters(list(tensors.values())):
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    seen: dict[str, Any] = {}

    for name, stage in cases:
        case = CASES[name]
        run_directory = directory / f"{name}-{stage}-{world_size}"
        learner = learner_of(case, stage)
        learner.export(run_directory / "start" / "hf")
        metrics = train(learner, case, range(SAVED_AT))
        learner.save(run_directory / "checkpoint")
        publish(learner)
        metrics += train(learner, case, range(SAVED_AT, NUM_BATCHES))
        published = publish(learner)
        again = publish(learner)
        alone = publish(learner, adapter_tensors)
        learner.export(run_directory / "hf")

        parameters = dict(learner.model.named_parameters())
        frozen = whole({n: p for n, p in parameters.items() if not p.requires_grad})
        adapters = whole({n: p for n, p in parameters.items() if p.requires_grad})
        optimizer = learner._backend._engine.basic_optimizer
        resumed = learner_of(case, stage)
        of_files = resumed.frozen()
        resumed.load(run_directory / "checkpoint")
        resumed_metrics = train(resumed, case, range(SAVED_AT, NUM_BATCHES))
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        seen[f"{name}-{stage}"] = {
            "metrics": metrics,
            "adapters": sorted(adapters),
            "digest": digest(adapters),
            "moments": num_values(moments),
            "masters": num_values(masters),
            "resumed": [resumed_metrics, digest(publish(resumed))],
            "published": [digest(published), digest(again)],
            "frozen": [of_files, resumed.frozen()],
        }
        if rank == 0:
            torch.save((published, frozen), run_directory / "tensors.pt")
            torch.save(alone, run_directory / "alone.pt")

    (directory / f"seen-{world_size}-{rank}.json").write_text(json.dumps(seen))


def num_values(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def digest(tensors: Mapping[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].contiguous().view(torch.uint8)
        hashed.update(name.encode() + values.numpy().tobytes())

    return hashed.hexdigest()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("lora"), "qwen3", "llama")


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, directory: Path) -> dict[int, list[dict[str, Any]]]:
    sizes = run_gangs(
        directory,
        __file__,
        asked_for(request, "name", "stage", "world_size"),
    )
    return {world_size: read_seen(directory, world_size) for world_size in sizes}


# --- the oracle: plain torch


class Adapted:
    """A model with W + s B A in place of W, for a matrix A [r, in] and B [out, r] of every
    adapted layer.
    """

    def __init__(self, model: PreTrainedModel, adapters: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.model, self.adapters = model, adapters

    def merged(self) -> dict[str, Tensor]:
        weights = self.model.state_dict()
        return {
            f"{layer}.weight": weights[f"{layer}.weight"] + SCALE * (b @ a)
            for layer, (a, b) in self.adapters.items()
        }

    def __call__(self, **inputs: Tensor) -> Any:
        return torch.func.functional_call(self.model, self.merged(), kwargs=inputs)


def base_of(case: LoraCase, root: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(root / case.family, dtype=dtype)


def read_adapter(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by layer, from peft's file."""
    tensors = load_file(directory / "adapter_model.safetensors")
    prefix = "base_model.model."
    suffixes = (".lora_A.weight", ".lora_B.weight")
    layers = {
        name.removeprefix(prefix).removesuffix(suffix)
        for name in tensors
        for suffix in suffixes
        if suffix in name
    }
    found = {}
    for layer in sorted(layers):
        a, b = (tensors[f"{prefix}{layer}{suffix}"].float() for suffix in suffixes)
        found[layer] = (a, b)

    return found


def first_adapter(name: str, root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What one of the runs of a case began with."""
    return read_adapter(min(root.glob(f"{name}-*/start/adapter")))


@dataclass(frozen=True)
class Expected:
    losses: list[float]
    norms: list[float]
    model: Adapted


@cache
def oracle(name: str, root: Path) -> Expected:
    """Trains from the A that a learner began with; that all begin with the same one is tested
    by itself.
    """
    case, config = CASES[name], LossConfig(top_k=TOP_K)
    adapters = first_adapter(name, root)
    model = Adapted(base_of(case, root).requires_grad_(False), adapters)
    matrices = [matrix.requires_grad_() for pair in adapters.values() for matrix in pair]
    optimizer = torch.optim.AdamW(matrices, lr=LR, weight_decay=WEIGHT_DECAY)
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
                        1.0,
                    ),
                    scored,
                )
                for scored in batch
            ]

        total = 0.0
        count = 0
        step_norms = []
        size = len(batch) // case.steps_per_batch

        for start in range(0, len(batch), size):
            losses_of_step = []
            for i in range(start, start + size):
                new = dense_logprobs(model, batch[i], 1.0)
                of_tokens = token_losses(new, old[i], batch[i], gates[i], config)
                mask = torch.tensor(batch[i].trajectory.loss_mask)
                losses_of_step.append(of_tokens[mask])

            values = torch.cat(losses_of_step)
            optimizer.zero_grad()
            values.mean().backward()
            limit = case.learner["max_grad_norm"]
            norm = torch.nn.utils.clip_grad_norm_(matrices, limit)
            step_norms.append(norm.item())
            optimizer.step()
            total += values.sum().item()
            count += len(values)

        losses.append(total / count)
        norms.append(sum(step_norms) / len(step_norms))

    return Expected(losses, norms, model)


# --- tests


def every(dtype: str | None = None) -> pytest.MarkDecorator:
    """Every run, or those of one dtype."""
    params = []
    for run in RUNS:
        if dtype in (None, CASES[run[0]].dtype):
            marks = () if run in QUICK else pytest.mark.slow
            params.append(pytest.param(*run, marks=marks))

    return pytest.mark.parametrize(("name", "stage", "world_size"), params)


IDS = torch.arange(9)[None]


def column(run: dict[str, Any], metric: str) -> list[float]:
    return [metrics[metric] for metrics in run["metrics"]]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@every("float32")
def test_losses_and_gradient_norms_are_those_of_plain_torch(
    seen, directory, name, stage, world_size
):
    run = seen[world_size][0][f"{name}-{stage}"]
    expected = oracle(name, directory)
    assert column(run, "eopd_loss") == pytest.approx(expected.losses, abs=1e-4)
    assert column(run, "eopd_grad_norm") == pytest.approx(expected.norms, rel=1e-3)
    assert expected.losses[0] - expected.losses[-1] > 0.05
    limit = CASES[name].learner["max_grad_norm"]
    assert min(expected.norms) > 2 * limit or max(expected.norms) < limit


@every("bfloat16")
def test_bfloat16_stays_near(seen, directory, name, stage, world_size):
    run = seen[world_size][0][f"{name}-{stage}"]
    expected = oracle(name, directory)
    assert column(run, "eopd_loss") == pytest.approx(expected.losses, rel=0.01)
    assert column(run, "eopd_grad_norm") == pytest.approx(expected.norms, rel=0.03)


@every()
def test_the_first_adapters_are_kaiming_and_zero_whatever_the_stage(
    seen, directory, name, stage, world_size
):
    adapter = read_adapter(directory / f"{name}-{stage}-{world_size}" / "start" / "adapter")
    ours = first_adapter(name, directory)
    assert {layer.rpartition(".")[2] for layer in adapter} == set(CASES[name].adapted)
    assert len(adapter) == 2 * len(CASES[name].adapted)  # the model has two layers

    for layer, (a, b) in adapter.items():
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound * (1 + 2**-8)
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.2)
        assert not b.any()
        assert torch.equal(a, ours[layer][0])


@every()
def test_nothing_but_the_adapters_is_trained_or_has_moments(
    seen, directory, name, stage, world_size
):
    case = CASES[name]
    run = seen[world_size][0][f"{name}-{stage}"]
    _, frozen = torch.load(directory / f"{name}-{stage}-{world_size}" / "tensors.pt")
    base = base_of(case, directory, getattr(torch, case.dtype)).state_dict()
    plain = {n.replace(".base_layer.", "."): tensor for n, tensor in frozen.items()}
    assert plain.keys() | {"lm_head.weight"} == base.keys()
    assert all(torch.equal(tensor, base[n]) for n, tensor in plain.items())
    layers = read_adapter(directory / f"{name}-{stage}-{world_size}" / "adapter")
    names = [f"{layer}.lora_{m}.default.weight" for layer in layers for m in "AB"]
    assert run["adapters"] == sorted(names)
    num_trained = num_values(matrix for pair in layers.values() for matrix in pair)

    # ZeRO-3 keeps the masters elsewhere
    for what in ("moments", "masters")[: 1 if stage == 3 else 2]:
        held = [of_rank[f"{name}-{stage}"][what] for of_rank in seen[world_size]]
        if stage == 0:
            assert held == [num_trained] * world_size
        else:
            assert num_trained <= sum(held) < 1.1 * num_trained  # padded


@every()
def test_published_weights_are_merged_and_plain(seen, directory, name, stage, world_size):
    case = CASES[name]
    run_directory = directory / f"{name}-{stage}-{world_size}"
    published, _ = torch.load(run_directory / "tensors.pt")
    base = base_of(case, directory, getattr(torch, case.dtype))
    assert published.keys() == dict(base.named_parameters()).keys()
    expected = Adapted(base.float(), read_adapter(run_directory / "adapter")).merged()
    rounding, noise = (2**-8, 1e-5) if case.dtype == "bfloat16" else (0.0, 1e-6)

    for n, tensor in published.items():
        assert tensor.dtype == getattr(torch, case.dtype)
        if n in expected:
            assert torch.allclose(
                tensor.float(),
                expected[n],
                rtol=rounding,
                atol=noise,
            ), n
            assert (tensor.float() - base.state_dict()[n]).abs().max() > 0.02
        else:
            assert torch.equal(tensor.float(), base.state_dict()[n]), n

    # to merge changes nothing
    assert len(set(seen[world_size][0][f"{name}-{stage}"]["published"])) == 1


@every()
def test_a_checkpoint_is_known_to_hold_the_weights_of_the_files(
    seen, directory, name, stage, world_size
):
    of_files, of_checkpoint = seen[world_size][0][f"{name}-{stage}"]["frozen"]
    _, frozen = torch.load(directory / f"{name}-{stage}-{world_size}" / "tensors.pt")
    assert (
        of_files
        == of_checkpoint
        == [int(torch.hash_tensor(weight).view(torch.int64)) for weight in frozen.values()]
    )


@every()
def test_an_engine_makes_the_same_weights_of_adapters_alone(
    seen, directory, name, stage, world_size
):
    case = CASES[name]
    run_directory = directory / f"{name}-{stage}-{world_size}"
    made = merged(
        load_file(directory / case.family / "model.safetensors").items(),
        torch.load(run_directory / "alone.pt"),
        scale=SCALE,
        dtype=getattr(torch, case.dtype),
        device=torch.device("cpu"),
    )
    published, _ = torch.load(run_directory / "tensors.pt")
    adapted = read_adapter(run_directory / "adapter")
    found = {n: tensor for n, tensor in made if n.removesuffix(".weight") in adapted}
    assert len(found) == len(adapted)
    assert all(torch.equal(tensor, published[n]) for n, tensor in found.items())


@every("float32")
def test_published_weights_are_those_of_plain_torch(seen, directory, name, stage, world_size):
    published, _ = torch.load(directory / f"{name}-{stage}-{world_size}" / "tensors.pt")
    with torch.no_grad():
        expected = oracle(name, directory).model.merged()

    assert all(
        torch.allclose(
            published[n],
            tensor,
            atol=2e-5,
        )
        for n, tensor in expected.items()
    )


@every()
def test_an_export_is_the_merged_model_and_the_adapter_beside_it(
    seen, directory, name, stage, world_size
):
    case = CASES[name]
    run_directory = directory / f"{name}-{stage}-{world_size}"
    published, _ = torch.load(run_directory / "tensors.pt")
    dtype = getattr(torch, case.dtype)
    merged = AutoModelForCausalLM.from_pretrained(run_directory / "hf", dtype="auto")
    assert merged.dtype == dtype
    assert not list(run_directory.glob(".*"))
    assert all(torch.equal(tensor, merged.state_dict()[n]) for n, tensor in published.items())

    adapted = peft.PeftModel.from_pretrained(base_of(case, directory), run_directory / "adapter")
    assert torch.allclose(
        logits_of(merged.float()),
        logits_of(adapted),
        atol=1e-4 if dtype == torch.float32 else 0.2,
    )
    modes = {path.stat().st_mode for path in (run_directory / "adapter").iterdir()}
    assert len(modes) == 1
    settings = json.loads((run_directory / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(directory / case.family)
    assert settings["r"] == RANK
    assert settings["lora_alpha"] == ALPHA
    assert settings["lora_dropout"] == 0.0
    if dtype == torch.float32:
        assert torch.allclose(
            logits_of(merged),
            logits_of(oracle(name, directory).model),
            atol=5e-3,
        )


@every()
def test_before_training_the_merged_model_is_the_base(seen, directory, name, stage, world_size):
    case = CASES[name]
    merged = AutoModelForCausalLM.from_pretrained(
        directory / f"{name}-{stage}-{world_size}" / "start" / "hf", dtype="auto"
    )
    base = base_of(case, directory, getattr(torch, case.dtype)).state_dict()
    assert all(torch.equal(tensor, base[n]) for n, tensor in merged.state_dict().items())


@every()
def test_a_loaded_checkpoint_continues_bit_equal(seen, name, stage, world_size):
    run = seen[world_size][0][f"{name}-{stage}"]
    assert run["resumed"] == [run["metrics"][SAVED_AT:], run["published"][0]]


@every()
def test_all_ranks_hold_the_same_adapters_and_return_the_same(seen, name, stage, world_size):
    first, *others = [of_rank[f"{name}-{stage}"] for of_rank in seen[world_size]]
    assert len(others) == world_size - 1
    for other in others:
        assert other["metrics"] == first["metrics"]
        assert other["digest"] == first["digest"]
