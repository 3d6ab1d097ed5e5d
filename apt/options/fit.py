"""The options of a run that fits a model into a budget."""

from pathlib import Path
from typing import Any

from apt.errors import AptError
from apt.options.declaration import option, options
from apt.options.prune import Effort, SolveOptions
from apt.options.shared import (
    ACCURACY,
    OUTPUT,
    SIZE,
    TEXT,
    DeviceOptions,
    DtypeOptions,
    MeasuringOptions,
    ModelOptions,
    SampleOptions,
)

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
"""The units of sizes in bytes."""

MEANS = ("zeros", "bits", "width", "depth", "experts")
"""The means to make a file smaller: zeros in the weights, fewer bits for a weight, fewer heads and
channels, fewer blocks, and fewer experts."""


def read_means(text: str) -> tuple[str, ...]:
    """The means in a text such as ``bits,depth``.

    Raises:
        AptError: a name is unknown or given twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in MEANS]:
        raise AptError(f"may '{unknown[0]}' is not one of {', '.join(MEANS)}", options=("may",))
    if len(set(names)) < len(names):
        raise AptError(f"may {text} has a name twice", "leave one of them out", ("may",))
    return names


def read_bytes(text: Any) -> int:
    """The bytes of a text such as ``73MiB``, ``1.5GB`` or ``1000000``.

    Raises:
        AptError: it is no size.
    """
    words = str(text).strip().lower()
    unit = next((unit for unit in UNITS if words.endswith(unit)), "")
    try:
        size = int(float(words.removesuffix(unit)) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise AptError(
            f"{text} is not a size", "write 73MiB, 1.5GB or a number of bytes", ("size",)
        )
    return size


@options
class FitRun(
    ModelOptions, MeasuringOptions, SampleOptions, SolveOptions, DeviceOptions, DtypeOptions
):
    """The options of ``apt-prune fit``: a whole run from a model to a file of a given size."""

    model: str = option(
        "Directory, hub name, .gguf file or zoo:NAME.", default="", positional=True, place=True
    )
    effort: Effort = option(
        "fast, default or best. With best, a fourth of --samples are added that the model "
        "generates.",
        default="default", panel=ACCURACY, metavar="LEVEL", used_if="efforts",
    )  # fmt: skip
    random_tokens: float | None = option(
        "Copies with random tokens for each sample. By default 0.",
        default=None, panel=TEXT, metavar="R", within="[0, 100]",
        meaning="it is a number of copies for each sample, such as 0.25",
    )  # fmt: skip
    tuning_epochs: int | None = option(
        "Passes of block tuning by gradients, before a block is rounded. By default 0.",
        default=None, panel=ACCURACY, metavar="N", within="[0, 1000]", off="without tuning",
        needs_in_run="error_aware",
        meaning="it is a number of passes, such as 1",
    )  # fmt: skip
    size: int | str | None = option(
        "Largest file, for example 73MiB or 1.5GB.", default=None, panel=SIZE, metavar="BYTES"
    )
    bits: float | None = option(
        "Mean bits for each weight of the file, in place of --size: 8 times the bytes of the file, "
        "divided by the number of weights.",
        default=None, panel=SIZE, metavar="B", within="(0, 32]",
        meaning="it is a number of bits, such as 4.5",
    )  # fmt: skip
    may: str | None = option(
        "The means, separated by commas: bits; width and depth, to remove channels and blocks "
        "where that is better. By default all that the format has.",
        default=None, panel=SIZE, metavar="MEANS",
    )  # fmt: skip
    table_from: Path | None = option(
        "Take the table of losses from the report of OUT, the output of an earlier fit of the same "
        "model, and do not measure again.",
        default=None, panel=SIZE, flag="--from", metavar="OUT", place=True,
    )  # fmt: skip
    output: Path | None = option(
        "File to write: NAME.gguf.", default=None, panel=OUTPUT, short="-o"
    )
    overwrite: bool = option(
        "Replace the output of an earlier run.",
        default=False, panel=OUTPUT, saved=False, effect=False,
    )  # fmt: skip

    @property
    def directory(self) -> Path:
        """The file to write, once it is chosen."""
        assert self.output is not None
        return self.output

    def check(self) -> None:
        """Raise `AptError` if an option is out of range, or options contradict each other."""
        super().check()
        if not self.model:
            raise AptError("no MODEL is given", "name one, for example zoo:llama")
        if (self.size is None) == (self.bits is None):
            problem = "both given" if self.size else "missing: what must the model fit into?"
            raise AptError(f"size and bits are {problem}", "give one of them", ("size", "bits"))
        if self.size is not None:
            read_bytes(self.size)
        if "bits" not in self.means(("bits",)):
            raise AptError(
                f"may {self.may} does not choose the bits", f"add them: bits,{self.may}", ("may",)
            )
        if self.samples < 1:
            raise AptError("fit needs calibration text", "use at least one sample", ("samples",))

    def means(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """The means that are allowed; ``default`` if none are given."""
        return default if self.may is None else read_means(self.may)

    def budget(self, weights: int) -> int:
        """The largest file in bytes, for a model of a number of weights."""
        if self.size is not None:
            return read_bytes(self.size)
        return int((self.bits or 0) * weights / 8)
