"""The storage of calibration activations between the runs of blocks.

Activations stay on the model's device, move to CPU memory while the model is on a GPU, or move to
disk. On disk, each tensor is a file. The file is mapped into memory for reading, and deleted with
the last reference to it. The mapping is private: a write to it does not change the file.
"""

import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor

T = TypeVar("T")


class Store(Protocol):
    """A store of activations.

    Attributes:
        with_model: True if all values stay on the device of the model. Only then are products
            stored between the runs of a block.
    """

    with_model: bool

    def put(self, value: Any) -> Any:
        """Store ``value``, a tensor or a container of tensors; returns a handle for `get`."""

    def get(self, handle: Any) -> Any:
        """The stored value, on its original device."""


class MemoryStore:
    """A store that leaves tensors in place."""

    with_model = True

    def put(self, value: Any) -> Any:
        """Return the value itself."""
        return value

    def get(self, handle: Any) -> Any:
        """Return the value itself."""
        return handle


class CpuStore:
    """A store that copies tensors to CPU memory, and back to their device when they are read."""

    with_model = False

    def put(self, value: Any) -> Any:
        """Copy every tensor to the CPU."""
        return mapped(value, Tensor, _OnCpu)

    def get(self, handle: Any) -> Any:
        """Copy every tensor back to its device."""
        return mapped(handle, _OnCpu, _OnCpu.read)


class _OnCpu:
    """The copy of a tensor in CPU memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy, self._device = tensor.detach().cpu(), tensor.device

    def read(self) -> Tensor:
        """The tensor on its original device."""
        return self._copy.to(self._device)


class DiskStore:
    """A store in files of ``folder``; each is deleted with the last reference to its handle."""

    with_model = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, value: Any) -> Any:
        """Write every tensor to a file."""
        return mapped(value, Tensor, self._write)

    def get(self, handle: Any) -> Any:
        """Map every file into memory."""
        return mapped(handle, _File, _File.read)

    def _write(self, tensor: Tensor) -> "Tensor | _File":
        return _File(self._folder, tensor) if tensor.numel() else tensor


class _File:
    """The file of a tensor."""

    def __init__(self, folder: Path, tensor: Tensor) -> None:
        descriptor, self._path = tempfile.mkstemp(dir=folder)
        # After an error, the folder may be gone before the last references.
        weakref.finalize(self, Path(self._path).unlink, missing_ok=True)
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        with open(descriptor, "wb") as file:
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def read(self) -> Tensor:
        """The tensor, mapped into memory: its pages are read at first use."""
        size = self._shape.numel()
        flat = torch.from_file(self._path, shared=False, size=size, dtype=self._dtype)
        return flat.view(self._shape).to(self._device)


def mapped(value: Any, kind: type[T], change: Callable[[T], Any]) -> Any:
    """``value`` with ``change`` applied to each item of type ``kind``, inside containers too."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, kind, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [mapped(item, kind, change) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    return value


class InStore(Generic[T]):
    """An attribute whose value is kept in the ``store`` of its owner."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> "InStore[T]": ...
    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> "T | InStore[T]":
        if instance is None:
            return self
        value: T = instance.store.get(getattr(instance, self._name))
        return value

    def __set__(self, instance: Any, value: T) -> None:
        setattr(instance, self._name, instance.store.put(value))
