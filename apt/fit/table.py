"""The table of losses: for each tensor of a model, its size and its loss at each level."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class MeasuredLevel:
    """A level of a tensor with its loss.

    Attributes:
        name: the name in the format, such as ``q4_K``.
        size: the bytes in the file.
        loss: the rise of the loss of the model, in nats for each token, if only this tensor has
            this level.
        zeros: the share of zeros of its values.
    """

    name: str
    size: int
    loss: float
    zeros: float = 0.0


@dataclass(frozen=True)
class LossTable:
    """The sizes and losses of the tensors of a model at each level.

    Attributes:
        tensors: the levels of each tensor, by the name of its parameter.
        rest: the bytes of the file without these tensors.
        gradient: the mean square of a gradient after the embedding, for each token, with which
            another run rounds the embedding.
        tied: groups of tensors that have the same level. The record of a table does not have them.
    """

    tensors: Mapping[str, Sequence[MeasuredLevel]]
    rest: int
    gradient: float = 0.0
    tied: Sequence[tuple[str, ...]] = ()

    @property
    def smallest(self) -> int:
        """The bytes of the smallest file."""
        return self.rest + sum(min(x.size for x in levels) for levels in self.tensors.values())

    @property
    def largest(self) -> int:
        """The bytes of the largest file."""
        return self.rest + sum(max(x.size for x in levels) for levels in self.tensors.values())

    def size(self, choice: Mapping[str, str]) -> int:
        """The bytes of the file with a level for each tensor, by name."""
        return self.rest + sum(self.level(name, level).size for name, level in choice.items())

    def loss(self, choice: Mapping[str, str]) -> float:
        """The rise of the loss with these levels: the sum over the tensors."""
        return sum(self.level(name, level).loss for name, level in choice.items())

    def level(self, tensor: str, name: str) -> MeasuredLevel:
        """A level of a tensor; raises `KeyError` if it has none of this name."""
        for level in self.tensors[tensor]:
            if level.name == name:
                return level
        raise KeyError(f"{tensor} has no level {name}")

    def joined(self) -> "LossTable":
        """The table with one row for each group of tied tensors, under the name of the first."""
        tensors = dict(self.tensors)
        for first, *others in self.tied:
            for name in others:
                tensors[first] = _sums(tensors[first], tensors.pop(name))
        return replace(self, tensors=tensors, tied=())

    def separate(self, choice: Mapping[str, str]) -> dict[str, str]:
        """The level of each tensor, from a choice in the joined table."""
        others = {name: choice[group[0]] for group in self.tied for name in group}
        return {**choice, **others}

    def priced(self, price: Callable[[str, MeasuredLevel], int], rest: int) -> "LossTable":
        """The same losses, with another cost in the place of bytes.

        Args:
            price: a function from the name of a tensor and its level to the cost.
            rest: the cost of everything that is not chosen.
        """
        tensors = {
            name: tuple(replace(level, size=price(name, level)) for level in levels)
            for name, levels in self.tensors.items()
        }
        return replace(self, tensors=tensors, rest=rest)

    def record(self) -> dict[str, Any]:
        """The table as values for JSON."""
        tensors = {
            name: [[level.name, level.size, level.loss, level.zeros] for level in levels]
            for name, levels in self.tensors.items()
        }
        return {"rest": self.rest, "gradient": self.gradient, "tensors": tensors}

    @classmethod
    def read(cls, record: Any) -> "LossTable":
        """The table from a record.

        Raises:
            ValueError: the record is damaged.
        """
        try:
            tensors = {
                str(name): tuple(
                    MeasuredLevel(str(n), int(s), float(x), float(z)) for n, s, x, z in levels
                )
                for name, levels in record["tensors"].items()
            }
            table = cls(tensors, int(record["rest"]), float(record["gradient"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("the table of losses is damaged") from error
        if not all(table.tensors.values()):
            raise ValueError("the table of losses has a tensor without levels")
        return table


def _sums(
    levels: Sequence[MeasuredLevel], others: Sequence[MeasuredLevel]
) -> tuple[MeasuredLevel, ...]:
    """The levels that two tensors have, with the sums of their sizes and losses."""
    by_name = {level.name: level for level in others}
    return tuple(
        replace(level, size=level.size + other.size, loss=level.loss + other.loss)
        for level in levels
        if (other := by_name.get(level.name)) is not None
    )
