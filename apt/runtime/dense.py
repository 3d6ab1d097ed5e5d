"""Linear modules of a packed model that keep a dense matrix, such as the language-model head."""

from typing import Any

import torch
from torch import Tensor, nn

from apt.runtime.linear import FEW, is_slow, kernels, tiled_product
from apt.runtime.watched import is_plain

_WORD = 64  # columns
_LEAST = 2**20  # the least number of weights for which the kernels are faster


class DenseLinear(nn.Linear):
    """A Linear in half precision that multiplies in the fastest way of the processor.

    A product of a few vectors is computed by ``apt-kernels`` in bf16. A product of many vectors is
    computed in fp32 and rounded, where the processor is slow in half precision.
    """

    _kernel: Any = None
    _key: tuple[int, torch.Size] | None = None  # the address and shape of the kernel's weight

    def __getstate__(self) -> dict[str, Any]:
        """The state without the kernel, which a copy builds again."""
        return {k: v for k, v in vars(self).items() if k not in ("_kernel", "_key")}

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (…, in) → (…, out)."""
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if needs_gradient or x.dtype != self.weight.dtype or not is_plain():
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        product = self._fast(rows)
        if product is None:
            return super().forward(x)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def _fast(self, rows: Tensor) -> Tensor | None:
        """The product with vectors (n, in), without the bias; None if torch's is as fast."""
        weight = self.weight
        if len(rows) > FEW:
            return tiled_product(rows, len(weight), self._rows) if is_slow(weight) else None
        if not _is_supported(self):
            return None
        product: Tensor = self.kernel().product(rows)
        return product.to(rows.dtype)

    def _rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.weight[first:last].to(dtype)

    def kernel(self) -> Any:
        """The current weight as a matrix of ``apt-kernels``.

        Raises:
            ValueError: the kernels do not support it.
        """
        key = self.weight.data_ptr(), self.weight.shape
        if self._key != key:  # the first time, and after a move
            self._kernel, self._key = kernels().DenseMatrix(self.weight.data), key
        return self._kernel


def _is_supported(linear: nn.Linear) -> bool:
    """True if the kernels multiply the weight of a module faster than torch."""
    weight = linear.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % _WORD == 0
        and weight.numel() >= _LEAST
        and weight.is_contiguous()
        and kernels() is not None
    )


def use_kernels(model: nn.Module) -> None:
    """Let the Linear modules of a loaded model multiply in the fastest way of the processor.

    With the kernels, the dense weights are copied to large pages, as the packed weights were.
    Otherwise the file of weights would stay mapped into memory, as long as one tensor refers to it.
    """
    package = kernels()
    for parameter in model.parameters() if package is not None else ():
        if parameter.device.type == "cpu":
            parameter.data = package.in_large_pages(parameter.data)
    for module in model.modules():
        if type(module) is nn.Linear and (_is_supported(module) or is_slow(module.weight)):
            module.__class__ = DenseLinear
