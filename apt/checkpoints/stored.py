"""A checkpoint in the format of transformers, whose tensors are the parameters of the model.

Most outputs are copies of such a checkpoint in which the pruned tensors are overwritten. All other
tensors and files do not change.
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

# Files on the hub that transformers does not read either.
_UNREAD = [*(f"*{suffix}" for suffix in OTHER_WEIGHTS), "*/*.safetensors", "consolidated*"]
_WIDEST = torch.float32  # if the pruned tensors are stored in several dtypes


@dataclass(frozen=True)
class Stored:
    """A checkpoint in a local directory, with the tensors for each parameter of the model."""

    directory: Path
    shards: Shards
    layout: Layout

    def dtype(self, shell: Model, plan: Plan | None = None) -> torch.dtype:
        """The dtype that the model runs in: the stored dtype of its sites.

        Other tensors, such as norms and routers, may have another one, and so may the
        configuration. If the sites, with the extras of a ``plan``, have several dtypes, it is fp32,
        so that none of them is rounded.
        """
        names = {
            f"{name}.{site.parameter}"
            for name, block in shell.adapter.blocks(shell.module)
            for site in shell.adapter.sites(block)
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


def open_stored(shell: Model) -> Stored:
    """The checkpoint; raises `AptError` if its tensors are not the parameters of the model."""
    if shell.checkpoint is not None or shell.source.gguf:
        fault = "only checkpoints of transformers can be streamed"
        raise NotStoredError(fault, "convert it first with apt-prune convert", ("stream",))
    directory = local_directory(shell)
    if directory / "config.json" not in side_files(directory):
        fault = f"{directory / 'config.json'} is a link to a file outside the checkpoint"
        raise NotStoredError(fault, "copy that file into the checkpoint")
    shards = Shards(directory)
    return Stored(directory, shards, layout_of(shell, shards))


def find_stored(shell: Model) -> Stored | None:
    """The checkpoint of a model; None where `open_stored` raises `NotStoredError`."""
    try:
        return open_stored(shell)
    except NotStoredError:
        return None


def local_directory(shell: Model) -> Path:
    """The local directory of the checkpoint of a model."""
    source = shell.source
    config = find_source_file(source, "config.json")
    if config is None:
        raise AptError(f"{source.location} has no config.json", "is the checkpoint complete?")
    if not source.on_hub:
        return config.parent
    try:
        return local_copy(source, _UNREAD)
    except OSError:  # no network: use the earlier download
        return config.parent
