"""A check, by the configuration, that a model can be pruned."""

from typing import Any

from transformers import AutoModelForCausalLM
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
    if method and method != METHOD and not packed:
        fault = f"{reference} is quantised with {method}, and its weights cannot be pruned"
        raise AptError(fault, "prune the original model, and quantise the result")
    if getattr(config, "is_encoder_decoder", False):
        fault = f"{reference} is an encoder-decoder model (type '{kind}')"
        raise AptError(fault, f"{_PRUNED}, which have only a decoder")
    if _bidirectional(config):
        fault = f"{reference} is an encoder (type '{kind}'), which reads text in both directions"
        raise AptError(fault, f"{_PRUNED}, which predict the next token")
    if not _causal(config):
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


def _causal(config: Any) -> bool:
    if "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):  # code in its repository
        return True
    return type(config) in AutoModelForCausalLM._model_mapping
