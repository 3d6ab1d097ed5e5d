"""The changes by the removal of single weights, observed without the adapter.

A weight of an extra is set to zero, and the block runs again. The change is measured at three
places: at the first operator whose result changes, at the input of the first site that changes,
and at the block's output. An adapter may report the loss at any of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apt.adapter import Site, State
from apt.calibration.storage import mapped
from apt.conformance.checks.recording import first_tensor
from apt.conformance.checks.subject import Step, Subject
from apt.conformance.oracle import Oracle

_UNSET = ("empty", "empty_like", "empty_strided", "new_empty")
_ROUNDING = 1e-12  # of the squared norm, below which nothing has changed


class Change(NamedTuple):
    """The squared norms of a change at one place and of the changed tensor; 0 without a change."""

    square: float = 0.0
    whole: float = 0.0

    @property
    def share(self) -> float:
        """The relative change."""
        return self.square / self.whole if self.whole else 0.0


class _Results(Oracle[Site]):  # type: ignore[no-untyped-call]
    """An oracle that keeps the results of operators, or measures the first change from ``plain``.

    It extends the oracle instead of a second mode beside it: every mode slows every operator down.
    """

    def __init__(self, weights: Mapping[Site, Tensor], plain: Sequence[Tensor | None] = ()) -> None:
        super().__init__(weights)
        self.kept: list[Tensor] = []
        self.change = Change()
        self._compares, self._plain = bool(plain), iter(plain)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and keep its result or measure the first change."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.change.square:
            return result
        unset = func.overloadpacket.__name__ in _UNSET
        if unset or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        if not self._compares:
            self.kept.append(result.clone())
        elif (plain := next(self._plain, None)) is not None:
            self.change = _change(result, plain)
        return result


class Removals:
    """The changes in one block when weights are zero."""

    def __init__(self, subject: Subject, step: Step) -> None:
        self.step, self._adapter = step, subject.adapter
        self._weights = {site: site.weight(step.block).data for site in step.sites}
        results, turned = (_Results(self._weights) for _ in range(2))
        self._run(mapped(step.state, Tensor, _turned), turned)
        self._plain = self._run(step.state, results)
        pairs = zip(results.kept, turned.kept, strict=False)
        # A result that is the same for reversed tokens depends on weights alone.
        self._results = [one if _change(one, other).square else None for one, other in pairs]

    def changes(
        self, weight: Tensor, channel: int, removed: list[int], left: float = 0
    ) -> list[Change]:
        """The changes at each place when some weights of a channel are multiplied by ``left``."""
        results = _Results(self._weights, self._results)
        with _scaled(weight, channel, removed, left):
            inputs, output = self._run(self.step.state, results)
        inner = (_change(*pair) for pair in zip(inputs, self._plain[0], strict=False))
        first = next((change for change in inner if change.square), Change())
        return [results.change, first, _change(output, self._plain[1])]

    @torch.no_grad()
    def _run(self, state: State, results: _Results) -> tuple[list[Tensor], Tensor]:
        """The inputs of the sites in order, and the block's output."""
        with results:
            output = self._adapter.step(self.step.block, state, self.step.call)
        in_order = sorted(results.seen.values(), key=lambda in_order: in_order.first)
        return [torch.cat(each.inputs) for each in in_order], first_tensor(output)


def _change(changed: Tensor, reference: Tensor) -> Change:
    """The change from ``reference``; zero if it is rounding, or if the shapes differ."""
    if changed.shape != reference.shape or torch.equal(changed, reference):
        return Change()
    square = float((changed.double() - reference.double()).square().sum())
    norm = float(reference.double().square().sum())
    return Change(square, norm) if square > _ROUNDING * norm else Change()


def _turned(tensor: Tensor) -> Tensor:
    """A tensor of a state with its tokens in reversed order."""
    return tensor.flip(1) if tensor.is_floating_point() and tensor.ndim > 2 else tensor


@contextmanager
def _scaled(weight: Tensor, channel: int, places: list[int], factor: float) -> Iterator[None]:
    before = weight[channel].clone()
    weight[channel, places] *= factor
    try:
        yield
    finally:
        weight[channel] = before
