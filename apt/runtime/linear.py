"""A Linear module whose weight is packed."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from apt.compute import compute_dtype, dtype_name
from apt.devices import is_accelerator, runs_triton
from apt.errors import SLOW_PRODUCTS, AptError
from apt.runtime.matrix import FLOATS, MASK, SCALES, VALUES, Entry, bitmask, check_sizes, decode
from apt.runtime.watched import is_plain, same

_STORED = {**FLOATS, "int8": torch.int8, "int4": torch.uint8}
FEW = 8  # the most vectors for which a product reads the packed matrix; for more, it is expanded
_TILED = 64  # the most vectors for which the kernels' product with expanded rows is fast
_TILE = 2**20  # elements of expanded rows that a CPU multiplies at a time
_DEVICE_TILE = 2**24  # the same on an accelerator
_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)])  # of a byte
_COLUMNS = 64  # groups of the kernels are multiples of it


@lru_cache
def kernels() -> Any:
    """The package ``apt_kernels``; None if it is not installed, or was built without a compiler."""
    try:
        import apt_kernels
    except ImportError:
        return None
    except ValueError as error:  # an unknown instruction set in the environment
        raise AptError(str(error)) from None
    return apt_kernels if apt_kernels.available() else None


@lru_cache
def gpu_matrix() -> Any:
    """The class of matrices on GPUs of ``apt_kernels``; None without the package or Triton."""
    try:
        from apt_kernels.gpu import GpuMatrix
    except ImportError:
        return None
    return GpuMatrix


def is_slow(tensor: Tensor) -> bool:
    """True for a tensor on the processor in a dtype that multiplies more slowly than fp32."""
    return tensor.is_cpu and compute_dtype(tensor.dtype, tensor.device) != tensor.dtype


def tiled_product(
    rows: Tensor, count: int, weights: Callable[[int, int, torch.dtype], Tensor]
) -> Tensor:
    """Vectors (n, in) times a transposed matrix: (n, count), with few dense rows at a time.

    Where the device is slow in half precision, the product is computed in fp32 and rounded.

    Args:
        rows: the vectors.
        count: the number of rows of the matrix.
        weights: returns the dense rows (last − first, in) from ``first`` to ``last`` in a dtype.
    """
    dtype = compute_dtype(rows.dtype, rows.device)
    inputs, step = rows.to(dtype), max(1, _tile(rows.device) // max(1, rows.shape[1]))
    parts = []
    for first, last in pairwise([*range(0, max(1, count), step), count]):
        part = nn.functional.linear(inputs, weights(first, last, dtype))
        parts.append(part if dtype == rows.dtype else part.to(rows.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _tile(device: torch.device) -> int:
    """The number of weights that are dense at a time."""
    return _DEVICE_TILE if is_accelerator(device) else _TILE


def describe_kernels() -> tuple[str, str]:
    """The implementation of packed products on this machine, and the remedy if it is slow."""
    package = kernels()
    if package is not None:
        return f"apt-kernels {package.__version__}, {package.LEVEL}", ""
    state = "torch, which expands a matrix for each product"
    if find_spec("apt_kernels") is None:
        return state, "install apt-kernels: pip install 'apt-prune[kernels]'"
    return f"{state}: apt-kernels is installed without its library", (
        "install its wheel, or a C++ compiler, and then: "
        "pip install --force-reinstall --no-deps apt-kernels"
    )


def warn_if_slow() -> None:
    """Warn if this processor has no kernels for packed products."""
    state, remedy = describe_kernels()
    if remedy:
        warnings.warn(f"{SLOW_PRODUCTS}: {state}; {remedy}", stacklevel=2)


class ExpandedMatrix:
    """A matrix that torch expands: a bitmask (out, ⌈in / 8⌉), scales (out, groups) or None."""

    def __init__(self, entry: Entry, mask: Tensor, values: Tensor, scales: Tensor | None) -> None:
        self._entry, self._mask, self._values, self._scales = entry, mask, values, scales
        counts = _ONES.to(mask.device)[mask.long()].sum(1)
        self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).tolist()

    def expand(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows ``first`` to ``last`` with their zeros (last − first, in)."""
        shifts = torch.arange(8, device=self._mask.device, dtype=torch.uint8)
        bits = (self._mask[first:last, :, None] >> shifts) & 1
        kept = bits.view(last - first, -1)[:, : self._entry.columns].bool()
        dense = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
        dense[kept] = self._read(self._starts[first], self._starts[last], kept, first).to(dtype)
        return dense

    def _read(self, start: int, end: int, kept: Tensor, first: int) -> Tensor:
        """The kept weights from ``start`` to ``end``."""
        if self._scales is None:
            return self._values[start:end]
        if self._entry.values == "int8":
            integers = self._values[start:end].to(torch.int32)
        else:
            pairs = self._values[start // 2 : -(-end // 2)].to(torch.int32)
            halves = torch.stack([pairs & 15, pairs >> 4], 1).reshape(-1)
            integers = halves[start % 2 : start % 2 + end - start] - 8
        rows, columns = kept.nonzero(as_tuple=True)
        scales = self._scales[rows + first, columns // self._entry.group]
        return integers.float() * scales.float()


class PackedLinear(nn.Module):
    """``x`` times the transposed packed matrix, plus the bias.

    The tensors are loaded as they are stored, and `prepare` checks them. With the package
    ``apt-kernels`` a product of a few vectors reads the packed matrix, on a GPU if Triton is
    installed. Otherwise the matrix is expanded for each product, a part of it at a time, in the
    dtype that the device multiplies faster: fp32, where bf16 is slow.

    Args:
        entry: the description of the matrix.
        bias: True if there is a bias.
        dtype: the dtype of the bias, and of `weight` after `prepare`; None for the dtype of the
            description.

    Attributes:
        matrix: the matrix for the current device, of ``apt-kernels`` or an `ExpandedMatrix`; None
            before `prepare`. A change of the weights replaces it.
    """

    weight_mask: Tensor
    weight_values: Tensor

    def __init__(self, entry: Entry, *, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.entry = entry
        self.out_features, self.in_features = entry.rows, entry.columns
        count = -(-entry.kept // 2) if entry.values == "int4" else entry.kept
        self.register_buffer(f"weight_{MASK}", torch.empty(entry.stored, dtype=torch.uint8))
        self.register_buffer(f"weight_{VALUES}", torch.empty(count, dtype=_STORED[entry.values]))
        scales = None
        if entry.group:
            scales = torch.empty(entry.rows, entry.groups, dtype=FLOATS[entry.dtype])
        self.register_buffer(f"weight_{SCALES}", scales)
        self.bias = nn.Parameter(torch.empty(entry.rows, dtype=dtype)) if bias else None
        self._dtype = dtype or FLOATS[entry.dtype]
        self.matrix: Any = None
        self._matrix_buffers: dict[str, Tensor | None] = {}  # the buffers when the matrix was made

    def prepare(self) -> None:
        """Check the loaded tensors, and pass them to the kernels if these are installed.

        Raises:
            ValueError: they do not fit the description.
        """
        if self.weight_values.dtype == self._dtype:
            self._cast(self._dtype)  # transformers 4 has done so while loading
        parts = self._parts()
        check_sizes(self.entry, parts)
        plain = bitmask(self.entry, parts[MASK].cpu())
        self._cast(self._dtype)
        self.weight_mask = plain.to(self.weight_values.device)
        self.entry = replace(self.entry, mask="bits", stored=plain.numel())
        self._build()

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast the values, if they are floats and the format has the dtype."""
        self._dtype = dtype
        name = dtype_name(dtype)
        if self.entry.values in FLOATS and name in FLOATS:
            self.weight_values = self.weight_values.to(dtype)
            self.entry = replace(self.entry, dtype=name, values=name)

    def _build(self) -> None:
        """Build the matrix for the current device, and share its memory."""
        self._make_matrix()
        self._matrix_buffers = dict(self._buffers)

    def _make_matrix(self) -> None:
        mask, values, scales = self.weight_mask, self.weight_values, self._scales
        group = self.entry.group
        if runs_triton(values.device) and (matrix_class := gpu_matrix()) is not None:
            self.matrix = matrix_class(self.in_features, mask, values, scales, group)
            return
        package = kernels() if values.device.type == "cpu" else None
        if package is None or group % _COLUMNS:
            self.matrix = ExpandedMatrix(self.entry, mask, values, scales)
            return
        self.matrix = package.Matrix(self.in_features, mask, values, scales, group)
        self.weight_mask = self.matrix.mask
        if self.entry.values != "int4":  # the kernels have them in another order
            self.weight_values = self.matrix.values
        if scales is not None:  # no longer in the file that they were loaded from
            self._buffers[f"weight_{SCALES}"] = scales.clone()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `weight`."""
        return self._dtype

    @property
    def _scales(self) -> Tensor | None:
        return self.get_buffer(f"weight_{SCALES}") if self.entry.group else None

    def _parts(self) -> dict[str, Tensor]:
        parts = {MASK: self.weight_mask.reshape(-1), VALUES: self.weight_values}
        return {**parts, **({SCALES: self._scales} if self._scales is not None else {})}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Move to another device or dtype. Masks, integers and scales keep their dtypes."""
        if self.matrix is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        example = fn(torch.empty(0, dtype=self._dtype, device=self.weight_values.device))
        buffers = {k: None if t is None else t.to(example.device) for k, t in self._buffers.items()}
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(buffers)
        self._cast(example.dtype)
        self._build()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load, and build the matrix again, since its layout depends on the mask."""
        super()._load_from_state_dict(*arguments)
        state, prefix, *_, errors = arguments
        if self.matrix is None or not any(f"{prefix}{name}" in state for name in self._buffers):
            return
        self.matrix = None
        try:
            self.prepare()
        except ValueError as error:
            errors.append(f"{prefix}weight does not fit its description: {error}")

    def __getstate__(self) -> dict[str, Any]:
        """The state without the matrix, which a copy builds again."""
        is_built = self.matrix is not None
        return {**vars(self), "matrix": None, "_matrix_buffers": {}, "_built": is_built}

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_built = state.pop("_built")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if is_built:
            self._build()

    @property
    def weight(self) -> Tensor:
        """The dense matrix, expanded on each access: some modules read another module's weight."""
        return self.dense().to(self.weight_values.device, self._dtype)

    def dense(self) -> Tensor:
        """The matrix with its zeros (out, in), on the processor."""
        return decode(self.entry, {name: part.cpu() for name, part in self._parts().items()})

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (…, in) → (…, out)."""
        self._follow()
        rows = x.reshape(-1, self.in_features)
        product = None if rows.requires_grad or not is_plain() else self._native(rows)
        if product is None:
            product = tiled_product(rows, self.out_features, self.rows)
        if self.bias is not None:
            product = product + self.bias
        output: Tensor = product.view(*x.shape[:-1], self.out_features)
        return output

    def _native(self, rows: Tensor) -> Tensor | None:
        """The product by the kernels; None if torch is faster for this number of vectors.

        With several threads torch is slower: one thread multiplies rows that others expanded.
        """
        if isinstance(self.matrix, ExpandedMatrix):
            return None
        if len(rows) <= FEW:
            product: Tensor = self.matrix.product(rows)
            return product.to(rows.dtype)
        faster = len(rows) <= _TILED or torch.get_num_threads() > 1
        if faster and rows.device.type == "cpu":
            tiled: Tensor | None = self.matrix.tiled(rows)
            return tiled
        return None

    def _follow(self) -> None:
        """Build the matrix again if its tensors were replaced one by one, as accelerate does."""
        if not same(self._buffers, self._matrix_buffers):
            self._build()

    def current_matrix(self) -> Any:
        """The `matrix` of the current tensors."""
        self._follow()
        return self.matrix

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Dense rows from ``first`` to ``last``, in any floating-point dtype."""
        self._follow()
        kernel_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        with torch._C._DisableFuncTorch():  # within torch.func new tensors have no memory
            dense: Tensor = self.matrix.expand(first, last, kernel_dtype).to(dtype)
        return dense

    def extra_repr(self) -> str:
        """The shape, the share of zeros and the kind of the values."""
        share = 1 - self.entry.kept / max(1, self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, zeros={share:.2f}, {self.entry.values}"
