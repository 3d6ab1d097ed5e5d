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
    part = cache.layers[index]
    if type(part) is not DynamicLayer or "update" in vars(part) or not part.is_initialized:
        return None
    keys, values = part.keys, part.values
    served = (
        _serves(keys, dtype)
        and _serves(values, dtype)
        and keys.shape == values.shape
        and (DynamicCache.update, DynamicLayer.update) == _METHODS
    )
    return part if served else None


def _serves(cached: Any, dtype: torch.dtype) -> bool:
    """True of keys or values (1, heads, length, width) that the kernels can read."""
    return bool(
        type(cached) is Tensor
        and cached.is_cpu
        and cached.dtype == dtype
        and cached.ndim == 4
        and len(cached) == 1
        and cached.numel()
        and not cached.requires_grad
    )


def given_cache(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a block, by its name in old and new transformers."""
    return named.get("cache", named.get("past_key_values"))


class Room:
    """Larger tensors, in which keys and values grow without a copy of those before.

    Each place is written once. So keys and values that someone took from a cache stay as they are,
    also if the cache is cropped and continues otherwise.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._used = keys.shape[2]
        self._tensors = _with_more(keys), _with_more(values)

    def continues(self, *known: Tensor) -> bool:
        """True if keys and values are those of this room, with all places that are written."""
        return (
            self._used == known[0].shape[2] < self._tensors[0].shape[2]
            and known[0].shape[1] == self._tensors[0].shape[1]
            and all(
                room.data_ptr() == part.data_ptr() and room.stride() == part.stride()
                for room, part in zip(self._tensors, known, strict=True)
            )
        )

    def grown(self) -> list[Tensor]:
        """Keys and values (1, heads, length + 1, width) with one more place, to be written now."""
        self._used += 1
        return [room[:, :, : self._used] for room in self._tensors]


def grow(part: Any) -> tuple[Tensor, Tensor]:
    """Keys and values (heads, length + 1, width) of a part of a cache, with one more place."""
    room = vars(part).get("apt_room")
    if room is None or not room.continues(part.keys, part.values):
        room = part.apt_room = Room(part.keys, part.values)
    part.keys, part.values = room.grown()
    return part.keys[0], part.values[0]


def _with_more(known: Tensor) -> Tensor:
    """A copy of keys or values with room for more."""
    _, heads, length, width = known.shape
    room = known.new_empty(1, heads, length + max(_ROOM, length // 4), width)
    room[:, :, :length] = known
    return room
