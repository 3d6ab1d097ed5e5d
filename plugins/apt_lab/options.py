"""The options of the commands that measure and compare."""

import os
from pathlib import Path

from apt.errors import AptError
from apt.locations.paths import portable
from apt.options import (
    ANY_MODEL,
    OUTPUT,
    RUNNING,
    TEXT,
    AdapterOptions,
    CalibrationOptions,
    ComputeOptions,
    DeviceOptions,
    DtypeOptions,
    Options,
    RemoteOptions,
    SampleOptions,
    TokenizerOptions,
    TowerOptions,
    option,
    options,
)

SAMPLES = 400
"""Samples to measure a model on that does not read windows of text, by default."""

_GRID, _TASKS, _WORK = "Comparison", "Tasks", "Work"


def parts(text: str, name: str) -> list[str]:
    """The parts of the text of an option that is a list separated by commas."""
    words = [part.strip() for part in text.split(",")]
    if not all(words):
        raise AptError(
            f"{name} '{text}' has an empty part", "separate names by single commas", (name,)
        )
    return words


@options
class TaskOptions(Options):
    """Options for tasks."""

    tasks: tuple[str, ...] = option(
        "Tasks of lm-evaluation-harness, or their YAML files, separated by commas. local stands "
        "for six multiple-choice sets that need no network.",
        default=(), panel=_TASKS, metavar="LIST",
    )  # fmt: skip
    limit: int | None = option(
        "Questions of each task; by default all.",
        default=None, panel=_TASKS, metavar="N", within="[1, ∞)",
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` for a number of questions without tasks; see `Options.check`."""
        super().check()
        if self.limit is not None and not self.tasks:
            raise AptError(
                "the limit counts the questions of tasks, and there are none",
                "name tasks, or leave it out",
                ("limit", "tasks"),
            )

    def known_tasks(self, *, trust_remote_code: bool) -> list[str]:
        """The names of the tasks.

        Raises:
            AptError: a task is not known, what it needs is not installed, or it would run code.
        """
        if not self.tasks:
            return []
        from apt_lab.tasks.harness import check_tasks

        names = [name for text in self.tasks for name in parts(text, "tasks")]
        return check_tasks(names, trust_remote_code=trust_remote_code)


@options
class EvalRun(
    AdapterOptions,
    TokenizerOptions,
    RemoteOptions,
    TowerOptions,
    DeviceOptions,
    DtypeOptions,
    ComputeOptions,
    TaskOptions,
):
    """The options of ``apt-prune eval``."""

    model: str = option(ANY_MODEL, positional=True, place=True)
    data: str | None = option(
        "Text, builtin by default; the same values as --calibration of apt-prune prune.",
        default=None, panel=TEXT, metavar="SRC", place=True,
    )  # fmt: skip
    metrics: tuple[str, ...] = option(
        "perplexity (the default) or accuracy; with --dense also divergence or agreement; of "
        "models that read no windows of text pseudo-perplexity or spearman, and with --dense "
        "similarity, neighbours, predictions or token-changes; repeatable.",
        default=(), panel=TEXT, flag="--metric", metavar="NAME",
    )  # fmt: skip
    dense: str | None = option(
        "The dense model, to compare the metrics and the answers to --tasks with; the metrics "
        "that compare need it.",
        default=None, panel=TEXT, metavar="MODEL", place=True,
    )  # fmt: skip
    samples: int | None = option(
        "Number of windows; by default all.", default=None, panel=TEXT, within="[1, ∞)"
    )
    seqlen: int = option(
        "Tokens of a window; at most the model's positions.",
        default=2048, panel=TEXT, within="[2, ∞)",
    )  # fmt: skip
    bos: bool = option(
        "Do not begin windows with the token that the tokenizer adds.",
        default=True, panel=TEXT, flag="/--no-bos",
    )  # fmt: skip
    stream: bool = option(
        "Read block by block, with one block in memory at a time.", default=False, panel=RUNNING
    )

    def check(self) -> None:
        """Raise `AptError` if options contradict each other; see `Options.check`."""
        super().check()
        if not self.stream:
            return
        in_memory = {"tasks": self.tasks, "dtype": self.dtype != "auto", "dense": self.dense}
        for name in (name for name, given in in_memory.items() if given):
            raise AptError(f"{name} needs the whole model in memory", "do not stream", (name,))


@options
class CompareRun(
    CalibrationOptions, SampleOptions, RemoteOptions, DeviceOptions, ComputeOptions, TaskOptions
):
    """The options of ``apt-prune compare``."""

    model: str = option(
        "The dense model: a directory, hub name, .gguf or zoo:NAME.", positional=True, place=True
    )
    methods: str = option(
        "Methods, separated by commas; each NAME[:EFFORT][/ALLOCATION], for example admm:fast or "
        "wanda/owl. n:m patterns use no allocation.",
        default="magnitude,wanda,ss,admm", panel=_GRID, metavar="LIST",
    )  # fmt: skip
    patterns: str = option(
        "Patterns, separated by commas, for example 0.5,0.7,2:4.",
        default="0.5,2:4", panel=_GRID, metavar="LIST",
    )  # fmt: skip
    others: tuple[Path, ...] = option(
        "A directory that another tool pruned, measured in the same way; repeatable.",
        default=(), panel=_GRID, flag="--with", metavar="DIR",
    )  # fmt: skip
    data: tuple[str, ...] = option(
        "Text or other samples to measure on; repeatable.",
        default=("builtin",),
        panel=_GRID,
        metavar="SRC",
    )
    windows: int | None = option(
        "Windows of each text, by default all; or samples of each source, by default 400.",
        default=None, panel=_GRID, metavar="N", within="[1, ∞)",
    )  # fmt: skip
    metrics: tuple[str, ...] = option(
        "perplexity, accuracy, divergence or agreement; of models that read no windows of text "
        "similarity, neighbours, predictions, pseudo-perplexity, spearman or token-changes; "
        "repeatable.",
        default=("perplexity",), panel=_GRID, flag="--metric", metavar="NAME",
    )  # fmt: skip
    samples: int = option(
        "Calibration samples drawn from the text.", default=128, panel=TEXT, within="[1, ∞)"
    )
    output: Path = option(
        "Directory for the results. The same command continues an interrupted comparison; several "
        "processes with this command divide the rows.",
        panel=OUTPUT, short="-o",
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` for two texts of one file name, by which results name them."""
        super().check()
        names: dict[str, str] = {}
        for source in dict.fromkeys(self.data):
            if (other := names.setdefault(portable(source), source)) != source:
                raise AptError(
                    f"data {other} and {source} have the same name", "rename one", ("data",)
                )
        for directory in self.others:
            if not directory.is_dir():
                raise AptError(f"{directory} is not a directory", options=("others",))


@options
class BenchRun(AdapterOptions, RemoteOptions, DeviceOptions, DtypeOptions):
    """The options of ``apt-prune bench``."""

    models: tuple[str, ...] = option(
        "Directories, hub names, .gguf files or zoo:NAME.",
        positional=True,
        metavar="MODEL",
        place=True,
    )
    prompt: int = option(
        "Tokens of a prompt, or of a text of an encoder; they are random.",
        default=512,
        panel=_WORK,
        within="[1, ∞)",
    )
    generate: int = option(
        "Tokens to generate after a prompt; the first one belongs to the prefill.",
        default=64, panel=_WORK, within="[2, ∞)",
    )  # fmt: skip
    batch: tuple[int, ...] = option(
        "Number of sequences or samples that run together; repeatable.", default=(1, 8), panel=_WORK
    )
    rounds: int = option(
        "Number of rounds; each loads and measures every model.",
        default=5,
        panel=_WORK,
        within="[1, ∞)",
    )
    threads: int | None = option(
        "CPU threads; by default those of torch.", default=None, panel=RUNNING
    )

    def check(self) -> None:
        """Raise `AptError` if an option is out of range."""
        super().check()
        if min(self.batch) < 1:
            raise AptError("a batch must have at least 1 sequence", options=("batch",))
        most = os.cpu_count() or 1
        if self.threads is not None and not 1 <= self.threads <= most:
            raise AptError(
                f"{self.threads} threads are not between 1 and {most}, the processors of this "
                "machine",
                options=("threads",),
            )


@options
class ReportRun(Options):
    """The options of ``apt-prune report``."""

    directories: tuple[Path, ...] = option(
        "Models that prune, shrink or recover wrote, or comparisons that compare wrote.",
        positional=True, metavar="DIR", place=True,
    )  # fmt: skip
    output: Path = option("The HTML file to write.", default=Path("report.html"), short="-o")
    text: str | None = option(
        "Also compare with the dense model on this text: the losses of frequent and rare tokens, "
        "and the text that both models generate.",
        default=None, metavar="SRC",
    )  # fmt: skip
    prompts: int = option(
        "With --text, the number of paragraph beginnings that both models continue.",
        default=4, metavar="N", within="[0, ∞)",
    )  # fmt: skip
    dense: str | None = option(
        "The dense model for --text; by default the one that the report names.",
        default=None, metavar="MODEL",
    )  # fmt: skip
    png: Path | None = option(
        "Also draw errors and sparsities by block and kind as images in this directory.",
        default=None, metavar="DIR",
    )  # fmt: skip
    overwrite: bool = option("Replace an existing file.", default=False)

    def check(self) -> None:
        """Raise `AptError` if options contradict each other; see `Options.check`."""
        super().check()
        if self.output.suffix not in (".html", ".htm"):
            raise AptError(f"output {self.output} is not an .html file", options=("output",))
        if self.text is None and self.dense is not None:
            raise AptError(
                "the dense model is used with a text only", "name a text, such as builtin",
                ("dense", "text"),
            )  # fmt: skip


@options
class LawRun(Options):
    """The options of ``apt-prune law``."""

    directories: tuple[Path, ...] = option(
        "Recovered models, written by apt-prune recover.",
        positional=True,
        metavar="DIR",
        place=True,
    )
    tokens: float | None = option(
        "Also predict the loss after N training tokens.",
        default=None, metavar="N", within="(0, ∞)",
    )  # fmt: skip
    threshold: float = option(
        "Tokens are enough if twice as many lower the loss by less than this.",
        default=0.01, metavar="NATS", within="(0, ∞)",
    )  # fmt: skip
    resamples: int = option(
        "Bootstrap samples for the intervals; 0 for none.",
        default=200, metavar="N", within="[0, ∞)",
    )  # fmt: skip
    plot: Path | None = option(
        "Draw the curves into a .png, .svg or .pdf file (needs matplotlib).",
        default=None, metavar="FILE",
    )  # fmt: skip
