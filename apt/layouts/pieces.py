"""The pieces of a parameter: parts of stored tensors, and their places in the parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """The place in a checkpoint of a part of a parameter.

    ``parameter[part]`` is ``stored[of].permute(order)``.

    Attributes:
        key: the name of the stored tensor.
        part: the part of the parameter; empty for all of it.
        of: the part of the stored tensor; empty for all of it.
        order: the dimensions of the stored part in the order of the parameter; empty if equal.
    """

    key: str
    part: tuple[int | slice, ...] = ()
    of: tuple[slice, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """True if the stored tensor is the parameter itself."""
        return not (self.part or self.of or self.order)

    def from_stored(self, stored: Tensor) -> Tensor:
        """The part of the parameter, taken from the stored tensor."""
        values = stored[self.of]
        return values.permute(self.order) if self.order else values

    def to_stored(self, parameter: Tensor) -> Tensor:
        """The part of the stored tensor, taken from the parameter."""
        values = parameter[self.part]
        if not self.order:
            return values
        return values.permute([self.order.index(dim) for dim in range(len(self.order))])


Layout = Mapping[str, Sequence[Piece]]
"""The pieces of each parameter."""
