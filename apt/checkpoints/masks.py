"""The masks of a pruned model, and their file: one bit for each weight.

The file has a tensor of bytes for each parameter, with 8 weights in a byte, the first one in the
highest bit; a one means pruned. The shapes of the parameters are in its metadata, and so are the
orders of inputs that have changed places, and a checksum of all of it.
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

_SHAPES, _ORDERS = "shapes", "orders"
_CHECKSUM = "sha256"  # in the metadata; early files have none

Masks = dict[str, Tensor]
"""The masks (True where pruned) by the full name of a parameter, in the shape of the parameter."""

Orders = Mapping[str, Sequence[int]]
"""The column of the dense weight that each column of a pruned weight was, by the full name of a
site whose inputs have changed places."""


def masks_of(model: nn.Module, adapter: Adapter) -> Masks:
    """The zeros of all parameters that can be pruned and have some."""
    masks: Masks = {}
    for name, block in adapter.blocks(model):
        masks |= block_masks(name, block, adapter)
    return masks


def block_masks(name: str, block: nn.Module, adapter: Adapter) -> Masks:
    """The zeros of a block's parameters that can be pruned and have some."""
    places = [site.parameter for site in adapter.sites(block)]
    places += [extra.parameter for extra in adapter.extras(block)]
    zeros = {place: block.get_parameter(place) == 0 for place in dict.fromkeys(places)}
    return {f"{name}.{place}": mask for place, mask in zeros.items() if bool(mask.any())}


def sparsity_of(masks: Masks) -> float:
    """The share of pruned weights in the parameters that have masks; 0 without masks."""
    size = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.sum()) for mask in masks.values()) / size if size else 0.0


def write_masks(masks: Masks, path: Path, orders: Orders | None = None) -> None:
    """Write the file of masks, with the orders of inputs that have changed places."""
    packed = {
        name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))
        for name, mask in masks.items()
    }
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    described = {_SHAPES: json.dumps(shapes)}
    if orders:
        described[_ORDERS] = json.dumps({name: [*order] for name, order in orders.items()})
    described[_CHECKSUM] = _checksum(packed, described)
    save_file(packed, path, described)


def _checksum(packed: Mapping[str, Tensor], described: Mapping[str, str]) -> str:
    """The SHA-256 of all masks, and of the shapes and orders in the metadata."""
    whole = sha256()
    for name in sorted(packed):
        whole.update(f"{name} ".encode() + packed[name].numpy().tobytes())
    for name in (_SHAPES, _ORDERS):
        whole.update(described.get(name, "").encode())
    return whole.hexdigest()


def read_masks(path: Path) -> Masks:
    """Read a file of masks; raises `AptError` if the file is not one, or is damaged."""
    try:
        with safe_open(path, "pt") as file:
            if _SHAPES not in (file.metadata() or {}):
                raise ValueError("it has tensors of another kind")
            shapes = json.loads(file.metadata()[_SHAPES])
            names = file.keys()
            if set(names) != set(shapes):
                raise ValueError("its shapes and tensors have different names")
            packed, described = {n: file.get_tensor(n) for n in names}, file.metadata()
            if described.get(_CHECKSUM) not in (None, _checksum(packed, described)):
                raise ValueError("it was changed since it was written")
            return {name: _unpacked(packed[name], shapes[name]) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fault = f"{path} is not a file of masks: {first_line(error)}"
        raise AptError(fault, f"name the directory of a pruned model, or a file {MASKS}") from error


def read_orders(path: Path) -> Orders:
    """The orders in a file of masks; raises `AptError` if they are damaged."""
    try:
        with safe_open(path, "pt") as file:
            orders: Orders = json.loads((file.metadata() or {}).get(_ORDERS, "{}"))
        if not all(map(_is_permutation, orders.values())):
            raise ValueError("an order is no permutation")
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        fault = f"the orders in {path} cannot be read: {first_line(error)}"
        raise AptError(fault, "name the directory of the pruned model") from error
    return orders


def _is_permutation(order: Any) -> bool:
    whole = isinstance(order, list) and all(type(index) is int for index in order)
    return whole and sorted(order) == [*range(len(order))]


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),) or min(shape) < 1:
        raise ValueError("a tensor does not fit its shape")
    bits = np.unpackbits(packed.numpy(), count=count)
    return torch.from_numpy(bits.view(bool)).view(shape)


def check_masks(masks: Mapping[str, Tensor], model: nn.Module, name: str) -> None:
    """Raise if masks are those of another model: a parameter is missing, or has another shape."""
    if not masks:
        raise AptError(f"{name} has no zeros", "name the pruned model")
    parameters = _parameters(model)
    for key, mask in masks.items():
        if key not in parameters:
            fault = f"{name} has masks of another model: {key} is missing in this one"
            raise AptError(fault, "name the model that was fine-tuned from the pruned one")
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
    """Put the inputs of sites into the order of the pruned model, if they have the former one.

    The weights that a mask removes are small in the order that the mask was made for. So the order
    is the one in which the masks of these sites remove the smaller sum of squares.

    Returns:
        True if the inputs of the model have changed places.
    """
    config, before, after = getattr(model, "config", None), 0.0, 0.0
    moves = list[tuple[nn.Module, Permutable, Tensor]]()
    for name, block in adapter.blocks(model):
        known = {s.name: s for s in adapter.sites(block) if f"{name}.{s.name}" in orders}
        for permutable in adapter.permutable(block, config) if known else ():
            if (site := known.get(permutable.reader)) is None:
                continue
            if (whole := masks.get(f"{name}.{site.parameter}")) is None:  # it has no zeros
                continue
            weight, mask = site.oriented(site.weight(block).detach()), site.slice_of(whole)
            removed = site.oriented(mask).to(weight.device)
            columns = torch.tensor(orders[f"{name}.{site.name}"], device=weight.device)
            if len(columns) != weight.shape[1]:
                fault = (
                    f"{name}.{site.name} has {len(columns)} inputs there, {weight.shape[1]} here"
                )
                raise AptError(f"the masks are those of another model: {fault}")
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
        The number of weights that were not zero, and their squares as a share of those of all
        weights in the parameters with masks.
    """
    parameters, weights, cut, total = _parameters(model), 0, 0.0, 0.0
    for name, mask in masks.items():
        parameter = parameters[name]
        mask = mask.to(parameter.device)
        squares = parameter.float().square()
        total += float(squares.sum(dtype=torch.float64))
        cut += float(squares[mask].sum(dtype=torch.float64))
        weights += int((parameter[mask] != 0).sum())
        parameter.masked_fill_(mask, 0)
    return weights, cut / total if total else 0.0


def filled(masks: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """The name of a parameter with a masked weight that is not zero; None if there is none."""
    parameters = _parameters(model)
    for name, mask in masks.items():
        if bool(parameters[name][mask.to(parameters[name].device)].any()):
            return name
    return None


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))  # blocks can share parameters
