"""The stored tensors that a parameter is made of, and how each lies in it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Shards


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

    def read(self, shards: Shards) -> Tensor:
        """The part of the parameter; raises `AptError` if a value is not finite."""
        stored = shards.read_finite(self.key)[self.of]
        return stored.permute(self.order) if self.order else stored

    def stored(self, parameter: Tensor, shards: Shards) -> Tensor:
        """The stored tensor with this part of a parameter in its place."""
        values = parameter.detach()[self.part]
        if self.order:
            values = values.permute([self.order.index(dim) for dim in range(len(self.order))])
        if not self.of:
            return values
        tensor = shards.read(self.key)
        tensor[self.of] = values.to(tensor)
        return tensor


Layout = Mapping[str, Sequence[Piece]]
"""The pieces of each parameter."""


def read_parameter(pieces: Sequence[Piece], shape: Sequence[int], shards: Shards) -> Tensor:
    """A parameter, assembled from its pieces; raises `AptError` if a value is not finite."""
    if len(pieces) == 1 and pieces[0].whole:
        return pieces[0].read(shards)
    whole = torch.empty(*shape, dtype=shards.entries[pieces[0].key].dtype)
    for piece in pieces:
        whole[piece.part] = piece.read(shards)
    return whole


def write_parameters(parameters: Iterable[tuple[Sequence[Piece], Tensor]], shards: Shards) -> None:
    """Write the pieces of parameters over the bytes of their stored tensors."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for pieces, parameter in parameters:
            for piece in pieces:
                yield piece.key, piece.stored(parameter, shards)

    shards.write(tensors())
