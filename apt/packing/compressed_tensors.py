"""Dense checkpoints of integers in the format ``pack-quantized`` of compressed-tensors.

vLLM and transformers open them (W4A16 and W8A16). The package compressed-tensors is not needed to
write them. Zeros stay zeros, but need as many bits as other integers.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.checkpoints.opened import Opened
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import layout_of
from apt.errors import AptError
from apt.packing.directory import (
    Packed,
    Rounding,
    check_finite,
    finish,
    linear_tensors,
    relative_error,
    rewrite,
    value_hash,
)
from apt.patterns import IntegerGrid, ScaleGroup
from apt.runtime.entries import KEY, read_config
from apt.runtime.rounding import BITS, exact_integers, nearest_integers

_PARTS = _PACKED, _SCALE, _SHAPE = "weight_packed", "weight_scale", "weight_shape"


def write_compressed_tensors(
    directory: Path, skeleton: Opened, target: Path, roundings: Mapping[str, Rounding]
) -> Packed:
    """Write a checkpoint with weights of Linear modules as integers.

    Args:
        target: an empty directory.
        roundings: the kind of integers of each stored tensor of `linear_tensors` that becomes
            integers; with ``exact`` it must consist of integers times scales.

    Raises:
        AptError: the group does not divide the columns of a matrix, or a matrix does not consist
            of integers.
    """
    config = read_config(directory)
    shards = Shards(directory)
    modules = linear_tensors(skeleton, layout_of(skeleton, shards), blocks=True)
    modules = {name: module for name, module in modules.items() if name in roundings}
    _check_groups(shards, roundings)
    rounded = dict[str, str]()

    def converted(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name not in modules:
            return {name: tensor}
        check_finite(name, tensor)
        integers, scales = _integers(name, tensor, roundings[name])
        rounded[name] = value_hash(dequantized(integers, scales))
        stem = name.removesuffix("weight")
        return {
            f"{stem}{_PACKED}": packed(integers, BITS[roundings[name].kind]),
            f"{stem}{_SCALE}": scales,
            f"{stem}{_SHAPE}": torch.tensor(tensor.shape),
        }

    rewrite(shards, target, converted)
    finish(directory, target, {**config, KEY: _description(skeleton, modules, roundings)})
    written = Shards(target)
    error = relative_error(_verified(shards, written, roundings, rounded))
    sizes = {name: entry.size for name, entry in written.entries.items()}
    parts = sum(size for name, size in sizes.items() if name.rpartition(".")[2] in _PARTS)
    dense = sum(shards.entries[name].size for name in modules)
    return Packed(len(modules), dense, parts, parts, sum(sizes.values()), error)


def _check_groups(shards: Shards, roundings: Mapping[str, Rounding]) -> None:
    """Raise if there is nothing to write, or a group does not divide the columns."""
    if not roundings:
        raise AptError("the blocks have no torch.nn.Linear modules", "use the format apt")
    by_group: dict[ScaleGroup, set[int]] = {}
    for name, rounding in roundings.items():
        by_group.setdefault(rounding.scale_group, set()).add(shards.entries[name].shape[1])
    for group, widths in by_group.items():
        if group != "row":
            _check_widths(widths, group)


def _check_widths(widths: Collection[int], group: int) -> None:
    if unfitting := sorted(width for width in widths if width % group):
        divisor = next((g for g in (128, 64) if not any(w % g for w in widths)), None)
        advice = f"use {divisor}" if divisor else "use the format apt"
        raise AptError(
            f"group {group} does not divide matrices of {unfitting[0]} columns, which "
            "compressed-tensors needs",
            advice,
            ("scale_group",),
        )


def _integers(name: str, tensor: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    if not rounding.exact:
        return nearest_integers(tensor, rounding.kind, rounding.scale_group)
    exact = exact_integers(tensor, rounding.kind, rounding.scale_group)
    if exact is None:
        message = f"{name} does not consist of integers times scales"
        raise AptError(message, "round it", ("quantize",))
    return exact


def part_shapes(
    shape: Sequence[int], dtype: torch.dtype, grid: IntegerGrid
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtypes and the shapes of the parts of a matrix (out, in), by their names.

    Args:
        dtype: the dtype of the scales.
    """
    rows, columns = shape
    groups = 1 if grid.group == "row" else columns // grid.group
    return {
        _PACKED: (torch.int32, (rows, math.ceil(columns * grid.bits / 32))),
        _SCALE: (dtype, (rows, groups)),
        _SHAPE: (torch.int64, (2,)),
    }


def packed(integers: Tensor, bits: int) -> Tensor:
    """Integers (out, in) of 4 or 8 bits plus an offset, in int32 (out, words), lowest first."""
    values = (integers.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    padded: Tensor = nn.functional.pad(values, (0, -values.shape[1] % (32 // bits)))
    if bits == 4:
        padded = padded[:, ::2] | (padded[:, 1::2] << 4)
    return padded.contiguous().view(torch.int32)


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """The integers (out, columns), int8, of `packed`."""
    values = words.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], 2).flatten(1)
    integers: Tensor = values[:, :columns].to(torch.int16) - 2 ** (bits - 1)
    return integers.to(torch.int8)


def dequantized(integers: Tensor, scales: Tensor) -> Tensor:
    """Integers (out, in) times their scales (out, groups), in the dtype of the scales."""
    group = integers.shape[1] // scales.shape[1]
    values: Tensor = integers * scales.float().repeat_interleave(group, 1)
    return values.to(scales.dtype)


def _description(
    skeleton: Opened, modules: Mapping[str, str], roundings: Mapping[str, Rounding]
) -> dict[str, Any]:
    """The ``quantization_config``, with one group of modules for each kind of integers."""
    names = set(modules.values())
    ignored = [
        name
        for name, module in skeleton.module.named_modules()
        if isinstance(module, nn.Linear) and name not in names
    ]
    kinds: dict[Rounding, list[str]] = {}
    for name, module_name in modules.items():
        kinds.setdefault(roundings[name], []).append(module_name)
    groups = {
        f"group_{index}": {
            "targets": targets if len(kinds) > 1 else ["Linear"], "weights": _scheme(rounding)
        }
        for index, (rounding, targets) in enumerate(kinds.items())
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }


def _scheme(rounding: Rounding) -> dict[str, Any]:
    """The description of a kind of integers."""
    return {
        "num_bits": BITS[rounding.kind],
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if rounding.scale_group == "row" else "group",
        "group_size": None if rounding.scale_group == "row" else rounding.scale_group,
        "dynamic": False,
    }


def _verified(
    shards: Shards, written: Shards, roundings: Mapping[str, Rounding], rounded: Mapping[str, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights by the integers and scales on disk, and the original ones.

    The former must have the `value_hash` of the rounded original, or be equal to the original if it
    consists of integers.
    """
    for name in (name for name in shards.entries if name in roundings):
        rounding, original = roundings[name], shards.read(name)
        stem = name.removesuffix("weight")
        words = written.read(f"{stem}{_PACKED}")
        integers = unpacked(words, BITS[rounding.kind], original.shape[1])
        values = dequantized(integers, written.read(f"{stem}{_SCALE}"))
        changed = value_hash(values) != rounded[name]
        if changed or (rounding.exact and not torch.equal(values, original)):
            raise RuntimeError(f"{name} was not written exactly")
        yield values, original
