"""The pattern of structured pruning: whole groups of input columns are removed.

A group of columns is, for instance, a channel of an MLP or the outputs of an attention head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apt.patterns.protocol import SitePattern


@dataclass(frozen=True)
class ColumnGroups(SitePattern):
    """Consecutive groups of columns, of which a number is kept.

    Args:
        count: the number of groups; all have the same number of columns.
        kept: the number of groups that are kept.
        bins: the number of equal, consecutive bins of groups. The same number is removed from each.
        chosen: the indices of the groups that are removed; None leaves the choice to a method.

    Raises:
        ValueError: nothing is kept, the bins cannot be equal, or ``chosen`` are not ``count −
            kept`` different groups with the same number in each bin.
    """

    structured = True
    unit = "groups"

    count: int
    kept: int
    bins: int = 1
    chosen: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.kept <= self.count:
            raise ValueError(f"{self.kept} of {self.count} groups: keep at least one")
        if self.count % self.bins or self.kept % self.bins:
            raise ValueError(f"{self.kept} of {self.count} groups in {self.bins} unequal bins")
        if self.chosen is not None and not self._fits(self.chosen):
            per_bin = f", {self.removed // self.bins} in each bin" if self.bins > 1 else ""
            raise ValueError(
                f"{self} needs {self.removed} removed groups{per_bin}, not {self.chosen}"
            )

    def _fits(self, chosen: tuple[int, ...]) -> bool:
        """True if the same number of different groups is chosen from every bin."""
        size, per_bin = self.count // self.bins, self.removed // self.bins
        bins = sorted(group // size for group in set(chosen))
        return len(chosen) == self.removed and bins == sorted([*range(self.bins)] * per_bin)

    def __str__(self) -> str:
        return f"{self.kept} of {self.count} groups" if self.removed else "dense"

    @property
    def removed(self) -> int:
        """The number of groups that are removed."""
        return self.count - self.kept

    def mask(self, indices: Tensor | tuple[int, ...]) -> Tensor:
        """The mask (count,) of groups with these indices."""
        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[torch.as_tensor(indices, dtype=torch.long, device="cpu")] = True
        return mask

    def columns(self, removed: Tensor, width: int) -> Tensor:
        """The mask (width,) of the columns of the groups with the mask ``removed`` (count,).

        Raises:
            ValueError: ``width`` is not a multiple of the number of groups.
        """
        if width % self.count:
            raise ValueError(f"{width} columns are not a multiple of {self.count} groups")
        return removed.repeat_interleave(width // self.count)

    def lowest(self, scores: Tensor) -> Tensor:
        """The mask (count,) of the removed groups: those of the lowest ``scores`` in each bin."""
        per_bin = self.removed // self.bins
        order = scores.view(self.bins, -1).argsort(dim=1, stable=True)[:, :per_bin]
        bin_starts = torch.arange(self.bins, device=order.device) * (self.count // self.bins)
        return self.mask((order + bin_starts.unsqueeze(1)).flatten())

    def zeros(self, weight: Tensor) -> Tensor:
        """The mask (count,) of the groups whose columns of ``weight`` (out, in) are all zero."""
        empty: Tensor = (weight == 0).all(0).view(self.count, -1).all(1)
        return empty

    def required(self, shape: tuple[int, int]) -> int:
        """The weights of the removed groups."""
        return shape[0] * shape[1] // self.count * self.removed

    def shortfall(self, weight: Tensor) -> str:
        """A message if some bin of ``weight`` (out, in) has too few groups of zeros."""
        message = f"too few of its {self.count} groups are zero: {self} are kept"
        if weight.shape[1] % self.count:
            return message
        empty = self.zeros(weight).view(self.bins, -1).sum(1)
        return "" if bool((empty >= self.removed // self.bins).all()) else message

    def surplus(self, weight: Tensor, dense: Tensor) -> int:
        """The number of groups that are zero beyond the pattern, but not in ``dense``."""
        new_zeros = self.zeros(weight) & ~self.zeros(dense)
        counts = new_zeros.view(self.bins, -1).sum(1)
        return int((counts - self.removed // self.bins).clamp_min(0).sum())
