"""The masks of a pruned model, and their file: one bit for each weight.

The file has a tensor of bytes for each parameter. A byte has the bits of 8 weights, the first
weight in the highest bit; 1 means pruned. The metadata has the shapes of the parameters, the orders
of permuted inputs, and a checksum of masks and metadata.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.adapter import Adapter, Permutable
from apt.adapter.groups import tensors_of
from apt.errors import AptError, first_line

MASKS = "apt_masks.safetensors"
"""The name of the file beside a pruned model."""

_ENTRY = "apt_masks"
_SHAPES, _ORDERS = "shapes", "orders"
_CHECKSUM = "sha256"  # in the metadata; early files have none

Masks = dict[str, Tensor]
"""The masks (True where pruned) by the full name of a parameter, in the shape of the parameter."""

Orders = Mapping[str, Sequence[int]]
"""The orders of permuted inputs, by the full names of sites.

The entry for a column of the pruned weight is the index of this column in the dense weight."""


def masks_of(model: nn.Module, adapter: Adapter) -> Masks:
    """The masks of all parameters that can be pruned; a parameter without zeros has no mask."""
    masks: Masks = {}
    for name, block in adapter.blocks(model):
        masks |= block_masks(name, block, adapter)
    return masks


def block_masks(name: str, block: nn.Module, adapter: Adapter) -> Masks:
    """The `masks_of` one block."""
    paths = [site.parameter for site in adapter.sites(block)]
    paths += [extra.parameter for extra in adapter.extras(block)]
    zeros = {path: block.get_parameter(path) == 0 for path in dict.fromkeys(paths)}
    return {f"{name}.{path}": mask for path, mask in zeros.items() if bool(mask.any())}


def sparsity_of(masks: Masks) -> float:
    """The share of pruned weights in the parameters with masks; 0 without masks."""
    size = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.sum()) for mask in masks.values()) / size if size else 0.0


def write_masks(masks: Masks, path: Path, orders: Orders | None = None) -> None:
    """Write the file of masks, with the orders of permuted inputs."""
    packed = {
        name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))
        for name, mask in masks.items()
    }
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    metadata = {_SHAPES: json.dumps(shapes)}
    if orders:
        metadata[_ORDERS] = json.dumps({name: [*order] for name, order in orders.items()})
    metadata[_CHECKSUM] = _checksum(packed, metadata)
    # One entry: safetensors writes several in a random order, and equal masks as other bytes.
    save_file(packed, path, {_ENTRY: json.dumps(metadata)})


def _metadata(file: Any) -> Mapping[str, str]:
    """The metadata of a file of masks. Files of early versions have an entry for each value."""
    stored: Mapping[str, str] = file.metadata() or {}
    return json.loads(stored[_ENTRY]) if _ENTRY in stored else stored


def _checksum(packed: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of all masks, and of the shapes and orders in the metadata."""
    digest = sha256()
    for name in sorted(packed):
        digest.update(f"{name} ".encode() + packed[name].numpy().tobytes())
    for name in (_SHAPES, _ORDERS):
        digest.update(metadata.get(name, "").encode())
    return digest.hexdigest()


def read_masks(path: Path) -> Masks:
    """Read a file of masks; raises `AptError` if the file is not one, or is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = _metadata(file)
            if _SHAPES not in metadata:
                raise ValueError("it has tensors of another kind")
            shapes = json.loads(metadata[_SHAPES])
            names = file.keys()
            if set(names) != set(shapes):
                raise ValueError("its shapes and tensors have different names")
            packed = {name: file.get_tensor(name) for name in names}
            if metadata.get(_CHECKSUM) not in (None, _checksum(packed, metadata)):
                raise ValueError("it was changed since it was written")
            return {name: _unpacked(packed[name], shapes[name]) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{path} is not a file of masks: {first_line(error)}"
        hint = f"name the directory of a pruned model, or a file {MASKS}"
        raise AptError(message, hint) from error


def read_orders(path: Path) -> Orders:
    """The orders in a file of masks; raises `AptError` if they are damaged."""
    try:
        with safe_open(path, "pt") as file:
            orders: Orders = json.loads(_metadata(file).get(_ORDERS, "{}"))
        if not all(map(_is_permutation, orders.values())):
            raise ValueError("an order is no permutation")
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        message = f"the orders in {path} cannot be read: {first_line(error)}"
        raise AptError(message, "name the directory of the pruned model") from error
    return orders


def _is_permutation(order: Any) -> bool:
    integers = isinstance(order, list) and all(type(index) is int for index in order)
    return integers and sorted(order) == [*range(len(order))]


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),) or min(shape) < 1:
        raise ValueError("a tensor does not fit its shape")
    bits = np.unpackbits(packed.numpy(), count=count)
    return torch.from_numpy(bits.view(bool)).view(shape)


def check_masks(masks: Mapping[str, Tensor], model: nn.Module, name: str) -> None:
    """Raise if masks belong to another model: a parameter is missing, or has another shape."""
    if not masks:
        raise AptError(f"{name} has no zeros", "name the pruned model")
    parameters = _parameters(model)
    for key, mask in masks.items():
        if key not in parameters:
            message = f"{name} has masks of another model: {key} is missing in this one"
            raise AptError(message, "name the model that was fine-tuned from the pruned one")
        if parameters[key].shape != mask.shape:
            raise AptError(
                f"{name} has masks of another model: {key} is {_shape(mask)} there, and "
                f"{_shape(parameters[key])} here",
                "name the model that was fine-tuned from the pruned one",
            )


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape))


@torch.no_grad()
def permute_as_masked(
    masks: Mapping[str, Tensor], orders: Orders, model: nn.Module, adapter: Adapter
) -> bool:
    """Permute the inputs of sites as in the pruned model, if the model has the original order.

    Masked weights are small in the order for which the mask was chosen. So the masks are applied
    to both orders, and the order with the smaller sum of squares of masked weights is used.

    Returns:
        True if the inputs of the model were permuted.
    """
    config, before, after = getattr(model, "config", None), 0.0, 0.0
    moves = list[tuple[nn.Module, Permutable, Tensor]]()
    for name, block in adapter.blocks(model):
        sites = {s.name: s for s in adapter.sites(block) if f"{name}.{s.name}" in orders}
        for permutable in adapter.permutable(block, config) if sites else ():
            if (site := sites.get(permutable.reader)) is None:
                continue
            if (stored := masks.get(f"{name}.{site.parameter}")) is None:  # it has no zeros
                continue
            weight, mask = site.oriented(site.weight(block).detach()), site.slice_of(stored)
            removed = site.oriented(mask).to(weight.device)
            columns = torch.tensor(orders[f"{name}.{site.name}"], device=weight.device)
            if len(columns) != weight.shape[1]:
                raise AptError(
                    f"the masks are those of another model: {name}.{site.name} has "
                    f"{len(columns)} inputs there, {weight.shape[1]} here"
                )
            before += _energy(weight, removed)
            after += _energy(weight[:, columns], removed)
            moves.append((block, permutable, permutable.order_of(columns)))
    if before <= after:
        return False
    for block, permutable, order in moves:
        permutable.permute(tensors_of(block), order)
    return True


def _energy(weight: Tensor, mask: Tensor) -> float:
    """The sum of squares of the masked weights."""
    return float(weight[mask].float().square().sum(dtype=torch.float64))


@torch.no_grad()
def apply_masks(masks: Mapping[str, Tensor], model: nn.Module) -> tuple[int, float]:
    """Set the masked weights to zero.

    Returns:
        The number of masked weights that were not zero, and their share of the sum of squares of
        all weights in the parameters with masks.
    """
    parameters, count, removed, total = _parameters(model), 0, 0.0, 0.0
    for name, mask in masks.items():
        parameter = parameters[name]
        mask = mask.to(parameter.device)
        squares = parameter.float().square()
        total += float(squares.sum(dtype=torch.float64))
        removed += float(squares[mask].sum(dtype=torch.float64))
        count += int((parameter[mask] != 0).sum())
        parameter.masked_fill_(mask, 0)
    return count, removed / total if total else 0.0


def filled(masks: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """The name of the first parameter with a masked weight that is not zero; None without one."""
    parameters = _parameters(model)
    for name, mask in masks.items():
        if bool(parameters[name][mask.to(parameters[name].device)].any()):
            return name
    return None


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))  # blocks can share parameters
