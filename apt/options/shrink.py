"""The options for the size of a smaller model, and for the parts that are removed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from apt.errors import AptError
from apt.locations.text_sources import labels, text_sources
from apt.options.declaration import Options, option, options
from apt.options.prune import ModelRun
from apt.options.shared import ACCURACY, MINUTES, SIZE, TIME_MEANING

Budget = Literal["parameters", "latency"]
Mode = Literal["width", "depth", "blocks-first", "search"]
_MODES = (
    ("--width-only", "width", "Remove channels, heads or states, and no block. The default for "
     "models of fewer than 8 blocks."),
    ("--blocks-first", "blocks-first", "Drop whole blocks, and remove as many channels or heads as "
     "then differ from --keep. The default for other models."),
    ("--depth-only", "depth", "Drop whole blocks, and nothing else: the number nearest to --keep."),
    ("--search", "search", "Search for the best numbers of blocks, heads and channels, and for the "
     "blocks."),
)  # fmt: skip

GENERATION = {"population": 12, "children": 12}
"""The sizes of a search that have no option, see `apt.shrinking.search.SearchOptions`."""
_SHARE = re.compile(r"0?\.\d*[1-9]\d*")


def read_sizes(texts: list[str]) -> dict[str, int | float]:
    """The numbers or shares of groups by kind, from texts such as ``channels=1024``.

    Raises:
        AptError: a text has another form.
    """
    sizes = dict[str, int | float]()
    for text in texts:
        kind, equals, number = text.partition("=")
        share = _SHARE.fullmatch(number) is not None
        if not equals or not kind or not (share or number.isdecimal()):
            hint = "write channels=1024, or a share such as experts=0.5"
            raise AptError(f"size {text} is not KIND=N", hint, ("sizes",))
        if kind in sizes:
            message = f"the number of {kind} is given twice: {sizes[kind]} and {number}"
            raise AptError(message, "leave one of them out", ("sizes",))
        sizes[kind] = float(number) if share else int(number)
    return sizes


def read_indices(texts: list[Any]) -> tuple[int, ...]:
    """The indices in texts such as ``20`` and ``20,21``.

    Raises:
        AptError: a text has another form.
    """
    parts = [part.strip() for text in texts for part in str(text).split(",")]
    if wrong := [part for part in parts if not part.isdecimal()]:
        hint = "write the numbers of blocks from 0 on, such as 20,21"
        raise AptError(f"drop {wrong[0] or ','} is no index of a block", hint, ("drop",))
    return tuple(map(int, parts))


@options
class ShrinkOptions(Options):
    """The options of a smaller model."""

    keep: float = option(
        "Share of the parameters of the blocks that is kept.",
        default=0.75, panel=SIZE, metavar="S", within="(0, 1)",
        meaning="it is a share of the blocks' parameters, such as 0.75",
    )  # fmt: skip
    budget: Budget = option(
        "--keep is a share of the parameters, or of the latency: the time of a "
        "forward through the blocks, measured on this machine.",
        default="parameters", panel=SIZE, metavar="WHAT",
    )  # fmt: skip
    mode: Mode | None = option("What is removed.", default=None, panel=SIZE, switches=_MODES)
    compensate: bool | None = option(
        "Solve the weights of the kept columns, and the last weights of the kept experts, exactly, "
        "or keep them as they are. The default depends on the method.",
        default=None, panel=ACCURACY, flag="--compensate/--no-compensate",
    )  # fmt: skip
    multiple_of: int | None = option(
        "The number of channels is a multiple of N. By default 64, or a smaller power of two "
        "where none comes within 0.5 % of --keep.",
        default=None, panel=SIZE, metavar="N", within="[1, ∞)",
    )  # fmt: skip
    sizes: Mapping[str, int | float] = option(
        "Keep N groups of a kind in every block, for example channels=1024, or a share of them, "
        "experts=0.5, in place of --keep; repeatable.",
        default_factory=dict, panel=SIZE, flag="--size", metavar="KIND=N", read=read_sizes,
        text=lambda sizes: [f"{kind}={number}" for kind, number in sizes.items()],
    )  # fmt: skip
    blocks: int | None = option(
        "Keep N blocks, in place of --keep.", default=None, panel=SIZE, metavar="N"
    )
    drop: tuple[int, ...] = option(
        "Drop the blocks with these indices, from 0, such as 20,21, in place of --keep; "
        "repeatable.",
        default=(), panel=SIZE, metavar="INDEX", read=read_indices,
        text=lambda indices: [str(index) for index in indices],
    )  # fmt: skip
    expert_tokens: int = option(
        "Judge each expert on at least N calibration tokens: more text is read, and an expert that "
        "still gets fewer is judged also on the tokens for which its router weight is largest.",
        default=0, panel=ACCURACY, metavar="N", within="[0, ∞)",
    )  # fmt: skip
    dense_scores: bool = option(
        "Score the experts of each block on its inputs in the dense model, and not in the smaller "
        "one. The scores then serve any number of experts, see --from.",
        default=False, panel=ACCURACY,
    )  # fmt: skip
    evaluations: int = option(
        "Candidates that --search evaluates at most.",
        default=120, panel=SIZE, metavar="N", within="[1, ∞)", needs="mode=search",
    )  # fmt: skip
    minutes: float | None = option(
        "Time for --search; by default no limit.",
        default=None, panel=SIZE, metavar="M", within=MINUTES, meaning=TIME_MEANING,
        needs="mode=search",
    )  # fmt: skip

    @property
    def explicit(self) -> bool:
        """True if the size is given in place of a share."""
        return bool(self.sizes) or self.blocks is not None or bool(self.drop)

    def check(self) -> None:
        """Raise `AptError` if an option is out of range, or options contradict each other."""
        super().check()
        for kind, number in self.sizes.items():
            if isinstance(number, float) and not 0 < number < 1:
                hint = "give a whole number, or a share between 0 and 1"
                raise AptError(f"size {kind}={number:g} is no share", hint, ("sizes",))
        if not self.explicit:
            return
        by_blocks = self.blocks is not None or bool(self.drop)
        fitting = {None: True, "width": not by_blocks, "depth": not self.sizes}
        if not fitting.get(self.mode, False):
            raise _unused(f"mode '{self.mode}'", "mode")
        if self.keep != ShrinkOptions.keep:
            raise _unused(f"a share of {self.keep:g}", "keep")
        if self.budget != "parameters":
            raise _unused(f"budget '{self.budget}'", "budget")
        if self.multiple_of is not None:
            raise _unused(f"a multiple of {self.multiple_of}", "multiple_of")

    def suffixes(self) -> list[str]:
        """The parts of the name of a directory that depend on the size."""
        sizes = [f"{number}-{kind}" for kind, number in self.sizes.items()]
        blocks = [f"{self.blocks}-blocks"] if self.blocks is not None else []
        blocks += [f"without-{'-'.join(map(str, sorted(self.drop)))}"] if self.drop else []
        parts = [*blocks, *sizes] if self.explicit else [f"keep-{self.keep:g}"]
        return parts + ([self.mode] if self.mode else [])

    def size_record(self) -> dict[str, Any]:
        """The options of the size alone, as values for JSON, for the report."""
        names = (
            "keep", "budget", "mode", "compensate", "multiple_of", "sizes", "blocks", "drop",
            "expert_tokens", "dense_scores",
        )  # fmt: skip
        search = {"evaluations": self.evaluations, "minutes": self.minutes, **GENERATION}
        record = {name: getattr(self, name) for name in names}
        return record | {
            "sizes": dict(self.sizes), "drop": list(self.drop), "search": search
        }  # fmt: skip


def _unused(what: str, option: str) -> AptError:
    reason = "in place of" if option == "keep" else "for a share to keep, and does not fit"
    message = f"{what} is {reason} the given blocks or groups"
    return AptError(message, "leave it out", (option,))


@options
class ShrinkRun(ModelRun, ShrinkOptions):
    """The options of ``apt-prune shrink``: a whole run from a model to a smaller one."""

    method: str | None = option(
        "Choice of groups or of blocks, listed by: apt-prune methods. By default the most "
        "accurate. It decides which of the two are removed.",
        default=None, panel=ACCURACY, metavar="NAME",
    )  # fmt: skip

    protect: tuple[str, ...] = option(
        "Keep the experts that this source of --calibration needs: in each block the fewest with "
        "half of the router weight of its tokens; repeatable.",
        default=(), panel=ACCURACY, metavar="SRC",
    )  # fmt: skip

    scores_from: Path | None = option(
        "Choose the experts by the scores of OUT, the output of a run with --dense-scores for the "
        "same model, without a calibration.",
        default=None, panel=SIZE, flag="--from", metavar="OUT", place=True,
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` if an option is out of range, or options contradict each other."""
        super().check()
        if self.scores_from is not None:
            self._check_from()
        names = [source.name for source in text_sources(self.calibration)]
        if unknown := [name for name in self.protect if name not in names]:
            raise AptError(
                f"{unknown[0]} is not a source of the calibration {self.calibration}",
                f"protect one of {', '.join(names)}, or add it to the calibration",
                ("protect", "calibration"),
            )

    def _check_from(self) -> None:
        """Raise if a run without a calibration would need one."""
        problems = {
            "compensate": "exact weights need a calibration" if self.compensate else "",
            "expert_tokens": "tokens need a calibration" if self.expert_tokens else "",
            "sizes": "only a number of experts can be chosen" if not self.sizes else "",
            "blocks": "only experts are removed" if self.blocks is not None else "",
            "drop": "only experts are removed" if self.drop else "",
        }
        for name, problem in problems.items():
            if problem:
                hint = "run the whole command with a calibration instead"
                raise AptError(f"with scores from {self.scores_from}, {problem}", hint, (name,))

    def record(self) -> dict[str, Any]:
        """See `Options.record`; the options of the size are one entry."""
        size = {declared.name for declared in ShrinkOptions.OPTIONS}
        record = {name: value for name, value in super().record().items() if name not in size}
        names = labels([source.name for source in text_sources(self.calibration)])
        protect = [names.get(name, name) for name in self.protect]
        return record | {"protect": protect, "shrink": self.size_record()}
