"""What a configuration says of its model: the class that opens it, and whether it can be pruned."""

from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin
from transformers.models.auto import modeling_auto

from apt.errors import AptError
from apt.runtime.entries import METHOD

_PRUNED = "APT prunes causal language models"


def check_kind(reference: str, config: Any, *, packed: bool = False) -> None:
    """Raise for a model that no adapter can serve.

    Args:
        packed: True if a packed or quantised model will do: it can be measured, but not pruned.

    Raises:
        AptError: its weights are packed or quantised, it is an encoder-decoder, it reads in both
            directions, or transformers has no causal language model of its type.
    """
    kind = getattr(config, "model_type", "")
    method = quantised_with(config)
    if method == METHOD and not packed:
        raise AptError(
            f"{reference} is packed, and its weights cannot be changed", "apt-prune unpack it first"
        )
    if method and not packed:
        fault = f"{reference} is quantised with {method}, and its weights cannot be pruned"
        raise AptError(fault, "prune the original model, and quantise the result")
    if getattr(config, "is_encoder_decoder", False):
        fault = f"{reference} is an encoder-decoder model (type '{kind}')"
        raise AptError(fault, f"{_PRUNED}, which have only a decoder")
    if _bidirectional(config):
        fault = f"{reference} is an encoder (type '{kind}'), which reads text in both directions"
        raise AptError(fault, f"{_PRUNED}, which predict the next token")
    if not _has_own_code(config) and class_of(config) is None:
        raise AptError(
            f"{reference} is of type '{kind}', of which transformers has no causal language model",
            _PRUNED,
        )


def quantised_with(config: Any) -> str | None:
    """The method of a ``quantization_config``; None if the weights are not quantised."""
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return None
    fields = quantised if isinstance(quantised, dict) else getattr(quantised, "__dict__", {})
    method = fields.get("quant_method") or "an unnamed method"
    if method == "bitsandbytes" or any(f"_load_in_{b}bit" in fields for b in (4, 8)):
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def _bidirectional(config: Any) -> bool:
    """True for an encoder, such as BERT, even if transformers can run it as a decoder."""
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return getattr(config, "model_type", None) in masked and not decoder


def _has_own_code(config: Any) -> bool:
    """True if the repository of a model has the code of its class."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def class_of(config: Any) -> Any:
    """The class of transformers that opens a model; None if there is none that writes text.

    It is the class that the configuration names. A multimodal checkpoint is thus opened as a whole:
    for some types, the class for causal language models leaves the parts for images out.
    """
    named = getattr(config, "architectures", None)
    for name in named if isinstance(named, list) else ():
        kind = getattr(transformers, str(name), None)
        writes = isinstance(kind, type) and issubclass(kind, GenerationMixin)
        if writes and getattr(kind, "config_class", None) is type(config):
            return kind
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    return None


def opening_class(config: Any) -> Any:
    """As `class_of`, but the automatic class for a model with code of its own."""
    return AutoModelForCausalLM if _has_own_code(config) else class_of(config)


def without_weights(config: Any, *, trust_remote_code: bool) -> nn.Module:
    """A model of the class that opens it, with new weights on the current device."""
    kind = opening_class(config)
    made: nn.Module = (
        kind.from_config(config, trust_remote_code=trust_remote_code)
        if kind is AutoModelForCausalLM
        else kind._from_config(config)
    )
    return made
