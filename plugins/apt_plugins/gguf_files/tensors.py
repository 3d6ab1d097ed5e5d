"""The tensors of a file: the names of parameters in GGUF, and the types of numbers."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from apt.errors import AptError
from apt.extending import Exportable
from apt_plugins.gguf_files.grids import GRIDS
from apt_plugins.gguf_files.layouts import CHANGES, CONVERTER
from apt_plugins.gguf_files.writing import Array, Planned

_DTYPE_TYPES = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
PLAIN_TYPES = tuple(_DTYPE_TYPES.values())
"""The types of numbers that are not quantised."""

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


def planned_of(
    model: Exportable,
    tensor: str,
    name: str,
    architecture: str,
    kind: Type,
    stored: Callable[[], Array] | None = None,
) -> Planned:
    """The tensor to write for a parameter.

    Args:
        tensor, name: its names in GGUF and in the model.
        kind: the type of the weights of the file, or with ``stored`` the type of this tensor.
        stored: returns its bytes in the original file.
    """
    change = CHANGES[architecture]
    if (encoded := model.encoded.get(name)) is not None:
        encoded_type, rows = Type[encoded.level.upper()], encoded.rows.numpy()
        return Planned(
            tensor, model.shapes[name], encoded_type, lambda: change(tensor, rows, model.config),
            raw=True, parameter=name,
        )  # fmt: skip

    def values() -> Array:
        read: Array = model.read(name).to(torch.float32).numpy()
        return change(tensor, read, model.config)

    shape = model.shapes[name]
    if tensor.endswith("ssm_conv1d.weight"):
        shape = (shape[0], shape[-1])
    own_type = type_of(tensor, shape, kind) if stored is None else kind
    return Planned(tensor, shape, own_type, values, parameter=name, stored=stored)


def weight_type(model: Exportable) -> Type | None:
    """The type of the weights.

    It is the requested type, or that of the integers, or that of the checkpoint. None if the model
    was made from a file, whose quantised tensors keep their types.
    """
    if model.type is not None:
        return Type[model.type.upper()]
    if model.integers:
        return _INTEGER_TYPES[model.integers]
    return None if model.original is not None else plain_type(model)


def plain_type(model: Exportable) -> Type:
    """The type of the dtype of a model."""
    return _DTYPE_TYPES.get(model.dtype, Type.F32)


def most_common_type(tensors: Sequence[Planned]) -> Type:
    """The type of most weights."""
    sizes = Counter[Type]()
    for planned in tensors:
        sizes[planned.type] += math.prod(planned.shape)
    return max(sizes, key=lambda kind: sizes[kind])


def can_write(kind: Type) -> bool:
    """True if values can be written in a type."""
    return kind in PLAIN_TYPES or any(grid.type is kind for grid in GRIDS)


def type_of(name: str, shape: Sequence[int], kind: Type) -> Type:
    """The type of a tensor in a file with weights of type ``kind``, as in llama.cpp's converter.

    Beside weights of 4 or 5 bits, the embeddings and the head have 8 bits: llama.cpp too stores
    them with more bits. A matrix whose rows end with a partial block is f16.
    """
    if is_always_f32(name, shape):
        return Type.F32
    if has_partial_blocks(shape, kind):
        return Type.F16
    return Type.Q8_0 if kind in _FEW_BITS and name in _EMBEDDING_AND_HEAD else kind


def is_always_f32(name: str, shape: Sequence[int]) -> bool:
    """True for a tensor that is f32 in every file: a vector, a norm, a router or a convolution."""
    return len(shape) < 2 or not name.endswith(".weight") or name.endswith(_ALWAYS_F32)


def has_partial_blocks(shape: Sequence[int], kind: Type) -> bool:
    """True if the rows of a matrix end with a partial block of a type."""
    return len(shape) > 1 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] != 0


def file_type(kind: Type) -> gguf.LlamaFileType:
    """The value of the entry ``general.file_type``."""
    if kind is Type.F32:
        return gguf.LlamaFileType.ALL_F32
    names = (f"MOSTLY_{kind.name}", f"MOSTLY_{kind.name}_M", f"MOSTLY_{kind.name}_MOE")
    found = [name for name in names if name in gguf.LlamaFileType.__members__]
    return gguf.LlamaFileType[found[0]] if found else gguf.LlamaFileType.GUESSED
