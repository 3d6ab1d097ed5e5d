"""The check of groups: a model without them equals one that does not depend on them."""

import copy
import tempfile
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Groups, Site, Unrouted
from apt.adapter.groups import disconnect, tensors_of
from apt.adapter.text_config import text_config
from apt.checkpoints.smaller import shrunk
from apt.conformance.checks.promise import Fault, Faults, promise
from apt.conformance.checks.subject import Subject
from apt.errors import AptError, first_line
from apt.shrinking.skipping import skipping

_SHARES = (1 / 2, 1 / 3, 2 / 3, 0)
_LARGE_SHARES = (1, 3 / 4, 2 / 3)  # up to the limit of `Groups.least`
_TOLERANCE = 1e-3  # of the effect of the removal
_LEAST = 1e-5  # of the largest logit


@promise("groups")
def check_groups(subject: Subject) -> Faults:
    """Without a group, or a block, the model equals one that does not depend on it."""
    config: Any = getattr(subject.model, "config", None)
    kinds, faults = dict[str, None](), list[Fault | tuple[str, str]]()
    for name, block, sites in subject.blocks():
        for groups in subject.adapter.groups(block, config):
            kinds[groups.kind] = None
            faults += _misdeclared(name, block, groups, {site.name: site for site in sites})
            faults += _misnumbered(name, groups, text_config(config))
    yield from faults
    if faults:
        return
    for kind in kinds:
        yield from _removed(subject, kind)
    yield from _dropped(subject)


def _misdeclared(name: str, block: nn.Module, groups: Groups, sites: dict[str, Site]) -> Faults:
    """Faults of a declaration that show without a run."""
    parameters = tensors_of(block)
    for part in (*groups.parts, *groups.outputs):
        if part.path(0) not in parameters:
            message = (
                f": {groups.kind} have a part in {part.parameter}, which is no parameter of it"
            )
            yield name, message
            continue
        if "*" in part.parameter:  # the whole parameter of a member
            continue
        end = part.start + groups.count * part.each
        length = parameters[part.parameter].shape[part.dim]
        if end > length:
            message = f": {groups.kind} have {end} entries in dimension {part.dim} of"
            yield name, f"{message} {part.parameter}, which has {length}"
    for reader in groups.readers:
        if reader not in sites:
            yield name, f": {groups.kind} have the reader {reader}, which is no site"
            continue
        width = sites[reader].oriented(sites[reader].weight(block)).shape[1]
        if width % groups.count:
            message = f"{width} inputs, not a multiple of {groups.count} {groups.kind}"
            yield name, f": {reader} has {message}"
    if not groups.readers and not groups.outputs:
        yield name, f": {groups.kind} have neither readers nor outputs"


def _misnumbered(name: str, groups: Groups, config: Any) -> Faults:
    """Fields that would get another value although all groups are kept.

    The smaller model may run in spite of the fault: perhaps no shape depends on the field, or its
    value is right for one number of groups by chance. A field without a value has a default, which
    may be right.
    """
    for field, value in groups.fields.items():
        configured, all_kept = getattr(config, field, None), value(groups.count)
        if isinstance(configured, int | float) and not _agree(all_kept, configured, groups.count):
            message = f": {groups.kind} write {all_kept} into {field} of the configuration if all"
            yield name, f"{message} {groups.count} are kept, but it has {configured}"


def _agree(written: int | float, configured: int | float, count: int) -> bool:
    """True if two values of a field are equal; a ratio must give the same number of groups."""
    return written == configured or (
        isinstance(configured, float) and abs(written - configured) * count < abs(configured)
    )


def _removed(subject: Subject, kind: str) -> Faults:
    """Faults in the model without half of the groups of a kind."""
    adapter, model = subject.adapter, copy.deepcopy(subject.model).float()
    masked: Any = copy.deepcopy(model)
    removed, smaller_model, message = dict[str, list[int]](), None, ""
    for share in _SHARES:  # a configuration may not express every number
        removed = _some(adapter, masked, kind, share)
        removed_groups = {name: {kind: indices} for name, indices in removed.items()}
        try:
            smaller_model = shrunk(model, adapter, removed_groups)
            break
        except AptError as error:
            message = message or error.message
    if smaller_model is None:
        yield "", f"{kind} cannot be removed: {message}"
        return
    with _mask(adapter, masked, kind, removed):
        expected = subject.logits(masked)
    size = float((expected - subject.logits(model)).abs().max())
    try:
        logits = subject.logits(smaller_model)
    except Exception as error:
        yield _fails(kind, "some", error)
        return
    if not equal_up_to(logits, expected, size):
        yield "", f"the model without some {kind} differs from one that does not depend on them"
    yield from _fewest(subject, model, kind)
    with tempfile.TemporaryDirectory() as folder:
        smaller_model.save_pretrained(folder)
        loaded = type(smaller_model).from_pretrained(folder, dtype="auto").eval()
        if not equal_up_to(subject.logits(loaded), logits, size):
            yield Fault("", f"the model without some {kind} is another one after it is loaded")


def _fewest(subject: Subject, model: Any, kind: str) -> Faults:
    """A fault of the model with the fewest groups of a kind that its configuration can express."""
    for share in _LARGE_SHARES:
        removed = _some(subject.adapter, model, kind, share)
        try:
            smaller_model = shrunk(
                model, subject.adapter, {n: {kind: indices} for n, indices in removed.items()}
            )
        except AptError:
            continue
        try:
            subject.logits(smaller_model)
        except Exception as error:
            yield _fails(kind, "most", error)
        return


def _fails(kind: str, removed: str, error: Exception) -> tuple[str, str]:
    message = f"the model without {removed} {kind} does not run: {first_line(error)}"
    return "", f"{message}: is 'least' too small?"


def _dropped(subject: Subject) -> Faults:
    """Faults in the model without its second block, if the configuration can express it."""
    names = [name for name, _, _ in subject.blocks()]
    if len(names) < 2:
        return
    model = copy.deepcopy(subject.model).float()
    try:
        smaller_model = shrunk(model, subject.adapter, {}, [names[1]])
    except AptError:  # for instance, blocks whose kinds follow from their positions
        return
    with skipping(model, subject.adapter, [names[1]]):
        expected = subject.logits(model)
    if not equal_up_to(subject.logits(smaller_model), expected, 0.0):
        yield Fault("", f"the model without {names[1]} differs from one that skips it", "blocks")


def _some(adapter: Adapter, model: Any, kind: str, share: float) -> dict[str, list[int]]:
    """A share of the groups of each block, the same number from each bin, and at least one."""
    selected = {}
    for index, (name, block) in enumerate(adapter.blocks(model)):
        for groups in adapter.groups(block, model.config):
            if groups.kind == kind:
                only_bins = groups.count == groups.bins  # then whole bins go
                bins, step = (1, 1) if only_bins else (groups.bins, groups.multiple)
                each = groups.count // bins
                most = (each - -(-groups.least // bins)) // step
                count = min(max(1, int(each * share / step)), most) * step
                selected[name] = [
                    first + (index + i) % each
                    for first in range(0, groups.count, each)
                    for i in range(count)
                ]
    return selected


def _mask(
    adapter: Adapter, model: Any, kind: str, removed: dict[str, list[int]]
) -> AbstractContextManager[Any]:
    """Disconnect groups of a model; inside the context, its routers do not choose them."""
    routers = dict[Tensor, Tensor]()
    for name, block in adapter.blocks(model):
        sites = {site.name: site for site in adapter.sites(block)}
        parameters = tensors_of(block)
        for groups in adapter.groups(block, model.config):
            if groups.kind != kind:
                continue
            for reader in groups.readers:
                weight = sites[reader].oriented(sites[reader].weight(block).detach())
                torch.unflatten(weight, 1, (groups.count, -1))[:, removed[name]] = 0
            disconnect(parameters, groups, removed[name])
            if groups.routed:
                outputs = {part.parameter for part in groups.outputs}
                rows = [p.parameter for p in groups.parts if p.dim == 0]
                flat = [path for path in rows if parameters[path].ndim == 2]
                mask = torch.zeros(groups.count, dtype=torch.bool)
                mask[removed[name]] = True
                routers |= {parameters[p]: mask for p in flat if p not in outputs}
    return Unrouted(routers) if routers else nullcontext()


def equal_up_to(logits: Tensor, expected: Tensor, effect: float) -> bool:
    """True if logits are equal up to rounding, relative to the effect of a removal."""
    if logits.shape != expected.shape:
        return False
    allowed = _TOLERANCE * effect + _LEAST * float(expected.abs().max())
    return float((logits - expected).abs().max()) <= allowed
