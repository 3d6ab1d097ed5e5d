"""Stacked experts whose matrices are packed: modules that replace stacked parameters."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from apt.errors import AptError
from apt.layouts.pieces import Piece
from apt.runtime.linear import FEW, PackedLinear, is_slow, tiled_product
from apt.runtime.matrix import Entry
from apt.runtime.packed_file import PARTS, missing_parts


class PlainMatrix(nn.Module):
    """A matrix of a stack that is not packed, because it has too few zeros."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix."""
        return self.weight.dtype

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows ``first`` to ``last``, of all matrices of a stack."""
        return self.weight.flatten(0, -2)[first:last].to(dtype)


Matrix = PackedLinear | PlainMatrix


class _LikeTensor:
    """An object that the code of a model uses like a tensor: functions get its dense values."""

    def dense(self) -> Tensor:
        """The values as a dense tensor."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*map(_dense, args), **{k: _dense(v) for k, v in (kwargs or {}).items()})


def _dense(value: Any) -> Any:
    """An argument of a function, with tensors in place of tensor-like objects."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_dense, value))
    return value.dense() if isinstance(value, _LikeTensor) else value


class PackedStack(nn.Module, _LikeTensor):
    """A stacked parameter (experts, …) whose matrices are packed, used like a tensor.

    ``stack[expert]`` is the matrix of one expert; the other matrices stay packed.

    Args:
        shape: the shape of the parameter.
        dtype: the dtype of the parameter.
        pieces: the pieces of the parameter; `are_matrices` must be true of them.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.shape, self.pieces = torch.Size(shape), tuple(pieces)
        self._matrices, self._dtype = nn.ModuleList(), dtype
        self._pieces_of: list[list[int]] = [[] for _ in range(self.shape[0])]
        for number, piece in enumerate(self.pieces):
            for expert in [piece.part[0]] if piece.part else range(self.shape[0]):
                assert isinstance(expert, int)
                self._pieces_of[expert].append(number)

    def fill(self, matrices: Mapping[str, Matrix]) -> None:
        """Set the matrices, by the name of their tensor."""
        self._matrices.extend(matrices[piece.key] for piece in self.pieces)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices."""
        return cast(Matrix, self._matrices[0]).dtype if len(self._matrices) else self._dtype

    @property
    def device(self) -> torch.device:
        """The device of the matrices."""
        return next(self.buffers()).device

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return _LikeTensor.__getattr__(self, name)

    def __getitem__(self, index: Any) -> Any:
        """The matrix of an expert, or any other part."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            return PackedExpert(self, range(self.shape[0])[int(index)])
        return self.dense()[index]

    def dense(self) -> Tensor:
        """The complete parameter as a dense tensor."""
        return torch.stack([self[expert].dense() for expert in range(self.shape[0])])

    def of(self, expert: int) -> list[tuple[Piece, Matrix]]:
        """The pieces of an expert's matrix, with the stored matrices."""
        return [(self.pieces[n], cast(Matrix, self._matrices[n])) for n in self._pieces_of[expert]]


class PackedExpert(_LikeTensor):
    """The matrix of one expert of a stack. It is dense while it is used."""

    def __init__(self, stack: PackedStack, expert: int) -> None:
        self._stack, self._expert = stack, expert
        self.shape, self.ndim = stack.shape[1:], stack.ndim - 1
        self.dtype, self.device = stack.dtype, stack.device

    def __getitem__(self, index: Any) -> Tensor:
        """A part of the matrix."""
        return self.dense()[index]

    def dense(self) -> Tensor:
        """The matrix as a dense tensor."""
        parts = [(p, self._rows(p, matrix)) for p, matrix in self._stack.of(self._expert)]
        if len(parts) == 1:
            return parts[0][1]
        dense = parts[0][1].new_empty(self.shape)
        for piece, part in parts:
            dense[piece.part[1:]] = part
        return dense

    def _rows(self, piece: Piece, matrix: Matrix) -> Tensor:
        """The values of a piece of the matrix."""
        transposed = bool(piece.order) and piece.order[-2] > piece.order[-1]
        if piece.part:
            rows = matrix.rows(0, _rows_of(matrix), self.dtype)
        else:
            count, expert = self.shape[1] if transposed else self.shape[0], self._expert
            rows = matrix.rows(expert * count, (expert + 1) * count, self.dtype)
        return rows.T if transposed else rows

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`torch.nn.functional.linear`, with packed matrices if each of them is a part of rows."""
        parts = self._stack.of(self._expert)
        if not all(isinstance(m, PackedLinear) and p.part and not p.order for p, m in parts):
            return self._dense_linear(x, bias)
        product = torch.cat([cast(PackedLinear, matrix)(x) for _, matrix in parts], -1)
        return product if bias is None else product + bias

    def _dense_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the dense matrix of the expert."""
        matrix = self.dense()
        rows = x.reshape(-1, matrix.shape[1])
        if len(rows) <= FEW or x.dtype != matrix.dtype or not is_slow(x):
            return nn.functional.linear(x, matrix, bias)
        product = tiled_product(rows, len(matrix), lambda first, last, d: matrix[first:last].to(d))
        output = product.view(*x.shape[:-1], len(matrix))
        return output if bias is None else output + bias

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Multiply by the packed matrix, or call the function with the dense matrix."""
        if function is nn.functional.linear and len(args) > 1 and isinstance(args[1], cls):
            return args[1].linear(args[0], *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


def are_matrices(pieces: Sequence[Piece]) -> bool:
    """True if a stacked parameter consists of one or several matrices for each expert."""
    return all(
        not piece.of
        and (
            (len(piece.part) == 3 and isinstance(piece.part[0], int))
            or (not piece.part and piece.order in ((), (0, 2, 1)))
        )
        for piece in pieces
    )


def _rows_of(matrix: Matrix) -> int:
    return matrix.out_features if isinstance(matrix, PackedLinear) else len(matrix.weight)


def put_stack(owner: nn.Module, name: str, pieces: Sequence[Piece]) -> PackedStack:
    """Replace a parameter of a module by a stack without matrices."""
    parameter = owner.get_parameter(name)
    stack = PackedStack(parameter.shape, parameter.dtype, pieces)
    delattr(owner, name)
    owner.add_module(name, stack)
    owner._is_hf_initialized = True  # type: ignore[assignment]  # no random values are needed
    return stack


def prepare_for_stacks(model: Any) -> None:
    """Let transformers multiply experts one by one, and ignore tensors that this package reads."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    ignored = model._keys_to_ignore_on_load_unexpected or set()
    parts = "|".join(PARTS)
    model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, rf"_({parts})$"])


def device_near(model: nn.Module, name: str) -> torch.device:
    """The device of a tensor in the same module, or in the nearest enclosing module."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


class StoredTensors:
    """The tensors of packed files, by their names in the plain checkpoint.

    Args:
        files: the files, which were compared with their checksums; empty if they are unknown.
        entries: the descriptions of the packed matrices.

    Raises:
        AptError: the files lack a tensor of a packed matrix.

    Attributes:
        shapes: the shape of each tensor, and of each packed matrix.
    """

    def __init__(self, files: Sequence[Path | str], entries: Mapping[str, Entry]) -> None:
        self._entries, self._files = entries, dict[str, Path | str]()
        self.shapes: dict[str, tuple[int, ...]] = {n: e.shape for n, e in entries.items()}
        parts = {f"{name}_{part}" for name in entries for part in PARTS}
        for path in files:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  # it is no dictionary
                    self._files[key] = path
                    if key not in parts:
                        self.shapes[key] = tuple(file.get_slice(key).get_shape())
        if files and (missing := missing_parts(self._files, entries)):
            message = f"{Path(files[0]).parent} lacks {missing[0]}, which its config.json describes"
            raise AptError(message, "is the checkpoint complete?")

    def matrix(self, name: str, dtype: torch.dtype, device: torch.device) -> Matrix:
        """A matrix of a stack, packed if it is stored packed."""
        if name not in self._entries:
            return PlainMatrix(self._read(name).to(device, dtype))
        module = PackedLinear(self._entries[name], bias=False, dtype=dtype)
        for part in PARTS:
            if (key := f"{name}_{part}") in self._files:
                setattr(module, f"weight_{part}", self._read(key).to(device))
        return module

    def _read(self, key: str) -> Tensor:
        with safe_open(self._files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor
