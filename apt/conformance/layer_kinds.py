"""The kinds of layers that a family has: a mistake in one does not show on models without it."""

from typing import Any

_WINDOW = 8
_LISTED = ("layer_types", "layers_block_type")


def kinds(config: Any) -> list[str]:
    """The kinds of layers that a configuration lists, each once; none where it does not list any.

    The configuration of a model of several parts lists those of its language model.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    listed = next((found for name in _LISTED if (found := getattr(text, name, None))), None)
    return list(dict.fromkeys(listed)) if isinstance(listed, list | tuple) else []


def default_kinds(config_class: Any) -> list[str]:
    """The kinds that a class of configurations has by default."""
    try:
        return kinds(config_class())
    except Exception:  # it cannot be made without arguments
        return []


def every_kind(config_class: Any) -> dict[str, Any]:
    """Arguments for a class of configurations by which a model has a layer of every kind.

    For the example of an adapter: ``Gemma3TextConfig(hidden_size=32, **every_kind(…))``.

    Returns:
        ``num_hidden_layers``; ``layer_types`` where the class takes it and has several kinds; and
        ``sliding_window``, shorter than the samples of the checks, where the class has one.
    """
    found, fields = default_kinds(config_class), config_class().to_dict()
    window = {"sliding_window": _WINDOW} if fields.get("sliding_window") else {}
    if len(found) < 2 or "layer_types" not in fields:
        return {"num_hidden_layers": 2, **window}
    return {"num_hidden_layers": len(found), "layer_types": found, **window}
