"""Checks of a pruned model: only sites are pruned, and it can be saved and loaded."""

import copy
import tempfile
from typing import Any

import torch
from torch import nn

from apt.conformance.checks.promise import Fault, Faults, promise
from apt.conformance.checks.subject import Subject, products
from apt.planning.plan import make_plan
from apt.pruning.block_store import BlockStore
from apt.pruning.layer import BlockPruning, Recipe
from apt.pruning.pipeline import prune_blocks
from apt.solver import NM, Pattern, Unstructured, meets, ss


@promise()
def check_identity(subject: Subject) -> Faults:
    """A run that prunes no weight changes no bit of the model."""
    pruned = _pruned(subject, Unstructured(1e-12)).state_dict()
    for name, value in subject.model.state_dict().items():
        if not torch.equal(pruned[name], value):
            yield "", f"{name} changes although nothing is pruned"


@promise()
def check_pruning(subject: Subject) -> Faults:
    """Only sites are pruned, along their inputs, and shared parameters stay shared."""
    pruned = _pruned(subject, pattern := _pattern(subject))
    pruned_subject = Subject(subject.adapter, pruned, subject.tokens)
    for step in pruned_subject.steps():
        for site, seen in products(pruned_subject, step).items():
            weight = site.weight(step.block).detach()
            if not meets(weight.T if any(seen.stored) else weight, pattern):
                yield Fault(step.name, f".{site.name} is not {pattern} along its inputs", "sites")
    weights = dict(pruned.named_parameters())
    site_parameters = {
        f"{name}.{site.parameter}" for name, _, sites in subject.blocks() for site in sites
    }
    for name, value in subject.model.named_parameters():
        if name not in site_parameters and not torch.equal(weights[name], value):
            yield "", f"{name} is not a site, but pruning changes it"
    if _sharing(pruned) != _sharing(subject.model):
        yield "", "shared parameters are no longer shared after pruning"


@promise()
def check_saving(subject: Subject) -> Faults:
    """A pruned model gives the same logits after it is saved and loaded by transformers."""
    pruned: Any = _pruned(subject, _pattern(subject))
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        # transformers 4 loads fp32 by default; kernels of attention differ in rounding
        kernel = getattr(pruned.config, "_attn_implementation", None)
        arguments = {"dtype": "auto", **({"attn_implementation": kernel} if kernel else {})}
        loaded = type(pruned).from_pretrained(folder, **arguments).eval()
        subject.adapter.check(loaded.config)
        with subject.adapter.running(loaded):  # with the same kernels
            logits = subject.logits(loaded)
        if not torch.equal(logits, subject.logits(pruned)):
            message = "the model gives other logits after it is saved and loaded"
            yield "", message + _changed_number(pruned, loaded)


def _changed_number(before: nn.Module, after: nn.Module) -> str:
    """The first attribute of a module whose number is another one after loading, in words."""
    modules = dict(after.named_modules())
    for name, module in before.named_modules():
        for attribute, value in vars(module).items():
            loaded = getattr(modules.get(name), attribute, value)
            if isinstance(value, int | float) and loaded != value:
                return f": {attribute} of {name or 'the model'} is {value}, and then {loaded}"
    return ""


def _pattern(subject: Subject) -> NM:
    """2:4, or 1:2 if the width of an input is not a multiple of 4."""
    widths = [
        site.oriented(site.weight(block)).shape[1]
        for _, block, sites in subject.blocks()
        for site in sites
    ]
    return NM(2, 4) if all(width % 4 == 0 for width in widths) else NM(1, 2)


def _pruned(subject: Subject, pattern: Pattern) -> nn.Module:
    """A copy of the model, pruned layer by layer with SparseGPT."""
    model = copy.deepcopy(subject.model)
    plan = make_plan(model, subject.adapter, pattern)
    prune_blocks(
        BlockStore(model), BlockPruning(subject.adapter, plan, ss, Recipe()), subject.tokens
    )
    return model


def _sharing(model: nn.Module) -> list[list[str]]:
    """The groups of names of shared parameters."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)
