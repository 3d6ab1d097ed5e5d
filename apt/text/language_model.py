"""The language model inside a multimodal model."""

from collections.abc import Iterator

from torch import nn
from transformers import GenerationMixin, PreTrainedModel


def language_model(model: nn.Module) -> nn.Module:
    """The part of a decoder that reads text alone and predicts the next token.

    Some multimodal models contain a whole model of text, with its head. They need an image
    themselves (BLIP-2, Kosmos-2), or fail without one (Llama 4 before transformers 5.25). For all
    others it is ``model`` itself.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return model
    head = model.get_output_embeddings()
    inner: Iterator[nn.Module] = (
        module
        for module in model.modules()
        if module is not model
        and isinstance(module, GenerationMixin)
        and module.get_output_embeddings() is head is not None
    )
    return next(inner, model)
