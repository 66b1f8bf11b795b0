"""The learner's actor: one rank of the gang (``gang.py``).

Heavy libraries are imported inside the actor, never in the driver.
"""

import logging
import socket
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import ObjectLostError

from eopd.adapters import LORA_A, WEIGHT
from eopd.config import Config
from eopd.hub import model_directory
from eopd.metrics import reduce
from eopd.preflight.environment import require_gpu
from eopd.preflight.weights import read_tensors
from eopd.run.directory import RunDirectory
from eopd.run.lock import Holder, require_same
from eopd.runtime.actors import Actor
from eopd.types import (
    EvalStats,
    Float32Array,
    Header,
    Int32Array,
    LearnerStats,
    PackedBatch,
    PolicyVersion,
    RunFailedError,
    TrajectoryKey,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from eopd.adapters import CheckpointTensor
    from eopd.learner.flops import Cost
    from eopd.learner.learner import LearnerRank
    from eopd.weights.transfer import WeightSender

_PLAIN = ("F32", "BF16", "F16")  # a weight that is neither quantized nor packed
_log = logging.getLogger(__name__)


class LearnerActor(Actor):
    """Hosts one ``LearnerRank`` and its end of the weight channel."""

    _rank: "LearnerRank"
    _cost: "Cost"
    _sender: "WeightSender"
    _share: PackedBatch

    def rendezvous(self) -> tuple[str, int]:
        """Returns this node's address and a free port on it, for the ranks to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(  # noqa: D102
        self,
        config: Config,
        rank: int,
        address: str,
        port: int,
        incarnation: int,
        driver: Holder | None,
    ) -> None:
        if driver is not None:
            require_same(config.run.path, driver)

        require_gpu(config.learner.gpus)
        from eopd.learner.deepspeed_backend import DeepspeedBackend
        from eopd.learner.flops import Cost
        from eopd.learner.learner import LearnerRank
        from eopd.tokenizer import num_tokens
        from eopd.weights.layout import ModelSource
        from eopd.weights.transfer import WeightSender

        self._rank = LearnerRank(
            DeepspeedBackend,
            config.student,
            config.learner,
            config.loss,
            temperature=config.rollout.temperature,
            num_tokens=num_tokens(model_directory(config.student.model)),
            total_batches=config.run.batches,
            seed=config.run.seed,
            entropy_bounds={teacher.name: teacher.entropy_bound for teacher in config.teachers},
            broken=RunDirectory(config.run.path).broken,
            rank=rank,
            world_size=config.learner.ranks,
            master_address=address,
            master_port=port,
        )
        self._rank.version = PolicyVersion(incarnation, 0)
        self._headers: list[Header] = []  # of the batch that is being trained
        self._busy_s = 0.0
        self._cost = Cost(self._rank.model, config.learner.peak_flops)
        tensors, scale = sent_tensors(self._rank.model, config)
        self._sends_adapters = scale is not None
        if config.student.lora is not None and not self._sends_adapters and rank == 0:
            _log.warning("engines cannot merge adapters with what they read: all weights are sent")

        self._sender = WeightSender(
            ModelSource(
                tensors,
                rank=rank,
                shape=self._rank.backend.shape,
                gathered=self._rank.backend.gathered,
                scale=scale,
            ),
            rank=rank,
            backend=config.weights_backend,
            address=address,
            bucket_bytes=config.weights.bucket_bytes,
            timeout_s=config.weights.timeout_s,
            connect_timeout_s=config.weights.connect_timeout_s,
        )

    def take(self, share: PackedBatch) -> list[TrajectoryKey]:
        """Fetch this rank's share of a batch, for ``accumulate``, ``step`` or ``evaluate``.

        Args:
            share: the share, whose bodies are references.

        Returns:
            The trajectories whose bodies are lost; empty once everything is here. Where some were not
            found, and each of them is by now, all count as lost: they were not taken.
        """
        try:
            self._share = share.with_bodies(ray.get([stored.body for stored in share.stored()]))
        except ObjectLostError:
            lost = [stored.header.key for stored in share.stored() if _is_lost(stored.body)]
            return lost or [stored.header.key for stored in share.stored()]

        return []

    def accumulate(self) -> None:
        """Add up the gradients of the share that was taken, a part of a batch."""
        import torch

        with self._measured():
            self._rank.accumulate(self._share)
            if torch.cuda.is_available():  # backward was only enqueued
                torch.cuda.synchronize()

    def step(self) -> LearnerStats:
        """Update the student from the share that was taken and what was accumulated before, and
        measure the costs of all ranks.
        """
        from eopd.learner.ranks import gather_all

        with self._measured():
            stats = self._rank.step(self._share)

        costs = self._cost.metrics(self._headers, self._busy_s)
        self._headers, self._busy_s = [], 0.0
        return replace(stats, metrics={**stats.metrics, **reduce(gather_all([costs]))})

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Counts the seconds of the block, and the trajectories of the share."""
        started = time.monotonic()
        yield
        self._busy_s += time.monotonic() - started
        self._headers += [stored.header for stored in self._share.stored()]

    def evaluate(self) -> EvalStats:
        """Measure student against teacher on the share that was taken."""
        return self._rank.evaluate(self._share)

    def save(self, directory: Path) -> None:  # noqa: D102
        self._rank.save(directory)

    def load(self, directory: Path, fresh_optimizer: bool) -> None:
        """Continue from a checkpoint.

        Raises:
            RunFailedError: engines would merge its adapters with other weights than it holds.
        """
        files = self._rank.frozen() if self._sends_adapters else []
        self._rank.load(directory, fresh_optimizer=fresh_optimizer)
        if self._sends_adapters and self._rank.frozen() != files:
            raise RunFailedError(
                "student.model: its files hold other weights than the checkpoint, whose adapters "
                "engines merge with those of the files; give the model that the run began with, or "
                "set rollout.vllm: {load_format: auto}, and engines are sent all weights"
            )

    def ping(self) -> None:
        """Returns when the rank answers, whether it has started or not."""

    def version(self) -> PolicyVersion:  # noqa: D102
        return self._rank.version

    def export(self, directory: Path, adapter: Path) -> None:  # noqa: D102
        self._rank.export(directory, adapter)

    def probe(self, token_ids: Int32Array) -> Float32Array:  # noqa: D102
        return self._rank.probe(token_ids)

    def open_wire(self, engines: int, secret: str) -> list[dict[str, object]]:  # noqa: D102
        return self._sender.open(engines, secret)

    def accept_engines(self) -> None:  # noqa: D102
        self._sender.accept()

    def send_weights(self) -> int:  # noqa: D102
        return self._sender.send()

    def close(self) -> None:  # noqa: D102
        self._rank.close()


def sent_tensors(
    model: "PreTrainedModel", config: Config
) -> "tuple[Mapping[str, CheckpointTensor], float | None]":
    """Returns what the engines are sent: adapters alone and their scale, where an engine finds each
    weight that they belong to in the model's files; otherwise all weights, and None.
    """
    from eopd.learner.lora import adapter_tensors, whole_tensors

    lora = config.student.lora
    if lora is not None and config.may_send_adapters:
        adapters = adapter_tensors(model)
        weights = {name.removesuffix(LORA_A) + WEIGHT for name in adapters if LORA_A in name}
        if weights <= _weights_in(model_directory(config.student.model)):
            return adapters, lora.scale

    return whole_tensors(model), None


def _weights_in(directory: Path) -> Set[str]:
    """Returns the names of the tensors in a model's files; none where transformers and vLLM might
    read different files, or where there are other than plain weights.
    """
    tensors = read_tensors(directory, standard_names=True) or {}
    files = {tensor.file for tensor in tensors.values()}
    is_plain = all(tensor.dtype in _PLAIN for tensor in tensors.values())
    return tensors.keys() if is_plain and files == set(directory.rglob("*.safetensors")) else set()


def _is_lost(body: ray.ObjectRef) -> bool:
    try:
        ray.get(body)
    except ObjectLostError:
        return True

    return False
