"""The engine's end inside vLLM: a ``WeightTransferEngine`` that loads what ``WeightReceiver`` took.
``vllm_plugin.py`` registers it in every process of vLLM.

Calls to the engine, in order (checked against 0.32.0):
    init_weight_transfer_engine(InitInfo)      leave the old group, join the new one; weight_failure.
                                               The first worker joins, the others read its memory
    begin_weights                              start the receiving thread, return at once: generation goes on
    check_weights                              tell whether everything arrived whole
    ... pause_generation ...
    start_weight_update, update_weights        layer-wise reload from host memory
    finish_weight_update                       repack, set the label
Every call waits for the step under way of the engine, so as few are made as can be. The last three
are a session of vLLM's. None spans what may be given up, since a worker starts no second session
while one is active.

All but those of the session may fail without harm. They raise nothing here, they return why they
failed, as ``weight_failure`` does for the first. For vLLM stops reading replies at the first worker
that raises, and takes the replies of the others for those of its next call (0.32.0,
``MultiprocExecutor.collective_rpc``).

On CPU, linear weights are repacked after loading and the original parameters emptied, so
``model.load_weights`` must run between ``initialize_layerwise_reload`` and
``finalize_layerwise_reload``.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol, cast

import torch
from vllm.config import WeightTransferConfig
from vllm.distributed.parallel_state import get_pp_group, get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from eopd.adapters import merged
from eopd.types import WeightTransferError
from eopd.weights.transfer import InitInfo, WeightReader, WeightReceiver

ENGINE_NAME = "eopd"
logger = logging.getLogger(__name__)


class _VllmInitInfo(InitInfo, WeightTransferInitInfo):
    """``InitInfo`` under the base class of vLLM, which makes it of the fields it hands through."""


class StagedWeightTransferEngine(WeightTransferEngine[_VllmInitInfo, WeightTransferUpdateInfo]):
    """Receives while generation goes on, loads while it is paused."""

    init_info_cls = _VllmInitInfo
    update_info_cls = WeightTransferUpdateInfo
    supports_draft_weight_update = False

    failure = ""  # of the last call
    _receiver: WeightReceiver | WeightReader | None = None
    _never_sent: Collection[str] = ()

    def init_transfer_engine(self, init_info: _VllmInitInfo) -> None:
        """Leave the last group and join the sender's; a transfer under way ends by itself."""
        self.shutdown()
        workers = get_world_group()
        with self._keeps_failure():
            if workers.is_first_rank:
                self._receiver = WeightReceiver(init_info)

        memory = workers.broadcast_object(self._receiver.memory if self._receiver else "")
        if memory and not workers.is_first_rank:
            with self._keeps_failure():
                self._receiver = WeightReader(init_info, memory)

    def begin(self) -> str:
        """Start receiving; returns why it cannot be, empty where it can."""
        with self._keeps_failure():
            self._joined().start()

        return self.failure

    def check(self) -> str:
        """Returns why what was sent did not arrive whole; empty where it did."""
        with self._keeps_failure():
            self._joined().check()

        return self.failure

    def start_weight_update(self) -> None:
        """Nothing is touched before the load."""

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Load; overridden since the base class ends in a synchronisation of the device, which a CPU
        lacks.
        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:
        """Load what was received.

        Raises:
            WeightTransferError: it is not there.
        """
        receiver = self._joined()
        weights = receiver.take()
        if receiver.scale is not None:
            weights = self._merged(dict(weights), receiver.scale)

        self._never_sent = _never_sent(self.model)
        initialize_layerwise_reload(self.model)
        self.model.load_weights(weights)

    def _merged(
        self, adapters: Mapping[str, torch.Tensor], scale: float
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights of the model's own files, merged with what the learner has trained."""
        config = replace(self.vllm_config.load_config, use_tqdm_on_load=False)
        loader = cast(DefaultModelLoader, get_model_loader(config))
        return merged(
            loader.get_all_weights(self.model_config, self.model),
            adapters,
            scale=scale,
            dtype=self.model_config.dtype,
            device=self.device,
        )

    def _joined(self) -> WeightReceiver | WeightReader:
        if self._receiver is None:
            raise WeightTransferError("in no weight transfer group: connect first")

        return self._receiver

    @contextmanager
    def _keeps_failure(self) -> Iterator[None]:
        self.failure = ""
        try:
            yield
        except Exception as error:
            self.failure = str(error) or type(error).__name__
            logger.warning(
                "weights: %s", self.failure, exc_info=not isinstance(error, WeightTransferError)
            )

    def finish_weight_update(self) -> None:
        """Repack the layers."""
        with _expecting(self._never_sent):
            finalize_layerwise_reload(self.model, self.model_config)

        if self.device.type == "cpu":
            _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._receiver is not None:
            self._receiver.close()

        self._receiver = None


class WeightWorker:
    """Methods that vLLM's worker has in addition, for ``collective_rpc``."""

    weight_transfer_engine: StagedWeightTransferEngine
    model_runner: "_ModelRunner"

    def weight_failure(self) -> str:
        """Returns why this worker has joined no group; empty where it has."""
        return self.weight_transfer_engine.failure

    def begin_weights(self) -> str:
        """Start receiving; returns why it cannot be, empty where it can."""
        return self.weight_transfer_engine.begin()

    def check_weights(self) -> str:
        """Returns why what was sent did not arrive whole; empty where it did."""
        return self.weight_transfer_engine.check()

    def leave_out_padding(self, num_tokens: int) -> None:
        """Make ids from ``num_tokens`` on impossible, if this worker computes logits: of a pipeline the
        last stage alone does, and others may have no layer for it.
        """
        if get_pp_group().is_last_rank:
            leave_out_padding(self.model_runner.get_model(), num_tokens)


class _ModelRunner(Protocol):
    def get_model(self) -> torch.nn.Module: ...


def leave_out_padding(model: torch.nn.Module, num_tokens: int) -> None:
    """Set the logits of ids from ``num_tokens`` on to -inf: sampling and every log-probability are
    over the others.

    Raises:
        TypeError: the model computes its logits without vLLM's layer for it.
    """

    def mask(
        _: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object], logits: object
    ) -> None:
        if isinstance(logits, torch.Tensor):  # other ranks of a tensor-parallel group may have none
            first = _shard_start(args[0]) if kwargs.get("skip_gather") else 0
            logits[..., max(0, num_tokens - first) :] = -torch.inf

    layers = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    for layer in layers:
        layer.register_forward_hook(mask, with_kwargs=True)

    if not layers:
        raise TypeError(
            f"{type(model).__name__} has no LogitsProcessor: its padding cannot be left out"
        )


def _shard_start(head: object) -> int:
    """Returns the first id of a rank's share of the head, where its logits stay with it."""
    if not isinstance(head, VocabParallelEmbedding):
        raise TypeError(f"{type(head).__name__} is no sharded head")

    return int(head.shard_indices.org_vocab_start_index)


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Packs the weights of tied heads again.

    On CPU a head multiplies with a packed copy of its weight, made when the head itself is loaded.
    A tied head never is: its weight changed with the embedding, its packed copy did not (vLLM
    0.32.0, ``dispatch_cpu_unquantized_gemm``).
    """
    for head in _tied_heads(model):
        head.quant_method.process_weights_after_loading(head)


def _tied_heads(model: torch.nn.Module) -> list[ParallelLMHead]:
    modules = list(model.modules())
    embeddings = {_address(module) for module in modules if type(module) is VocabParallelEmbedding}
    return [
        module
        for module in modules
        if isinstance(module, ParallelLMHead) and _address(module) in embeddings
    ]


def _never_sent(model: torch.nn.Module) -> set[str]:
    """Returns the kinds of layers that no checkpoint holds: those that only compute, like a rotary
    embedding, and tied heads.
    """
    layers = [module for module in model.modules() if not list(module.parameters(recurse=False))]
    return {type(layer).__name__ for layer in (*layers, *_tied_heads(model))}


@contextmanager
def _expecting(never_sent: Collection[str]) -> Iterator[None]:
    """Silences vLLM's warning, twice a sync, that these layers were not loaded (0.32.0,
    ``finalize_layerwise_reload``); that of any other layer is still logged.
    """

    def is_news(record: logging.LogRecord) -> bool:
        kind, _, text = record.getMessage().partition(": ")
        return text != "Failed to load weights" or kind not in never_sent

    vllm_logger = logging.getLogger(finalize_layerwise_reload.__module__)
    vllm_logger.addFilter(is_news)

    try:
        yield
    finally:
        vllm_logger.removeFilter(is_news)


def _address(module: torch.nn.Module) -> int:
    return module.get_parameter("weight").data_ptr()


def engine_options() -> dict[str, object]:
    """Returns the options that an engine needs in order to receive weights."""
    return {
        "weight_transfer_config": WeightTransferConfig(backend=ENGINE_NAME),
        "worker_extension_cls": f"{__name__}.{WeightWorker.__name__}",
    }


def register() -> None:
    """Register the transfer engine under ``ENGINE_NAME``; may be called again in a process."""
    if ENGINE_NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(ENGINE_NAME, StagedWeightTransferEngine)
