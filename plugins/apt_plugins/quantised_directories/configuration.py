"""The ``config.json`` of a smaller model: that of the checkpoint, with other sizes and names."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apt.errors import AptError
from apt_plugins.quantised_directories.renaming import Renaming

_QUANTISATION = ("quantization_config", "quantization", "compression_config")
"""The fields of ``config.json`` that describe the quantisation."""

_BESIDE = ("quantize_config.json", "quant_config.json")
"""Files of GPTQ and AWQ with the same description."""

_NOT_SIZES = (*_QUANTISATION, "dtype", "torch_dtype", "transformers_version", "_name_or_path")


def without_quantisation(config: Any) -> Any:
    """A configuration of transformers without the description of the quantisation; it changes."""
    for field in _QUANTISATION:
        if field in vars(config):
            delattr(config, field)
    return config


def smaller_record(
    record: Mapping[str, Any], before: Any, after: Any, renaming: Renaming
) -> dict[str, Any]:
    """The ``config.json`` of a smaller model.

    Args:
        record: that of the checkpoint.
        before, after: the configurations of the checkpoint and of the smaller model.

    Raises:
        AptError: the file cannot express the smaller model, or a pattern of modules would match
            others.
    """
    written = _resized(record, before, after)
    plain = {field: value for field, value in written.items() if field not in _QUANTISATION}
    again = type(after).from_dict(plain).to_dict()
    for field, value in _changed(before, after):
        if again.get(field) != value:
            raise AptError(
                f"config.json of the smaller model would have {field} {again.get(field)!r}",
                f"{value!r} is needed: is the field written in another way there?",
            )
    about = {field: renaming.apply(written[field]) for field in _QUANTISATION if field in written}
    return {**written, **about}


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a ``config.json``."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_beside(source: Path, target: Path, renaming: Renaming) -> None:
    """Write other descriptions of the quantisation in which names of modules change."""
    for path in (source / name for name in _BESIDE):
        if path.is_file():
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue  # no loader reads it; the copy stays
            if (renamed := renaming.apply(about)) != about:
                write_record(renamed, target / path.name)


def _changed(before: Any, after: Any) -> Iterator[tuple[str, Any]]:
    """The fields that differ, with their new values."""
    old, new = before.to_dict(), after.to_dict()
    for field, value in new.items():
        if field not in _NOT_SIZES and (field not in old or old[field] != value):
            yield field, value


def _resized(record: Mapping[str, Any], before: Any, after: Any) -> dict[str, Any]:
    """A record with the fields that differ; nested configurations keep their other fields."""
    result = dict(record)
    former = getattr(after, "attribute_map", {})  # names in files to those of the class
    for field, value in _changed(before, after):
        inner, parts = record.get(field), [getattr(each, field, None) for each in (before, after)]
        if isinstance(inner, dict) and all(hasattr(part, "to_dict") for part in parts):
            result[field] = _resized(inner, *parts)
            continue
        names = [field, *(name for name, own in former.items() if own == field)]
        result |= dict.fromkeys([name for name in names if name in record] or [field], value)
    return result
