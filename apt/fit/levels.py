"""The levels of the tensors of a model: the grids that a file format has, and their sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apt.patterns import Grid


@dataclass(frozen=True)
class Level:
    """One way to store a tensor.

    Attributes:
        name: the name in the format, such as ``q4_K``.
        size: the bytes of the tensor in the file, with its padding.
        grid: the grid of its values; None if the values stay as they are.
    """

    name: str
    size: int
    grid: Grid | None = None


@dataclass(frozen=True)
class FileForm:
    """What a file of one model can hold.

    Attributes:
        levels: the levels of each tensor whose level can be chosen, by the name of its parameter.
        rest: the bytes of the file without these tensors.
    """

    levels: Mapping[str, Sequence[Level]]
    rest: int
