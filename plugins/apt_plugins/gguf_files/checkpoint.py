"""The plan of a GGUF file for a checkpoint that was not made from a GGUF file.

The names of tensors come from the package gguf, and the entries are the same as those of
llama.cpp's converter. Only families and tokenizers with known names and entries are supported.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apt.errors import AptError
from apt.extending import Exportable
from apt_plugins.gguf_files.layouts import CONVERTER, architecture_of
from apt_plugins.gguf_files.tensors import file_type, most_common_type, planned_of, tensor_names
from apt_plugins.gguf_files.vocabulary import add_vocabulary
from apt_plugins.gguf_files.writing import Planned

_FAMILIES = ("llama", "qwen2", "qwen3")
# The scaling of rotary frequencies that GGUF stores as a tensor, for the architecture llama only.
_LLAMA3_SCALING = "llama3"
_FREQUENCIES = "rope_freqs.weight"


def from_checkpoint(
    model: Exportable, target: Path, kind: Type
) -> tuple[gguf.GGUFWriter, list[Planned]]:
    """A writer with all metadata, and the tensors to write.

    Raises:
        AptError: the family or the tokenizer is not supported.
    """
    architecture, config = architecture_of(model), model.config
    if architecture not in _FAMILIES:
        message = (
            f"{model.name} was not made from a GGUF file, and is of type '{config.model_type}'"
        )
        raise _unsupported(model, message)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        architecture == "llama" and getattr(config, "sliding_window", None)
    ):
        raise _unsupported(model, f"{model.name} attends within a window")
    rope = rotary(config)
    scaling = str(rope.get("rope_type", rope.get("type", "default")))
    if scaling not in ("default", *([_LLAMA3_SCALING] if architecture == "llama" else [])):
        raise _unsupported(model, f"{model.name} has rotary frequencies of type '{scaling}'")
    names = tensor_names(model, architecture)
    tensors = [planned_of(model, *item, architecture, kind) for item in names.items()]
    if scaling == _LLAMA3_SCALING:
        factors = _rotary_factors(config, float(rope["rope_theta"]))
        tensors.append(Planned(_FREQUENCIES, factors.shape, Type.F32, lambda: factors))
    writer = gguf.GGUFWriter(target, architecture)
    total = sum(int(np.prod(planned.shape)) for planned in tensors)
    writer.add_type("model")
    writer.add_name(model.title)
    writer.add_size_label(gguf.size_label(total, total, 0, 0))
    _add_sizes(writer, config, float(rope["rope_theta"]))
    writer.add_file_type(file_type(most_common_type(tensors) if model.is_fitted else kind))
    add_vocabulary(writer, model)
    return writer, tensors


def _unsupported(model: Exportable, message: str) -> AptError:
    return AptError(message, f"{CONVERTER} {model.directory}")


def rotary(config: Any) -> dict[str, Any]:
    """The parameters of the rotary embedding, from a configuration of transformers 4 or 5."""
    parameters = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    return {"rope_theta": getattr(config, "rope_theta", 10_000.0), **parameters}


def _rotary_factors(config: Any, base: float) -> np.ndarray[Any, Any]:
    """The factors by which the frequencies of rotary pairs are divided."""
    frequencies, _ = ROPE_INIT_FUNCTIONS[_LLAMA3_SCALING](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (2 * len(frequencies))
    factors: np.ndarray[Any, Any] = (1.0 / base**steps / frequencies).numpy()
    return factors


def _add_sizes(writer: gguf.GGUFWriter, config: Any, base: float) -> None:
    """Add the sizes of the model and the parameters of its norms and rotary embedding."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
