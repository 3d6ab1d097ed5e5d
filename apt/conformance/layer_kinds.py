"""The kinds of layers of a family. A model without a kind cannot show mistakes in that kind."""

from typing import Any

_WINDOW = 8
_LISTED = ("layer_types", "layers_block_type")


def kinds(config: Any) -> list[str]:
    """The distinct kinds of layers that a configuration lists; empty if it lists none.

    For a model of several parts, they are those of its language model.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    listed = next((value for name in _LISTED if (value := getattr(text, name, None))), None)
    return list(dict.fromkeys(listed)) if isinstance(listed, list | tuple) else []


def default_kinds(config_class: Any) -> list[str]:
    """The kinds of layers in the default configuration of a class."""
    try:
        return kinds(config_class())
    except Exception:  # it cannot be made without arguments
        return []


def every_kind(config_class: Any) -> dict[str, Any]:
    """Arguments for a class of configurations that give a model with a layer of every kind.

    For the example of an adapter: ``Gemma3TextConfig(hidden_size=32, **every_kind(…))``.

    Returns:
        ``num_hidden_layers``; ``layer_types`` if the class has this argument and several kinds; and
        ``sliding_window``, shorter than the samples of the checks, if the class has one.
    """
    layers, fields = default_kinds(config_class), config_class().to_dict()
    window = {"sliding_window": _WINDOW} if fields.get("sliding_window") else {}
    if len(layers) < 2 or "layer_types" not in fields:
        return {"num_hidden_layers": 2, **window}
    return {"num_hidden_layers": len(layers), "layer_types": layers, **window}
