"""Patterns as texts, and the questions about patterns as functions."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from apt.patterns.kinds import NM, MixedNM, Unstructured
from apt.patterns.protocol import Granularity, Pattern, SitePattern


def read(given: object, kinds: Iterable[type[Pattern]], forms: Sequence[str] = ()) -> Pattern:
    """The pattern, or that of a text or a number by the first kind that reads it.

    Args:
        forms: texts of kinds of other packages, for the message.

    Raises:
        ValueError: no kind reads the text, or it is out of range.
        TypeError: a kind returns something else than a pattern.
    """
    if isinstance(given, Pattern):
        return given
    text = str(given).strip()
    found = next((p for kind in kinds if (p := kind.parse(text)) is not None), None)
    if found is None:
        others = "".join(f" or {form}" for form in forms)
        fault = f"'{text}' is neither a sparsity such as 0.5 nor a pattern such as 2:4"
        raise ValueError(fault + others)
    if not isinstance(found, Pattern):
        raise TypeError(f"is read as {type(found).__name__}, not as an apt.solver.Pattern")
    return found


def parse_pattern(text: str) -> Pattern:
    """Read ``0.5``, ``50%``, ``2:4`` or ``auto:8@0.5``, which is `MixedNM`.

    Raises:
        ValueError: the text has none of these forms, or is out of range.
    """
    return read(text, (MixedNM, NM, Unstructured))


def keeps_all(pattern: SitePattern | None) -> bool:
    """True for a sparsity of 0: no weight is removed, and the zeros that are there stay."""
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
