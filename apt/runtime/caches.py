"""Keys and values in the caches of transformers, with reserved memory for further tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_LEAST_SPACE = 128  # the least number of positions that are added to a full cache
_METHODS = (DynamicCache.update, DynamicLayer.update)


def growing(cache: Any, index: int, batch: int, dtype: torch.dtype) -> Any:
    """The layer of a cache for a block, if it is a plain growing cache; else None.

    It holds keys and values of ``batch`` sequences on the processor, in this dtype, without
    gradients.
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
    keys, values, reserve = layer.keys, layer.values, vars(layer).get("apt_reserve")
    known = reserve is not None and reserve.is_last(keys, values, dtype)
    supported = known or (
        _is_supported(keys, dtype) and _is_supported(values, dtype) and keys.shape == values.shape
    )
    return layer if supported and keys.shape[0] == batch else None


def _is_supported(tensor: Any, dtype: torch.dtype) -> bool:
    """True for keys or values (batch, heads, length, width) that the kernels can read."""
    return bool(
        type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.dtype == dtype
        and tensor.ndim == 4
        and tensor.numel()
        and not tensor.requires_grad
    )


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a block, by its name in old and new transformers."""
    return arguments.get("cache", arguments.get("past_key_values"))


class Reserve:
    """Larger tensors in which keys and values grow without a copy.

    Each position is written once, since only the last returned keys and values can grow. So tensors
    that other code took from a cache do not change, even if the cache is then cropped.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._larger = _enlarged(keys), _enlarged(values)
        self._keys, self._values = keys, values  # the last returned ones
        self._dtype = keys.dtype

    def is_last(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> bool:
        """True if these are the last keys and values of this reserve, in this dtype."""
        same_tensors = keys is self._keys and values is self._values and dtype == self._dtype
        return same_tensors and not (keys.requires_grad or values.requires_grad)

    def has_space(self) -> bool:
        """True if there is space for one more token."""
        return self._keys.shape[2] < self._larger[0].shape[2]

    def extended(self) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, length + 1, width): one more position, not written yet."""
        length = self._keys.shape[2] + 1
        self._keys, self._values = (larger.narrow(2, 0, length) for larger in self._larger)
        return self._keys, self._values


def grow(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, heads, length + 1, width) of a layer, with one more position."""
    reserve, keys, values = vars(layer).get("apt_reserve"), layer.keys, layer.values
    if reserve is None or not reserve.is_last(keys, values, keys.dtype) or not reserve.has_space():
        reserve = layer.apt_reserve = Reserve(keys, values)
    layer.keys, layer.values = keys, values = reserve.extended()
    return keys, values


def _enlarged(tensor: Tensor) -> Tensor:
    """A copy of keys or values in a larger tensor."""
    batch, heads, length, width = tensor.shape
    larger = tensor.new_empty(batch, heads, length + max(_LEAST_SPACE, length // 4), width)
    larger[:, :, :length] = tensor
    return larger
