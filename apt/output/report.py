"""What a run did: the record that goes beside the pruned model."""

import json
import platform
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from apt.checkpoints.copies import REPORT
from apt.distributed.ranks import Work
from apt.errors import AptError
from apt.events import SitePruned
from apt.locations.paths import mendable
from apt.output.json_values import plain

_PACKAGES = ("apt-prune", "torch", "transformers", "safetensors", "tokenizers", "datasets")


@dataclass(frozen=True)
class Report:
    """A run's record, written as `REPORT`.

    Attributes:
        options: what the run was told, defaults included.
        model: where the model came from, its type, adapter and the SHA-256 of its weights.
        tokens: the calibration text, the shape of its tokens and their SHA-256.
        sites: what was done to each pruned site.
        skipped: the sites left dense on request.
        seconds: the time of the whole run.
        scores: the text, and each measure before and after, where they were taken.
        ranks: what each of the processes did that pruned together.
        problems: what could not be measured, and why.
    """

    options: dict[str, Any]
    model: dict[str, Any]
    tokens: dict[str, Any]
    sites: list[SitePruned]
    skipped: list[str]
    seconds: float
    scores: dict[str, Any] = field(default_factory=dict)
    ranks: list[Work] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """The share of zeros over all pruned sites."""
        return sum(site.zeros for site in self.sites) / sum(site.size for site in self.sites)

    @property
    def relative_error(self) -> float:
        """The mean relative layer error."""
        return fmean(site.relative_error for site in self.sites)

    def write(self, directory: Path) -> None:
        """Write the record into ``directory``, with the names of all files that are there.

        A number that is not finite is written as ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``.
        """
        record = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "options": self.options,
            "model": self.model,
            "calibration": self.tokens,
            "sparsity": self.sparsity,
            "relative_layer_error": self.relative_error,
            "scores": self.scores,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": peak_memory(),
            "ranks": [asdict(work) for work in self.ranks],
            "sites": [_entry(site) for site in self.sites],
            "skipped": self.skipped,
            "problems": self.problems,
            "files": sorted(
                path.relative_to(directory).as_posix()
                for path in directory.rglob("*")
                if path.is_file() and path.name != REPORT
            ),
        }
        text = json.dumps(plain(record), indent=2, allow_nan=False) + "\n"
        partial = directory / f".{REPORT}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(directory / REPORT)


def _entry(site: SitePruned) -> dict[str, Any]:
    return {**asdict(site), "sparsity": site.zeros / site.size}


def differences(known: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of the entries that differ."""
    for key in {**known, **now}:
        left, right = known.get(key), now.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}"


def portable(reference: str) -> str:
    """What a user named a model or a text, without the folders of this machine around it."""
    path = Path(reference).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else reference


def versions() -> dict[str, str]:
    """The versions that can change a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory() -> dict[str, int]:
    """The process's highest resident memory, and the device's, in bytes."""
    peak = {"cpu": _peak_resident()}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_resident() -> int:
    # What getrusage says on Linux counts the process that started this one, up to that moment.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_report(directory: Path) -> dict[str, Any] | None:
    """The record in ``directory``, if there is one.

    Raises:
        AptError: there is one, but it is damaged.
    """
    path = directory / REPORT
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = record if isinstance(record, dict) else {}
        if not isinstance(fields.get("skipped"), list) or not isinstance(
            fields.get("options"), dict
        ):
            raise ValueError("it is no report")
    except OSError as error:
        raise mendable(error) or error from error
    except RecursionError as error:
        raise AptError(f"{path} is nested too deeply", "delete it to verify without it") from error
    except ValueError as error:
        raise AptError(f"{path} is damaged: {error}", "delete it to verify without it") from error
    return fields


@dataclass(frozen=True)
class KindSummary:
    """The sites of one kind, taken together."""

    kind: str
    sites: int
    weights: int
    sparsity: float
    mean_error: float
    max_error: float
    seconds: float


def by_kind(sites: Sequence[SitePruned]) -> list[KindSummary]:
    """One summary for each kind of site, in the order in which they were pruned."""
    kinds: dict[str, list[SitePruned]] = defaultdict(list)
    for site in sites:
        kinds[site.kind].append(site)
    return [_summary(kind, group) for kind, group in kinds.items()]


def _summary(kind: str, group: Sequence[SitePruned]) -> KindSummary:
    errors = [site.relative_error for site in group]
    weights = sum(site.size for site in group)
    zeros = sum(site.zeros for site in group)
    seconds = sum(site.seconds for site in group)
    return KindSummary(
        kind, len(group), weights, zeros / weights, fmean(errors), max(errors), seconds
    )
