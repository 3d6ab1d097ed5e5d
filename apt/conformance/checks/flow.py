"""Checks of the inputs of weights: captured rows, order, timing, and the residual stream."""

import copy
from itertools import combinations

import torch
from torch import Tensor

from apt.adapter import Site
from apt.calibration.capture import Capture
from apt.calibration.storage import mapped
from apt.conformance.checks.promise import Faults, promise
from apt.conformance.checks.recording import first_tensor, near
from apt.conformance.checks.subject import Step, Subject, products
from apt.conformance.oracle import Seen, Stream
from apt.errors import AptError
from apt.tuning.block_forward import stream_after


@promise("capture")
def check_capture(subject: Subject) -> Faults:
    """The captured rows of each site are the real input of its weight, in order."""
    for step in subject.steps():
        capture = Capture(step.block, step.sites)
        try:
            capture.run(subject.opened(step))
        except AptError as error:
            yield step.name, f": {error.message}"
            continue
        rows = _captured(subject, step)
        for site, seen in products(subject, step).items():
            if problem := _capture_fault(capture, site, seen) or _row_fault(rows[site], seen):
                yield step.name, f".{site.name}{problem}"


def _captured(subject: Subject, step: Step) -> dict[Site, list[Tensor]]:
    """The inputs (tokens, in) that the adapter captures for each site in one step."""
    rows: dict[Site, list[Tensor]] = {site: [] for site in step.sites}

    def take(site: Site, inputs: Tensor) -> None:
        rows[site].append(inputs.detach().reshape(-1, inputs.shape[-1]).double())

    with subject.adapter.capture(step.block, step.sites, take):
        subject.step(step)
    return rows


def _row_fault(captured: list[Tensor], seen: Seen) -> str:
    """A fault of rows whose Gram matrix is right: their signs, or their order."""
    rows, expected = torch.cat(captured), torch.cat(seen.inputs)
    if rows.shape == expected.shape and near(rows, expected):
        return ""
    return ": the captured rows have the right Gram matrix, but other signs or another order"


def _capture_fault(capture: Capture, site: Site, seen: Seen) -> str:
    gram = capture.sums[site.input].gram
    if seen.gram.shape != gram.matrix.shape or not near(gram.matrix, seen.gram):
        return ": the captured rows are not the input of its weight"
    if gram.tokens != seen.tokens:
        return f" multiplies {seen.tokens} tokens, but {gram.tokens} are counted"
    return ""


@promise("sites")
def check_order(subject: Subject) -> Faults:
    """Sites run in their order, and residual sites of one order have one input."""
    for step in subject.steps():
        seen = products(subject, step)
        firsts: dict[str, Site] = {}  # the first site of each input
        for site in sorted(seen, key=lambda site: seen[site].first):
            firsts.setdefault(site.input, site)
        for before, after in combinations(firsts.values(), 2):
            # Two experts run in sequence, but independently.
            experts = before.routed and after.routed and _expert(before) != _expert(after)
            if before.order > after.order and not experts:
                position = f".{before.name} of order {before.order}"
                yield (
                    step.name,
                    f"{position} is multiplied before {after.name} of order {after.order}",
                )
                break
        # The orders must tell the last site that writes to the stream.
        for one, other in combinations((site for site in step.sites if site.residual), 2):
            if one.order == other.order and one.input != other.input:
                message = (
                    f".{one.name} and {other.name} are residual, with different inputs, but both"
                )
                yield step.name, f"{message} of order {one.order}"
                break


def _expert(site: Site) -> tuple[str, int | None]:
    """The module of a routed site, and the index of its expert in a stack."""
    path = site.parameter if site.expert is not None else site.parameter.removesuffix(".weight")
    return path.rpartition(".")[0], site.expert


@promise("sites")
def check_residual(subject: Subject) -> Faults:
    """Exactly the sites whose product is added to the residual stream are declared residual."""
    model = copy.deepcopy(subject.model).float()
    subject = Subject(subject.adapter, model, subject.tokens)
    for step in subject.steps():
        weights = {site: site.weight(step.block).data for site in step.sites}
        stream = Stream(weights, first_tensor(step.state))
        with stream:
            subject.step(step)
        for site in step.sites:
            added = site in stream.added
            if site.residual and not added:
                message = (
                    "is declared residual, but its product is not added unchanged to the stream"
                )
                yield step.name, f".{site.name} {message} at the start of the block"
            elif added and not site.residual and not site.routed:
                message = "adds its product to the residual stream, but is not declared residual"
                yield step.name, f".{site.name} {message}"


@promise("capture")
def check_in_time(subject: Subject) -> Faults:
    """A weight that changes when its input is captured is used as changed."""
    for step in subject.steps():
        if any(site.routed or site.calls > 1 for site in step.sites):
            continue
        if not _in_time(subject, step):
            yield step.name, ": an input is captured too late: its weight has already been used"


def _in_time(subject: Subject, step: Step) -> bool:
    block = copy.deepcopy(step.block)
    sites = subject.adapter.sites(block)
    weights = {site: site.weight(block).data for site in sites}

    def take(site: Site, rows: Tensor) -> None:
        if (weight := weights.pop(site, None)) is not None:
            weight.mul_(-0.5)

    with subject.adapter.capture(block, sites, take):
        stream = subject.adapter.step(block, step.state, step.call)
    after = subject.adapter.step(block, step.state, step.call)
    return near(first_tensor(stream), first_tensor(after))


@promise("step")
def check_gradients(subject: Subject) -> Faults:
    """Gradients flow from the output of a step to its state and to the weight of each site."""
    for step in subject.steps():
        yield from _without_gradient(subject, step)


def _without_gradient(subject: Subject, step: Step) -> Faults:
    """The faults of one step. Experts that received no token need no gradient."""
    names = dict.fromkeys(site.parameter for site in step.sites)
    weights = {name: _leaf(step.block.get_parameter(name)) for name in names}
    states: list[Tensor] = []
    with torch.enable_grad():
        state = mapped(step.state, Tensor, lambda tensor: _counted(tensor, states))
        block = subject.opened(step)
        stream = stream_after(block, weights, state, block.batches[0].calls[block.index])
        # Not a plain sum: after a norm it would be constant.
        loss = (stream.flatten() * torch.linspace(-1, 1, stream.numel()).to(stream)).sum()
    if not stream.requires_grad:
        yield step.name, ": the output of step has no gradient: is it detached?"
        return
    leaves = [*states, *weights.values()]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    if not any(_flows(gradient) for gradient in gradients[: len(states)]):
        yield step.name, ": no gradient flows from the output of step to the state before it"
    for name, gradient in zip(weights, gradients[len(states) :], strict=True):
        if not _flows(gradient):
            yield step.name, f".{name}: no gradient flows to it from the output of step"


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _counted(tensor: Tensor, leaves: list[Tensor]) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    leaves.append(_leaf(tensor))
    return leaves[-1]


def _flows(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
