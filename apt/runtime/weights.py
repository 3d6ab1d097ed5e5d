"""The files of a packed model's weights: their names for transformers, and their checks."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from apt.errors import AptError, first_line
from apt.files.index import indexed_files
from apt.runtime.entries import KEY, OWN_CODE
from apt.runtime.packed_file import checked_tensors


def with_weights(config: Any) -> Any:
    """A copy of a packed model's configuration that names the file of its weights.

    transformers then loads that file, and does not use the code in the directory.
    """
    copied = without_own_code(copy.deepcopy(config))
    copied.transformers_weights = _weights(copied)
    return copied


def without_own_code(config: Any) -> Any:
    """The configuration without the entry for the code in a packed directory, changed in place.

    That code renames the description of the weights; here the description gets its name again.
    """
    if (getattr(config, "auto_map", None) or {}) == OWN_CODE:
        del config.auto_map
    if (description := getattr(config, "apt_packed", None)) is not None:
        setattr(config, KEY, description)
        del config.apt_packed
    return config


def _weights(config: Any) -> str:
    description = getattr(config, KEY)
    return str(description["weights"] if isinstance(description, Mapping) else description.weights)


def check_packed_files(
    files: Iterable[Path | str], records: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compare the tensors of packed files with their checksums; raises `AptError`."""
    for path in files:
        try:
            for _ in checked_tensors(path, records):
                pass
        except (OSError, ValueError, SafetensorError) as error:
            raise AptError(
                f"{path} is damaged: {first_line(error)}", "get it again, or pack the model again"
            ) from error


def local_files(config: Any) -> list[Path]:
    """The files of a packed model's weights in its local directory; none for one on the hub."""
    path = Path(str(getattr(config, "_name_or_path", ""))) / _weights(config)
    if not path.is_file():
        return []
    return indexed_files(path) if path.name.endswith(".index.json") else [path]
