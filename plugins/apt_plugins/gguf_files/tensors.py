"""The tensors of a file: the parameters of a model, by their names in GGUF."""

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from apt.errors import AptError
from apt.extending import Exportable
from apt_plugins.gguf_files.layouts import CHANGES, CONVERTER
from apt_plugins.gguf_files.number_types import type_of
from apt_plugins.gguf_files.writing import Array, Planned

_HEAD = "output.weight"  # that of the embeddings, if the file has none


def tensor_names(model: Exportable, architecture: str) -> dict[str, str]:
    """The stored parameters of a model by the names of their tensors.

    Raises:
        AptError: a parameter has no name in GGUF.
    """
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, len(model.blocks))
    found = dict[str, str]()
    for name in model.shapes:
        tensor = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor is None:
            fault = f"{name} of {model.name} has no name in GGUF"
            raise AptError(fault, f"{CONVERTER} {model.directory}")
        if tensor != _HEAD or not getattr(model.config, "tie_word_embeddings", False):
            found[tensor] = name
    return found


def planned_of(model: Exportable, tensor: str, name: str, architecture: str, kind: Type) -> Planned:
    """A parameter as a tensor of a file."""
    change = CHANGES[architecture]

    def values() -> Array:
        stored: Array = model.read(name).to(torch.float32).numpy()
        return change(tensor, stored, model.config)

    shape = model.shapes[name]
    if tensor.endswith("ssm_conv1d.weight"):
        shape = (shape[0], shape[-1])
    return Planned(tensor, shape, type_of(tensor, shape, kind), values)
