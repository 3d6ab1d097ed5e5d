"""Stacked experts whose matrices are packed, in the place of a parameter."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from apt.layouts.pieces import Piece
from apt.runtime.linear import PackedLinear
from apt.runtime.matrix import Entry
from apt.runtime.packed_file import PARTS


class PlainMatrix(nn.Module):
    """A matrix of a stack that is not packed: it has too few zeros."""

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


class PackedStack(nn.Module):
    """A stacked parameter (experts, …) whose matrices are packed.

    To the code of a model it is a tensor. ``stack[expert]`` expands the matrix of one expert, so
    that the others stay packed. Functions and methods of torch get all of them, expanded.

    Args:
        shape: the shape of the parameter.
        dtype: its dtype.
        pieces: the packed matrices that it is made of; `are_matrices` is true of them.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.shape, self.pieces = torch.Size(shape), tuple(pieces)
        self._matrices, self._dtype = nn.ModuleList(), dtype
        self._of: list[list[int]] = [[] for _ in range(self.shape[0])]
        for number, piece in enumerate(self.pieces):
            for expert in [piece.part[0]] if piece.part else range(self.shape[0]):
                assert isinstance(expert, int)
                self._of[expert].append(number)

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

    def __getitem__(self, index: Any) -> Tensor:
        """The matrix of an expert, or any other part."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            return self._expert(range(self.shape[0])[int(index)])
        return self.dense()[index]

    def _expert(self, expert: int) -> Tensor:
        """The matrix of an expert."""
        parts = [(self.pieces[number], self._part(number, expert)) for number in self._of[expert]]
        if len(parts) == 1:
            return parts[0][1]
        whole = parts[0][1].new_empty(self.shape[1:])
        for piece, part in parts:
            whole[piece.part[1:]] = part
        return whole

    def _part(self, number: int, expert: int) -> Tensor:
        """What a piece has of the matrix of an expert."""
        piece, matrix = self.pieces[number], cast(Matrix, self._matrices[number])
        turned = bool(piece.order) and piece.order[-2] > piece.order[-1]
        if piece.part:
            rows = matrix.rows(0, _rows_of(matrix), self.dtype)
        else:
            count = self.shape[2] if turned else self.shape[1]
            rows = matrix.rows(expert * count, (expert + 1) * count, self.dtype)
        return rows.T if turned else rows

    def dense(self) -> Tensor:
        """The whole parameter."""
        return torch.stack([self._expert(expert) for expert in range(self.shape[0])])

    def __getattr__(self, name: str) -> Any:
        """A method of a tensor that this class does not have is that of the whole parameter."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """A function of torch with the whole parameter."""
        given = [arg.dense() if isinstance(arg, cls) else arg for arg in args]
        named = {k: v.dense() if isinstance(v, cls) else v for k, v in (kwargs or {}).items()}
        return function(*given, **named)


def are_matrices(pieces: Sequence[Piece]) -> bool:
    """True if a stacked parameter is made of a matrix, or several, for each expert."""
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
    """Put a stack without matrices in the place of a parameter of a module."""
    parameter = owner.get_parameter(name)
    stack = PackedStack(parameter.shape, parameter.dtype, pieces)
    delattr(owner, name)
    owner.add_module(name, stack)
    owner._is_hf_initialized = True  # type: ignore[assignment]  # transformers has nothing to draw
    return stack


def prepare_for_stacks(model: Any) -> None:
    """Let transformers multiply experts one by one, and not miss tensors that are read here."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    ignored = model._keys_to_ignore_on_load_unexpected or set()
    parts = "|".join(PARTS)
    model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, rf"_({parts})$"])


def device_near(model: nn.Module, name: str) -> torch.device:
    """The device of a tensor in the same module or the nearest one around it."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


class StoredTensors:
    """The tensors of packed files, as those of the plain checkpoint.

    Args:
        files: the files, which were compared with their checksums.
        entries: the descriptions of the packed matrices.

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

    def matrix(self, name: str, dtype: torch.dtype, device: torch.device) -> Matrix:
        """A matrix, packed if it is stored so."""
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
