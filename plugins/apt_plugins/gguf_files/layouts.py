"""How the tensors of a family differ between transformers and GGUF.

transformers converts them when it reads a GGUF file, in its ``modeling_gguf_pytorch_utils``. These
are the inverses.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

from apt.errors import AptError
from apt.extending import Exportable
from apt_plugins.gguf_files.writing import Array

Change = Callable[[str, Array, Any], Array]
"""A function of a name in GGUF, values in fp32, and the configuration."""

CONVERTER = "run llama.cpp's convert_hf_to_gguf.py"


def _same(name: str, values: Array, config: Any) -> Array:
    return values


def _rotary_pairs(name: str, values: Array, config: Any) -> Array:
    """The rows of q and k in pairs that the rotary embedding turns: 0, n/2, 1, n/2 + 1, …"""
    heads = {
        "attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads
    }.get(name.split(".")[-2])  # fmt: skip
    if heads is None:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _norms_from_one(name: str, values: Array, config: Any) -> Array:
    """The weights of norms, which the model adds to 1."""
    return values + np.float32(1) if name.endswith("norm.weight") else values


def _state_space(name: str, values: Array, config: Any) -> Array:
    """The matrix A in place of its logarithm, and the convolution without its channel."""
    if name.endswith("ssm_a"):
        return -np.exp(values)
    return values.squeeze(1) if name.endswith("ssm_conv1d.weight") else values


CHANGES: Mapping[str, Change] = {
    "llama": _rotary_pairs, "qwen2": _same, "qwen3": _same, "phi3": _same, "starcoder2": _same,
    "gemma2": _norms_from_one, "gemma3": _norms_from_one, "mamba": _state_space,
}  # fmt: skip
"""The architectures of GGUF that are known here."""

_MODEL_TYPES = {"llama": ("llama", "mistral"), "gemma3": ("gemma3_text",)}


def architecture_of(model: Exportable) -> str:
    """The architecture of GGUF of a model.

    Raises:
        AptError: it is not known here.
    """
    kind = model.config.model_type
    for name in CHANGES:
        if kind in _MODEL_TYPES.get(name, (name,)):
            return name
    known = kind.replace("_", "") in {n.replace("-", "") for n in gguf.MODEL_ARCH_NAMES.values()}
    fault = f"no GGUF is written of models of type '{kind}'"
    raise AptError(
        fault, f"{CONVERTER} {model.directory}" if known else "GGUF does not know this family"
    )
