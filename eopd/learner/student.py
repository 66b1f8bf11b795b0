"""The student in the learner: a backbone on packed tokens, and its output head.

Logits are never made here. ``Student.forward`` runs the backbone and calls ``use_head(hidden_TD,
head)``, so that the chunked objective reads the (possibly tied) head weight inside the forward of
the wrapped module: under ZeRO-3 the whole weight exists nowhere else.

What a family does between head and logits (a scale, a soft-cap) is read from its config, and
checked on load against the model's own logits. A family that does anything else is refused: the
student would be trained as another model than the rollout engines serve.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from eopd.config import StudentConfig
from eopd.hub import model_directory
from eopd.learner.attention import choose_attention, may_take_varlen, sequences_of, try_varlen
from eopd.learner.lora import add_adapters
from eopd.loss.chunked import Head

T = TypeVar("T")

# Config keys that scale the logits, and the power they enter with (Cohere, Muse; Granite divides).
_SCALE_POWERS = {"logit_scale": 1, "output_multiplier": 1, "logits_scaling": -1}

# Config keys of attention that sees only a window of its sequence, and the length below which a
# window is tried on load.
_WINDOWS = ("sliding_window", "attention_chunk_size")
_LONGEST_PROOF = 512


class Student(nn.Module):
    """A Hugging Face causal language model behind a packing-aware forward.

    Args:
        model: the model.
        num_tokens: rows of the head from here on name no token, and are left out; None: there are
            none.
    """

    def __init__(self, model: PreTrainedModel, *, num_tokens: int | None = None) -> None:
        super().__init__()
        self.model = model
        padded = num_tokens is not None and num_tokens < model.config.get_text_config().vocab_size
        self._num_tokens = num_tokens if padded else None
        self.logit_scale, self.logit_softcap = _head_form(model.config.get_text_config().to_dict())

    @property
    def head(self) -> Head:
        """The head over the V ids that are tokens; under ZeRO-3 its weight is whole only inside
        ``forward``.
        """
        layer = self.model.get_output_embeddings()
        weight_VD, bias_V = layer.weight, layer.bias
        if self._num_tokens is not None:
            weight_VD = weight_VD[: self._num_tokens]
            bias_V = None if bias_V is None else bias_V[: self._num_tokens]

        return Head(
            weight_VD=weight_VD,
            bias_V=bias_V,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
        )

    @property
    def whole_head_VD(self) -> nn.Parameter:
        """The head's weight as a parameter, padding included."""
        weight: nn.Parameter = self.model.get_output_embeddings().weight
        return weight

    def forward(
        self, input_ids_T: Tensor, position_ids_T: Tensor, use_head: Callable[[Tensor, Head], T]
    ) -> T:
        """Run the backbone on packed tokens and return ``use_head(hidden_TD, head)``.

        Args:
            input_ids_T: int64, trajectories end to end.
            position_ids_T: int64, restarting at 0 with every trajectory: attention never crosses a
                restart.
            use_head: what to make of the hidden states: a tensor or a tuple of them (ZeRO-3 looks
                into the result).
        """
        output = self.model.base_model(
            input_ids=input_ids_T[None],
            position_ids=position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            **sequences_of(self.model, position_ids_T),
        )
        return use_head(output.last_hidden_state[0], self.head)


def load_student(
    config: StudentConfig,
    *,
    activation_checkpointing: bool,
    device: str | torch.device = "cpu",
    seed: int = 0,
    num_tokens: int | None = None,
) -> Student:
    """Load ``config.model`` in ``config.dtype`` onto ``device``, prove there that packing and head
    are understood, and add adapters, drawn from ``seed``, where the config has them. ``num_tokens``
    is that of ``Student``.

    Raises:
        ValueError: packed sequences see each other, the model makes its logits in an unknown way,
            or recomputed layers would drop out activations.
        ConfigError: ``lora.target_modules`` cannot be adapted.
    """
    directory = model_directory(config.model, weights=True)
    model_config = AutoConfig.from_pretrained(directory)
    attention = choose_attention(model_config.get_text_config().to_dict())
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, config.chosen_dtype), attn_implementation=attention
    ).to(device)
    student = Student(model, num_tokens=num_tokens)
    on_gpu = torch.device(device).type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_gpu else None
    if may_take_varlen(model, dtype=config.chosen_dtype, capability=capability):
        _try_varlen(student, config.chosen_dtype)

    _prove_packing(student)
    _prove_head(student)
    if config.lora is not None:
        add_adapters(model, config.lora, seed=seed)

    if activation_checkpointing:
        _recompute_layers(model)
        _prove_no_dropout(student)

    return student


def _recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of every layer for backward.

    transformers (5.19) does so for layers in training mode, while a loaded model is in evaluation
    mode: only the layers' own flag is raised, so that dropout inside them stays off.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _head_form(text_config: Mapping[str, object]) -> tuple[float, float | None]:
    scale = 1.0
    for key, power in _SCALE_POWERS.items():
        value = text_config.get(key)
        if isinstance(value, int | float):
            scale *= float(value) ** power

    softcap = text_config.get("final_logit_softcapping")
    return scale, float(softcap) if isinstance(softcap, int | float) else None


def _packed_pair(student: Student) -> tuple[Tensor, Tensor, int]:
    """Returns ids and positions of a packed pair, and the length of its first sequence, which is
    longer than every window and chunk of the attention that is short enough to try.
    """
    config = student.model.config.get_text_config().to_dict()
    windows = [
        size
        for key in _WINDOWS
        if isinstance(size := config.get(key), int) and size < _LONGEST_PROOF
    ]
    length = max([6, *windows]) + 1
    row = torch.arange(length + 5, device=student.model.device)
    return row % student.head.weight_VD.shape[0], row % length, length


@torch.no_grad()
def _try_varlen(student: Student, dtype: str) -> None:
    """Gives the model the attention by sequences, if it is the same there on a packed pair."""
    ids, positions, _ = _packed_pair(student)
    try_varlen(student.model, dtype, lambda: student(ids, positions, _hidden))


@torch.no_grad()
def _prove_packing(student: Student) -> None:
    """Checks that the second sequence of a packed pair does not change when the first one does."""
    ids, positions, length = _packed_pair(student)
    first = torch.arange(len(ids), device=ids.device) < length
    hidden, hidden_of_other = (
        student(
            torch.where(first, other, ids),
            positions,
            _hidden,
        )
        for other in (ids, ids.flip(0))
    )
    if not hidden.isfinite().all():
        raise ValueError(
            f"student.model: {_name(student)} gives numbers that are not finite: its weights hold "
            f"such, or overflow in {hidden.dtype}"
        )

    if not _close(hidden[length:], hidden_of_other[length:]):
        raise ValueError(
            f"student.model: {_name(student)} sees other sequences of a packed batch; it "
            "cannot be trained packed"
        )


@torch.no_grad()
def _prove_no_dropout(student: Student) -> None:
    """Checks that recomputed layers do not drop out activations.

    Layers that do so by their own training flag (Doge) would, since recomputation raises the flag.
    """
    row = torch.arange(12, device=student.model.device)
    ids = row % student.head.weight_VD.shape[0]
    if not _close(student(ids, row, _hidden), student(ids, row, _hidden)):
        raise ValueError(
            f"student.model: {_name(student)} drops out activations while its layers are "
            "recomputed; set its dropout to 0, or learner.activation_checkpointing to false"
        )


@torch.no_grad()
def _prove_head(student: Student) -> None:
    """Checks that ``Head.logits`` equals the model's logits, also where they are large: a soft-cap
    is invisible near zero.
    """
    row = torch.arange(5, device=student.model.device)
    ids = row % student.head.weight_VD.shape[0]
    hidden_TD = student(ids, row, _hidden)
    entered: list[Tensor] = []

    def enlarge(_layer: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        entered.append(arguments[0][0])
        return (arguments[0] * gain,)

    gain = 50.0 / functional.linear(hidden_TD, student.head.weight_VD).abs().max().item()
    handle = student.model.get_output_embeddings().register_forward_pre_hook(enlarge)
    logits_TV = student.model(input_ids=ids[None], use_cache=False).logits[
        0, :, : len(student.head.weight_VD)
    ]
    handle.remove()
    if not (
        _close(entered[0], hidden_TD) and _close(student.head.logits(hidden_TD * gain), logits_TV)
    ):
        raise ValueError(
            f"student.model: {_name(student)} makes its logits in a way this learner does not know "
            f"(assumed scale {student.logit_scale}, soft-cap {student.logit_softcap})"
        )


def _hidden(hidden_TD: Tensor, _head: Head) -> Tensor:
    return hidden_TD


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Returns whether two tensors are equal up to rounding: to 1e-5 of the largest entry in float32,
    to 1/64 in half precision.
    """
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2.0**-6
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def _name(student: Student) -> str:
    return type(student.model).__name__
