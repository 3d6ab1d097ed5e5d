"""The effects that an adapter reports, compared with the changes when weights are zero."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apt.adapter import Extra
from apt.conformance.checks.removals import Change, Removals

_SMALL = 1e-6  # of the largest change
_SPREAD = 0.2  # of the logarithms of changes, below which their order does not matter
_JOINT = 0.1  # of the change by two weights, below which what they share does not matter
_ALIKE = 0.6  # the least correlation
_SCALE = 4  # the largest deviation of a share: an adapter may measure it at another place


@dataclass
class Predictions:
    """The reported effects of some weights of one kind, and the observed changes.

    The order of the effects must be that of the changes at one of the places of `Removals`. An
    adapter may weight a product as it likes, so that only shares have a scale: the effects in
    relation to their energy, and the changes in relation to what changes.

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
        """Add one or two weights, and their pair, of each of ``channels`` channels of a block."""
        weight, gram = extra.weight(removals.step.block).data, gram.double()
        draw = torch.Generator().manual_seed(0)
        for channel in torch.randperm(len(weight), generator=draw)[:channels].tolist():
            pair = torch.randperm(weight.shape[1], generator=draw)[:2].tolist()
            each = [removals.changes(weight, channel, [place]) for place in pair]
            alone = [_squares(changes) for changes in each]
            number = len(self._changes)
            for place, changes in zip(pair, each, strict=True):
                square = float(weight[channel, place].double().square())
                effect = float(gram[channel, place, place])
                acting = square if self.removal == "product" else 1.0
                self._blocks.append(removals.step.index)
                self._channels.append(number)
                self._squares.append(square)
                self._reported.append(effect)
                self._changes.append(_squares(changes))
                self._shares.append((acting * effect / energy, [c.share for c in changes]))
            if self.removal == "product":
                half = removals.changes(weight, channel, pair[:1], 0.5)[0].square
                self._linear &= not half or bool(0.9 < 4 * half / alone[0][0] < 1.1)
            if len(pair) == 2:
                both = _squares(removals.changes(weight, channel, pair))
                sign = weight[channel, pair].sign().prod() if self.removal == "product" else 1
                size = gram.diagonal(dim1=1, dim2=2)[channel, pair].prod().sqrt()
                reported = sign * gram[channel, pair[0], pair[1]] / size
                observed = (both - alone[0] - alone[1]) / 2 / (alone[0] * alone[1]).sqrt()
                self._joint.append((reported.nan_to_num(), observed))

    def fault(self) -> tuple[str, str] | None:
        """The fault, and the faulty method of the adapter; None if there is none."""
        spread, likeness = self._compared(self.removal, self._blocks)
        if not self._linear and max(self._compared("effect", self._blocks)[1]) > max(likeness):
            said = "removal is 'product', but the product is not linear in the weight"
            return f"{said}: declare 'effect'", "extras"
        if max(spread) >= _SPREAD and max(likeness) < _ALIKE:
            other = "effect" if self.removal == "product" else "product"
            if max(self._compared(other, self._blocks)[1]) > max(_ALIKE, *likeness):
                said = f"removal is '{self.removal}', but its effects are those of '{other}'"
                return said, "extras"
            said = "its effects do not predict which weights change the block most when they are 0"
            return said, "effects"
        if not self._linear:  # a fused kernel hides the product: it applies the activation too
            return self._scale_fault()
        spread, likeness = self._compared(self.removal, self._channels)
        if min(spread) >= _SPREAD and max(likeness) < _ALIKE:
            return "its effects do not predict which weights of a channel matter most", "effects"
        if not self._joined():
            said = "its effects do not predict the change when two weights of a channel are 0"
            return said, "effects"
        return self._scale_fault()

    def _compared(self, removal: str, groups: list[int]) -> tuple[list[float], list[float]]:
        """The spread of the changes within groups at each place, and their rank correlation."""
        changes, among = torch.stack(self._changes), torch.tensor(groups)
        squares = torch.tensor(self._squares, dtype=torch.float64)
        reported = torch.tensor(self._reported, dtype=torch.float64).clamp(min=1e-300).log()
        spreads, likeness = [], []
        for change in changes.T[_first_place(removal) :]:
            some = (change > _SMALL * change.max()) & (squares > 0)
            each = (change / squares if removal == "product" else change)[some].log()
            seen, said = (_centred(values, among[some]) for values in (each, reported[some]))
            spreads.append(float(seen.square().mean().sqrt()) if some.any() else 0.0)
            ranks = (values.argsort().argsort().double() for values in (seen, said))
            likeness.append(_cosine(*(rank - rank.mean() for rank in ranks)))
        return spreads, likeness

    def _joined(self) -> bool:
        """True if pairs have the reported joint change at a place, or if there is hardly one."""
        if not self._joint:
            return True
        reported = torch.stack([reported for reported, _ in self._joint])
        observed = torch.stack([observed for _, observed in self._joint])
        sizes, likeness = [], []
        for change in observed.T[_first_place(self.removal) :]:
            known = change.isfinite()
            sizes.append(float(change[known].square().mean().sqrt()) if known.any() else 0.0)
            likeness.append(_cosine(reported[known], change[known]))
        return max(sizes) < _JOINT or max(likeness) >= _ALIKE

    def _scale_fault(self) -> tuple[str, str] | None:
        """A fault if the share that the effects report is not the one that is observed.

        The last place is left out: the residual stream is a part of the block's output, but not of
        a product.
        """
        places = slice(_first_place(self.removal), -1)
        reported = max(sum(share for share, _ in self._shares), 1e-300)
        observed = torch.tensor([shares for _, shares in self._shares]).sum(0)[places].tolist()
        _, likeness = self._compared(self.removal, self._blocks)
        seen = [(like, reported / o) for like, o in zip(likeness, observed, strict=False) if o]
        scales = [s for like, s in seen if like >= _ALIKE] or [s for _, s in seen]
        scale = min(scales, key=lambda scale: abs(math.log(scale)), default=1.0)
        if 1 / _SCALE <= scale <= _SCALE:
            return None
        said = f"its effects, divided by their energy, are {scale:.2g} × the relative changes when"
        said += " weights are 0: is the Gram matrix or the energy on another scale?"
        return said, "effects"


def _squares(changes: Sequence[Change]) -> Tensor:
    return torch.tensor([change.square for change in changes], dtype=torch.float64)


def _first_place(removal: str) -> int:
    """The first place to look at: the first operator does not show the effect on a product."""
    return 1 if removal == "effect" else 0


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    """The values without the mean of their group."""
    same = (groups[:, None] == groups).to(values)
    return values - same @ values / same.sum(1)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-300))
