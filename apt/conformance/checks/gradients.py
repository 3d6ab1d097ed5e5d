"""A check of the gradients through a step, which block tuning needs."""

import torch
from torch import Tensor

from apt.calibration.storage import mapped
from apt.conformance.checks.promise import Faults, promise
from apt.conformance.checks.subject import Step, Subject
from apt.tuning.block_forward import stream_after


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
        stream = stream_after(block, weights, block.batches[0], state)
        # A plain sum would not do: a norm makes it constant.
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
