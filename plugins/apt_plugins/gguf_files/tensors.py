"""The tensors of a file: the parameters of a model, by their names in GGUF."""

import torch
from gguf import GGMLQuantizationType as Type

from apt.extending import Exportable
from apt_plugins.gguf_files.layouts import CHANGES, names_in_gguf
from apt_plugins.gguf_files.number_types import type_of
from apt_plugins.gguf_files.writing import Array, Planned


def tensor_names(model: Exportable, architecture: str) -> dict[str, str]:
    """The stored parameters of a model by the names of their tensors.

    Raises:
        AptError: a parameter has no name in GGUF.
    """
    names = names_in_gguf(model.module, architecture, len(model.blocks))
    tied = getattr(model.config, "tie_word_embeddings", False)
    names = {tensor: name for tensor, name in names.items() if name in model.shapes}
    return {t: n for t, n in names.items() if not (tied and t == "output.weight")}


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
