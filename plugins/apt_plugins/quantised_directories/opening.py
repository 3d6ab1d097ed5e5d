"""Opening of a directory with the format that its ``config.json`` declares."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from apt.checkpoints.formats import find_source_file, local_copy
from apt.checkpoints.safetensors_io import Shards
from apt.errors import AptError, describe
from apt.extending import Source
from apt_plugins.quantised_directories.awq import Awq
from apt_plugins.quantised_directories.bitsandbytes import BitsAndBytes
from apt_plugins.quantised_directories.checkpoint import QuantisedDirectory
from apt_plugins.quantised_directories.compressed_tensors import CompressedTensors
from apt_plugins.quantised_directories.configuration import without_quantisation
from apt_plugins.quantised_directories.format import Format
from apt_plugins.quantised_directories.fp8 import BlockFp8
from apt_plugins.quantised_directories.gptq import Gptq
from apt_plugins.quantised_directories.mlx import Mlx
from apt_plugins.quantised_directories.mxfp4 import Mxfp4

_FORMATS: tuple[type[Format], ...] = (
    Mlx, BlockFp8, Mxfp4, CompressedTensors, Awq, Gptq, BitsAndBytes,
)  # fmt: skip
_NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*/*.safetensors", "consolidated*"]


def open_directory(source: Source) -> QuantisedDirectory | None:
    """The checkpoint of a source; None if it has no format of this package.

    Raises:
        AptError: the checkpoint has a format of this package, and is damaged or not supported.
    """
    path = None if source.gguf else find_source_file(source, "config.json")
    record = _record(path) if path is not None else None
    if record is None:
        return None
    for format_class in _FORMATS:
        quantization = format_class.description(record)
        if quantization is not None:
            return _opened(source, record, format_class, quantization)
    return None


def _record(path: Path) -> dict[str, Any] | None:
    """A ``config.json``; None if it is damaged, which other code reports."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _opened(
    source: Source,
    record: Mapping[str, Any],
    format_class: type[Format],
    quantization: Mapping[str, Any],
) -> QuantisedDirectory:
    directory = local_copy(source, _NOT_DOWNLOADED)
    shards = Shards(directory, fp8=True)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=source.trust_remote_code)
        scheme = format_class(record, quantization, shards)
        config = without_quantisation(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"config.json of {source.reference} cannot be read: {describe(error)}"
        raise AptError(message, "get the model again") from error
    return QuantisedDirectory(directory, record, config, scheme)
