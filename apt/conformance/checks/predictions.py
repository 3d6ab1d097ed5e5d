"""The effects that an adapter reports, compared with the changes by the removal of weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apt.adapter import Extra
from apt.conformance.checks.removals import Change, Removals

_SMALL = 1e-6  # of the largest change
_SPREAD = 0.2  # of the logarithms of changes; below it the order of changes is not checked
_JOINT = 0.1  # of the change by two weights; below it their joint change is not checked
_ALIKE = 0.6  # the least correlation
_SCALE = 4  # the largest deviation of a share: an adapter may measure at another place


@dataclass
class Predictions:
    """The reported effects of some weights of one kind, and the observed changes.

    The effects must have the same order as the changes at one of the places of `Removals`. An
    adapter may scale a product by any factor. So only shares are compared: the effects divided by
    their energy, and the changes divided by the norm of the changed tensor.

    Args:
        removal: the declared `apt.adapter.Extra.removal` of the kind.
    """

    removal: str
    _blocks: list[int] = field(default_factory=list)
    _channels: list[int] = field(default_factory=list)  # each channel of each block has a number
    _squares: list[float] = field(default_factory=list)  # of the weights
    _reported: list[float] = field(default_factory=list)
    _changes: list[Tensor] = field(default_factory=list)
    _shares: list[tuple[float, list[float]]] = field(default_factory=list)  # reported, observed
    _joint: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _linear: bool = True

    def compare(
        self, removals: Removals, extra: Extra, gram: Tensor, energy: float, channels: int
    ) -> None:
        """Add one or two weights, and their pair, from each of ``channels`` channels of a block."""
        weight, gram = extra.weight(removals.step.block).data, gram.double()
        draw = torch.Generator().manual_seed(0)
        for channel in torch.randperm(len(weight), generator=draw)[:channels].tolist():
            pair = torch.randperm(weight.shape[1], generator=draw)[:2].tolist()
            changes_by_weight = [removals.changes(weight, channel, [index]) for index in pair]
            singles = [_squares(changes) for changes in changes_by_weight]
            number = len(self._changes)
            for index, changes in zip(pair, changes_by_weight, strict=True):
                square = float(weight[channel, index].double().square())
                effect = float(gram[channel, index, index])
                acting = square if self.removal == "product" else 1.0
                self._blocks.append(removals.step.index)
                self._channels.append(number)
                self._squares.append(square)
                self._reported.append(effect)
                self._changes.append(_squares(changes))
                self._shares.append((acting * effect / energy, [c.share for c in changes]))
            if self.removal == "product":
                half = removals.changes(weight, channel, pair[:1], 0.5)[0].square
                self._linear &= not half or bool(0.9 < 4 * half / singles[0][0] < 1.1)
            if len(pair) == 2:
                joint = _squares(removals.changes(weight, channel, pair))
                sign = weight[channel, pair].sign().prod() if self.removal == "product" else 1
                size = gram.diagonal(dim1=1, dim2=2)[channel, pair].prod().sqrt()
                reported = sign * gram[channel, pair[0], pair[1]] / size
                observed = (joint - singles[0] - singles[1]) / 2 / (singles[0] * singles[1]).sqrt()
                self._joint.append((reported.nan_to_num(), observed))

    def fault(self) -> tuple[str, str] | None:
        """The fault and the method of the adapter that has it; None without a fault."""
        spread, likeness = self._compared(self.removal, self._blocks)
        if not self._linear and max(self._compared("effect", self._blocks)[1]) > max(likeness):
            message = "removal is 'product', but the product is not linear in the weight"
            return f"{message}: declare 'effect'", "extras"
        if max(spread) >= _SPREAD and max(likeness) < _ALIKE:
            other = "effect" if self.removal == "product" else "product"
            if max(self._compared(other, self._blocks)[1]) > max(_ALIKE, *likeness):
                message = f"removal is '{self.removal}', but its effects are those of '{other}'"
                return message, "extras"
            return (
                "its effects do not predict which weights change the block most when they are 0",
                "effects",
            )
        if not self._linear:  # a fused kernel applies the activation too, and hides the product
            return self._scale_fault()
        spread, likeness = self._compared(self.removal, self._channels)
        if min(spread) >= _SPREAD and max(likeness) < _ALIKE:
            return "its effects do not predict which weights of a channel matter most", "effects"
        if not self._joined():
            message = "its effects do not predict the change when two weights of a channel are 0"
            return message, "effects"
        return self._scale_fault()

    def _compared(self, removal: str, groups: list[int]) -> tuple[list[float], list[float]]:
        """The spread of the changes within groups at each place, and their rank correlation."""
        changes, group_of = torch.stack(self._changes), torch.tensor(groups)
        squares = torch.tensor(self._squares, dtype=torch.float64)
        reported = torch.tensor(self._reported, dtype=torch.float64).clamp(min=1e-300).log()
        spreads, likeness = [], []
        for change in changes.T[_first_place(removal) :]:
            usable = (change > _SMALL * change.max()) & (squares > 0)
            observed = (change / squares if removal == "product" else change)[usable].log()
            pair = (observed, reported[usable])
            observed, expected = (_centred(values, group_of[usable]) for values in pair)
            spreads.append(float(observed.square().mean().sqrt()) if usable.any() else 0.0)
            ranks = (values.argsort().argsort().double() for values in (observed, expected))
            likeness.append(_cosine(*(rank - rank.mean() for rank in ranks)))
        return spreads, likeness

    def _joined(self) -> bool:
        """True if pairs have the reported joint change at one place, or a very small one."""
        if not self._joint:
            return True
        reported = torch.stack([reported for reported, _ in self._joint])
        observed = torch.stack([observed for _, observed in self._joint])
        sizes, likeness = [], []
        for change in observed.T[_first_place(self.removal) :]:
            finite = change.isfinite()
            sizes.append(float(change[finite].square().mean().sqrt()) if finite.any() else 0.0)
            likeness.append(_cosine(reported[finite], change[finite]))
        return max(sizes) < _JOINT or max(likeness) >= _ALIKE

    def _scale_fault(self) -> tuple[str, str] | None:
        """A fault if the reported share differs from the observed one.

        The last place is left out: the block's output includes the residual stream, which is not a
        part of a product.
        """
        places = slice(_first_place(self.removal), -1)
        reported = max(sum(share for share, _ in self._shares), 1e-300)
        observed = torch.tensor([shares for _, shares in self._shares]).sum(0)[places].tolist()
        _, likeness = self._compared(self.removal, self._blocks)
        ratios = [(like, reported / o) for like, o in zip(likeness, observed, strict=False) if o]
        scales = [s for like, s in ratios if like >= _ALIKE] or [s for _, s in ratios]
        scale = min(scales, key=lambda scale: abs(math.log(scale)), default=1.0)
        if 1 / _SCALE <= scale <= _SCALE:
            return None
        message = (
            f"its effects, divided by their energy, are {scale:.2g} × the relative changes when "
            "weights are 0: is the Gram matrix or the energy on another scale?"
        )
        return message, "effects"


def _squares(changes: Sequence[Change]) -> Tensor:
    return torch.tensor([change.square for change in changes], dtype=torch.float64)


def _first_place(removal: str) -> int:
    """The first compared place: the first operator does not show an effect on a product."""
    return 1 if removal == "effect" else 0


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    """The values without the mean of their group."""
    same = (groups[:, None] == groups).to(values)
    return values - same @ values / same.sum(1)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-300))
