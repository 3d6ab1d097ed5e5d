"""One HTML page about one or several reports. It needs no network."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from apt import Report
from apt.errors import AptError
from apt.events import SitePruned
from apt.output.report import by_kind, levels_by_kind, versions
from apt_lab.reporting.beside import Beside
from apt_lab.reporting.charts import Bar, Line, bar_chart, line_chart
from apt_lab.reporting.comparisons import ComparisonSection
from apt_lab.reporting.heat import Heat, expert_of, heat, source_heat

_MIB = 2**20
_RECOVERY = " (recovery)"


@dataclass(frozen=True)
class Subject:
    """A model of a page.

    Attributes:
        name: its name on the page.
        anchor: the identifier of its section.
        report: its report.
        command: the command that reproduces the run; empty if it is unknown.
        beside: the comparison with the dense model; None if it was not measured.
    """

    name: str
    anchor: str
    report: Report
    command: str = ""
    beside: Beside | None = None

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The facts of the summary, each with its name."""
        report, options = self.report, self.report.options
        kept, error = report.structure.get("share"), f"{report.relative_layer_error:.4f}"
        pruned = report.sites and not report.fit  # else zeros are those of a rounding
        entries = [
            ("original", report.model.get("reference")),
            ("pattern", options.get("pattern")),
            *_sizes(report.fit),
            ("zeros in the pruned sites", f"{report.sparsity:.2%}" if pruned else None),
            ("parameters of the blocks kept", f"{kept:.2%}" if kept else None),
            ("method", options.get("method")),
            ("allocation", options.get("allocation")),
            ("calibration", _text(report.calibration)),
            ("mean relative layer error", error if report.sites else None),
            ("time", _duration(report.seconds)),
            ("peak memory", _bytes(sum(report.peak_memory_bytes.values()))),
            ("created", report.created),
        ]
        return [(name, str(value)) for name, value in entries if value not in (None, "")]

    @property
    def scores(self) -> list[tuple[str, str, str]]:
        """Each metric with its values before and after the run.

        The metrics of a recovery have separate lines.
        """
        lines = []
        for name, before, after in _scores(self.report):
            lines.append((name, f"{before:.4g}", f"{after:.4g}"))
        return lines

    @property
    def heats(self) -> list[Heat]:
        """The tables of errors and of sparsities, and of what each source's tokens use."""
        by_source = source_heat(self.report.routing)
        return [*self._site_heats(), *([by_source] if by_source else [])]

    def _site_heats(self) -> list[Heat]:
        sites = self.report.sites
        if not sites:
            return []
        heats = [heat("Relative layer error by block and kind", sites, _error, "{:.3f}".format)]
        if not self.report.fit:
            heats += [heat("Sparsity by block and kind", sites, _sparsity, "{:.1%}".format)]
        if experts := [site for site in sites if expert_of(site)]:
            heats += [
                heat("Tokens of each expert", experts, _tokens, "{:,.0f}".format, expert_of),
                heat("Relative layer error by expert", experts, _error, "{:.3f}".format, expert_of),
            ]
        return heats

    @property
    def levels(self) -> list[tuple[str, str]]:
        """The levels of each kind of tensor, of a run that fits a model into a budget."""
        return list(levels_by_kind(self.report.fit.get("levels", {})).items())

    @property
    def frontier(self) -> str:
        """A chart of the predicted loss of the best files of ten sizes or speeds."""
        fit = self.report.fit
        kind, unit, per = ("speed", "tokens/s", 1) if "speed" in fit else ("size", "MiB", _MIB)
        points = [(cost / per, float(loss)) for cost, loss in fit.get("frontier", [])]
        line = Line("best files", points)
        return line_chart(f"Predicted loss by {kind}", [line], unit, "nats per token")

    @property
    def experts(self) -> list[tuple[str, str, str]]:
        """The removed experts of each block, and the experts that were merged into others."""
        return [
            (
                block,
                ", ".join(map(str, entry["removed"])),
                ", ".join(f"{expert} into {other}" for expert, other in entry["merged"]),
            )
            for block, entry in self.report.structure.get("experts", {}).items()
        ]

    @property
    def kinds(self) -> list[Any]:
        """The summary of each kind of site."""
        return by_kind(self.report.sites)

    @property
    def damped(self) -> list[SitePruned]:
        """The sites with another damping than the most frequent one."""
        values = Counter(site.damping for site in self.report.sites)
        most_frequent = values.most_common(1)[0][0] if values else None
        return [site for site in self.report.sites if site.damping != most_frequent]

    @property
    def phases(self) -> str:
        """A chart of the time of each phase."""
        starts = self.report.timeline.get("phases", [])
        ends = [start for _, start in starts[1:]] + [self.report.timeline.get("end", 0)]
        times: dict[str, float] = {}
        for (name, start), end in zip(starts, ends, strict=True):
            times[name] = times.get(name, 0) + end - start
        return bar_chart("Time by phase", [Bar(*item) for item in times.items()], "s")

    @property
    def memory(self) -> str:
        """A chart of the resident memory."""
        samples = [(s, value / _MIB) for s, value in self.report.timeline.get("memory", [])]
        line = Line("resident memory", samples)
        return line_chart("Memory over time", [line], "seconds", "MiB")

    @property
    def training(self) -> str:
        """A chart of the losses of a recovery."""
        training = self.report.recovery.get("training")
        if not training:
            return ""
        losses = [(float(n), float(loss)) for n, loss in enumerate(training["losses"], 1)]
        held_back = [(float(step), float(loss)) for step, loss in training["held_back"]]
        lines = [Line("samples held back", held_back)]
        if self.report.recovery["options"]["kind"] != "distill":  # its loss has another unit
            lines.append(Line("training", losses))
        return line_chart("Loss of the recovery", lines, "step", "loss")

    @property
    def options(self) -> list[tuple[str, str]]:
        """All options."""
        return [(name, str(value)) for name, value in self.report.options.items()]


def _error(site: SitePruned) -> float:
    return site.relative_error


def _tokens(site: SitePruned) -> float:
    return site.tokens


def _sparsity(site: SitePruned) -> float:
    return site.sparsity


def _sizes(fit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The budget or the speed of an output, its size and its loss; empty for other runs."""
    if not fit:
        return []
    speed = fit.get("speed")
    return [
        ("budget", f"{fit['budget']:,} bytes")
        if speed is None
        else (
            "speed",
            f"{speed['measured']:.1f} tokens/s on {speed['threads']} threads, for a goal of "
            f"{speed['goal']:g}; {speed['dense']:.1f} with dense weights",
        ),
        ("size", f"{fit['size']:,} bytes"),
        ("predicted rise of the loss", f"{float(fit['loss']):.4f} nats per token"),
    ]


def _scores(report: Report) -> list[tuple[str, float, float]]:
    """Each metric with its text, and its values before and after."""
    lines = []
    for suffix, scores in (("", report.scores), (_RECOVERY, report.recovery.get("scores", {}))):
        before, after = scores.get("before", {}), scores.get("after", {})
        lines += [
            (f"{name} on {scores.get('source')}{suffix}", float(before[name]), float(after[name]))
            for name in before
            if name in after
        ]
    return lines


def _text(calibration: dict[str, Any]) -> str:
    shape = " × ".join(map(str, calibration.get("shape", ())))
    return f"{calibration.get('source', '')}, {shape} tokens" if shape else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count else ""


def render(subjects: Sequence[Subject], comparisons: Sequence[ComparisonSection] = ()) -> str:
    """The page about at least one model or comparison.

    Args:
        subjects: the models.
        comparisons: the comparisons.
    """
    environment = Environment(
        loader=PackageLoader("apt_lab.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        sections=[*comparisons, *subjects],
        comparisons=comparisons,
        subjects=subjects,
        models=_side_by_side(subjects) if len(subjects) > 1 else [],
        version=versions().get("apt-prune", ""),
    )


def _side_by_side(subjects: Sequence[Subject]) -> list[tuple[str, str]]:
    """A chart of each metric with all models, and with the model before each run.

    Models that were pruned from the same dense model share its bar.
    """
    bars: dict[str, list[Bar]] = {}
    seen: set[tuple[str, float]] = set()
    for subject in subjects:
        for name, before, after in _scores(subject.report):
            metric_bars = bars.setdefault(name, [])
            if (name, before) not in seen:
                dense = f"dense, for {subject.name}" if metric_bars else "dense"
                label = f"{subject.name}, before" if name.endswith(_RECOVERY) else dense
                metric_bars.append(Bar(label, before))
                seen.add((name, before))
            metric_bars.append(Bar(subject.name, after))
    return [(name, bar_chart(name, values, "")) for name, values in bars.items()]


def read_subjects(
    directories: Sequence[Path], command_of: Callable[[dict[str, Any]], str]
) -> list[Subject]:
    """The models in directories with a report.

    Args:
        directories: the directories.
        command_of: the command that reproduces the run of a report.

    Raises:
        AptError: a directory has no report, or the report is damaged.
    """
    names = [directory.resolve().name for directory in directories]
    subjects = []
    for number, directory in enumerate(directories):
        name = names[number] if names.count(names[number]) == 1 else str(directory)
        report = Report.read(directory)
        try:
            command = command_of(report.to_dict())
            subject = Subject(name, f"model-{number}", report, command)
            render([subject])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AptError(
                f"the report in {directory} is damaged: {error}", "prune the model again"
            ) from error
        subjects.append(subject)
    return subjects
