"""The types of numbers, and which tensor has which."""

from collections.abc import Sequence

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from apt.extending import Exportable

_OF_DTYPE = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
_OF_INTEGERS = {"int8": Type.Q8_0, "int4": Type.Q4_0}
_FEW_BITS = (Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0)
_BOTH_ENDS = ("token_embd.weight", "output.weight")
# Those that llama.cpp's converter writes as f32 too, beside norms, biases and vectors.
_EXACT = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "position_embd.weight", "_norm.weight")


def own_type(model: Exportable) -> Type:
    """The type of the weights: the given one, that of its integers, or that of the checkpoint."""
    if model.type is not None:
        return Type[model.type.upper()]
    return _OF_INTEGERS[model.integers] if model.integers else _OF_DTYPE.get(model.dtype, Type.F32)


def type_of(name: str, shape: Sequence[int], kind: Type) -> Type:
    """The type of a tensor in a file whose weights are of a type, as llama.cpp's converter has it.

    With 4 or 5 bits the embeddings and the head have 8, since llama.cpp too gives them more. A
    matrix whose rows do not consist of whole blocks is f16.
    """
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(_EXACT):
        return Type.F32
    if smaller_rows(shape, kind):
        return Type.F16
    return Type.Q8_0 if kind in _FEW_BITS and name in _BOTH_ENDS else kind


def smaller_rows(shape: Sequence[int], kind: Type) -> bool:
    """True if the rows of a matrix do not consist of whole blocks of a type."""
    return len(shape) > 1 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] != 0


def file_type(kind: Type) -> gguf.LlamaFileType:
    """The entry ``general.file_type``."""
    return gguf.LlamaFileType["ALL_F32" if kind is Type.F32 else f"MOSTLY_{kind.name}"]
