"""The weights of a smaller model, written block by block from a checkpoint with zeros."""

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from apt.adapter.groups import without
from apt.checkpoints.copies import copy_files, side_files, synchronise
from apt.checkpoints.model import Model
from apt.checkpoints.offload import StoredBlocks
from apt.checkpoints.safetensors_io import INDEX, Shards
from apt.checkpoints.shrunk import resized
from apt.checkpoints.tensor_map import Layout
from apt.errors import AptError
from apt.files.index import write_index
from apt.planning.plan import Plan, PlannedBlock
from apt.planning.structure import planned_groups, removed_groups

_CONFIG = "config.json"


def check_compactable(layout: Layout) -> None:
    """Raise if a parameter is stored in several tensors, as those of experts may be."""
    for name, pieces in layout.items():
        if len(pieces) > 1:
            raise AptError(
                f"{name} is stored in {len(pieces)} tensors, which cannot be made smaller one by "
                "one",
                "do not stream",
                ("stream",),
            )


def write_compacted(
    shell: Model, plan: Plan, masked: StoredBlocks, layout: Layout, source: Path, target: Path
) -> None:
    """Write the smaller model of a run that has set columns to zero.

    The blocks are read one by one. Each block that is kept has a file of its own.

    Args:
        shell: the dense model without weights.
        masked: the blocks of ``source``.
        layout: the tensors for each parameter.
        source: the checkpoint with zeros, which has all blocks.
        target: an empty directory.
    """
    files = (path for path in side_files(source) if path != source / _CONFIG)
    copy_files(files, source, target)
    _write_config(shell, plan, target)
    parts = _parts(shell, plan, masked, layout, Shards(source))
    count = 1 + sum(not block.dropped for block in plan.blocks)
    places, size = dict[str, str](), 0
    for number, tensors in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        synchronise(target / name)
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_index(target / INDEX, {"total_size": size}, places)


def _write_config(shell: Model, plan: Plan, target: Path) -> None:
    modules, removed = dict(shell.adapter.blocks(shell.module)), {}
    indices = [index for index, block in enumerate(plan.blocks) if not block.dropped]
    for index in indices:
        planned = plan.blocks[index]
        block = modules[planned.name]
        kept = planned_groups(shell.adapter, shell.config, block, planned)
        for groups in shell.adapter.groups(block, shell.config):
            if groups.kind in kept:
                removed[groups.kind] = (groups, groups.count - kept[groups.kind])
    config = resized(shell.config, list(removed.values()), indices, len(plan.blocks))
    config.save_pretrained(target)


def _parts(
    shell: Model, plan: Plan, masked: StoredBlocks, layout: Layout, shards: Shards
) -> Iterator[dict[str, Tensor]]:
    """The tensors outside the blocks, and then those of each block that is kept."""
    inside = {
        piece.key
        for name, block in shell.adapter.blocks(shell.module)
        for path, _ in block.named_parameters()
        for piece in layout[f"{name}.{path}"]
    }
    yield {key: shards.read(key) for key in shards.entries if key not in inside}
    kept = [planned for planned in plan.blocks if not planned.dropped]
    for place, planned in zip(plan.blocks, kept, strict=False):
        yield _block(shell, planned, place.name, masked, layout, shards)


def _block(
    shell: Model,
    planned: PlannedBlock,
    place: str,
    masked: StoredBlocks,
    layout: Layout,
    shards: Shards,
) -> dict[str, Tensor]:
    """The smaller tensors of a block, by the keys of the block ``place``."""
    adapter, config, tensors = shell.adapter, shell.config, {}
    with masked.open(planned.name) as block:
        removed = removed_groups(adapter, config, block, planned)
        known = {groups.kind: groups for groups in adapter.groups(block, config)}
        removals = [(known[kind], indices) for kind, indices in removed.items()]
        own = dict(block.named_parameters())
        for path, tensor in (own | without(own, removals)).items():
            stored = shards.entries[layout[f"{planned.name}.{path}"][0].key].dtype
            tensors[layout[f"{place}.{path}"][0].key] = (
                tensor.detach().to("cpu", stored).contiguous()
            )
    return tensors
