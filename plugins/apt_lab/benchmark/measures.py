"""The measures of a benchmark. This module imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Facts:
    """The facts about a model that do not change from round to round.

    Attributes:
        parameters: the number of its parameters; shared ones count once.
        weight_bytes: the size of its files of weights.
        positions: the length of the longest sequence; None if unlimited.
        idle_bytes: the memory of the process before it reads the weights: Python and libraries.
        device, device_name: the device that was chosen, and its model.
        threads: the number of CPU threads.
        versions: the versions of the packages.
    """

    parameters: int
    weight_bytes: int
    positions: int | None
    idle_bytes: int
    device: str
    device_name: str
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Speed:
    """The speed of one batch, in tokens of all its sequences per second.

    Attributes:
        batch: the number of sequences.
        prefill: the prompts' tokens, over the time to the first generated tokens.
        decode: the generated tokens without the first ones, over the time that they take.
    """

    batch: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class Turn:
    """The measures of one model in one round.

    Attributes:
        load_seconds: the time from files to a model that is ready on the device.
        dtype: the dtype of the weights.
        speeds: the speed of each batch.
        peak_bytes: the peak memory of the process so far (``"cpu"``) and, on a GPU, that of
            its tensors in this turn, by the kind of device, such as ``"cuda"``.
        slow: True if a dense model multiplies in a dtype that the device multiplies more slowly
            than fp32.
    """

    load_seconds: float
    dtype: str
    speeds: tuple[Speed, ...]
    peak_bytes: dict[str, int]
    slow: bool = False


@dataclass(frozen=True)
class Result:
    """The measures of one model in all rounds."""

    model: str
    facts: Facts
    turns: tuple[Turn, ...]

    def each(self, measure: Callable[[Turn], float]) -> list[float]:
        """A measure in each round."""
        return [measure(turn) for turn in self.turns]

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The peak memory over all rounds, by its kind."""
        return {
            kind: max(turn.peak_bytes[kind] for turn in self.turns)
            for kind in self.turns[0].peak_bytes
        }


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, with the smallest and the largest value."""

    median: float
    smallest: float
    largest: float


def spread(values: Sequence[float]) -> Spread:
    """The median and the range of values."""
    return Spread(median(values), min(values), max(values))


def ratios(values: Sequence[float], first: Sequence[float]) -> list[float]:
    """The ratio to the first model in each round.

    The models of a round run one after the other, so a slow drift of the machine cancels.
    """
    return [value / base for value, base in zip(values, first, strict=True)]
