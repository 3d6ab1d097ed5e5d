"""The options of a run that fits a model into a budget."""

from pathlib import Path
from typing import Any, Final, Literal

from apt.errors import AptError
from apt.options.declaration import option, options
from apt.options.prune import Effort, SolveOptions
from apt.options.recover import check_trainable
from apt.options.shared import (
    ACCURACY,
    MINUTES,
    OUTPUT,
    SIZE,
    TEXT,
    TIME_MEANING,
    DeviceOptions,
    DtypeOptions,
    MeasuringOptions,
    ModelOptions,
    SampleOptions,
    check_scale_group,
    read_columns,
)

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
"""The units of sizes in bytes."""
PACKED = "packed"
"""The name of the target that is a packed directory."""
VLLM = "vllm"
"""The name of the target that is a directory for vLLM, in the format of compressed-tensors."""
DIRECTORIES = (PACKED, VLLM)
"""The targets that are directories; all others are files."""
ZEROS: Final = "zeros"
BITS: Final = "bits"
WIDTH: Final = "width"
DEPTH: Final = "depth"
EXPERTS: Final = "experts"
MEANS = (ZEROS, BITS, WIDTH, DEPTH, EXPERTS)
"""The means to make an output smaller: zeros in the weights, fewer bits for a weight, fewer heads
and channels, fewer blocks, and fewer experts."""


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


def read_bytes(text: Any, name: str = "size") -> int:
    """The bytes of a text such as ``73MiB``, ``1.5GB`` or ``1000000``.

    Args:
        name: the name of the option, for the message.

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
        raise AptError(f"{text} is not a size", "write 73MiB, 1.5GB or a number of bytes", (name,))
    return size


@options
class FitRun(
    ModelOptions, MeasuringOptions, SampleOptions, SolveOptions, DeviceOptions, DtypeOptions
):
    """The options of ``apt-prune fit``: a whole run from a model to an output of a given size."""

    model: str = option(
        "Directory, hub name, .gguf file or zoo:NAME.", default="", positional=True, place=True
    )
    effort: Effort = option(
        "fast, default or best. With best, a fourth of --samples are added that the model "
        "generates. For zeros also the length of the mask search, and tuning and random tokens.",
        default="default", panel=ACCURACY, metavar="LEVEL", used_if="efforts",
    )  # fmt: skip
    random_tokens: float | None = option(
        "Copies with random tokens for each sample. By default 0, for zeros by effort.",
        default=None, panel=TEXT, metavar="R", within="[0, 100]",
        meaning="it is a number of copies for each sample, such as 0.25",
    )  # fmt: skip
    tuning_epochs: int | None = option(
        "Passes of block tuning by gradients, before a block is rounded. By default 0, for zeros "
        "by effort.",
        default=None, panel=ACCURACY, metavar="N", within="[0, 1000]", off="without tuning",
        needs_in_run="error_aware",
        meaning="it is a number of passes, such as 1",
    )  # fmt: skip
    size: int | str | None = option(
        "Largest size of the weights, for example 73MiB or 1.5GB.",
        default=None, panel=SIZE, metavar="BYTES",
    )  # fmt: skip
    bits: float | None = option(
        "Mean bits for each weight, in place of --size: 8 times the bytes of the output, "
        "divided by the number of weights.",
        default=None, panel=SIZE, metavar="B", within="(0, 32]",
        meaning="it is a number of bits, such as 4.5",
    )  # fmt: skip
    memory: int | str | None = option(
        "Largest memory of a packed model and its cache, for example 2GiB, in place of --size.",
        default=None, panel=SIZE, metavar="BYTES",
    )  # fmt: skip
    cache_tokens: int = option(
        "Tokens in the cache with --memory.",
        default=2048, panel=SIZE, flag="--context", metavar="N", within="[0, ∞)",
    )  # fmt: skip
    speed: float | None = option(
        "Tokens per second that a packed model decodes on this processor, with one sequence, in "
        "place of --size. The number of threads is that of the run.",
        default=None, panel=SIZE, metavar="N", within="(0, ∞)",
        meaning="it is a number of tokens per second, such as 60",
    )  # fmt: skip
    table_from: Path | None = option(
        "Take the table of losses from the report of OUT, the output of an earlier fit of the same "
        "model, and do not measure again.",
        default=None, panel=SIZE, flag="--from", metavar="OUT", place=True,
    )  # fmt: skip
    target: str | None = option(
        "Kind of output: gguf, a file for llama.cpp; packed, a packed directory; or vllm, a "
        "directory of compressed-tensors. By default packed, unless --output ends in .gguf; "
        "without --output gguf.",
        default=None, panel=SIZE, flag="--for", metavar="KIND",
    )  # fmt: skip
    may: str | None = option(
        "Means that fit may use, separated by commas. For gguf and vllm: bits; width and depth, to "
        "remove channels and blocks where that is better. For packed: zeros, bits; and experts, to "
        "remove experts of a mixture. By default all of the output.",
        default=None, panel=SIZE, metavar="MEANS",
    )  # fmt: skip
    scale_group: int | Literal["row"] = option(
        "Columns of the integers of a directory that share a scale, or row for one scale a row.",
        default=64, panel=SIZE, metavar="N|row", read=read_columns,
    )  # fmt: skip
    minutes: float | None = option(
        "Time for the whole run: what the fit leaves is spent on the training of norms and biases "
        "towards the model, as by recover --kind norms; all other tensors keep their bytes.",
        default=None, panel=ACCURACY, metavar="M", within=MINUTES, meaning=TIME_MEANING,
    )  # fmt: skip
    output: Path | None = option(
        "File or directory to write: NAME.gguf, or a directory.",
        default=None, panel=OUTPUT, short="-o",
    )  # fmt: skip
    overwrite: bool = option(
        "Replace the output of an earlier run.",
        default=False, panel=OUTPUT, saved=False, effect=False,
    )  # fmt: skip

    @property
    def directory(self) -> Path:
        """The file or directory to write, once it is chosen."""
        assert self.output is not None
        return self.output

    @property
    def means(self) -> tuple[str, ...]:
        """The means that the run may use, once its target is chosen."""
        return self.possible_means if self.may is None else read_means(self.may)

    @property
    def counted_context(self) -> int | None:
        """The tokens of the cache, if the bytes in memory are counted; else None."""
        return None if self.memory is None else self.cache_tokens

    @property
    def needs_packed(self) -> bool:
        """True if only a packed directory can have what the options ask for."""
        names = {ZEROS, EXPERTS}.intersection(self.means)
        return self.memory is not None or self.speed is not None or bool(names)

    @property
    def possible_means(self) -> tuple[str, ...]:
        """The means of the target."""
        if self.target != PACKED:
            return BITS, WIDTH, DEPTH
        return (ZEROS, BITS, EXPERTS) if self.speed is None else (ZEROS, BITS)

    @property
    def zeros(self) -> bool:
        """True if weights may be removed one by one."""
        return ZEROS in self.means

    def check(self) -> None:
        """Raise `AptError` if an option is out of range, or options contradict each other."""
        super().check()
        check_scale_group(self.scale_group)
        if self.memory is None and self.cache_tokens != type(self).cache_tokens:
            message = "cache tokens has no effect without memory"
            raise AptError(message, "leave it out, or add memory", ("cache_tokens", "memory"))
        if self.may is not None:
            read_means(self.may)
        if not self.model:
            raise AptError("no MODEL is given", "name one, for example zoo:llama")
        budgets = {
            "size": self.size, "bits": self.bits, "memory": self.memory, "speed": self.speed,
        }  # fmt: skip
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            names = (given[0], given[1])
            raise AptError(f"{' and '.join(names)} are both given", "give one of them", names)
        if not given:
            message = "size and bits are missing: what must the model fit into?"
            raise AptError(message, "give one of them, or a speed", tuple(budgets))
        for name in ("size", "memory"):
            if budgets[name] is not None:
                read_bytes(budgets[name], name)
        if self.samples < 1:
            raise AptError("fit needs calibration text", "use at least one sample", ("samples",))
        if self.minutes is not None:
            check_trainable(self.compute, ("minutes", "compute"))

    def check_target(self) -> None:
        """Raise `AptError` if options contradict the kind of output, once it is chosen."""
        if other := [name for name in self.means if name not in self.possible_means]:
            message = f"fit has no {other[0]} to choose for {self.target}"
            hint = f"choose from {', '.join(self.possible_means)}"
            raise AptError(message, hint, ("may", "target"))
        if self.target != PACKED and BITS not in self.means:
            message = f"may {self.may} does not choose the bits"
            raise AptError(message, f"add them: bits,{self.may}", ("may",))
        if self.target != PACKED and self.memory is not None:
            message = f"memory has no effect for {self.target}: it is that of a packed model"
            raise AptError(message, "give a size", ("memory", "target"))
        if self.target != PACKED and self.speed is not None:
            message = f"speed has no effect for {self.target}: it is that of a packed model"
            raise AptError(message, "give a size", ("speed", "target"))
        if self.target not in DIRECTORIES and self.scale_group != type(self).scale_group:
            message = f"scale group has no effect for {self.target}: its types have their own"
            raise AptError(message, "leave it out", ("scale_group", "target"))

    def budget(self, weights: int) -> int:
        """The largest number of bytes, for a model of a number of weights.

        For a speed it is the largest number of nanoseconds of a decoding step.
        """
        if self.speed is not None:
            return int(1e9 / self.speed)
        size = self.memory if self.size is None else self.size
        if size is not None:
            return read_bytes(size)
        return int((self.bits or 0) * weights / 8)
