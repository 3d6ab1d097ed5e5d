"""Keys and values in the caches of transformers, and room in them for further tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_ROOM = 128  # places that are added to a full cache at least
_METHODS = (DynamicCache.update, DynamicLayer.update)


def growing(cache: Any, index: int, dtype: torch.dtype) -> Any:
    """The part of a cache for a block, if it does no more than grow; else None.

    It holds keys and values of one sequence on the processor, in this dtype, without gradients.
    """
    if type(cache) is not DynamicCache or "update" in vars(cache) or cache.offloading:
        return None
    if not 0 <= index < len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is not DynamicLayer or "update" in vars(layer) or not layer.is_initialized:
        return None
    if (DynamicCache.update, DynamicLayer.update) != _METHODS:
        return None
    keys, values, reserve = layer.keys, layer.values, vars(layer).get("apt_room")
    if reserve is not None and reserve.gave(keys, values, dtype):
        return layer
    supported = _serves(keys, dtype) and _serves(values, dtype) and keys.shape == values.shape
    return layer if supported else None


def _serves(tensor: Any, dtype: torch.dtype) -> bool:
    """True of keys or values (1, heads, length, width) that the kernels can read."""
    return bool(
        type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.dtype == dtype
        and tensor.ndim == 4
        and len(tensor) == 1
        and tensor.numel()
        and not tensor.requires_grad
    )


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a block, by its name in old and new transformers."""
    return arguments.get("cache", arguments.get("past_key_values"))


class Room:
    """Larger tensors, in which keys and values grow without a copy of those before.

    Each place is written once: only the keys and values that were given last grow. So those that
    someone took from a cache stay as they are, also if the cache is then cropped.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._room = _with_more(keys), _with_more(values)
        self._keys, self._values = keys, values  # that were given last
        self._dtype = keys.dtype

    def gave(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> bool:
        """True if these are the last keys and values of this room, in this dtype."""
        same_tensors = keys is self._keys and values is self._values and dtype == self._dtype
        return same_tensors and not (keys.requires_grad or values.requires_grad)

    def has_place(self) -> bool:
        """True if there is room for one more token."""
        return self._keys.shape[2] < self._room[0].shape[2]

    def grown(self) -> tuple[Tensor, Tensor]:
        """Keys and values (1, heads, length + 1, width) with one more place, to be written now."""
        length = self._keys.shape[2] + 1
        keys, values = self._room
        self._keys, self._values = keys[:, :, :length], values[:, :, :length]
        return self._keys, self._values


def grow(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values (heads, length + 1, width) of a part of a cache, with one more place."""
    reserve, keys, values = vars(layer).get("apt_room"), layer.keys, layer.values
    if reserve is None or not reserve.gave(keys, values, keys.dtype) or not reserve.has_place():
        reserve = layer.apt_room = Room(keys, values)
    layer.keys, layer.values = keys, values = reserve.grown()
    return keys[0], values[0]


def _with_more(tensor: Tensor) -> Tensor:
    """A copy of keys or values with room for more."""
    _, heads, length, width = tensor.shape
    larger = tensor.new_empty(1, heads, length + max(_ROOM, length // 4), width)
    larger[:, :, :length] = tensor
    return larger
