"""Checks of an adapter as a whole: its attributes, its model types, its example."""

from difflib import get_close_matches
from typing import Any

from apt.adapter import Adapter, DecoderAdapter, Input
from apt.adapter.text_config import text_config
from apt.conformance.checks.promise import Faults, promise
from apt.conformance.checks.subject import Subject
from apt.plugin.registry import registry
from apt.plugin.specs import AdapterSpec

_METHODS = [name for name in vars(Adapter) if not name.startswith("_")]
# Attributes of a `DecoderAdapter`: the type of their items, and the methods that read them.
_DECLARED = {
    "blocks_path": (str, ("blocks",)),
    "inputs": (Input, ("inputs_of", "sites")),
    "left_dense": (str, ()),
    "transposed": (type, ()),
}


@promise()
def check_declaration(subject: Subject) -> Faults:
    """The adapter has every method, and its attributes are of the right types."""
    adapter = subject.adapter
    for method in _METHODS:
        if not callable(getattr(adapter, method, None)):
            yield "", lacks(adapter, method)
    if isinstance(adapter, DecoderAdapter):
        for name, (kind, readers) in _DECLARED.items():
            read = all(getattr(type(adapter), r) is getattr(DecoderAdapter, r) for r in readers)
            yield from _attribute(adapter, name, kind, needed=read)


def lacks(adapter: Adapter, name: str) -> str:
    """The line for a missing attribute."""
    return f"{type(adapter).__name__} has no '{name}'"


def _attribute(adapter: Adapter, name: str, kind: type, *, needed: bool) -> Faults:
    if not hasattr(adapter, name):
        if needed:
            yield "", lacks(adapter, name)
        return
    value = getattr(adapter, name)
    if name == "blocks_path":
        if not isinstance(value, str):
            yield "", f"blocks_path is {value!r}, not the path of the list of blocks"
    elif not isinstance(value, tuple):
        yield "", f"{name} is {_shown(value)}, not a tuple: write ({_shown(value)},)"
    else:
        for part in value:
            if not isinstance(part, kind):
                yield "", f"{name} has {_shown(part)}, which is not of type {kind.__name__}"


def _shown(value: Any) -> str:
    return f"Input({value.name!r}, …)" if isinstance(value, Input) else repr(value)


@promise()
def check_model_types(subject: Subject) -> Faults:
    """``model_types`` of the spec name the family of the example; no other adapter claims it."""
    spec, config = subject.spec, getattr(subject.model, "config", None)
    kind = getattr(config, "model_type", None) or type(subject.model).__name__
    if spec is None:
        return
    if not spec.model_types:
        if spec.example is not None or spec.zoo is not None:
            yield "", f"model_types of adapter '{spec.name}' is empty, its example is a '{kind}'"
        return
    if kind not in spec.model_types:
        names = ", ".join(map(repr, spec.model_types))
        yield "", f"model_types of adapter '{spec.name}' name {names}, its example is a '{kind}'"
    yield from _unknown(spec, kind)
    yield from _claimed(spec)


def _unknown(spec: AdapterSpec, kind: str) -> Faults:
    """Types that transformers does not know, but that are similar to a type of transformers."""
    from transformers import CONFIG_MAPPING

    types = set(CONFIG_MAPPING.keys())
    for name in set(spec.model_types) - types - {kind}:
        close = get_close_matches(name, types - set(spec.model_types), n=1, cutoff=0.8)
        if close:
            yield "", f"no model of transformers is of type '{name}': did you mean '{close[0]}'?"


def _claimed(spec: AdapterSpec) -> Faults:
    for other in registry().adapters.specs.values():
        for name in spec.model_types if other.name != spec.name else ():
            if name in other.model_types:
                yield "", f"model type '{name}' is claimed by adapter '{other.name}' as well"


@promise()
def check_kinds(subject: Subject) -> Faults:
    """The model has a layer of each kind in the default configuration of its class."""
    config: Any = getattr(subject.model, "config", None)
    text = text_config(config)
    present = kinds(text)
    for missing in default_kinds(type(text)):
        if missing not in present:
            message = (
                f"the model has no layer of kind '{missing}', which {type(text).__name__} has by"
            )
            yield "", f"{message} default: mistakes in that kind would not show"


_WINDOW = 8
_LISTED = ("layer_types", "layers_block_type")


def kinds(config: Any) -> list[str]:
    """The distinct kinds of layers that a configuration lists; empty if it lists none.

    The list of a multimodal configuration is that of its language model.
    """
    text = text_config(config)
    layers = next((value for name in _LISTED if (value := getattr(text, name, None))), None)
    return list(dict.fromkeys(layers)) if isinstance(layers, list | tuple) else []


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
