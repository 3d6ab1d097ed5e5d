"""The task of ``apt-prune reapply``: restore the zeros of a pruned model after fine-tuning."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apt.checkpoints.load import load, load_tokenizer, open_skeleton
from apt.checkpoints.masks import (
    MASKS,
    Masks,
    Orders,
    apply_masks,
    check_masks,
    masks_of,
    permute_as_masked,
    read_masks,
    read_orders,
    sparsity_of,
)
from apt.distributed.ranks import Ranks
from apt.engine.opening import RunRequest, find_source
from apt.engine.prepare import Notice, open_model, pruned_towers, tower_in
from apt.engine.reports import continued_report
from apt.engine.store import ModelStore
from apt.engine.task import Task, TaskResult
from apt.engine.text import Text
from apt.errors import AptError
from apt.locations.paths import kind_at, portable
from apt.options import ReapplyRun
from apt.output.report import Report, read_report
from apt.planning.plan import Plan
from apt.plugin.registry import Registry


@dataclass(frozen=True, kw_only=True)
class ReapplyTask(Task):
    """The zeros of a pruned model, and their application to a fine-tuned model.

    Attributes:
        masks, orders, report: the masks, the orders of permuted inputs and the report of the pruned
            model.
    """

    options: ReapplyRun
    masks: Masks
    orders: Orders
    report: Report

    def read_text(self, ranks: Ranks) -> Text:
        """The tokenizer alone, if there is one."""
        try:
            return Text(load_tokenizer(self.skeleton.source))
        except AptError:
            return Text(None)

    def begin(self, store: ModelStore, text: Text) -> Report:
        """The report of the pruned model."""
        return self.report

    def change(
        self, store: ModelStore, text: Text, plan: Plan | None, report: Report
    ) -> TaskResult:
        """Permute the model into the order of the pruned model, and set masked weights to zero."""
        adapter = self.skeleton.adapter
        permuted = permute_as_masked(self.masks, self.orders, store.model, adapter)
        weights, share = apply_masks(self.masks, store.model)
        options = self.options
        record = {
            "masks": portable(str(options.masks)),
            "model": portable(options.model),
            "weights": weights,
            "share": share,
            "sparsity": sparsity_of(self.masks),
            "parameters": len(self.masks),
            "permuted": permuted,
        }
        return TaskResult(replace(report, reapplied=record), masks=self.masks)


def prepare_reapplying(
    request: RunRequest[ReapplyRun], registry: Registry, notice: Notice
) -> ReapplyTask:
    """Check the options of a reapplication, and read the masks.

    Raises:
        AptError: the masks cannot be read or belong to another model, or the output cannot be
            written.
    """
    options, masks = request.options, request.options.masks
    skeleton = open_model(request, (str(masks),), registry, notice)
    kind = kind_at(masks)
    if kind not in ("file", "directory"):
        problem = "does not exist" if kind is None else "is neither a file nor a directory"
        raise AptError(f"{masks} {problem}", f"name a pruned model, or a file {MASKS}")
    mask_tensors = read_masks(masks) if kind == "file" else _model_masks(options, registry)
    check_masks(mask_tensors, skeleton.module, str(masks))
    report = continued_report(_pruning_report(masks), skeleton, masks)
    orders = read_orders(masks) if kind == "file" else report.orders
    return ReapplyTask(
        options=options,
        registry=registry,
        skeleton=skeleton,
        device="cpu",
        masks=mask_tensors,
        orders=orders,
        report=report,
    )


def _pruning_report(masks: Path) -> dict[str, Any] | None:
    """The record of the pruned model that has these masks; None if there is none.

    A file of masks with its default name is beside its model.
    """
    if masks.name == MASKS and masks.is_file():
        return read_report(masks.parent)
    return read_report(masks) if masks.is_dir() else None


def _model_masks(options: ReapplyRun, registry: Registry) -> Masks:
    """The masks of a pruned model."""
    source = find_source(f"{options.masks.resolve()}", replace(options, revision=None), registry)
    skeleton = open_skeleton(source, registry, options.adapter)
    towers = pruned_towers(read_report(options.masks) or {})
    masks: Masks = {}
    for part in (skeleton, *(tower_in(skeleton, name, registry, None) for name in towers)):
        masks |= masks_of(load(part).module, part.adapter)
    return masks
