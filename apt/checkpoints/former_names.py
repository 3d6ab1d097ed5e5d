"""Names of transformers 4 in the files that transformers 5 writes.

Many runtimes still use transformers 4. It ignores the field ``rope_parameters`` without a message,
so that a model gets the default base frequency of its architecture. It refuses the tokenizer class
``TokenizersBackend``, and a list of ``extra_special_tokens``. transformers 5 reads the names of
both versions.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Values = dict[str, Any]
FORMER_NAMES = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")


def save_config(config: Any, directory: Path) -> None:
    """Write ``config.json``, with the former names of the rotary embedding."""
    config.save_pretrained(directory)
    add_rope_names(config, directory)


def add_rope_names(config: Any, directory: Path) -> None:
    """Add the former names of ``rope_parameters``, such as ``rope_theta``, to a ``config.json``.

    The file does not change if transformers would read another configuration from the new text.

    Args:
        config: the configuration, as it is written in the file.
    """
    path = directory / "config.json"
    text = path.read_text(encoding="utf-8")
    written = json.loads(text)
    extended = _with_rope_names(written)
    if extended == written:
        return
    before = _configuration(type(config), directory)
    _write(path, extended)
    if before is None or _configuration(type(config), directory) != before:
        path.write_text(text, encoding="utf-8")


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write the files of a tokenizer, with the former names of its class and special tokens."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    renamed = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        renamed["additional_special_tokens"] = renamed.pop("extra_special_tokens")
    if renamed != values:
        _write(path, renamed)


def _with_rope_names(values: Mapping[str, Any]) -> Values:
    """A configuration and its nested ones, with the former names of their ``rope_parameters``."""
    inner = {
        key: _with_rope_names(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }
    return _rope_names(values.get("rope_parameters")) | inner


def _rope_names(rope: Any) -> Values:
    """The former names of rotary parameters, which layers with windows may have of their own."""
    if not isinstance(rope, dict):
        return {}
    if "full_attention" in rope:
        local = _rope_names(rope.get("sliding_attention"))
        names = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        return names | _rope_names(rope["full_attention"])
    values = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") == "default":
        return values
    return values | {"rope_scaling": {k: v for k, v in rope.items() if k not in values}}


def _configuration(config_class: Any, directory: Path) -> Values | None:
    """The configuration as transformers reads it, without the former names; None on an error."""
    try:
        values: Values = config_class.from_pretrained(directory).to_dict()
    except Exception:  # each class has its own checks
        return None
    return _without_former_names(values)


def _without_former_names(values: Mapping[str, Any]) -> Values:
    return {
        key: _without_former_names(value)
        if isinstance(value, dict) and key != "rope_parameters"
        else value
        for key, value in values.items()
        if key not in FORMER_NAMES
    }


def _write(path: Path, values: Values) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
