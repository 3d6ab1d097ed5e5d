"""What a weight is multiplied by, found without the adapter: below hooks and torch functions.

Every product ends in one of a few operators. Seen there, a weight is known by its storage, whoever
wrote the product and however; and the strides of the factor tell in which direction it is stored.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

K = TypeVar("K", bound=Hashable)

_aten = torch.ops.aten
# The operators, and where their two factors stand.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}


@dataclass
class Seen:
    """The products with one weight.

    Attributes:
        inputs: the other factors (tokens, in), in fp64.
        stored: of each product, whether it says that the weight is stored (in, out); None where
            its shape leaves that open.
        first: the place of the first product among all.
    """

    inputs: list[Tensor] = field(default_factory=list)
    stored: list[bool | None] = field(default_factory=list)
    first: int = -1

    @property
    def gram(self) -> Tensor:
        """``XᵀX`` (in, in) in fp64."""
        rows = torch.cat(self.inputs)
        return rows.T @ rows

    @property
    def tokens(self) -> int:
        """The number of rows."""
        return sum(len(rows) for rows in self.inputs)


class Oracle(TorchDispatchMode, Generic[K]):  # type: ignore[no-untyped-call]
    """While entered, collects what the ``weights`` (2-D, by key) are multiplied by."""

    def __init__(self, weights: Mapping[K, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[K, Seen] = {}
        self._weights = {_place(weight): (key, weight) for key, weight in weights.items()}
        self._products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the factors of a product, then let it happen."""
        if func in _PRODUCTS:
            left, right = (args[place] for place in _PRODUCTS[func])
            self._products += 1
            self._look(right, left, lambda x: x)
            self._look(left, right, lambda x: x.transpose(-1, -2))
        return func(*args, **(kwargs or {}))

    def _look(self, factor: Tensor, other: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        """Whether ``factor`` is a watched weight; ``rows`` turns both factors to ``X Wᵀ``."""
        key, weight = self._weights.get(_place(factor), (None, None))
        if key is None or weight is None or factor.numel() != weight.numel():
            return
        inputs, turned = rows(other), rows(factor)
        seen = self.seen.setdefault(key, Seen(first=self._products))
        seen.inputs.append(inputs.reshape(-1, inputs.shape[-1]).double())
        if min(turned.shape[-2:]) > 1:
            seen.stored.append(turned.stride(-1) == 1)  # (in, out), and contiguous along out
        else:
            seen.stored.append(None)


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
