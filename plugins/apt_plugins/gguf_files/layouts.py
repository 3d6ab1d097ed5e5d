"""The conversion of the tensors of a family from transformers to GGUF.

transformers converts in the other direction when it reads a GGUF file, in its
``modeling_gguf_pytorch_utils``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

from apt.errors import AptError
from apt.extending import Exportable
from apt_plugins.gguf_files.writing import Array

Change = Callable[[str, Array, Any], Array]
"""Converts values: a function of the name in GGUF, the values in fp32, and the configuration."""

CONVERTER = "run llama.cpp's convert_hf_to_gguf.py"


def _identity(name: str, values: Array, config: Any) -> Array:
    return values


def _rotary_pairs(name: str, values: Array, config: Any) -> Array:
    """The rows of q and k, reordered so that the rows of a rotary pair are neighbours.

    The order within a head of n rows is 0, n/2, 1, n/2 + 1, …
    """
    heads = {
        "attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads
    }.get(name.split(".")[-2])  # fmt: skip
    if heads is None:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _norms_from_one(name: str, values: Array, config: Any) -> Array:
    """The weights of norms plus 1, which the model adds to the stored weights."""
    return values + np.float32(1) if name.endswith("norm.weight") else values


def _state_space(name: str, values: Array, config: Any) -> Array:
    """The matrix A in place of its logarithm, and the convolution without its channel."""
    if name.endswith("ssm_a"):
        return -np.exp(values)
    return values.squeeze(1) if name.endswith("ssm_conv1d.weight") else values


CHANGES: Mapping[str, Change] = {
    "llama": _rotary_pairs, "qwen2": _identity, "qwen3": _identity, "phi3": _identity,
    "starcoder2": _identity, "gemma2": _norms_from_one, "gemma3": _norms_from_one,
    "mamba": _state_space,
}  # fmt: skip
"""The conversions of the supported architectures of GGUF."""

_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ALL_ROTARY = {"partial_rotary_factor": (1,)}
_CONSTANTS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": _SILU, **_ALL_ROTARY},
    "qwen2": {"hidden_act": _SILU, **_ALL_ROTARY},
    "qwen3": {"hidden_act": _SILU, "attention_bias": (False,), **_ALL_ROTARY},
    "phi3": {"hidden_act": _SILU},
    "starcoder2": {"hidden_act": _GELU, "use_bias": (True,), **_ALL_ROTARY},
    "gemma2": {"hidden_activation": _GELU, "attention_bias": (False,)},
    "gemma3": {"hidden_activation": _GELU, "attention_bias": (False,)},
    "mamba": {"hidden_act": _SILU, "use_bias": (False,), "use_conv_bias": (True,)},
}
"""The values of fields that are constants in llama.cpp's code of each architecture.

A GGUF file has no entry for these values. With other values, llama.cpp would compute another
function without an error."""

_MODEL_TYPES = {"llama": ("llama", "mistral"), "gemma3": ("gemma3_text",)}


def architecture_of(model: Exportable) -> str:
    """The name of a model's architecture in GGUF.

    Raises:
        AptError: the architecture is not supported, or llama.cpp would compute another function.
    """
    model_type = model.config.model_type
    for architecture in CHANGES:
        if model_type in _MODEL_TYPES.get(architecture, (architecture,)):
            _check_constants(model, architecture)
            return architecture
    supported = model_type.replace("_", "") in {
        n.replace("-", "") for n in gguf.MODEL_ARCH_NAMES.values()
    }
    message = f"no GGUF is written of models of type '{model_type}'"
    raise AptError(
        message, f"{CONVERTER} {model.directory}" if supported else "GGUF does not know this family"
    )


def _check_constants(model: Exportable, architecture: str) -> None:
    """Raise if llama.cpp would compute with another value than the configuration has."""
    rope = getattr(model.config, "rope_parameters", None)
    configured = {**(rope if isinstance(rope, dict) else {}), **model.config.to_dict()}
    for field, values in _CONSTANTS[architecture].items():
        if (value := configured.get(field)) is not None and value not in values:
            raise AptError(
                f"{model.name} has {field} {value!r}, and llama.cpp runs models of type "
                f"'{model.config.model_type}' with {values[0]!r} alone",
                "GGUF cannot express this model",
            )
