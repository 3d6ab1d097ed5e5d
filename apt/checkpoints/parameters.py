"""Parameters read from the tensors of a checkpoint, and written over them."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Shards
from apt.layouts.pieces import Piece


def read_parameter(pieces: Sequence[Piece], shape: Sequence[int], shards: Shards) -> Tensor:
    """A parameter, assembled from its pieces; raises `AptError` if a value is not finite."""
    if len(pieces) == 1 and pieces[0].whole:
        return shards.read_finite(pieces[0].key)
    whole = torch.empty(*shape, dtype=shards.entries[pieces[0].key].dtype)
    for piece in pieces:
        whole[piece.part] = piece.taken(shards.read_finite(piece.key))
    return whole


def write_parameters(parameters: Iterable[tuple[Sequence[Piece], Tensor]], shards: Shards) -> None:
    """Write the pieces of parameters over the bytes of their stored tensors."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for pieces, parameter in parameters:
            for piece in pieces:
                values = piece.given(parameter.detach())
                if piece.of:  # the rest of the stored tensor stays
                    stored = shards.read(piece.key)
                    stored[piece.of] = values.to(stored)
                    values = stored
                yield piece.key, values

    shards.write(tensors())
