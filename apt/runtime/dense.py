"""Linear modules of a packed model that keep a dense matrix, such as the language-model head."""

from typing import Any

import torch
from torch import Tensor, nn

from apt.runtime.linear import FEW, kernels

_WORD = 64  # columns
_LEAST = 2**20  # weights from which on the kernels pay


class DenseLinear(nn.Linear):
    """A Linear in bf16 whose products of a few vectors are those of ``apt-kernels``."""

    _kernel: Any = None
    _address = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies make a kernel of their own."""
        return {k: v for k, v in vars(self).items() if k not in ("_kernel", "_address")}

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (…, in) → (…, out)."""
        rows = x.reshape(-1, self.in_features)
        trained = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if len(rows) > FEW or x.dtype != torch.bfloat16 or not _serves(self) or trained:
            return super().forward(x)
        if self._address != self.weight.data_ptr():  # the first time, and after a move
            self._kernel = kernels().DenseMatrix(self.weight.data)
            self._address = self.weight.data_ptr()
        product: Tensor = self._kernel.product(rows).to(x.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)


def _serves(linear: nn.Linear) -> bool:
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
    """Let the Linear modules of a loaded model use the kernels where they are faster.

    The dense weights are copied to large pages, as the packed ones were. Loading maps the whole
    file into memory, and it stays mapped as long as one tensor refers to it.
    """
    if (native := kernels()) is None:
        return
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = native.in_large_pages(parameter.data)
    for module in model.modules():
        if type(module) is nn.Linear and _serves(module):
            module.__class__ = DenseLinear
