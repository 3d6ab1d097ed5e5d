"""The index of a checkpoint in several files: the file of each tensor."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.errors import AptError

_GET_AGAIN = "get the checkpoint again"


def indexed_files(index: Path) -> list[Path]:
    """The files that an index names, sorted. They must be in its directory.

    Raises:
        AptError: the index is damaged, names a file outside its directory, or a file is missing.
    """
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
            raise AptError(f"{index} names a file outside its directory: {name!r}", "do not use it")
        if not index.with_name(name).is_file():
            raise AptError(f"{index.parent} lacks {name}", "is the checkpoint complete?")
    return [index.with_name(name) for name in names]


def index_metadata(index: Path) -> dict[str, Any]:
    """The metadata of an index; empty if it has none.

    Raises:
        AptError: the index is damaged.
    """
    about = _read(index).get("metadata")
    return about if isinstance(about, dict) else {}


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    index_file = _read(index)
    if "weight_map" not in index_file:
        raise AptError(f"{index} has no 'weight_map'", _GET_AGAIN)
    weights = index_file["weight_map"]
    valid = isinstance(weights, dict) and all(isinstance(v, str) for v in weights.values())
    if not valid or not weights:
        raise AptError(f"{index} is damaged: no map of weights", _GET_AGAIN)
    return dict(weights)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise AptError(f"{path} is damaged: {error}", _GET_AGAIN) from error


def write_index(index: Path, metadata: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Write an index.

    Args:
        index: the file to write.
        metadata: the metadata.
        files: the file of each tensor.
    """
    record = {"metadata": dict(metadata), "weight_map": dict(files)}
    index.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
