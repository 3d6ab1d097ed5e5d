"""Options that several commands have in common."""

from pathlib import Path
from typing import Any, Literal

from apt.errors import AptError
from apt.locations.text_sources import portable_sources, text_sources
from apt.options.declaration import Options, option, options

MODEL, SELECTION, TEXT, ACCURACY, RUNNING, OUTPUT = (
    "Model", "Pattern and selection", "Calibration and measuring", "Accuracy", "Running", "Output",
)  # fmt: skip
SIZE, TRAINING = "Size", "Training"
PANELS = ("", MODEL, SIZE, TRAINING, SELECTION, TEXT, ACCURACY, RUNNING, OUTPUT)
"""The headings in the help of a command, in order; other headings come after ``TEXT``."""

Activations = Literal["memory", "cpu", "disk"]
Compute = Literal["auto", "float32", "bfloat16", "float16"]
MachineName = Literal["h100", "h200", "a100", "4090", "mi300x"]
MINUTES, TIME_MEANING = "(0, 1e6]", "it is a time in minutes, such as 30"  # two years at most
_SEEDS = (-(2**63), 2**64 - 1)  # the range of torch's generators


@options
class RemoteOptions(Options):
    """Options for reading a model of the hub."""

    trust_remote_code: bool = option(
        "Run code from the checkpoint, or code that task files name.", default=False, panel=MODEL
    )
    revision: str | None = option(
        "Branch, tag or commit of a model on the hub.", default=None, panel=MODEL, metavar="REV"
    )


@options
class AdapterOptions(Options):
    """Options for opening a model."""

    adapter: str | None = option(
        "Adapter; by default the one for the model type.", default=None, panel=MODEL, metavar="NAME"
    )


@options
class TowerOptions(Options):
    """Options for a part of a multimodal checkpoint."""

    stack: str | None = option(
        "A tower of a multimodal checkpoint in place of its language model: vision or audio.",
        default=None, panel=MODEL, metavar="NAME",
    )  # fmt: skip


@options
class TokenizerOptions(Options):
    """Options for the tokenizer."""

    tokenizer: str | None = option(
        "Directory or hub name; by default the model's own.",
        default=None, panel=MODEL, metavar="NAME", place=True,
    )  # fmt: skip


@options
class ModelOptions(AdapterOptions, TokenizerOptions, RemoteOptions):
    """Options for opening a model with its tokenizer."""


DEFAULT_PATTERN = "2:4"


@options
class PatternOptions(Options):
    """Options for the pattern of the sites."""

    sparsity: float | str | None = option(
        "Share of weights to prune, for example 0.5. 0 removes none, for --quantize alone.",
        default=None, panel=SELECTION, metavar="S", recorded=False,
    )  # fmt: skip
    pattern: str | None = option(
        "Keep N of every M inputs, for example 2:4. auto:M with --sparsity chooses an N for "
        "each site.",
        default=None, panel=SELECTION, metavar="N:M",
    )  # fmt: skip
    only: tuple[str, ...] = option(
        "Prune only matching sites; repeatable.", default=(), panel=SELECTION, metavar="GLOB"
    )
    skip: tuple[str, ...] = option(
        "Leave matching sites dense; repeatable.", default=(), panel=SELECTION, metavar="GLOB"
    )
    overrides: tuple[str, ...] = option(
        "Another pattern for sites that match GLOB; repeatable.",
        default=(), panel=SELECTION, flag="--override", metavar="GLOB=S|N:M",
    )  # fmt: skip

    @property
    def shared(self) -> bool:
        """True if the pattern is NAME:SIZES, which needs a sparsity too, such as auto:8."""
        return self.pattern is not None and self.pattern[:1].isalpha() and ":" in self.pattern

    def check(self) -> None:
        """Raise `AptError` if options contradict each other; see `Options.check`."""
        super().check()
        if self.sparsity is not None and self.pattern is not None and not self.shared:
            raise AptError(
                "sparsity and pattern are both given", "choose one", ("sparsity", "pattern")
            )
        auto = str(self.pattern).startswith("auto:")
        if auto and self.sparsity is None and "@" not in str(self.pattern):
            raise AptError(
                f"pattern {self.pattern} needs a sparsity", "add one, such as 0.5", ("sparsity",)
            )
        for text in self.overrides:
            glob, equals, _ = text.rpartition("=")
            if not equals or not glob:
                raise AptError(
                    f"override {text} has no GLOB=PATTERN", "write '*.q_proj=0.4'", ("overrides",)
                )


@options
class UnitOptions(PatternOptions):
    """Options for a pattern with the unit in which its sparsity is counted."""

    per: Literal["row", "layer", "block", "model"] | None = option(
        "Unit in which --sparsity is counted: row, layer, block or model. The last two "
        "choose a sparsity for each site, as the allocations auto-block and auto do.",
        default=None, panel=SELECTION, metavar="UNIT",
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` if options contradict each other; see `Options.check`."""
        super().check()
        if self.per is not None and (self.sparsity is None or self.shared):
            raise AptError(
                f"per {self.per} needs a sparsity",
                "an n:m pattern is the same in every row: leave out the unit",
                ("per", "sparsity"),
            )


@options
class CalibrationOptions(Options):
    """Options for the text of a run."""

    calibration: str = option(
        "builtin, chat, code, math, wiki, wikitext2, ptb, c4, a hub data set, or a .txt, .jsonl or "
        ".parquet file; or a mix of them with shares: builtin:chat=0.5,builtin:code=0.3,my.jsonl. "
        "For models of images or sounds, a folder of them.",
        default="builtin", panel=TEXT, metavar="SRC", place=True,
    )  # fmt: skip
    bos: bool = option(
        "Do not begin samples and windows with the token that the tokenizer adds.",
        default=True, panel=TEXT, flag="/--no-bos",
    )  # fmt: skip
    seed: int = option(
        "Seed for the choice of samples and for the text that the model generates.",
        default=0, panel=TEXT,
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` if an option is out of range."""
        super().check()
        check_seed(self.seed)
        text_sources(self.calibration)

    def record(self) -> dict[str, Any]:
        """See `Options.record`; local files of a mix appear with their last names."""
        return super().record() | {"calibration": portable_sources(self.calibration)}


@options
class SampleOptions(Options):
    """Options for the number of calibration samples."""

    samples: int = option(
        "Calibration samples drawn from the text.", default=128, panel=TEXT, within="[0, ∞)"
    )
    seqlen: int = option(
        "Tokens of a sample; at most the model's positions.",
        default=2048, panel=TEXT, within="[2, ∞)",
    )  # fmt: skip


@options
class MeasuringOptions(CalibrationOptions):
    """Options for the text of a run, and for what is measured before and after."""

    evaluation: str | None = option(
        "Measure the model on this text before and after.",
        default=None, panel=TEXT, flag="--eval", metavar="SRC", place=True,
    )  # fmt: skip
    metrics: tuple[str, ...] = option(
        "perplexity or accuracy; with apt-prune eval --dense also divergence or "
        "agreement; repeatable.",
        default=("perplexity",), panel=TEXT, flag="--metric", metavar="NAME", needs="evaluation",
    )  # fmt: skip


@options
class MethodOptions(Options):
    """Options for the method."""

    method: str | None = option(
        "Pruning method, listed by: apt-prune methods. By default the most accurate.",
        default=None, panel=ACCURACY, metavar="NAME",
    )  # fmt: skip


@options
class DeviceOptions(Options):
    """Options for the device."""

    device: str = option(
        "cpu, cuda, …; auto uses a GPU if there is one.", default="auto", panel=RUNNING
    )


@options
class DtypeOptions(Options):
    """Options for the dtype of the weights."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Dtype of the weights as they are read and written: float32, bfloat16 or float16; auto "
        "keeps the checkpoint's.",
        default="auto", panel=RUNNING, metavar="DTYPE",
    )  # fmt: skip


@options
class ComputeOptions(Options):
    """Options for the dtype that a model computes in."""

    compute: Compute = option(
        "Dtype that the model computes in: float32, bfloat16 or float16. auto takes that of the "
        "weights, or float32 where this machine multiplies it more slowly. float32 also turns off "
        "the products in bfloat16 of trainings and error-aware runs on float32 weights.",
        default="auto", panel=RUNNING, metavar="DTYPE",
    )  # fmt: skip


@options
class StreamOptions(DeviceOptions):
    """Options for a run that may read and write block by block."""

    stream: bool = option(
        "Read and write block by block, with one block in memory at a time.",
        default=False, panel=RUNNING, effect=False,
    )  # fmt: skip
    activations: Activations = option(
        "Place of the calibration activations: memory (with the model), cpu (beside a "
        "GPU), or disk (with --stream).",
        default="memory", panel=RUNNING, metavar="WHERE", effect=False,
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` if options contradict each other; see `Options.check`."""
        super().check()
        if self.activations == "disk" and not self.stream and not getattr(self, "resume", False):
            raise AptError(
                "activations are kept on disk by streamed runs only",
                "stream the run as well",
                ("activations", "stream"),
            )


@options
class WritingOptions(Options):
    """Options for a directory that must be named."""

    output: Path = option("Directory to write.", panel=OUTPUT, short="-o")
    overwrite: bool = option(
        "Replace the output of an earlier run.",
        default=False, panel=OUTPUT, saved=False, effect=False,
    )  # fmt: skip


@options
class ShardOptions(Options):
    """Options for the files of weights."""

    max_shard_size: str | None = option(
        "Largest file of weights, for example 5GB; by default as in the checkpoint.",
        default=None, panel=OUTPUT, metavar="SIZE",
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` if the size of a file has no number or no unit."""
        super().check()
        if self.max_shard_size is None:
            return
        number, unit = self.max_shard_size.strip()[:-2].strip(), self.max_shard_size.strip()[-2:]
        if (
            not number.isdecimal()
            or not int(number)
            or unit.upper() not in ("KB", "MB", "GB", "TB")
        ):
            raise AptError(
                f"{self.max_shard_size!r} is not a file size",
                "write 5GB or 500MB",
                ("max_shard_size",),
            )


@options
class OutputOptions(ShardOptions):
    """Options for the output of a run."""

    output: Path | None = option(
        "Directory to write; or NAME.gguf, to write the model as this file alone, with its report "
        "NAME.apt_report.json.",
        default=None, panel=OUTPUT, short="-o",
    )  # fmt: skip
    export: Path | None = option(
        "Also write the model to FILE in the format of other software, as apt-prune export does: "
        "NAME.gguf for llama.cpp.",
        default=None, panel=OUTPUT, metavar="FILE", recorded=False, effect=False,
    )  # fmt: skip
    export_type: str | None = option(
        "Type of the weights of that file, as apt-prune export --type has it.",
        default=None, panel=OUTPUT, metavar="TYPE",
    )  # fmt: skip
    overwrite: bool = option(
        "Replace the output of an earlier run.",
        default=False, panel=OUTPUT, saved=False, effect=False,
    )  # fmt: skip

    @property
    def directory(self) -> Path:
        """The directory to write, once it is chosen."""
        assert self.output is not None
        return self.output

    @property
    def exports_alone(self) -> bool:
        """True if the output is the exported file alone, without a directory."""
        return self.export is not None and self.export == self.output


@options
class MaskOptions(Options):
    """Options for masks."""

    save_masks: bool = option(
        "Write the masks beside the model, one bit for each weight, for apt-prune reapply.",
        default=False, panel=OUTPUT,
    )  # fmt: skip


@options
class ConfigOptions(Options):
    """Options for reading and writing a file of options."""

    config: Path | None = option(
        'Take options from a TOML file with lines such as pattern = "2:4". Options on the '
        "command line take precedence.",
        default=None, panel=RUNNING, metavar="FILE", saved=False,
    )  # fmt: skip
    save_config: Path | None = option(
        "Write the options of this command to a TOML file for --config.",
        default=None, panel=RUNNING, metavar="FILE", saved=False,
    )  # fmt: skip


@options
class DryRunOptions(Options):
    """Options for a dry run."""

    dry_run: bool = option(
        "Show the plan and write nothing.", default=False, panel=RUNNING, saved=False
    )


@options
class PrintingOptions(Options):
    """Options for what a command prints."""

    as_json: bool = option(
        "Print one JSON object, and progress and errors as lines of JSON on standard error.",
        default=False, panel=OUTPUT, flag="--json", saved=False,
    )  # fmt: skip


def plot_option(drawn: str) -> Any:
    """The option for a plot of ``drawn``."""
    return option(
        f"Draw {drawn} into a .png, .svg or .pdf file (needs matplotlib).",
        default=None, panel=OUTPUT, metavar="FILE", saved=False,
    )  # fmt: skip


def read_columns(text: str) -> Any:
    """The value of an option for the columns that share a scale: a number, or ``row``.

    Raises:
        AptError: it is neither.
    """
    if text == "row":
        return text
    if not text.removeprefix("-").isdecimal():
        raise AptError(
            f"scale group '{text}' is neither a number nor row", options=("scale_group",)
        )
    return int(text)


@options
class IntegerOptions(Options):
    """Options for rounding weights to integers."""

    quantize: Literal["int8", "int4"] | None = option(
        "Round the kept weights to the nearest int8 or int4.",
        default=None, panel=ACCURACY, metavar="KIND",
    )  # fmt: skip
    scale_group: int | Literal["row"] = option(
        "Columns that share a scale with --quantize, or row for one scale a row.",
        default=128, panel=ACCURACY, metavar="N|row", read=read_columns, formerly="group",
        needs="quantize",
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` for a scale group that no runtime supports; see `Options.check`."""
        super().check()
        check_scale_group(self.scale_group)


def check_scale_group(group: int | Literal["row"]) -> None:
    """Raise `AptError` for a scale group that no runtime supports."""
    if group != "row" and (group < 32 or group % 32):
        raise AptError(
            f"scale group {group} is not a multiple of 32",
            "write for example 128, or row",
            ("scale_group",),
        )


def check_seed(seed: int) -> None:
    """Raise `AptError` if a seed is out of the range of torch's generators."""
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        hint = "give a whole number from -2**63 to 2**64 - 1"
        raise AptError(f"seed {seed} is out of range", hint, ("seed",))


def check_windows(count: int | None, seqlen: int) -> None:
    """Raise `AptError` if windows of text cannot have these sizes.

    Args:
        count: the number of windows; None for all.
        seqlen: the tokens of a window.
    """
    if (count is not None and count < 1) or seqlen < 2:
        message = "samples must be at least 1 and seqlen at least 2"
        raise AptError(message, options=("samples", "seqlen"))
