"""Conformance checks: plain functions that each say in a line what is wrong with an adapter.

A check takes a `Subject` and raises `Nonconformance`. Each looks at one promise of
`apt.adapter.Adapter`, by means that owe nothing to the adapter: the module tree, and the operators
that run (`apt.testing.oracle`). A small random model is enough.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from apt.adapter import Adapter, Call, Site, State
from apt.batches import Batch
from apt.capture import Capture
from apt.errors import AptError
from apt.eval_mode import eval_mode
from apt.pipeline import prune_blocks
from apt.plan import make_plan
from apt.solver import NM, Pattern, Unstructured, ss
from apt.solver.patterns import meets
from apt.testing.oracle import Oracle, Seen, Stream
from apt.walk import InParts, Walk


class Nonconformance(AssertionError):
    """What an adapter gets wrong, in one line."""


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        adapter: the adapter.
        model: a model of its family, in eval mode; random and tiny is enough. It is not changed.
        tokens: token ids (samples, seqlen), without padding; a few dozen in all.
    """

    adapter: Adapter
    model: nn.Module
    tokens: Tensor

    def blocks(self) -> list[tuple[str, nn.Module, list[Site]]]:
        """Every block with its name and its sites."""
        return [(n, b, self.adapter.sites(b)) for n, b in self.adapter.blocks(self.model)]

    def steps(self) -> Iterator[tuple[str, nn.Module, list[Site], State, list[Call], int]]:
        """Every block in turn, with the state before it."""
        with torch.no_grad():
            state, calls = self.adapter.enter(self.model, self.tokens)
            for index, (name, block, sites) in enumerate(self.blocks()):
                yield name, block, sites, state, calls, index
                state = self.adapter.step(block, state, calls[index])

    @torch.no_grad()
    def logits(self, model: nn.Module | None = None) -> Tensor:
        """What the model, or another, gives for the tokens."""
        output: Any = (model or self.model)(self.tokens)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits


def check_sites(subject: Subject) -> None:
    """Every weight that a block multiplies is a site or left dense by name; every site is there."""
    for name, block, sites, state, calls, index in subject.steps():
        declared = {(site.parameter, site.expert) for site in sites}
        if len(declared) < len(sites):
            raise Nonconformance(f"{name}: two sites are the same weight")
        oracle = Oracle(_weights(block))
        with oracle:
            subject.adapter.step(block, state, calls[index])
        left = getattr(subject.adapter, "left_dense", ())
        for parameter, expert in oracle.seen:
            module = parameter.removesuffix(".weight")
            if (parameter, expert) not in declared and module not in left:
                raise Nonconformance(
                    f"{name}.{parameter}{_slice(expert)} is multiplied, but is no site and not "
                    "left dense by name"
                )
        for site in sites:
            if (site.parameter, site.expert) not in oracle.seen and not site.routed:
                raise Nonconformance(f"{name}.{site.name} is a site, but is never multiplied")


def check_orientation(subject: Subject) -> None:
    """Each site is declared transposed where its weight is stored (in, out), and only there."""
    for name, _, site, seen in _products(subject):
        if (stored := next((s for s in seen.stored if s is not None), None)) is None:
            continue
        if stored != site.transposed:
            truth = "(in, out)" if stored else "(out, in)"
            raise Nonconformance(
                f"{name}.{site.name} is stored {truth}, but declared transposed={site.transposed}"
            )


def check_capture(subject: Subject) -> None:
    """The Gram matrix of every site is that of what its weight really multiplies."""
    for name, block, sites, state, calls, index in subject.steps():
        products = _seen(subject, block, sites, state, calls[index])
        capture = Capture(block, sites)
        try:
            tokens = subject.tokens.numel()
            capture.run(subject.adapter, block, index, [Batch(state, calls, tokens)])
        except AptError as error:
            raise Nonconformance(f"{name}: {error.message}") from error
        for site, seen in products.items():
            gram = capture.sums[site.input].gram
            if seen.gram.shape != gram.matrix.shape or not _near(gram.matrix, seen.gram):
                raise Nonconformance(
                    f"{name}.{site.name}: what is captured is not what its weight multiplies"
                )
            if gram.tokens != seen.tokens:
                raise Nonconformance(
                    f"{name}.{site.name} multiplies {seen.tokens} tokens, {gram.tokens} are counted"
                )


def check_order(subject: Subject) -> None:
    """Inputs of sites of a lower order are multiplied before those of a higher one."""
    for name, block, sites, state, calls, index in subject.steps():
        products = _seen(subject, block, sites, state, calls[index])
        firsts: dict[str, Site] = {}  # of the sites of one input, the one that comes first
        for site in sorted(products, key=lambda site: products[site].first):
            firsts.setdefault(site.input, site)
        for before, after in pairwise(firsts.values()):
            if before.order > after.order and not (before.routed and after.routed):
                raise Nonconformance(
                    f"{name}.{before.name} of order {before.order} is multiplied before "
                    f"{after.name} of order {after.order}"
                )


def check_residual(subject: Subject) -> None:
    """Sites are declared residual where their product is added to the residual stream as it is."""
    subject = Subject(subject.adapter, copy.deepcopy(subject.model).float(), subject.tokens)
    for name, block, sites, state, calls, index in subject.steps():
        stream = Stream({site: site.weight(block).data for site in sites}, _first(state))
        with stream:
            subject.adapter.step(block, state, calls[index])
        for site in sites:
            if site.residual and site not in stream.added:
                raise Nonconformance(
                    f"{name}.{site.name} is declared residual, but its product is not what is "
                    "added to the stream that the block begins with"
                )
            if site in stream.added and not site.residual and not site.routed:
                raise Nonconformance(
                    f"{name}.{site.name} adds its product to the residual stream, but is not "
                    "declared residual"
                )


@torch.no_grad()
def check_blocks(subject: Subject) -> None:
    """Blocks chained by the adapter are the model: the same inputs, bit for bit, and outputs."""
    blocks = [block for _, block, _ in subject.blocks()]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(_first(args or tuple(kwargs.values())).clone())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(_first(output).clone())

    handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(after) for b in blocks]
    try:
        subject.logits()
    finally:
        for handle in handles:
            handle.remove()
    state, calls = subject.adapter.enter(subject.model, subject.tokens)
    for index, (name, block, _) in enumerate(subject.blocks()):
        if not torch.equal(_first(state), inputs[index]):
            raise Nonconformance(f"{name}: the state before it is not what the model gives it")
        state = subject.adapter.step(block, state, calls[index])
        if not torch.equal(_first(state), outputs[index]):
            raise Nonconformance(f"{name}: the state after it is not what it gives in the model")


def check_untouched(subject: Subject) -> None:
    """Entering and capturing change nothing: the same logits bit for bit, nothing left behind."""
    before, hooks = subject.logits(), _leftovers(subject.model)
    for name, block, sites, state, calls, index in subject.steps():
        plain = _first(subject.adapter.step(block, state, calls[index]))
        with subject.adapter.capture(block, sites, lambda site, rows: None):
            watched = _first(subject.adapter.step(block, state, calls[index]))
        if not torch.equal(plain, watched):
            raise Nonconformance(f"{name}: capture changes what it gives")
    if left := sorted(_leftovers(subject.model) - hooks):
        raise Nonconformance(f"capture leaves {left[0]} behind")
    if not torch.equal(subject.logits(), before):
        raise Nonconformance("the model gives other logits after capture")


def check_exception(subject: Subject) -> None:
    """A capture that an exception ends leaves nothing behind."""
    before, hooks = subject.logits(), _leftovers(subject.model)

    class _StopError(Exception):
        pass

    def stop(site: Site, rows: Tensor) -> None:
        raise _StopError

    for name, block, sites, state, calls, index in subject.steps():
        try:
            with subject.adapter.capture(block, sites, stop):
                subject.adapter.step(block, state, calls[index])
        except _StopError:
            pass
        else:
            raise Nonconformance(f"{name}: an exception of the sink does not come through")
        break
    if left := sorted(_leftovers(subject.model) - hooks):
        raise Nonconformance(f"capture leaves {left[0]} behind when an exception ends it")
    if not torch.equal(subject.logits(), before):
        raise Nonconformance("the model gives other logits after an exception in capture")


def check_in_time(subject: Subject) -> None:
    """A weight that is changed when its input is handed over is used as changed, in every batch."""
    hooks = _leftovers(subject.model)
    for name, original, _, state, calls, index in subject.steps():
        block = copy.deepcopy(original)
        sites = subject.adapter.sites(block)
        if any(site.routed or site.calls > 1 for site in sites):
            continue
        batches = [Batch(state, calls, subject.tokens.numel()) for _ in range(2)]
        with (
            suppress(InParts),
            Walk(subject.adapter, block, index, batches, sites, sites, {}) as walk,
        ):
            while (given := walk.next_input()) is not None:
                walk.capture(given)
                for site in sites:
                    if site.input == given:
                        site.weight(block).data.mul_(-0.5)
            walk.finish(leave=True)
            after = _first(subject.adapter.step(block, state, calls[index]))
            if not all(_near(_first(batch.state), after) for batch in batches):
                raise Nonconformance(
                    f"{name}: an input is handed over too late: its weight has been used before"
                )
    if left := sorted(_leftovers(subject.model) - hooks):
        raise Nonconformance(f"captures of two batches at once leave {left[0]} behind")


def check_identity(subject: Subject) -> None:
    """Pruning no weight changes no bit."""
    pruned = _pruned(subject, Unstructured(1e-12))
    for name, value in subject.model.state_dict().items():
        if not torch.equal(pruned.state_dict()[name], value):
            raise Nonconformance(f"{name} changes where nothing is pruned")


def check_pruning(subject: Subject) -> None:
    """Sites, and sites only, are pruned; along their inputs; shared parameters stay shared."""
    pruned = _pruned(subject, pattern := _pattern(subject))
    for name, block, site, seen in _products(Subject(subject.adapter, pruned, subject.tokens)):
        weight = site.weight(block).detach()
        along = weight.T if any(seen.stored) else weight
        if not meets(along, pattern):
            raise Nonconformance(f"{name}.{site.name} is not {pattern} along its inputs")
    weights = dict(pruned.named_parameters())
    touched = {f"{name}.{site.parameter}" for name, _, sites in subject.blocks() for site in sites}
    for name, value in subject.model.named_parameters():
        if name not in touched and not torch.equal(weights[name], value):
            raise Nonconformance(f"{name} is no site, but pruning changes it")
    if _sharing(pruned) != _sharing(subject.model):
        raise Nonconformance("parameters that were shared are not after pruning")


def check_saving(subject: Subject) -> None:
    """Saved as transformers does and loaded again, a pruned model gives the same logits."""
    pruned: Any = _pruned(subject, _pattern(subject))
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        # transformers 4 loads fp32 unless told otherwise
        loaded = type(pruned).from_pretrained(folder, dtype="auto").eval()
        subject.adapter.check(loaded.config)
        if not torch.equal(subject.logits(loaded), subject.logits(pruned)):
            raise Nonconformance("the model gives other logits once saved and loaded")


Check = Callable[[Subject], None]
CHECKS: dict[str, Check] = {
    function.__name__.removeprefix("check_"): function
    for function in (
        check_sites, check_orientation, check_capture, check_order, check_residual, check_blocks,
        check_untouched, check_exception, check_in_time, check_identity, check_pruning,
        check_saving,
    )
}  # fmt: skip
"""All checks by name, in the order in which they help most to find a fault."""


@dataclass(frozen=True)
class Outcome:
    """What came of one check: its name, what it looks at, and what is wrong, if anything."""

    name: str
    summary: str
    problem: str = ""


def check_adapter(adapter: Adapter, model: nn.Module, tokens: Tensor) -> list[Outcome]:
    """Run all checks; none keeps another from running.

    Args:
        adapter: the adapter.
        model: a model of its family; see `Subject`.
        tokens: token ids (samples, seqlen).
    """
    with eval_mode(model), adapter.running(model):
        subject = Subject(adapter, model, tokens)
        return [_outcome(name, check, subject) for name, check in CHECKS.items()]


def _outcome(name: str, check: Check, subject: Subject) -> Outcome:
    summary = (check.__doc__ or "").splitlines()[0]
    try:
        check(subject)
    except (Nonconformance, AptError) as error:
        return Outcome(name, summary, str(error))
    except Exception as error:  # a fault of the adapter shows in any way
        return Outcome(name, summary, f"{type(error).__name__}: {error}")
    return Outcome(name, summary)


def _weights(block: nn.Module) -> dict[tuple[str, int | None], Tensor]:
    """Every matrix among the block's parameters, and every slice of those that are stacks."""
    weights: dict[tuple[str, int | None], Tensor] = {}
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            weights[name, None] = parameter.data
        elif parameter.ndim == 3:
            weights |= {(name, index): part for index, part in enumerate(parameter.data)}
    return weights


def _slice(expert: int | None) -> str:
    return "" if expert is None else f"[{expert}]"


def _seen(
    subject: Subject, block: nn.Module, sites: list[Site], state: State, call: Call
) -> dict[Site, Seen]:
    """What the sites of a block are multiplied by in one step, as the oracle sees it."""
    oracle = Oracle({site: site.weight(block).data for site in sites})
    with oracle:
        subject.adapter.step(block, state, call)
    return oracle.seen


def _products(subject: Subject) -> Iterator[tuple[str, nn.Module, Site, Seen]]:
    """Every site that is multiplied, with what the oracle sees."""
    for name, block, sites, state, calls, index in subject.steps():
        products = _seen(subject, block, sites, state, calls[index])
        for site, seen in products.items():
            yield name, block, site, seen


def _near(found: Tensor, expected: Tensor, share: float = 1e-4) -> bool:
    """Whether two tensors agree to within ``share`` of the norm."""
    distance = (found.double() - expected.double()).norm()
    return bool(distance <= share * expected.double().norm().clamp(min=1e-12))


def _first(value: Any) -> Tensor:
    """The first tensor in a state, a tuple or a mapping."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def _leftovers(model: nn.Module) -> set[str]:
    """Hooks on the model's modules, and forwards of their own."""
    found = set()
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            found |= {f"a hook on {name or 'the model'} ({key})" for key in getattr(module, kind)}
        if "forward" in vars(module):
            found.add(f"a forward on {name or 'the model'}")
    modes = len(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]
    return found | {f"torch function mode {index}" for index in range(modes)}


def _pattern(subject: Subject) -> NM:
    """2:4, or 1:2 where an input is too narrow."""
    widths = [
        site.oriented(site.weight(block)).shape[1]
        for _, block, sites in subject.blocks()
        for site in sites
    ]
    return NM(2, 4) if all(width % 4 == 0 for width in widths) else NM(1, 2)


def _pruned(subject: Subject, pattern: Pattern) -> nn.Module:
    """A copy of the model, pruned by SparseGPT's method, layer by layer."""
    model = copy.deepcopy(subject.model)
    plan = make_plan(model, subject.adapter, pattern)
    prune_blocks(model, subject.adapter, plan, subject.tokens, ss)
    return model


def _sharing(model: nn.Module) -> list[list[str]]:
    """The names of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)
