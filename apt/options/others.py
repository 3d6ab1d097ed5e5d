"""The options of the commands that neither prune nor train."""

from pathlib import Path
from typing import Literal

from apt.errors import AptError
from apt.options.declaration import Options, option, options
from apt.options.shared import (
    MODEL,
    OUTPUT,
    RUNNING,
    SELECTION,
    TEXT,
    AdapterOptions,
    ComputeOptions,
    DtypeOptions,
    IntegerOptions,
    MachineName,
    PatternOptions,
    RemoteOptions,
    SampleOptions,
    ShardOptions,
    StreamOptions,
    TokenizerOptions,
    TowerOptions,
    UnitOptions,
    WritingOptions,
)

ANY_MODEL = "Directory, hub name, .gguf file or zoo:NAME."


@options
class ReapplyRun(AdapterOptions, RemoteOptions, WritingOptions, ShardOptions):
    """The options of ``apt-prune reapply``."""

    masks: Path = option(
        "A file of masks, written with --save-masks, or the directory of a pruned model.",
        positional=True, place=True,
    )  # fmt: skip
    model: str = option(
        "The model that was fine-tuned from the pruned one: a directory or hub name.",
        positional=True, place=True,
    )  # fmt: skip


@options
class PackRun(AdapterOptions, RemoteOptions, WritingOptions, IntegerOptions):
    """The options of ``apt-prune pack``."""

    model: str = option("A pruned model: a directory or hub name.", positional=True, place=True)
    format: Literal["apt", "compressed-tensors"] = option(
        "apt leaves the zeros out. compressed-tensors keeps them, as integers that vLLM and "
        "transformers open; it needs --quantize, or a model that was pruned with it.",
        default="apt", metavar="NAME",
    )  # fmt: skip


@options
class UnpackRun(WritingOptions):
    """The options of ``apt-prune unpack``."""

    model: str = option("A directory that apt-prune pack wrote.", positional=True, place=True)


@options
class ConvertRun(RemoteOptions, TokenizerOptions, DtypeOptions, WritingOptions):
    """The options of ``apt-prune convert``."""

    model: str = option(ANY_MODEL, positional=True, place=True)


@options
class ExportRun(AdapterOptions, RemoteOptions):
    """The options of ``apt-prune export``."""

    model: str = option(
        "A model, pruned or not: a directory, hub name or zoo:NAME.", positional=True, place=True
    )
    format: str | None = option(
        "Export format, listed by: apt-prune plugins. By default the one of the suffix of the "
        "output: gguf for .gguf.",
        default=None, panel=OUTPUT, metavar="NAME",
    )  # fmt: skip
    type: str | None = option(
        "Type of the weights; by default that of the checkpoint, of its integers, or of each "
        "tensor of the quantised file that the model was made from. "
        "gguf: f32, bf16, f16, q8_0, q6_K, q5_1, q5_K, q5_0, q4_1, q4_K, q4_0, iq4_nl, mxfp4, "
        "iq4_xs, q3_K or q2_K.",
        default=None, panel=OUTPUT, metavar="TYPE",
    )  # fmt: skip
    source: Path | None = option(
        "The file that the model was made from, for its metadata and tokenizer; by default the one "
        "that the report names, in the working directory or beside the model.",
        default=None, panel=MODEL, metavar="FILE", place=True,
    )  # fmt: skip
    output: Path = option("File to write.", panel=OUTPUT, short="-o")
    overwrite: bool = option(
        "Replace a file there.", default=False, panel=OUTPUT, saved=False, effect=False
    )


@options
class InspectRun(
    AdapterOptions,
    RemoteOptions,
    TowerOptions,
    PatternOptions,
    SampleOptions,
    StreamOptions,
    ComputeOptions,
):
    """The options of ``apt-prune inspect``."""

    samples: int = option(
        "Calibration samples of the planned run.", default=128, panel=TEXT, within="[1, ∞)"
    )
    model: str = option(ANY_MODEL, positional=True, place=True)
    on: MachineName | None = option(
        "Estimate the run for another device: h100, h200, a100, 4090 or mi300x.",
        default=None, panel=RUNNING, metavar="NAME",
    )  # fmt: skip


@options
class VerifyRun(AdapterOptions, RemoteOptions, TowerOptions, UnitOptions):
    """The options of ``apt-prune verify``."""

    directory: Path = option(
        "The model's directory, or a file that APT wrote, such as NAME.gguf.",
        positional=True, place=True,
    )  # fmt: skip
    at_least: bool = option(
        "With a pattern: accept more zeros than it asks for, as other tools leave them.",
        default=False, panel=SELECTION,
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` if options contradict each other; see `Options.check`."""
        super().check()
        if self.at_least and self.sparsity is None and self.pattern is None:
            raise AptError("at least needs a pattern", "add a sparsity or a pattern", ("at_least",))


@options
class CheckRun(Options):
    """The options of ``apt-prune check``."""

    adapter: str = option("Name of the adapter; listed by: apt-prune adapters.", positional=True)
    model: str | None = option(
        "Model to check it with; by default the adapter's example or embedded model.",
        default=None, positional=True,
    )  # fmt: skip
