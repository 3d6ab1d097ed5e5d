"""The description of a packed checkpoint in its ``config.json``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.errors import AptError, first_line
from apt.runtime.matrix import Entry

METHOD = "apt_packed"
"""The value of ``quant_method`` in ``config.json``."""

VERSION, WITH_STACKS = 2, 3
"""The versions of the format: for matrices only, and for stacks of matrices too."""

SINGLE_PACKED = "apt_packed.safetensors"
"""The file of the weights. Plain transformers must not find it under its own names."""

INDEX_PACKED = f"{SINGLE_PACKED}.index.json"
"""The index of several files of weights."""

OWN_CODE = {
    "AutoConfig": "apt_packed.PlainConfig",
    "AutoModelForCausalLM": "apt_packed.PackedModel",
}
"""The entry ``auto_map`` of ``config.json``: the classes in the copied code that open the model."""

KEY = "quantization_config"
"""The place of the description in ``config.json``."""


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration of a checkpoint; raises `AptError` if there is none, or it is damaged."""
    try:
        return dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        message = f"{directory / 'config.json'} cannot be read: {first_line(error)}"
        raise AptError(message, "get the model again") from error


def is_packed(directory: Path) -> bool:
    """True if a directory has a packed checkpoint, of any version."""
    try:
        description = read_config(directory).get(KEY)
    except AptError:
        return False
    return isinstance(description, dict) and description.get("quant_method") == METHOD


def read_entries(directory: Path) -> dict[str, Entry]:
    """The descriptions of packed matrices by name; raises `AptError` if not packed, or newer."""
    description = read_config(directory).get(KEY)
    if not isinstance(description, dict) or description.get("quant_method") != METHOD:
        raise AptError(f"{directory} is not packed", "name a directory that apt-prune pack wrote")
    return described_entries(description, str(directory))


def described_entries(description: Mapping[str, Any], location: str) -> dict[str, Entry]:
    """The descriptions in a ``quantization_config``; raises `AptError` if newer or damaged."""
    version = description.get("version")
    if version not in (VERSION, WITH_STACKS):
        is_older = isinstance(version, int) and version < VERSION
        message = (
            f"{location} has version {version} of the packed format, and this APT reads {VERSION} "
            f"and {WITH_STACKS}"
        )
        raise AptError(
            message, "pack the pruned model again" if is_older else "install a newer APT"
        )
    try:
        return {name: Entry.read(record) for name, record in description["matrices"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        message = (
            f"the description of the packed matrices in {location} is damaged: {first_line(error)}"
        )
        raise AptError(message, "pack the model again") from error
