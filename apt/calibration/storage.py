"""Where the calibration activations are while no block is run on them.

They stay with the model, move to CPU memory beside a model on a GPU, or move to disk. On disk, each
tensor is a file of its own. It is mapped into memory when it is asked for, and deleted when nothing
refers to it any more. The mapping is private: a write to it does not change the file.
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
        with_model: whether everything stays on the device of the model, so that a batch may wait
            inside a block.
    """

    with_model: bool

    def put(self, value: Any) -> Any:
        """Something to `get` back ``value`` with: a tensor, or containers that hold tensors."""

    def get(self, held: Any) -> Any:
        """What was put, on the device where it was."""


class MemoryStore:
    """Everything stays where it is."""

    with_model = True

    def put(self, value: Any) -> Any:
        """The value."""
        return value

    def get(self, held: Any) -> Any:
        """The same."""
        return held


class CpuStore:
    """Tensors are copied to CPU memory, and back to their device when they are asked for."""

    with_model = False

    def put(self, value: Any) -> Any:
        """Copy every tensor to the CPU."""
        return mapped(value, Tensor, _OnCpu)

    def get(self, held: Any) -> Any:
        """Copy every tensor back."""
        return mapped(held, _OnCpu, _OnCpu.read)


class _OnCpu:
    """A tensor's copy in CPU memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy, self._device = tensor.detach().cpu(), tensor.device

    def read(self) -> Tensor:
        """The tensor on its own device."""
        return self._copy.to(self._device)


class DiskStore:
    """Tensors are files in ``folder`` for as long as somebody holds what `put` gave for them.

    Raises:
        OSError: a file cannot be written.
    """

    with_model = False

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


class InStore(Generic[T]):
    """An attribute that lies in its owner's ``store``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> "InStore[T]": ...
    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> "T | InStore[T]":
        if instance is None:
            return self
        found: T = instance.store.get(getattr(instance, self._name))
        return found

    def __set__(self, instance: Any, value: T) -> None:
        setattr(instance, self._name, instance.store.put(value))
