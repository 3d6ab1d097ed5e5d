"""Reapplication of masks to a model that was fine-tuned elsewhere."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from apt.checkpoints.copies import keep_side_files, save_model
from apt.checkpoints.load import load, load_tokenizer, skeleton
from apt.checkpoints.masks import (
    MASKS,
    Masks,
    apply_masks,
    check_masks,
    filled,
    masks_of,
    read_masks,
    sparsity_of,
)
from apt.checkpoints.model import Model
from apt.checkpoints.stored import local_directory
from apt.engine.prepare import check_place
from apt.errors import AptError
from apt.locations.model_source import Source, find
from apt.locations.paths import kind_at
from apt.output.card import write_card
from apt.output.location import check_space
from apt.output.report import Report, portable, read_report
from apt.output.workplace import whole_directory, write_errors
from apt.plugin.registry import Registry


@dataclass(frozen=True)
class Reapplied:
    """The result of a reapplication.

    Attributes:
        weights: the number of weights that were not zero.
        share: their squares as a share of those of all weights in the parameters with masks.
        sparsity: the share of pruned weights in these parameters.
        parameters: the number of parameters with masks.
    """

    weights: int
    share: float
    sparsity: float
    parameters: int


def reapply(
    masks: Path,
    source: Source,
    output: Path,
    registry: Registry,
    adapter: str | None = None,
    notice: Callable[[str], None] = lambda line: None,
    *,
    overwrite: bool = False,
    max_shard_size: str | None = None,
) -> Reapplied:
    """Write a model with the zeros of another one.

    Args:
        masks: a file of masks, or the directory of a pruned model.
        source: the model.
        output: the directory to write.
        registry: the plugins.
        adapter: the name of an adapter; by default that of the model's type.
        notice: called with a line about what is replaced or left out.
        overwrite: True if the output of an earlier run may be replaced.
        max_shard_size: the largest size of a file of weights.

    Raises:
        AptError: the masks cannot be read or belong to another model, or the output cannot be
            written.
    """
    check_place(output, source, (str(masks),), notice, overwrite=overwrite, resume=False)
    kind = _kind(masks)
    shell = skeleton(source, registry, adapter)
    check_space(output, sum(p.numel() for p in shell.module.parameters()) * shell.dtype.itemsize)
    if kind == "directory":
        found = _read(masks, registry, adapter, trust_remote_code=source.trust_remote_code)
    else:
        found = read_masks(masks)
    check_masks(found, shell.module, str(masks))
    report = _report(masks, shell)
    loaded = load(shell)
    removed = apply_masks(found, loaded.module)
    done = Reapplied(removed.weights, removed.share, sparsity_of(found), len(found))
    with whole_directory(output, overwrite) as work, write_errors(output):
        _save(loaded, work.out, max_shard_size)
        saved = skeleton(replace(source, location=str(work.out), gguf=None), registry, adapter)
        if (wrong := filled(found, load(saved).module)) is not None:
            raise RuntimeError(f"{wrong} on disk lost zeros")
        names = {"masks": portable(str(masks)), "model": portable(source.reference)}
        report = replace(report, reapplied=names | asdict(done))
        write_card(work.out, report, None if source.gguf else local_directory(shell))
        report.write(work.out)
    return done


def _report(masks: Path, shell: Model) -> Report:
    """The report of the pruned model; one without a run if it has none."""
    pruned = read_report(masks) if masks.is_dir() else None
    model = {
        "reference": portable(shell.source.reference),
        "type": shell.config.model_type,
        "adapter": shell.spec.name,
    }
    where = f"the report in {masks}"
    return Report.from_dict(pruned, where) if pruned else Report({}, model, {})


def _save(loaded: Model, directory: Path, max_shard_size: str | None) -> None:
    """Write the model, with its tokenizer if it has one."""
    try:
        tokenizer = load_tokenizer(loaded.source)
    except AptError:
        tokenizer = None
    save_model(loaded.module, tokenizer, directory, loaded.checkpoint, max_shard_size)
    if not loaded.source.gguf:
        keep_side_files(local_directory(loaded), directory)


def _kind(masks: Path) -> str:
    """The kind of file of the masks.

    Raises:
        AptError: it is neither a file nor a directory.
    """
    kind = kind_at(masks)
    if kind not in ("file", "directory"):
        fault = "does not exist" if kind is None else "is neither a file nor a directory"
        raise AptError(f"{masks} {fault}", f"name a pruned model, or a file {MASKS}")
    return kind


def _read(
    masks: Path, registry: Registry, adapter: str | None, *, trust_remote_code: bool
) -> Masks:
    """The masks of a pruned model."""
    source = find(f"{masks.resolve()}", registry, trust_remote_code=trust_remote_code)
    pruned = load(skeleton(source, registry, adapter))
    return masks_of(pruned.module, pruned.adapter)
