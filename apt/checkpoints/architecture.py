"""The class of transformers for a configuration, and a check that APT can prune its models."""

from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin
from transformers.models.auto import modeling_auto

from apt.errors import AptError
from apt.runtime.entries import METHOD

_PRUNED = "APT prunes causal language models"


def check_kind(reference: str, config: Any, *, packed: bool = False) -> None:
    """Raise for a model that no adapter supports.

    Args:
        packed: True to accept a packed or quantised model, which can be measured, but not pruned.

    Raises:
        AptError: the weights are packed or quantised, the model is an encoder-decoder or an
            encoder, or transformers has no causal language model of its type.
    """
    model_type = getattr(config, "model_type", "")
    method = quantised_with(config)
    if method == METHOD and not packed:
        raise AptError(
            f"{reference} is packed, and its weights cannot be changed", "apt-prune unpack it first"
        )
    if method and not packed:
        message = f"{reference} is quantised with {method}, and its weights cannot be pruned"
        raise AptError(message, "prune the original model, and quantise the result")
    if getattr(config, "is_encoder_decoder", False):
        message = f"{reference} is an encoder-decoder model (type '{model_type}')"
        raise AptError(message, f"{_PRUNED}, which have only a decoder")
    if _bidirectional(config):
        message = (
            f"{reference} is an encoder (type '{model_type}'), which reads text in both directions"
        )
        raise AptError(message, f"{_PRUNED}, which predict the next token")
    if not _has_own_code(config) and class_of(config) is None:
        raise AptError(
            f"{reference} is of type '{model_type}', "
            "of which transformers has no causal language model",
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
    """The class of transformers that opens a model; None without a class that generates text.

    The class that the configuration names comes first. So a multimodal checkpoint is opened with
    all its parts: for some types, the class for causal language models has no parts for images.
    """
    names = getattr(config, "architectures", None)
    for name in names if isinstance(names, list) else ():
        model_class = getattr(transformers, str(name), None)
        generates = isinstance(model_class, type) and issubclass(model_class, GenerationMixin)
        if generates and getattr(model_class, "config_class", None) is type(config):
            return model_class
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    return None


def opening_class(config: Any) -> Any:
    """The `class_of` a configuration; the automatic class if the repository has the code."""
    return AutoModelForCausalLM if _has_own_code(config) else class_of(config)


def without_weights(config: Any, *, trust_remote_code: bool) -> nn.Module:
    """A new model of the `opening_class`, with initial weights on the current device."""
    model_class = opening_class(config)
    model: nn.Module = (
        model_class.from_config(config, trust_remote_code=trust_remote_code)
        if model_class is AutoModelForCausalLM
        else model_class._from_config(config)
    )
    return model
