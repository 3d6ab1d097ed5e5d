"""The protocol of a pattern: the zeros of a weight, and all questions of APT about them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

Granularity = Literal["row", "layer"]


class SitePattern(ABC):
    """The zeros of a weight (out, in): single weights (`Pattern`), or groups of its columns.

    ``str(pattern)`` is its text in reports and messages.

    Attributes:
        kind: the name of its `apt.hookspecs.PatternSpec`; empty for groups of columns.
        structured: True if whole columns are removed, so that the model becomes smaller.
        unit: the name of the counted things, for messages.
    """

    kind: ClassVar[str] = ""
    structured: ClassVar[bool] = False
    unit: ClassVar[str] = "weights"

    @property
    def by_row(self) -> bool:
        """True if the number of zeros of a row does not depend on the other rows."""
        return True

    @property
    def per(self) -> Granularity | None:
        """The unit in which a share is counted; None if it is not chosen, or for other patterns."""
        return None

    @property
    def allocatable(self) -> bool:
        """True if an allocation may give each site a sparsity of its own."""
        return False

    @property
    def settled(self) -> bool:
        """False if an allocation must choose the pattern of each site."""
        return True

    @property
    def group(self) -> int | None:
        """The number m of consecutive inputs of n:m, or None for other patterns.

        In each row, every group of m inputs then has the same number of zeros.
        """
        return None

    @property
    def keeps_all(self) -> bool:
        """True if no weight is removed; zeros of the dense weight stay."""
        return False

    @abstractmethod
    def required(self, shape: tuple[int, int]) -> int:
        """The number of zeros that a weight of ``shape`` (out, in) must have."""

    @abstractmethod
    def shortfall(self, weight: Tensor) -> str:
        """A text about missing zeros of ``weight`` (out, in); empty if it meets the pattern."""

    @abstractmethod
    def surplus(self, weight: Tensor, dense: Tensor) -> int:
        """The number of `unit` that are zero beyond the pattern, but not in ``dense``."""


class Pattern(SitePattern):
    """A pattern of single weights; a kind of pattern is a subclass, a frozen dataclass.

    Attributes:
        may_be_dense: True if an allocation may leave a site without zeros.
        movable: True if a training may move the zeros of a row, within the groups of n:m.
    """

    may_be_dense: ClassVar[bool] = False
    movable: ClassVar[bool] = False

    if TYPE_CHECKING:  # at run time a field of a dataclass could not replace it

        @property
        def sparsity(self) -> float:
            """The share of weights pruned."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> "Pattern | None":
        """The pattern of a text, as ``str`` returns it; None if the text has another form.

        Raises:
            ValueError: the text has this form, but there is no such pattern.
        """

    @abstractmethod
    def lowest(self, scores: Tensor, per: Granularity = "layer", offset: int = 0) -> Tensor:
        """The mask (True = pruned) of the lowest ``scores`` (rows, columns) that meets the pattern.

        The count is exact even if scores are equal. The scores of weights that are pruned together
        are added.

        Args:
            per: the unit of a share whose own `per` is None.
            offset: the index of the first column, if the scores belong to a window of columns.
                The masks of consecutive windows add up to the exact count of the whole.
        """

    def smallest(self, magnitudes: Tensor, per: Granularity = "layer") -> Tensor:
        """The mask of the smallest ``magnitudes`` (rows, columns), whose squares are the scores."""
        return self.lowest(magnitudes, per)

    def keep_largest(self, magnitudes: Tensor) -> None:
        """Replace ``magnitudes`` (columns, rows) by 1 where they are kept, else by 0.

        The count may be approximate: this is the projection of searches, which select at every step
        and need the exact count only at the end. Note the transposed layout.
        """
        magnitudes.copy_(~self.smallest(magnitudes.T.contiguous()).T)

    def misfit(self, shape: tuple[int, int], inputs: str = "inputs") -> str:
        """Why a weight of ``shape`` (out, in) cannot have the pattern; empty if it can.

        The text continues the name of the weight; ``inputs`` is the name of its columns.
        """
        return ""

    @property
    def alignment(self) -> int:
        """Windows of columns must be a multiple of this number of columns."""
        return self.group or 1

    def zero_counts(self, zeros: Tensor) -> tuple[Tensor, int]:
        """The zeros of a mask (out, in) in each counted part, and the required number."""
        return zeros.sum().view(1), self.required((zeros.shape[0], zeros.shape[1]))

    def surplus(self, weight: Tensor, dense: Tensor) -> int:
        """The number of weights that are zero beyond the pattern, but not in ``dense``."""
        counts, needed = self.zero_counts((weight == 0) & (dense != 0))
        return int((counts - needed).clamp_min(0).sum())

    def counted(self, per: Granularity) -> "Pattern":
        """The same pattern, with a share counted over ``per`` if its own `per` is None."""
        return self

    def rest(self, shape: tuple[int, int], dead: int) -> "Pattern | None":
        """The pattern of the live inputs if all weights of ``dead`` inputs (out, in) are pruned.

        None if it leaves no choice among the live inputs. The pattern itself if inputs cannot be
        left out.
        """
        return self

    def of_channels(self) -> "Pattern | None":
        """The pattern of a weight (channels, k) whose channels are pruned separately, or None."""
        return None

    @property
    def knots(self) -> Sequence[float] | None:
        """The sparsities, from 0 to 1, at which an allocation measures losses.

        Losses between them are interpolated. None if weights are pruned one by one: a loss is then
        the sum of the lowest scores.
        """
        return [k / 16 for k in range(17)]

    def at(self, sparsity: float) -> "Pattern":
        """The pattern of another sparsity between 0 and 1, or the nearest; without ``per``."""
        return self

    def step(self, shape: tuple[int, int]) -> int:
        """The step of the number of zeros of a weight (out, in)."""
        return 1

    def with_zeros(self, zeros: int, shape: tuple[int, int]) -> "Pattern | None":
        """The pattern that removes ``zeros``, a multiple of the step, of a weight (out, in).

        None if the weight stays dense.
        """
        return self


def keeps_all(pattern: SitePattern | None) -> bool:
    """True for a sparsity of 0: no weight is removed; zeros of the dense weight stay."""
    return pattern is not None and pattern.keeps_all


def lowest(scores: Tensor, pattern: Pattern, per: Granularity = "layer", offset: int = 0) -> Tensor:
    """The mask (True = pruned) of the lowest ``scores`` (rows, columns) that meets ``pattern``.

    The count is exact even if scores are equal. ``per`` applies to an unstructured pattern whose
    own ``per`` is None. The masks of consecutive windows of columns, each with its ``offset``, add
    up to the exact count of the whole.

    Raises:
        ValueError: the columns are not a multiple of the m of n:m.
    """
    return pattern.lowest(scores, per, offset)


def meets(weight: Tensor, pattern: SitePattern) -> bool:
    """True if ``weight`` (out, in) has at least the zeros that ``pattern`` requires.

    An unstructured pattern without ``per`` is counted over the layer.
    """
    return not pattern.shortfall(weight)
