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

_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_WHOLE = {"partial_rotary_factor": (1,)}
_COMPUTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": _SILU, **_WHOLE},
    "qwen2": {"hidden_act": _SILU, **_WHOLE},
    "qwen3": {"hidden_act": _SILU, "attention_bias": (False,), **_WHOLE},
    "phi3": {"hidden_act": _SILU},
    "starcoder2": {"hidden_act": _GELU, "use_bias": (True,), **_WHOLE},
    "gemma2": {"hidden_activation": _GELU, "attention_bias": (False,)},
    "gemma3": {"hidden_activation": _GELU, "attention_bias": (False,)},
    "mamba": {"hidden_act": _SILU, "use_bias": (False,), "use_conv_bias": (True,)},
}
"""What llama.cpp computes in an architecture, whatever the configuration says: a GGUF file has no
entry for it. Other values would run, as another function."""

_MODEL_TYPES = {"llama": ("llama", "mistral"), "gemma3": ("gemma3_text",)}


def architecture_of(model: Exportable) -> str:
    """The architecture of GGUF of a model.

    Raises:
        AptError: it is not known here, or llama.cpp would compute another function.
    """
    kind = model.config.model_type
    for name in CHANGES:
        if kind in _MODEL_TYPES.get(name, (name,)):
            _check_computed(model, name)
            return name
    known = kind.replace("_", "") in {n.replace("-", "") for n in gguf.MODEL_ARCH_NAMES.values()}
    fault = f"no GGUF is written of models of type '{kind}'"
    raise AptError(
        fault, f"{CONVERTER} {model.directory}" if known else "GGUF does not know this family"
    )


def _check_computed(model: Exportable, architecture: str) -> None:
    """Raise if a value of the configuration is not the one that llama.cpp computes with."""
    rope = getattr(model.config, "rope_parameters", None)
    known = {**(rope if isinstance(rope, dict) else {}), **model.config.to_dict()}
    for field, values in _COMPUTED[architecture].items():
        if (value := known.get(field)) is not None and value not in values:
            raise AptError(
                f"{model.name} has {field} {value!r}, and llama.cpp runs models of type "
                f"'{model.config.model_type}' with {values[0]!r} alone",
                "GGUF cannot express this model",
            )
