"""The report: the record of a run, stored beside the pruned model."""

import json
import platform
import re
import resource
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from apt.arguments import checked
from apt.checkpoints.copies import REPORT
from apt.devices import accelerator, peak_allocated
from apt.distributed.ranks import Work
from apt.errors import AptError, describe, shortened
from apt.events import SitePruned
from apt.files.hashes import file_hashes, sha256
from apt.files.writing import write_file
from apt.locations.paths import portable, user_error
from apt.output.json_values import json_value
from apt.output.schema import first_problem

_PACKAGES = ("apt-prune", "torch", "transformers", "safetensors", "tokenizers", "datasets")


_RESTORE = "restore it, or delete it to go on without a report"

SCHEMA = 1
"""The version of the report. It rises if an entry is renamed or removed or changes its meaning."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Report:
    """The record of a run. Its attributes are the entries of ``apt_report.json``.

    Attributes:
        options: the options of the run, with defaults filled in.
        model: ``reference``, ``type``, ``adapter``, the ``sha256`` of the weights, their ``dtype``,
            the dtype that the model computed in, ``compute``, and that of its products,
            ``products``, which is another one if an error-aware run multiplied fp32 in bf16.
        calibration: ``source``, ``own_samples``, ``bos``, and ``shape`` and ``sha256`` of the
            calibration tokens. Samples with random tokens are not included in these two. Of a mix
            also ``sources``, each with ``name``, ``share``, ``samples`` and ``chat``, which is true
            if its text is conversations.
        sites: the record of each pruned site.
        skipped: the names of the sites that were left dense, on request or by an allocation.
        export: of a run whose output is an exported file alone, the ``type`` of most weights, the
            number of ``tensors``, the ``size`` in bytes, the ``zeros`` in the matrices of the
            blocks before the export, and those that are ``kept`` in the file; else empty.
        recovery: the record of a training after the pruning; empty if there was none.
        norms: of a run that trained norms and biases at the end, the number of ``vectors``, the
            ``divergence`` from the dense model before and after, in nats for each token of samples
            that were not trained, and ``kept``, which is false if it did not fall; the ``shape``
            of the windows of text, and how many of them were ``others`` than the samples; else
            empty.
        reapplied: the masks that were applied to a fine-tuned model, and the number of weights
            that they removed; empty if there were none.
        fit: of a run that fits a model into a budget, the ``budget`` in bytes, the ``size`` of the
            file, the ``levels`` of its tensors, the predicted rise of the ``loss`` in nats for each
            token, the bytes and losses of ten best files (``frontier``), and the ``table`` of
            losses; with a ``speed`` and speeds in place of bytes for a speed; else empty.
        structure: the kept and removed parts of a smaller model; empty for a sparse one.
        routing: the routing of the experts of each block, by the source of the calibration text:
            ``tokens``, the numbers of tokens, and ``weights``, the sums of the router's weights,
            with a number for each expert of the dense model; empty without experts.
        timeline: the phases of the run (`apt.events.Phase`) with their first second, ``phases``,
            the resident memory in bytes over the seconds, ``memory``, and the last second, ``end``.
            For a resumed run, the timeline begins with the resumption.
        earlier: the report of the run that wrote the given model; empty if there is none.
        seconds: the time of the whole run.
        scores: the text, and each metric before and after pruning; empty if nothing was measured.
        ranks: the work of each process.
        problems: failures after the pruning: metrics that could not be measured, and a training
            that had no time or did not lower the loss.
        peak_memory_bytes: the peak memory of the process, ``cpu``, and of a GPU by its kind.
        files: the SHA-256 of each file of the output, by relative path, without the report.
        created: the time at which the run began, in UTC (ISO 8601).
        versions: the versions of Python, the platform and the packages that can change a result.
        schema: the version of the format of this record.
    """

    options: dict[str, Any]
    model: dict[str, Any]
    calibration: dict[str, Any]
    sites: list[SitePruned] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    structure: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    norms: dict[str, Any] = field(default_factory=dict)
    reapplied: dict[str, Any] = field(default_factory=dict)
    timeline: dict[str, Any] = field(default_factory=dict)
    earlier: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    scores: dict[str, Any] = field(default_factory=dict)
    ranks: list[Work] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=_now)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    schema: int = SCHEMA

    @property
    def sparsity(self) -> float:
        """The share of zeros over all pruned sites; 0 without such sites."""
        weights = sum(site.size for site in self.sites)
        return sum(site.zeros for site in self.sites) / weights if weights else 0.0

    @property
    def relative_layer_error(self) -> float:
        """The mean relative layer error of the pruned sites; 0 without such sites."""
        return fmean(site.relative_error for site in self.sites) if self.sites else 0.0

    @property
    def orders(self) -> dict[str, tuple[int, ...]]:
        """The orders of the sites whose inputs have changed places, see `SitePruned`."""
        return {site.name: site.order for site in self.sites if site.order is not None}

    def with_zeros(self, zeros: Mapping[str, int]) -> "Report":
        """The report with numbers of zeros by site, as counted on disk."""
        sites = [replace(site, zeros=zeros.get(site.name, site.zeros)) for site in self.sites]
        return replace(self, sites=sites)

    def timed(self, seconds: float) -> "Report":
        """The report at the end of a run, with its time and the peak memory."""
        return replace(self, seconds=round(seconds, 3), peak_memory_bytes=peak_memory())

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON. A number that is not finite is a string, ``"Infinity"``."""
        record = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        record |= {
            "sparsity": self.sparsity,
            "relative_layer_error": self.relative_layer_error,
            "ranks": [asdict(work) for work in self.ranks],
            "sites": [{**asdict(site), "sparsity": site.sparsity} for site in self.sites],
        }
        values: dict[str, Any] = json_value(record)
        return {name: values[name] for name in _ENTRY_ORDER}

    @classmethod
    @checked
    def from_dict(cls, record: dict[str, Any], name: str = "the report") -> "Report":
        """The report from a record of `to_dict`.

        Args:
            record: the record.
            name: the name of the report in messages.

        Raises:
            AptError: the record has another schema, or is damaged.
        """
        _check(record, name)
        try:
            record = {name: {} for name in _LATER_ENTRIES} | record
            values = {entry.name: record[entry.name] for entry in fields(cls)}
            values["files"] = listed_files(record)
            values["ranks"] = [Work(**work) for work in values["ranks"]]
            values["sites"] = [read_site(site) for site in values["sites"]]
            values["scores"] = {
                name: _with_numbers(part) for name, part in values["scores"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AptError(f"{name} is damaged: {describe(error)}", _RESTORE) from error
        return cls(**values)

    @classmethod
    @checked
    def read(cls, directory: Path | str) -> "Report":
        """The report in ``directory``, or beside the file of a model.

        Raises:
            AptError: there is no report, or it cannot be read.
        """
        record = read_report(Path(directory))
        if record is None:
            raise AptError(f"{directory} has no {REPORT}", "a run of APT writes it")
        return cls.from_dict(record, f"the report in {directory}")

    def write(self, directory: Path, changed: Collection[str] | None = None) -> "Report":
        """Write the report into ``directory``, with the hashes of its files.

        Args:
            directory: the directory.
            changed: the files that have changed since `files` was made; None to hash all files.
        """
        if changed is None:
            files = file_hashes(directory, [REPORT])
        else:
            files = self.files | {name: sha256(directory / name) for name in changed}
        written = replace(self, files=files)
        _write(written.to_dict(), directory)
        return written


def carry_report(source: Path, target: Path, reference: str) -> None:
    """Write the report of a directory beside a copy of its model in another format.

    The report lists the files of the copy, so that a later run may replace them. If the directory
    has no readable report, the new report has no other entries.

    Args:
        reference: the user's name for the model, for a new report.
    """
    try:
        record = read_report(source)
    except AptError:
        record = None
    record = record or Report({}, {"reference": portable(reference)}, {}).to_dict()
    _write({**record, "files": file_hashes(target, [REPORT])}, target)


_NUMBERS = re.compile(r"\[\n[-+.,\deE\s]+\]")  # a list of numbers gets one line


def _write(record: dict[str, Any], directory: Path) -> None:
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda match: "".join(match[0].split()).replace(",", ", "), text)
    write_file(directory / REPORT, text, overwrite=True)


_ENTRY_ORDER = (
    "schema", "created", "versions", "options", "model", "calibration", "sparsity",
    "relative_layer_error", "scores", "seconds", "peak_memory_bytes", "ranks", "sites", "skipped",
    "structure", "routing", "fit", "export", "recovery", "norms", "reapplied", "timeline",
    "earlier", "problems", "files",
)  # fmt: skip


# Reports of early versions lack these entries.
_LATER_ENTRIES = (
    "structure", "routing", "fit", "export", "recovery", "norms", "reapplied", "timeline",
    "earlier",
)  # fmt: skip


def read_site(entry: Mapping[str, Any]) -> SitePruned:
    """The record of a site. Strings such as ``"Infinity"`` become numbers again.

    Raises:
        KeyError, TypeError, ValueError: the record is damaged.
    """
    values = {"order": None, **entry}  # records of early versions have no order
    values = {name: values[name] for name in SitePruned.__dataclass_fields__}
    values |= {name: float(values[name]) for name in ("relative_error", "seconds")}
    values["residual"] = None if values["residual"] is None else float(values["residual"])
    values["order"] = None if values["order"] is None else tuple(values["order"])
    return SitePruned(**values | {"shape": tuple(values["shape"])})


def _with_numbers(part: Any) -> Any:
    """The metrics of a model, as numbers; an entry of another type is returned unchanged."""
    return {name: float(value) for name, value in part.items()} if isinstance(part, dict) else part


def versions() -> dict[str, str]:
    """The versions that can change a result."""
    return dict(_read_versions())


@cache  # reading the metadata of packages takes time
def _read_versions() -> tuple[tuple[str, str], ...]:
    installed = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return tuple(installed.items())


def peak_memory() -> dict[str, int]:
    """The peak resident memory of the process, and the peak memory of a GPU, in bytes."""
    peak = {"cpu": _peak_resident()}
    if (kind := accelerator()) is not None:
        peak[kind] = peak_allocated(kind)
    return peak


def _peak_resident() -> int:
    # On Linux getrusage includes the memory of the parent process at the time of the fork.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report_beside(file: Path) -> Path:
    """The path of the report of a model that is a single file: NAME.apt_report.json."""
    return file.with_name(f"{file.stem}.{REPORT}")


def report_of(model: Path) -> Path:
    """The path of the report in a directory, or beside a file."""
    return report_beside(model) if model.is_file() else model / REPORT


def read_report(model: Path) -> dict[str, Any] | None:
    """The record of the report of a directory or a file; None if there is none.

    Raises:
        AptError: the report is damaged.
    """
    path = report_of(model)
    if not path.is_file():
        return None
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise user_error(error) or error from error
    except RecursionError as error:
        raise AptError(f"{path} is nested too deeply", _RESTORE) from error
    except ValueError as error:
        raise AptError(f"{path} is damaged: {error}", _RESTORE) from error
    if not isinstance(record, dict):
        raise AptError(f"{path} is damaged: it is not a report", _RESTORE)
    _check(record, str(path))
    return record


def _refuse_constant(constant: str) -> Any:
    """Raise for a constant that Python reads but JSON does not have, such as ``Infinity``."""
    raise ValueError(f"{constant} is no number in JSON")


def _check(record: dict[str, Any], name: str) -> None:
    """Raise `AptError` if a record has another schema, or an entry of a wrong type."""
    if (schema := record.get("schema")) != SCHEMA and isinstance(schema, int):
        hint = "use the version of APT that wrote it, or delete it to go on without a report"
        raise AptError(f"{name} has schema {shortened(str(schema))}, not {SCHEMA}", hint)
    if problem := first_problem(record):
        raise AptError(f"{name} is damaged: {shortened(problem)}", _RESTORE)


def listed_files(record: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of the files that a record lists; empty hashes if it lists only names."""
    files = record.get("files", {})
    names = files if isinstance(files, list) else []
    hashes = files if isinstance(files, dict) else dict.fromkeys(map(str, names), "")
    return {str(name): str(digest) for name, digest in hashes.items()}


@dataclass(frozen=True)
class KindSummary:
    """A summary of all sites of one kind."""

    kind: str
    sites: int
    weights: int
    sparsity: float
    mean_error: float
    max_error: float
    seconds: float


def by_kind(sites: Sequence[SitePruned]) -> list[KindSummary]:
    """One summary for each kind of site, in the order of pruning."""
    kinds: dict[str, list[SitePruned]] = defaultdict(list)
    for site in sites:
        kinds[site.kind].append(site)
    return [_summary(kind, group) for kind, group in kinds.items()]


def levels_by_kind(levels: Mapping[str, str]) -> dict[str, str]:
    """The levels of each kind of tensor, such as ``2 × q4_K, 1 × q8_0``, the most frequent first.

    Args:
        levels: the level of each tensor, by the name of its parameter.
    """
    counts = dict[str, Counter[str]]()
    for name, level in levels.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        counts.setdefault(kind, Counter())[level] += 1
    return {
        kind: ", ".join(f"{count} × {level}" for level, count in found.most_common())
        for kind, found in counts.items()
    }


def _summary(kind: str, group: Sequence[SitePruned]) -> KindSummary:
    errors = [site.relative_error for site in group]
    weights = sum(site.size for site in group)
    zeros = sum(site.zeros for site in group)
    seconds = sum(site.seconds for site in group)
    return KindSummary(
        kind, len(group), weights, zeros / weights, fmean(errors), max(errors), seconds
    )
