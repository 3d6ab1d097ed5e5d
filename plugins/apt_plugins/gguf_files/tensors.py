"""The tensors of a file: the names of parameters in GGUF, and the types of numbers."""

from collections.abc import Sequence

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from apt.errors import AptError
from apt.extending import Exportable
from apt_plugins.gguf_files.layouts import CHANGES, CONVERTER
from apt_plugins.gguf_files.writing import Array, Planned

_DTYPE_TYPES = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
_INTEGER_TYPES = {"int8": Type.Q8_0, "int4": Type.Q4_0}
_FEW_BITS = (Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0)
_EMBEDDING_AND_HEAD = ("token_embd.weight", "output.weight")
# llama.cpp's converter writes these tensors as f32 too, as it does norms, biases and vectors.
_ALWAYS_F32 = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "position_embd.weight", "_norm.weight")
_HEAD = "output.weight"  # a file without it has a tied head


def tensor_names(model: Exportable, architecture: str) -> dict[str, str]:
    """The stored parameters of a model by the names of their tensors.

    Raises:
        AptError: a parameter has no name in GGUF.
    """
    architecture_id = next(
        member for member, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture
    )
    name_map = gguf.get_tensor_name_map(architecture_id, len(model.blocks))
    names = dict[str, str]()
    for name in model.shapes:
        tensor = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor is None:
            message = f"{name} of {model.name} has no name in GGUF"
            raise AptError(message, f"{CONVERTER} {model.directory}")
        if tensor != _HEAD or not getattr(model.config, "tie_word_embeddings", False):
            names[tensor] = name
    return names


def planned_of(model: Exportable, tensor: str, name: str, architecture: str, kind: Type) -> Planned:
    """The tensor to write for a parameter."""
    change = CHANGES[architecture]

    def values() -> Array:
        stored: Array = model.read(name).to(torch.float32).numpy()
        return change(tensor, stored, model.config)

    shape = model.shapes[name]
    if tensor.endswith("ssm_conv1d.weight"):
        shape = (shape[0], shape[-1])
    return Planned(tensor, shape, type_of(tensor, shape, kind), values)


def weight_type(model: Exportable) -> Type:
    """The type of the weights: the requested type, or that of the integers or of the checkpoint."""
    if model.type is not None:
        return Type[model.type.upper()]
    return (
        _INTEGER_TYPES[model.integers]
        if model.integers
        else _DTYPE_TYPES.get(model.dtype, Type.F32)
    )


def type_of(name: str, shape: Sequence[int], kind: Type) -> Type:
    """The type of a tensor in a file with weights of type ``kind``, as in llama.cpp's converter.

    Beside weights of 4 or 5 bits, the embeddings and the head have 8 bits: llama.cpp too stores
    them with more bits. A matrix whose rows end with a partial block is f16.
    """
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(_ALWAYS_F32):
        return Type.F32
    if has_partial_blocks(shape, kind):
        return Type.F16
    return Type.Q8_0 if kind in _FEW_BITS and name in _EMBEDDING_AND_HEAD else kind


def has_partial_blocks(shape: Sequence[int], kind: Type) -> bool:
    """True if the rows of a matrix end with a partial block of a type."""
    return len(shape) > 1 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] != 0


def file_type(kind: Type) -> gguf.LlamaFileType:
    """The value of the entry ``general.file_type``."""
    return gguf.LlamaFileType["ALL_F32" if kind is Type.F32 else f"MOSTLY_{kind.name}"]
