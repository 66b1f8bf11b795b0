"""How a checkpoint stores the learner's tensors: what engines know, since they have loaded one.

transformers keeps some tensors in another form than checkpoints do: all experts of a mixture in one tensor, or under
another name. It remembers how it brought them there, and turns that round when it saves. The same is done here to one
tensor at a time. Left out: tensors that a checkpoint stores as one and the model keeps as several. Checked against
transformers 5.19.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from eopd.config import ConfigError


def as_stored(model: PreTrainedModel) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
    """From a tensor by the model's name for it to the tensors of a checkpoint, by their names.

    Example: ``mlp.experts.gate_up_proj`` [E, 2 I, D] becomes ``mlp.experts.0.gate_proj.weight`` [I, D] and 2 E - 1
    others. Where nothing is to be done, the tensor is handed back as it is.
    """

    def stored(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        return dict(revert_weight_conversion(model, {name: tensor}))

    return stored


def require_separable(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The names of a checkpoint of ``model``, which is on the meta device.

    Raises:
        ConfigError: a tensor of a checkpoint is made of several of the model's.
    """
    state = model.state_dict()
    tensors = {name: state[name] for name in names}
    together = {name: tensor.shape for name, tensor in revert_weight_conversion(model, dict(tensors)).items()}
    alone: dict[str, torch.Size] = {}
    for name, tensor in tensors.items():
        for stored, made in as_stored(model)(name, tensor).items():
            if stored in alone or together.get(stored) != made.shape:
                raise ConfigError(
                    f"{type(model).__name__} keeps {stored} of a checkpoint in several tensors, which cannot be sent "
                    "to rollout engines one by one; take another student"
                )
            alone[stored] = made.shape
    return set(alone)
