"""The part of a configuration that describes the language model."""

from typing import Any

from apt.errors import AptError

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


def text_config(config: Any) -> Any:
    """The configuration of the language model, which is a part of a multimodal configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def hidden_size(config: Any) -> int:
    """The width of the residual stream of the language model, under any of its common names."""
    text = text_config(config)
    width = next((n for name in _WIDTHS if isinstance(n := getattr(text, name, None), int)), None)
    if width is None:
        raise AptError(f"{type(text).__name__} does not give the width of the residual stream")
    return width


def cache_width(config: Any) -> int | None:
    """The numbers of the keys of a token in a block, of all heads that the cache keeps.

    None if the configuration does not give the number of heads. The values are as many.
    """
    text = text_config(config)
    heads = getattr(text, "num_attention_heads", None)
    kept = getattr(text, "num_key_value_heads", None) or heads
    if not heads or not kept:
        return None
    return int(kept) * int(getattr(text, "head_dim", None) or hidden_size(text) // heads)
