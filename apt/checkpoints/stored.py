"""A checkpoint of transformers' own format, whose tensors are the parameters of the model.

Most outputs are copies of such a checkpoint in which the pruned tensors are written over: every
other tensor and file stays as it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.checkpoints.copies import OTHER_WEIGHTS, copy_files, copy_weights, side_files
from apt.checkpoints.formats import find_source_file, local_copy
from apt.checkpoints.model import Model
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.tensor_map import Layout, layout_of, pruned_parameters
from apt.errors import AptError, NotStoredError
from apt.planning.plan import Plan

# Of a repository on the hub, what transformers does not read either.
_UNREAD = [*(f"*{suffix}" for suffix in OTHER_WEIGHTS), "*/*.safetensors", "consolidated*"]
_WIDEST = torch.float32  # where the pruned tensors are stored in several precisions


@dataclass(frozen=True)
class Stored:
    """A checkpoint on this machine.

    Attributes:
        directory: where it lies.
        shards: its tensors.
        layout: the tensors that each parameter of the model is made of.
    """

    directory: Path
    shards: Shards
    layout: Layout

    def dtype(self, shell: Model, plan: Plan | None = None) -> torch.dtype:
        """The precision that the model is run in: that of its sites.

        Other tensors may be stored in another one (norms, routers), and the configuration may say
        yet another. Where the sites are of several, none of them is rounded, and no more are the
        extras of a ``plan``.
        """
        names = {
            f"{name}.{site.parameter}"
            for name, block in shell.adapter.blocks(shell.module)
            for site in shell.adapter.sites(block)
        }
        for block in plan.blocks if plan else ():
            names |= {f"{block.name}.{extra.extra.parameter}" for extra in block.extras}
        found = {self.shards.entries[self.layout[name][0].key].dtype for name in names}
        return found.pop() if len(found) == 1 else _WIDEST

    def holds(self, model: nn.Module, names: Iterable[str]) -> bool:
        """Whether the parameters of these names are, in their own precision, what is stored.

        They are not where transformers turns tensors into others of the same name and shape.
        """
        return all(
            torch.equal(parameter[piece.part].cpu(), self._read(piece.key, parameter.dtype))
            for name in names
            for parameter in [model.get_parameter(name).data]
            for piece in self.layout[name]
        )

    def _read(self, key: str, dtype: torch.dtype) -> Tensor:
        return self.shards.read(key).to(dtype)

    def check_finite(self) -> None:
        """Raise where a tensor of the model holds values that are not finite."""
        for key in sorted({piece.key for pieces in self.layout.values() for piece in pieces}):
            self.shards.read_finite(key)

    def copy(self, target: Path, tokenizer: Any = None, largest: str | None = None) -> None:
        """Copy it.

        Args:
            target: an empty directory.
            tokenizer: one that takes the place of the checkpoint's own.
            largest: how large a file of weights may become, as ``"5GB"``; None keeps the files.
        """
        copy_files(side_files(self.directory), self.directory, target)
        copy_weights(self.shards, self.directory, target, largest)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)

    def write(self, model: nn.Module, plan: Plan, target: Path) -> None:
        """Write a model's pruned parameters over those of a copy."""
        Shards(target).write(self._pruned(model, plan))

    def _pruned(self, model: nn.Module, plan: Plan) -> Iterable[tuple[str, Tensor]]:
        for block in plan.blocks:
            for path in pruned_parameters(block):
                name = f"{block.name}.{path}"
                for piece in self.layout[name]:
                    yield piece.key, model.get_parameter(name).data[piece.part]


def open_stored(shell: Model) -> Stored:
    """The checkpoint of a model.

    Raises:
        AptError: it is not transformers' own format, or transformers renames its tensors.
    """
    if shell.checkpoint is not None or shell.source.gguf:
        raise NotStoredError(
            "only checkpoints of transformers can be streamed", "apt-prune convert it first"
        )
    directory = local_directory(shell)
    if directory / "config.json" not in side_files(directory):
        raise NotStoredError(
            f"{directory / 'config.json'} is a link to a file outside the checkpoint",
            "copy that file into the checkpoint",
        )
    shards = Shards(directory)
    return Stored(directory, shards, layout_of(shell, shards))


def find_stored(shell: Model) -> Stored | None:
    """The same; None where there is none."""
    try:
        return open_stored(shell)
    except NotStoredError:
        return None


def local_directory(shell: Model) -> Path:
    """Where the checkpoint of a model lies on this machine."""
    source = shell.source
    found = find_source_file(source, "config.json")
    if found is None:
        raise AptError(f"{source.location} has no config.json", "is the checkpoint complete?")
    if not source.on_hub:
        return found.parent
    try:
        return local_copy(source, _UNREAD)
    except OSError:  # no network: what has been loaded before is there
        return found.parent
