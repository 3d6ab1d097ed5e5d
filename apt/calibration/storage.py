"""Where the calibration activations lie while no block is run on them: in memory, or on disk.

On disk, each tensor is a file of its own, that is mapped into memory when it is asked for and gone
once nobody holds it. What is mapped is no one's but the reader's: written over, it leaves the file
as it is.
"""

import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor

T = TypeVar("T")


class Store(Protocol):
    """Takes what a run will ask for again.

    Attributes:
        in_memory: whether it is as large in memory as ever.
    """

    in_memory: bool

    def put(self, value: Any) -> Any:
        """Something to `get` back ``value`` with: a tensor, or containers that hold tensors."""

    def get(self, held: Any) -> Any:
        """What was put, on the device where it was."""


class MemoryStore:
    """Everything stays where it is."""

    in_memory = True

    def put(self, value: Any) -> Any:
        """The value."""
        return value

    def get(self, held: Any) -> Any:
        """The same."""
        return held


class DiskStore:
    """Tensors are files in ``folder`` for as long as somebody holds what `put` gave for them.

    Raises:
        OSError: a file cannot be written.
    """

    in_memory = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, value: Any) -> Any:
        """Write every tensor."""
        return mapped(value, Tensor, self._write)

    def get(self, held: Any) -> Any:
        """Map every file."""
        return mapped(held, _File, _File.read)

    def _write(self, tensor: Tensor) -> "Tensor | _File":
        return _File(self._folder, tensor) if tensor.numel() else tensor


class _File:
    """A tensor's file."""

    def __init__(self, folder: Path, tensor: Tensor) -> None:
        descriptor, self._path = tempfile.mkstemp(dir=folder)
        weakref.finalize(self, os.unlink, self._path)
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        with open(descriptor, "wb") as file:
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def read(self) -> Tensor:
        """The tensor, in pages that are read as they are used."""
        size = self._shape.numel()
        flat = torch.from_file(self._path, shared=False, size=size, dtype=self._dtype)
        return flat.view(self._shape).to(self._device)


def mapped(value: Any, kind: type[T], change: Callable[[T], Any]) -> Any:
    """``value`` with everything of a ``kind`` in it changed; dicts, lists and tuples are opened."""
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


class Stored(Generic[T]):
    """An attribute that lies in its owner's ``store``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> "Stored[T]": ...
    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> "T | Stored[T]":
        if instance is None:
            return self
        found: T = instance.store.get(getattr(instance, self._name))
        return found

    def __set__(self, instance: Any, value: T) -> None:
        setattr(instance, self._name, instance.store.put(value))
