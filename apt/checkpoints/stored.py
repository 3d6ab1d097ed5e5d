"""A checkpoint in the format of transformers, whose tensors are the parameters of the model.

Most outputs are copies of such a checkpoint in which the pruned tensors are overwritten. All other
tensors and files do not change.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.checkpoints.copies import OTHER_WEIGHTS, copy_files, copy_weights, side_files
from apt.checkpoints.expanded import Expanded
from apt.checkpoints.formats import find_source_file, local_copy
from apt.checkpoints.former_names import save_tokenizer
from apt.checkpoints.opened import Opened
from apt.checkpoints.safetensors_io import Shards
from apt.errors import AptError, NotStoredError
from apt.layouts.conversions import Converted, converted
from apt.layouts.pieces import Layout, Piece
from apt.planning.plan import Plan, PlannedBlock


def layout_of(skeleton: Opened, shards: Shards) -> Layout:
    """The pieces of all parameters in a checkpoint.

    Raises:
        NotStoredError: a parameter of a block is missing, has another shape, or does not consist
            of pieces of stored tensors.
        AptError: a parameter is stored as integers.
    """
    layout, problems = dict[str, Sequence[Piece]](), dict[str, str]()
    state = skeleton.module.state_dict()
    for name, conversion in converted(skeleton.whole or skeleton.module, shards.shapes).items():
        if name not in state:  # beside a tower
            continue
        if conversion.problem:
            problems[name] = f": {conversion.problem}"
        else:
            _check_stored(name, state[name], conversion, shards)
            layout[name] = conversion.pieces
    parameters = list(skeleton.module.named_parameters(remove_duplicate=False))
    owners = {parameter: name for name, parameter in parameters if name in layout}
    for block, module in skeleton.adapter.blocks(skeleton.module):
        for path, parameter in module.named_parameters():
            name = f"{block}.{path}"
            if name not in layout and parameter in owners:  # shared with another block
                layout[name] = layout[owners[parameter]]
            dtypes = {shards.entries[piece.key].dtype for piece in layout.get(name, ())}
            if len(dtypes) != 1:
                raise NotStoredError(
                    f"{skeleton.source.reference} cannot be streamed: {name} is stored differently "
                    f"than in the model{problems.get(name, '')}",
                    "do not stream it",
                    ("stream",),
                )
    return layout


def _check_stored(name: str, tensor: Tensor, conversion: Converted, shards: Shards) -> None:
    """Raise if a parameter is stored in another shape or as integers."""
    if conversion.shape != tuple(tensor.shape):
        raise NotStoredError(
            f"{name} has shape {conversion.shape} in the checkpoint, "
            f"{tuple(tensor.shape)} by its configuration",
            "is config.json that of another checkpoint?",
        )
    if tensor.is_floating_point() and any(
        not shards.entries[piece.key].dtype.is_floating_point for piece in conversion.pieces
    ):
        message = f"{name} is stored as integers: the checkpoint is quantised"
        raise AptError(message, "prune the original, and quantise the result")


def pruned_tensors(plan: Plan, layout: Layout) -> list[str]:
    """The stored names of the tensors that pruning changes."""
    return [key for block in plan.blocks for key in pruned_of(block, layout)]


def pruned_of(block: PlannedBlock, layout: Layout) -> list[str]:
    """`pruned_tensors` of one block."""
    names = (f"{block.name}.{path}" for path in pruned_parameters(block))
    return list(dict.fromkeys(piece.key for name in names for piece in layout[name]))


def pruned_parameters(block: PlannedBlock) -> list[str]:
    """The paths within a block of the parameters that pruning changes."""
    paths = [entry.site.parameter for entry in block.pruned]
    paths += [entry.extra.parameter for entry in block.extras]
    paths += [part.parameter for each in block.permutable for part in each.parts]
    for groups in (entry.groups for entry in block.groups if entry.groups.apart):
        paths += [part.parameter for part in groups.parts]
    for entry in block.disconnected:
        groups = entry.groups
        outputs = [part.path(group) for part in groups.outputs for group in range(groups.count)]
        prefixes = tuple(f"{path.rpartition('.')[0]}." for path in outputs)  # of experts
        parts = [part.parameter for part in groups.parts if part.parameter.startswith(prefixes)]
        paths += parts if groups.routed and not groups.members else outputs
    return list(dict.fromkeys(paths))


def read_parameter(pieces: Sequence[Piece], shape: Sequence[int], shards: Shards) -> Tensor:
    """A parameter, assembled from its pieces; raises `AptError` if a value is not finite."""
    if len(pieces) == 1 and pieces[0].whole:
        return shards.read_finite(pieces[0].key)
    parameter = torch.empty(*shape, dtype=shards.entries[pieces[0].key].dtype)
    for piece in pieces:
        parameter[piece.part] = piece.from_stored(shards.read_finite(piece.key))
    return parameter


def write_parameters(parameters: Iterable[tuple[Sequence[Piece], Tensor]], shards: Shards) -> None:
    """Write the pieces of parameters over the bytes of their stored tensors."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for pieces, parameter in parameters:
            for piece in pieces:
                values = piece.to_stored(parameter.detach())
                if piece.of:  # the rest of the stored tensor stays
                    stored = shards.read(piece.key)
                    stored[piece.of] = values.to(stored)
                    values = stored
                yield piece.key, values

    shards.write(tensors())


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
        """The dtype of the model: the stored dtype of its sites.

        Norms and routers may be stored in another dtype, and the configuration may name another
        one. If the sites, with the extras of a ``plan``, have several dtypes, the result is fp32,
        so that no value is rounded.
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
        """True if parameters equal the stored tensors; transformers may have transformed them."""
        return all(
            torch.equal(
                parameter[piece.part].cpu(),
                piece.from_stored(self.shards.read(piece.key)).to(parameter.dtype),
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
            save_tokenizer(tokenizer, target)

    def dtypes(self, plan: Plan) -> dict[str, torch.dtype]:
        """The stored dtypes of the parameters that pruning changes, by their full names."""
        names = (f"{b.name}.{path}" for b in plan.blocks for path in pruned_parameters(b))
        return {name: self.shards.entries[self.layout[name][0].key].dtype for name in names}

    def write(self, model: nn.Module, plan: Plan, target: Path, others: Iterable[str] = ()) -> None:
        """Write the pruned parameters of a model, and others, into a copy of the checkpoint."""
        names = [f"{b.name}.{path}" for b in plan.blocks for path in pruned_parameters(b)]
        parameters = ((self.layout[n], model.get_parameter(n)) for n in (*names, *others))
        write_parameters(parameters, Shards(target))


def open_stored(skeleton: Opened) -> Stored:
    """The checkpoint; raises `AptError` if its tensors are not the parameters of the model."""
    if skeleton.quantised is not None:
        expanded = Expanded(skeleton.quantised)
        return Stored(expanded.files[0].parent, expanded, layout_of(skeleton, expanded))
    if skeleton.checkpoint is not None or skeleton.source.gguf:
        message = "only checkpoints of transformers can be streamed"
        raise NotStoredError(message, "convert it first with apt-prune convert", ("stream",))
    directory = local_directory(skeleton)
    if directory / "config.json" not in side_files(directory):
        message = f"{directory / 'config.json'} is a link to a file outside the checkpoint"
        raise NotStoredError(message, "copy that file into the checkpoint")
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
