"""The class of transformers for a configuration, what its models read, and which can be pruned."""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from apt.errors import AptError
from apt.runtime.entries import METHOD

_PRUNED = "APT prunes models whose class transformers has"
_DECODERS = (AutoModelForImageTextToText, AutoModelForCausalLM)
_OTHERS = (
    AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoModelForCTC,
    AutoModelForImageClassification, AutoModel,
)  # fmt: skip
_TEXT, _IMAGE, _SOUND, _TARGET = (
    ("input_ids",), ("pixel_values",), ("input_values", "input_features"), ("decoder_input_ids",)
)  # fmt: skip


@dataclass(frozen=True)
class Reads:
    """What a model reads.

    Attributes:
        windows: True for a decoder of text, which reads windows of text of one length.
        text, image, sound: the name of the argument of its forward; None if it has none.
        target: True if its decoder reads the beginning of its output.
    """

    windows: bool = True
    text: str | None = "input_ids"
    image: str | None = None
    sound: str | None = None
    target: bool = False

    @property
    def words(self) -> str:
        """The kinds of input, for messages."""
        kinds = {"texts": self.text, "images": self.image, "sounds": self.sound}
        return " and ".join(kind for kind, name in kinds.items() if name)


def check_kind(reference: str, config: Any, *, packed: bool = False) -> None:
    """Raise for a model that no adapter supports.

    Args:
        packed: True to accept a packed or quantised model, which can be measured, but not pruned.

    Raises:
        AptError: the weights are packed or quantised, or transformers has no class for the model.
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
    if not _has_own_code(config) and class_of(config) is None:
        raise AptError(
            f"{reference} is of type '{model_type}', of which transformers has no model", _PRUNED
        )


def reads_of(model_class: Any, config: Any) -> Reads:
    """What the models of a class read, by the arguments of its forward."""
    is_decoder = not (getattr(config, "is_encoder_decoder", False) or _bidirectional(config))
    if not issubclass(model_class, PreTrainedModel):
        return getattr(model_class, "reads", Reads())  # of a tower
    forward: Any = model_class.forward
    arguments = signature(forward).parameters
    hears = "input_ids" not in arguments and not arguments.keys().isdisjoint(_SOUND)  # with CTC
    if is_decoder and issubclass(model_class, GenerationMixin) and not hears:
        return Reads()

    def named(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in arguments), None)

    kinds = named(_TEXT), named(_IMAGE), named(_SOUND)
    return Reads(False, *kinds, target=named(_TARGET) is not None)


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
    """The class of transformers that opens a model; None if there is none.

    The class that the configuration names comes first. So a model keeps its head, and a multimodal
    checkpoint is opened with all its parts: for some types, the class for causal language models
    has no parts for images. Without a name, a decoder predicts the next token, and other models
    have the head of their pre-training, if there is one.
    """
    names = getattr(config, "architectures", None)
    for name in names if isinstance(names, list) else ():
        model_class = getattr(transformers, str(name), None)
        is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
        if is_model and getattr(model_class, "config_class", None) is type(config):
            return model_class
    is_decoder = not (getattr(config, "is_encoder_decoder", False) or _bidirectional(config))
    for auto in (*(_DECODERS if is_decoder else ()), *_OTHERS):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
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
