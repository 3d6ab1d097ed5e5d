"""The measures of a benchmark. This module imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

SOUND_SECONDS = 10
"""The length of random sounds."""


@dataclass(frozen=True)
class Facts:
    """The facts about a model that do not change from round to round.

    Attributes:
        parameters: the number of parameters; shared parameters count once.
        weight_bytes: the size of the files of weights.
        positions: the length of the longest sequence; None if unlimited.
        idle_bytes: the memory of the process before it reads the weights: Python and libraries.
        device, device_name: the chosen device, and the name of its model.
        threads: the number of CPU threads.
        versions: the versions of the packages.
        reads: the kinds of samples, such as ``texts``; empty for a decoder of text.
        writes: True for a model that generates text.
    """

    parameters: int
    weight_bytes: int
    positions: int | None
    idle_bytes: int
    device: str
    device_name: str
    threads: int
    versions: dict[str, str]
    reads: str = ""
    writes: bool = True


@dataclass(frozen=True)
class Speed:
    """The speed of one batch, in tokens of all its sequences, or samples, per second.

    Attributes:
        batch: the number of sequences or samples.
        prefill: the number of prompt tokens, or of samples of a model that does not read windows of
            text, divided by the time to the first generated tokens. Without generated tokens, it is
            the time of a forward.
        decode: the number of further generated tokens, divided by their time; None without them.
    """

    batch: int
    prefill: float
    decode: float | None


@dataclass(frozen=True)
class Turn:
    """The measures of one model in one round.

    Attributes:
        load_seconds: the time from files to a model that is ready on the device.
        dtype: the dtype of the weights.
        speeds: the speed of each batch.
        peak_bytes: the peak memory by the kind of device: of the process so far (``"cpu"``), and of
            its tensors in this turn on a GPU (such as ``"cuda"``).
        slow: True if the model is dense, and the device is slower in its dtype than in fp32.
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
