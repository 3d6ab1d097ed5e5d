"""The ``config.json`` of a smaller model: the one of the checkpoint, with new sizes and names."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apt.errors import AptError
from apt_plugins.quantised_directories.renaming import Renaming

_QUANTISATION = ("quantization_config", "quantization", "compression_config")
"""The fields of ``config.json`` that describe the quantisation."""

_OTHER_DESCRIPTIONS = ("quantize_config.json", "quant_config.json")
"""Files of GPTQ and AWQ with the same description."""

_NOT_SIZES = (*_QUANTISATION, "dtype", "torch_dtype", "transformers_version", "_name_or_path")


def without_quantisation(config: Any) -> Any:
    """The same configuration of transformers; the description of the quantisation is deleted."""
    for field in _QUANTISATION:
        if field in vars(config):
            delattr(config, field)
    return config


def smaller_record(
    record: Mapping[str, Any], before: Any, after: Any, renaming: Renaming
) -> dict[str, Any]:
    """The ``config.json`` of a smaller model.

    Args:
        record: the ``config.json`` of the checkpoint.
        before, after: the configurations of the checkpoint and of the smaller model.
        renaming: the names of modules in the smaller model.

    Raises:
        AptError: the file cannot express the smaller model, or a pattern would match other
            modules.
    """
    resized = _resized(record, before, after)
    plain = {field: value for field, value in resized.items() if field not in _QUANTISATION}
    loaded = type(after).from_dict(plain).to_dict()
    for field, value in _changed(before, after):
        if loaded.get(field) != value:
            raise AptError(
                f"config.json of the smaller model would have {field} {loaded.get(field)!r}",
                f"{value!r} is needed: is the field written in another way there?",
            )
    quantization = {
        field: renaming.apply(resized[field]) for field in _QUANTISATION if field in resized
    }
    return {**resized, **quantization}


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a ``config.json``."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_other_descriptions(source: Path, target: Path, renaming: Renaming) -> None:
    """Write the other files that describe the quantisation, if names of modules change in them."""
    for path in (source / name for name in _OTHER_DESCRIPTIONS):
        if path.is_file():
            try:
                quantization = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue  # no loader reads it; the copy stays
            if (renamed := renaming.apply(quantization)) != quantization:
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
    aliases = getattr(after, "attribute_map", {})  # the field of the class for each name in files
    for field, value in _changed(before, after):
        inner, parts = record.get(field), [getattr(each, field, None) for each in (before, after)]
        if isinstance(inner, dict) and all(hasattr(part, "to_dict") for part in parts):
            result[field] = _resized(inner, *parts)
            continue
        names = [field, *(name for name, target in aliases.items() if target == field)]
        result |= dict.fromkeys([name for name in names if name in record] or [field], value)
    return result
