"""The options of pruning, and the defaults that depend on the effort."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apt.errors import AptError
from apt.options.declaration import option, options
from apt.options.recover import check_trainable
from apt.options.shared import (
    ACCURACY,
    MINUTES,
    OUTPUT,
    RUNNING,
    SELECTION,
    TEXT,
    TIME_MEANING,
    ComputeOptions,
    DtypeOptions,
    IntegerOptions,
    MaskOptions,
    MeasuringOptions,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    SampleOptions,
    StreamOptions,
    UnitOptions,
)

Effort = Literal["fast", "default", "best"]
QUANTISE_AFTER = "quantise the result in a run of its own: prune it with a sparsity of 0"
"""The hint of an error: integers exclude another option."""


INPUT_CORRECTION = DRIFT_CORRECTION = 0.25  # for a sparse model; 0 for a smaller one
ROW_IMPORTANCE = 0.35
DAMPING, DAMPING_ERROR_AWARE = 0.01, 0.05
SHRINK_TUNING_RATE = 0.03


@dataclass(frozen=True)
class Preset:
    """The defaults of an effort, in an error-aware run of a method with a mask search.

    Attributes:
        tuning_epochs, tuning_rate, tuning_tokens: see `PruneOptions`.
        own_samples: the number of generated samples for each given sample.
        random_tokens: see `PruneOptions`; for runs that generate no text.
        norm_epochs: see `PruneOptions`; for decoders of text in memory that lose weights.
    """

    tuning_epochs: int
    tuning_rate: float
    tuning_tokens: int
    own_samples: float
    random_tokens: float
    norm_epochs: int


PRESETS: dict[Effort, Preset] = {
    "fast": Preset(0, 0.0, 0, own_samples=0.0, random_tokens=0.0, norm_epochs=0),
    "default": Preset(1, 0.05, 3 * 2**11, own_samples=0.25, random_tokens=0.25, norm_epochs=1),
    "best": Preset(8, 0.025, 0, own_samples=0.25, random_tokens=0.0, norm_epochs=1),
}
"""The presets by effort. The costs of tuning and of own text of ``default`` do not grow with the
number of tokens. Own samples improve the result more than random tokens do. But in a streamed run
each of their tokens reads the whole model, so that its default is random tokens."""


@options
class SolveOptions(ComputeOptions):
    """The options of the loop over blocks, for a sparse and for a smaller model."""

    own_samples: int | None = option(
        "Samples that the model generates, beside --samples. By default a fourth of --samples "
        "with --effort best, and with the default effort in memory, of at most 8192 tokens; "
        "else 0.",
        default=None, panel=TEXT, metavar="N", within="[0, ∞)",
    )  # fmt: skip
    random_tokens: float | None = option(
        "Copies with random tokens for each sample. By default "
        f"{PRESETS['default'].random_tokens} with --effort default in an error-aware run without "
        "own samples, else 0.",
        default=None, panel=TEXT, metavar="R", within="[0, 100]",
        meaning="it is a number of copies for each sample, such as 0.25",
    )  # fmt: skip
    effort: Effort = option(
        "fast, default or best: the length of the mask search, and the defaults of "
        "tuning, random tokens and own samples.",
        default="default", panel=ACCURACY, metavar="LEVEL", used_if="efforts",
    )  # fmt: skip
    error_aware: bool | None = option(
        "Each site compensates a part of the error of the sites before it, or none of it. "
        "The default depends on the method.",
        default=None, panel=ACCURACY, flag="--error-aware/--layer-wise",
        off="in a layer-wise run",
    )  # fmt: skip
    input_correction: float | None = option(
        f"Share of the error of its inputs that a site compensates. By default {INPUT_CORRECTION}.",
        default=None, panel=ACCURACY, metavar="A", within="[0, 1]", formerly="alpha",
        needs_in_run="error_aware",
        meaning="it is a share of an error, such as 0.25",
    )  # fmt: skip
    drift_correction: float | None = option(
        "Share of the drift of the residual stream that a site which writes to this stream "
        f"compensates. By default {DRIFT_CORRECTION}.",
        default=None, panel=ACCURACY, metavar="B", within="[0, 1]", formerly="beta",
        needs_in_run="error_aware",
        meaning="it is a share of an error, such as 0.25",
    )  # fmt: skip
    ordered: bool | None = option(
        "Solve the sites of a block one after the other (true-sequential), or all on the "
        "inputs of the dense block. By default ordered if error-aware.",
        default=None, panel=ACCURACY, flag="--ordered/--at-once",
    )  # fmt: skip
    tuning_epochs: int | None = option(
        "Passes of block tuning by gradients; 0 turns it off. By effort 0, 1 or 8.",
        default=None, panel=ACCURACY, metavar="N", within="[0, 1000]", off="without tuning",
        needs_in_run="error_aware",
        meaning="it is a number of passes, such as 1",
    )  # fmt: skip
    tuning_rate: float | None = option(
        "First learning rate of the tuning, as a share of a weight's size. By default "
        f"{PRESETS['default'].tuning_rate}, with --effort best {PRESETS['best'].tuning_rate}.",
        default=None, panel=ACCURACY, metavar="R", within="[0, 1]", needs_in_run="tuning_epochs",
        meaning="it is a share of a weight's size, such as 0.05",
    )  # fmt: skip
    tuning_tokens: int | None = option(
        "Calibration tokens for the tuning; 0 uses all. By default "
        f"{PRESETS['default'].tuning_tokens}, with --effort best all.",
        default=None, panel=ACCURACY, metavar="N", within="[0, ∞)", needs_in_run="tuning_epochs",
        meaning="it is a number of tokens; 0 uses all",
    )  # fmt: skip
    damping: float | None = option(
        "Share of the mean diagonal of the Gram matrix (Hessian) that is added to it. By "
        f"default {DAMPING_ERROR_AWARE} if error-aware, else {DAMPING}.", default=None,
        # Above this the Gram matrix has no effect, and fp32 overflows.
        panel=ACCURACY, within="[0, 1e6]",
        meaning="it is a share of the mean diagonal, such as 0.05",
    )  # fmt: skip


@options
class PruneOptions(IntegerOptions, SolveOptions):
    """The options that affect the pruned weights, beside model, tokens, pattern and method.

    ``None`` means the default, which depends on the effort or on the method. Each option can be set
    separately, for example for an ablation. Sources are in methods.md: "The target" (error_aware,
    input_correction α, drift_correction β), "Row importance", "Block tuning" (after EBFT, arXiv
    2402.12419), "Random tokens"; own samples are after arXiv 2410.17170. Integers are rounded after
    the tuning of their block, so that later roundings and later blocks make up for the error.
    `apt.shrink` has other defaults: 0 for the two corrections, and 0.03 for ``tuning_rate``.
    """

    row_importance: float | None = option(
        "Exponent by which more important rows keep more weights; 0 turns it off. By default "
        f"{ROW_IMPORTANCE}.",
        default=None, panel=ACCURACY, metavar="P", within="[0, 2]", used_if="sparse",
        needs_in_run="error_aware",
        meaning="it is a power, such as 0.35",
    )  # fmt: skip
    permute: bool | None = option(
        "Change the order of channels and values before n:m, so that each group keeps more. By "
        "default in error-aware runs.",
        default=None, panel=ACCURACY, flag="--permute/--no-permute", used_if="sparse",
        needs_in_run="error_aware",
    )  # fmt: skip
    norm_epochs: int | None = option(
        "Passes over other calibration text that train the norms and biases at the end, towards "
        "the outputs of the dense model; for decoders of text in memory. By default 1 in "
        "error-aware runs of the default method, except with --only or --effort fast.",
        default=None, panel=ACCURACY, metavar="N", within="[0, 1000]", used_if="sparse",
        meaning="it is a number of passes, such as 1",
    )  # fmt: skip
    block_size: int | None = option(
        "Columns of one joint compensation; by default all.",
        default=None, panel=ACCURACY, within="[1, ∞)", used_if="blocks",
    )  # fmt: skip
    quantize: Literal["int8", "int4"] | None = option(
        "Round the kept weights to int8 or int4 times a scale, so that what follows makes up "
        "for the error.",
        default=None, panel=ACCURACY, metavar="KIND",
    )  # fmt: skip


@options
class ModelRun(
    ModelOptions,
    MeasuringOptions,
    SampleOptions,
    MethodOptions,
    SolveOptions,
    StreamOptions,
    DtypeOptions,
    OutputOptions,
):
    """The options that ``apt-prune prune`` and ``shrink`` have in common."""

    model: str = option(
        "Directory, hub name, .gguf file or zoo:NAME; by default that of the adapter.",
        default="", positional=True, place=True,
    )  # fmt: skip
    resume: bool = option(
        "Continue an interrupted --stream run of the same command.",
        default=False, panel=RUNNING, saved=False, effect=False,
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` if an option is out of range, or options contradict each other."""
        super().check()
        if self.samples == 0 and not self.own_samples:
            raise AptError(
                "there are no samples to calibrate on",
                "use at least one sample or one own sample",
                ("samples", "own_samples"),
            )

    def record(self) -> dict[str, Any]:
        """See `Options.record`. A smaller model has the entries of a sparse model too."""
        defaults = {"pattern": None, "allocation": "uniform", "also": (), "save_masks": False}
        return defaults | {"only": (), "skip": (), "overrides": {}} | super().record()


@options
class PruneRun(ModelRun, UnitOptions, PruneOptions, MaskOptions):
    """The options of ``apt-prune prune``: a whole run from a model to a directory."""

    allocation: str | None = option(
        "Distribution of --sparsity over the sites, listed by: apt-prune methods. By default "
        "auto in an error-aware run of the default method and for --pattern auto:M, else uniform.",
        default=None, panel=SELECTION, metavar="NAME",
    )  # fmt: skip
    also: tuple[str, ...] = option(
        "Prune these parameters too; for Mamba conv1d, A_log or D; repeatable.",
        default=(), panel=SELECTION, metavar="KIND",
    )  # fmt: skip
    stacks: tuple[str, ...] = option(
        "Prune only this chain of blocks, such as encoder, decoder, vision or text; repeatable. "
        "The report has the others as --skip. Of a multimodal checkpoint, vision or audio is its "
        "tower, which is pruned on images or sounds.",
        default=(), panel=SELECTION, flag="--stack", metavar="NAME", recorded=False,
    )  # fmt: skip
    minutes: float | None = option(
        "Time for the whole run: effort and samples become smaller until they fit, and what is "
        "left is spent on distillation, which keeps every zero.",
        default=None, panel=ACCURACY, metavar="M", within=MINUTES, meaning=TIME_MEANING,
    )  # fmt: skip
    pack: Path | None = option(
        "Also write the model without its zeros to DIR, as apt-prune pack does.",
        default=None, panel=OUTPUT, metavar="DIR", recorded=False, effect=False,
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` if an option is out of range, or options contradict each other."""
        super().check()
        if self.norm_epochs and (self.stream or self.resume):
            message = "norm epochs need the whole model in memory, and this run streams it"
            hint = "leave them out, or train the norms afterwards with apt-prune recover"
            raise AptError(message, hint, ("norm_epochs", "stream"))
        if self.norm_epochs and self.minutes is not None:
            message = "minutes and norm epochs exclude each other: a run of a given time trains all"
            raise AptError(message, "leave out norm epochs", ("minutes", "norm_epochs"))
        if self.minutes is None:
            return
        conflicts = {"stream": self.stream, "resume": self.resume, "quantize": self.quantize}
        if others := [name for name, value in conflicts.items() if value]:
            hint = "prune without minutes, and train the result with apt-prune recover"
            if others == ["quantize"]:
                hint = QUANTISE_AFTER
            raise AptError(
                f"minutes and {others[0]} exclude each other: a training needs the whole model in "
                "memory, and changes integers",
                hint,
                ("minutes", others[0]),
            )
        check_trainable(self.compute, ("minutes", "compute"))
        if self.samples == 0:
            raise AptError(
                "a training needs text, and there are no samples",
                "use samples",
                ("minutes", "samples"),
            )
