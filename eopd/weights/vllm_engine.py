"""The engine's end inside vLLM: a registered ``WeightTransferEngine`` that loads what ``WeightReceiver`` took.

vLLM's handshake, as it is used here (checked against 0.32.0):
    init_weight_transfer_engine(InitInfo)      leave the old group, join the new one
    session {"phase": "receive"}               start the receiving thread, return at once: generation goes on
    session {"phase": "check"}                 raise unless everything arrived whole
    ... pause_generation ...
    session {"phase": "load"}                  layer-wise reload from host memory, repack, set the label
A session is start_weight_update, update_weights, finish_weight_update. Each phase is a session of its own, because the
worker refuses to start one while another is active: one that spanned phases would stay active after a transfer that
was given up, and no engine would ever take weights again.

On CPU, linear weights are repacked after loading and the original parameters emptied, so ``model.load_weights`` must
run between ``initialize_layerwise_reload`` and ``finalize_layerwise_reload``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from eopd.types import WeightTransferError
from eopd.weights.transfer import InitInfo, WeightReceiver

ENGINE_NAME = "eopd"


@dataclass
class _VllmInitInfo(WeightTransferInitInfo):
    backend: Literal["gloo", "nccl"]
    address: str
    port: int
    rank: int
    world_size: int
    connect_timeout_s: float
    timeout_s: float
    buckets: list[list[dict[str, object]]]


@dataclass
class _VllmUpdateInfo(WeightTransferUpdateInfo):
    phase: Literal["receive", "check", "load"]


class StagedWeightTransferEngine(WeightTransferEngine[_VllmInitInfo, _VllmUpdateInfo]):
    """Receives while generation goes on, loads while it is paused."""

    init_info_cls = _VllmInitInfo
    update_info_cls = _VllmUpdateInfo
    supports_draft_weight_update = False

    _receiver: WeightReceiver | None = None
    _loaded = False

    def init_transfer_engine(self, init_info: _VllmInitInfo) -> None:
        """Leave the group there was and join the sender's; the thread of a transfer under way ends by itself.

        Raises:
            WeightTransferError: not all members have joined in time.
        """
        self.shutdown()
        self._receiver = WeightReceiver(InitInfo(**vars(init_info)), worker=self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Nothing is touched before the load."""
        self._loaded = False

    def update_weights(self, update_info: dict[str, object]) -> None:
        """One phase. Overridden because the base class ends in a device synchronisation that CPU lacks."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: _VllmUpdateInfo) -> None:
        """Start receiving, check or load what was received.

        Raises:
            WeightTransferError: no sender has been joined, or the transfer failed. Nothing was loaded.
        """
        if self._receiver is None:
            raise WeightTransferError("in no weight transfer group: connect first")
        if update_info.phase == "receive":
            self._receiver.start()
            return
        if update_info.phase == "check":
            self._receiver.check()
            return
        received = self._receiver.take()
        initialize_layerwise_reload(self.model)
        self.model.load_weights(received)
        self._loaded = True

    def finish_weight_update(self) -> None:
        """Repack the layers; nothing to do after a phase that loads nothing."""
        if not self._loaded:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = None


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """On CPU a head multiplies with a packed copy of its weight, made when the head itself is loaded. A tied head never
    is: its weight changed with the embedding, its packed copy did not (vLLM 0.32.0, ``dispatch_cpu_unquantized_gemm``).
    """
    modules = list(model.modules())
    embeddings = {_address(module) for module in modules if type(module) is VocabParallelEmbedding}
    for module in modules:
        if isinstance(module, ParallelLMHead) and _address(module) in embeddings:
            module.quant_method.process_weights_after_loading(module)


def _address(module: torch.nn.Module) -> int:
    return module.get_parameter("weight").data_ptr()


def register() -> None:
    """Make the engine known under ``ENGINE_NAME``; safe to call more than once in a process."""
    if ENGINE_NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(ENGINE_NAME, StagedWeightTransferEngine)
