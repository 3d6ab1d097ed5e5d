"""A checkpoint in the format of transformers, whose tensors are the parameters of the model.

Most outputs are copies of such a checkpoint in which the pruned tensors are overwritten. All other
tensors and files do not change.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.checkpoints.copies import OTHER_WEIGHTS, copy_files, copy_weights, side_files
from apt.checkpoints.formats import find_source_file, local_copy
from apt.checkpoints.opened import Opened
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


def layout_of(skeleton: Opened, shards: Shards) -> Layout:
    """The pieces of all parameters in a checkpoint.

    Raises:
        NotStoredError: a parameter of a block is missing or has another shape.
        AptError: a parameter is stored as integers.
    """
    prefix = f"{getattr(skeleton.module, 'base_model_prefix', '')}."
    layout = {}
    for name, tensor in skeleton.module.state_dict().items():
        for known in (name, name.removeprefix(prefix)):
            if pieces := _pieces(known, tuple(tensor.shape), shards):
                _check_stored(name, tensor, pieces, shards)
                layout[name] = pieces
                break
    for block, module in skeleton.adapter.blocks(skeleton.module):
        for name, parameter in module.named_parameters():
            pieces = layout.get(f"{block}.{name}", [])
            if not pieces or not _match(pieces, parameter, shards):
                raise NotStoredError(
                    f"{skeleton.source.reference} cannot be streamed: {block}.{name} is stored "
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


# Files on the hub that transformers does not read either.
_UNREAD = [*(f"*{suffix}" for suffix in OTHER_WEIGHTS), "*/*.safetensors", "consolidated*"]
_WIDEST = torch.float32  # if the pruned tensors are stored in several dtypes


@dataclass(frozen=True)
class Stored:
    """A checkpoint in a local directory, with the tensors for each parameter of the model."""

    directory: Path
    shards: Shards
    layout: Layout

    def dtype(self, skeleton: Opened, plan: Plan | None = None) -> torch.dtype:
        """The dtype that the model runs in: the stored dtype of its sites.

        Other tensors, such as norms and routers, may have another one, and so may the
        configuration. If the sites, with the extras of a ``plan``, have several dtypes, it is fp32,
        so that none of them is rounded.
        """
        names = {
            f"{name}.{site.parameter}"
            for name, block in skeleton.adapter.blocks(skeleton.module)
            for site in skeleton.adapter.sites(block)
        }
        for block in plan.blocks if plan else ():
            names |= {f"{block.name}.{extra.extra.parameter}" for extra in block.extras}
        dtypes = {self.shards.entries[self.layout[name][0].key].dtype for name in names}
        return dtypes.pop() if len(dtypes) == 1 else _WIDEST

    def equals(self, model: nn.Module, names: Iterable[str]) -> bool:
        """True if these parameters equal the stored tensors: transformers may transform them."""
        return all(
            torch.equal(
                parameter[piece.part].cpu(), self.shards.read(piece.key).to(parameter.dtype)
            )
            for name in names
            for parameter in [model.get_parameter(name).data]
            for piece in self.layout[name]
        )

    def check_finite(self) -> None:
        """Raise if a tensor of the model has values that are not finite."""
        for key in sorted({piece.key for pieces in self.layout.values() for piece in pieces}):
            self.shards.read_finite(key)

    def copy(self, target: Path, tokenizer: Any = None, largest: str | None = None) -> None:
        """Copy the checkpoint; ``largest``, such as ``"5GB"``, limits its files."""
        copy_files(side_files(self.directory), self.directory, target)
        copy_weights(self.shards, self.directory, target, largest)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)

    def write(self, model: nn.Module, plan: Plan, target: Path) -> None:
        """Write the pruned parameters of a model into a copy of the checkpoint."""
        Shards(target).write(self._pruned(model, plan))

    def _pruned(self, model: nn.Module, plan: Plan) -> Iterable[tuple[str, Tensor]]:
        for block in plan.blocks:
            for path in pruned_parameters(block):
                name = f"{block.name}.{path}"
                for piece in self.layout[name]:
                    yield piece.key, model.get_parameter(name).data[piece.part]


def open_stored(skeleton: Opened) -> Stored:
    """The checkpoint; raises `AptError` if its tensors are not the parameters of the model."""
    if skeleton.checkpoint is not None or skeleton.source.gguf:
        fault = "only checkpoints of transformers can be streamed"
        raise NotStoredError(fault, "convert it first with apt-prune convert", ("stream",))
    directory = local_directory(skeleton)
    if directory / "config.json" not in side_files(directory):
        fault = f"{directory / 'config.json'} is a link to a file outside the checkpoint"
        raise NotStoredError(fault, "copy that file into the checkpoint")
    shards = Shards(directory)
    return Stored(directory, shards, layout_of(skeleton, shards))


def find_stored(skeleton: Opened) -> Stored | None:
    """The checkpoint of a model; None where `open_stored` raises `NotStoredError`."""
    try:
        return open_stored(skeleton)
    except NotStoredError:
        return None


def local_directory(skeleton: Opened) -> Path:
    """The local directory of the checkpoint of a model."""
    source = skeleton.source
    config = find_source_file(source, "config.json")
    if config is None:
        raise AptError(f"{source.location} has no config.json", "is the checkpoint complete?")
    if not source.on_hub:
        return config.parent
    try:
        return local_copy(source, _UNREAD)
    except OSError:  # no network: use the earlier download
        return config.parent
