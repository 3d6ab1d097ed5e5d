"""The check of permutable inputs: in any order, the model is the same function."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Permutable, Site
from apt.adapter.groups import tensors_of
from apt.adapter.permutations import columns_of
from apt.conformance.checks.groups import equal_up_to
from apt.conformance.checks.promise import Faults, promise
from apt.conformance.checks.subject import Subject


@promise("permutable")
def check_permutable(subject: Subject) -> Faults:
    """In another order of permutable inputs, the model gives the same logits."""
    config: Any = getattr(subject.model, "config", None)
    model = copy.deepcopy(subject.model).float()
    modules, expected = dict(subject.adapter.blocks(model)), subject.logits(model)
    for name, _, sites in subject.blocks():
        block, readers = modules[name], {site.name: site for site in sites}
        for permutable in subject.adapter.permutable(block, config):
            message = f": the permutable inputs of {permutable.reader}"
            if problem := _misdeclared(block, permutable, readers):
                yield name, f"{message} {problem}"
                continue
            reader_part = columns_of(permutable, readers[permutable.reader])
            assert reader_part is not None
            changed = _permuted(subject, model, block, replace(permutable, parts=(reader_part,)))
            effect = float((changed - expected).abs().max())
            if not equal_up_to(_permuted(subject, model, block, permutable), expected, effect):
                yield name, f"{message} change the logits in another order"


def _misdeclared(block: nn.Module, permutable: Permutable, readers: dict[str, Site]) -> str:
    """The fault of a declaration that shows without a run; empty without a fault."""
    if permutable.reader not in readers:
        return "are those of no site"
    parameters = tensors_of(block)
    for part in permutable.parts:
        if part.parameter not in parameters:
            return f"have a part in {part.parameter}, which is no parameter of the block"
        length = parameters[part.parameter].shape[part.dim]
        end = part.start + permutable.bins * part.each
        if end > length or part.each % permutable.size:
            entries = f"{permutable.bins} × {part.each} entries from {part.start}"
            return f"have {entries} in dimension {part.dim} of {part.parameter}, which has {length}"
    reader = readers[permutable.reader]
    if columns_of(permutable, reader) is None:
        return f"have no part in the columns of {reader.parameter}"
    return ""


def _permuted(
    subject: Subject, model: nn.Module, block: nn.Module, permutable: Permutable
) -> Tensor:
    """The logits of a model with reordered inputs of a block; the order is restored."""
    order = permutable.random_order()
    with torch.no_grad():
        permutable.permute(tensors_of(block), order)
        try:
            return subject.logits(model)
        finally:
            permutable.permute(tensors_of(block), order.argsort())
