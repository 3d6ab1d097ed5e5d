"""The layout of a checkpoint: the tensors for each parameter of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from apt.checkpoints.model import Model
from apt.checkpoints.safetensors_io import Shards
from apt.errors import AptError, NotStoredError
from apt.planning.plan import Plan, PlannedBlock

_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameters that stack the tensors of single experts, and the tensors in each slice."""


@dataclass(frozen=True)
class Piece:
    """The ``key`` of a tensor in a checkpoint, and the ``part`` of the parameter that it is."""

    key: str
    part: tuple[int | slice, ...] = ()


Layout = Mapping[str, Sequence[Piece]]


def layout_of(shell: Model, shards: Shards) -> Layout:
    """The pieces of all parameters in a checkpoint.

    Raises:
        NotStoredError: a parameter of a block is missing or has another shape.
        AptError: a parameter is stored as integers.
    """
    prefix = f"{getattr(shell.module, 'base_model_prefix', '')}."
    layout = {}
    for name, tensor in shell.module.state_dict().items():
        for known in (name, name.removeprefix(prefix)):
            if pieces := _pieces(known, tuple(tensor.shape), shards):
                _check_stored(name, tensor, pieces, shards)
                layout[name] = pieces
                break
    for block, module in shell.adapter.blocks(shell.module):
        for name, parameter in module.named_parameters():
            pieces = layout.get(f"{block}.{name}", [])
            if not pieces or not _match(pieces, parameter, shards):
                raise NotStoredError(
                    f"{shell.source.reference} cannot be streamed: {block}.{name} is stored "
                    "differently than in the model",
                    "do not stream it",
                    ("stream",),
                )
    return layout


def _check_stored(name: str, tensor: torch.Tensor, pieces: Sequence[Piece], shards: Shards) -> None:
    """Raise if a parameter is stored in another shape or as integers."""
    if len(pieces) == 1 and shards.entries[pieces[0].key].shape != tuple(tensor.shape):
        raise NotStoredError(
            f"{name} has shape {shards.entries[pieces[0].key].shape} in the checkpoint, "
            f"{tuple(tensor.shape)} by its configuration",
            "is config.json that of another checkpoint?",
        )
    if tensor.is_floating_point() and any(
        not shards.entries[piece.key].dtype.is_floating_point for piece in pieces
    ):
        fault = f"{name} is stored as integers: the checkpoint is quantised"
        raise AptError(fault, "prune the original, and quantise the result")


def _pieces(name: str, shape: tuple[int, ...], shards: Shards) -> list[Piece]:
    """The pieces of a parameter; empty if it is not in the checkpoint."""
    if name in shards:
        return [Piece(name)]
    owner, _, own = name.rpartition(".")
    kinds = _STACKED.get(own, ()) if len(shape) == 3 else ()
    pieces = []
    for expert in range(shape[0] if kinds else 0):
        rows = shape[1] // len(kinds)
        for place, kind in enumerate(kinds):
            here = slice(place * rows, (place + 1) * rows)
            pieces.append(Piece(f"{owner}.{expert}.{kind}.weight", (expert, here)))
    return pieces if all(piece.key in shards for piece in pieces) else []


def _match(pieces: Sequence[Piece], parameter: torch.Tensor, shards: Shards) -> bool:
    """True if each piece has the right shape and all have the same dtype."""
    entries = [shards.entries[piece.key] for piece in pieces]
    shapes = [tuple(parameter[piece.part].shape) for piece in pieces]
    same = len({entry.dtype for entry in entries}) == 1
    return same and [entry.shape for entry in entries] == shapes


def pruned_tensors(plan: Plan, layout: Layout) -> list[str]:
    """The names in the checkpoint of the tensors that pruning changes."""
    return [key for block in plan.blocks for key in pruned_of(block, layout)]


def pruned_of(block: PlannedBlock, layout: Layout) -> list[str]:
    """`pruned_tensors` of one block."""
    return [
        piece.key for path in pruned_parameters(block) for piece in layout[f"{block.name}.{path}"]
    ]


def pruned_parameters(block: PlannedBlock) -> list[str]:
    """The paths within a block of the parameters that pruning changes."""
    paths = [entry.site.parameter for entry in block.pruned]
    paths += [entry.extra.parameter for entry in block.extras]
    paths += [part.parameter for entry in block.disconnected for part in entry.groups.outputs]
    return list(dict.fromkeys(paths))
