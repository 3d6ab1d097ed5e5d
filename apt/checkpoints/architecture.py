"""Which models can be pruned at all, by their configuration."""

from typing import Any

from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from apt.errors import AptError

_PRUNED = "APT prunes causal language models"


def check_kind(reference: str, config: Any) -> None:
    """Raise for a model that no adapter can serve.

    Args:
        reference: what the user calls the model.
        config: its configuration, as transformers has it.

    Raises:
        AptError: its weights are quantised, it is an encoder-decoder, it reads in both directions,
            or transformers has no causal language model of its type.
    """
    kind = getattr(config, "model_type", "")
    if method := _quantised_with(config):
        raise AptError(
            f"{reference} is quantised with {method}, and its weights cannot be pruned",
            "prune the original model, and quantise the result",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise AptError(
            f"{reference} is an encoder-decoder model (type '{kind}')",
            f"{_PRUNED}, which have a decoder only",
        )
    if _bidirectional(config):
        raise AptError(
            f"{reference} is an encoder (type '{kind}'), which reads text in both directions",
            f"{_PRUNED}, which predict the next token",
        )
    if not _causal(config):
        raise AptError(
            f"transformers has no causal language model of type '{kind}', which {reference} is",
            _PRUNED,
        )


def _quantised_with(config: Any) -> str | None:
    """The method of a ``quantization_config``; None where the weights are plain."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    fields = found if isinstance(found, dict) else getattr(found, "__dict__", {})
    method = fields.get("quant_method") or "a method that is not named"
    if method == "bitsandbytes" or any(f"_load_in_{b}bit" in fields for b in (4, 8)):
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def _bidirectional(config: Any) -> bool:
    """Whether it is an encoder, such as BERT, that transformers could run as a decoder too."""
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return getattr(config, "model_type", None) in masked and not decoder


def _causal(config: Any) -> bool:
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):  # code of its own
        return True
    return type(config) in AutoModelForCausalLM._model_mapping
