"""Further cases of `hostile.py`: files that commands write, packed models, and interruptions."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from apt_lab.comparing.results import RESULTS
from hostile_cases import QUICK, Case, sparse
from safetensors.torch import load_file

from apt.packing.directory import pack

_SMALL = ["--samples", "2", "--seqlen", "32", "--calibration", "t.txt"]
_RECOVER = ["recover", "m", "--kind", "layers", "--steps", "2", "--seqlen", "16", "--batch", "2",
            "--calibration", "t.txt", "-o", "out"]  # fmt: skip
_COMPARE = ["compare", "m", "--methods", "magnitude", "--patterns", "0.5", "--windows", "2",
            "--data", "t.txt", *_SMALL, "-o", "c"]  # fmt: skip
_SEARCH = ["shrink", "m", "--search", "--keep", "0.75", "--evaluations", "1", *_SMALL, "-o", "out"]
WRITERS: dict[str, list[str]] = {
    "page.html": ["report", "r", "-o", "page.html"],
    "i/r-sparsity-by-block-and-kind.png": ["report", "r", "-o", "page.html", "--png", "i"],
    "search.png": [*_SEARCH, "--plot", "search.png"],
    ".out.search.jsonl": _SEARCH,
    "loss.png": [*_RECOVER, "--plot", "loss.png"],
    "options.toml": ["prune", "m", *QUICK, "--save-config", "options.toml"],
    "messages.log": ["--log-file", "messages.log", "inspect", "m"],
    "c/comparison.json": _COMPARE,
    "c/comparison.md": _COMPARE,
    "c/comparison.csv": _COMPARE,
    "c/comparison.png": _COMPARE,
    "c/.claims": _COMPARE,
}
"""A command for each file that a command writes."""

_KEPT = ("c", "options.toml", ".out.search.jsonl")
"""What a full disk leaves: finished rows, the options, and the losses of a search."""

_AT: dict[str, Callable[[Path], object]] = {
    "a link to a file": lambda place: place.symlink_to(place.parent.resolve() / "other"),
    "a link to nothing": lambda place: place.symlink_to("nowhere"),
    "a link to itself": lambda place: place.symlink_to(place.name),
    "a link to a device": lambda place: place.symlink_to("/dev/full"),
    "a FIFO": os.mkfifo,
    "a folder": lambda place: (place.mkdir(), (place / "mine").write_text("mine")),
}


def files() -> Iterator[Case]:
    """Files that commands write, where something else is already, or on a full disk."""
    for place, command in WRITERS.items():
        for kind, make in _AT.items():
            if (place, kind) == ("c/.claims", "a folder"):
                continue  # which it is

            def prepare(folder: Path, place: str = place, make: Callable = make) -> None:
                results(folder)
                (folder / place).parent.mkdir(exist_ok=True)
                (folder / place).parent.joinpath("other").write_text("mine")
                if place.startswith("c/"):
                    (folder / "c/other").unlink()
                    (folder / "other").write_text("mine")
                    if place != f"c/{RESULTS}":
                        (folder / "c" / RESULTS).write_text(json.dumps({"setting": {}, "rows": []}))
                make(folder / place)

            yield Case("files", f"{place}: {kind}", [*command], prepare, refused=True)
        if place not in ("c/.claims", ".out.search.jsonl"):
            yield Case("files", f"{place}: a full disk", [*command], results, may=(1,),
                       before="ulimit -f 2;", keeps=_KEPT)  # fmt: skip


def results(folder: Path) -> None:
    """Make the pruned model ``m`` and the result ``r`` of a run, with its report."""
    sparse(folder)
    shutil.copytree(folder / "m", folder / "r")
    sites = [
        {"name": f"model.layers.{block}.mlp.{kind}", "kind": f"mlp.{kind}", "shape": [4, 4],
         "pattern": "0.5", "zeros": 8, "relative_error": 0.1, "damping": 0.05, "residual": None,
         "tokens": 64, "seconds": 0.1}
        for block in range(2) for kind in ("up_proj", "down_proj")
    ]  # fmt: skip
    from apt.events import SitePruned
    from apt.output.report import Report

    options = {"pattern": "0.5", "method": "magnitude", "model": "m"}
    Report(options, {"reference": "m"}, {}, [SitePruned(**site) for site in sites]).write(
        folder / "r"
    )


def packed() -> Iterator[Case]:
    """Packed models with one changed bit: it is found, or the unpacked model is the same."""
    for seed in range(200):
        quantised = seed % 3 == 0

        def prepare(folder: Path, seed: int = seed, quantised: bool = quantised) -> None:
            from apt.packing.directory import Rounding

            sparse(folder)
            names = [n for n in load_file(folder / "m/model.safetensors") if "proj" in n]
            for name in ("p", "whole"):
                (folder / name).mkdir()
            rounding = Rounding("int4", 64) if quantised else None
            pack(folder / "m", dict.fromkeys(names, rounding), folder / "p")
            unpacked(folder / "p", folder / "whole")
            draw = random.Random(seed)
            file = folder / "p" / ("config.json" if seed % 10 == 9 else "apt_packed.safetensors")
            data = bytearray(file.read_bytes())
            low = data.index(b"quantization_config") if file.suffix == ".json" else 0
            header = low or 8 + int.from_bytes(data[:8], "little")
            start = low if low else 0 if seed % 4 == 0 else header
            end = len(data) if start else header
            data[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
            file.write_bytes(data)

        yield Case("packed", f"bit {seed}", ["unpack", "p", "-o", "out"], prepare,
                   check=same_as_before)  # fmt: skip


def unpacked(directory: Path, target: Path) -> None:
    from apt.packing.directory import unpack

    unpack(directory, target)


def same_as_before(folder: Path) -> str:
    """A fault if the unpacked model differs from the one before the change."""
    for name in ("model.safetensors", "config.json"):
        if (folder / "out" / name).read_bytes() != (folder / "whole" / name).read_bytes():
            return f"{name} became another one"
    return ""


def interruptions() -> Iterator[Case]:
    """Commands that receive a signal at a random time: they say so, and leave nothing behind."""
    draw = random.Random(1)
    commands = {
        "pack": ["pack", "m", "-o", "out"],
        "reapply": ["reapply", "m", "m", "-o", "out"],
        "convert": ["convert", "m", "-o", "out"],
        "report": ["report", "r", "-o", "page.html"],
        "eval": ["eval", "m", "--data", "t.txt", "--seqlen", "64"],
        "shrink": ["shrink", "m", "--keep", "0.75", *_SMALL, "-o", "out"],
    }
    for name, command in commands.items():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            seconds = draw.uniform(1, 6)
            yield Case("interruptions", f"{name} {number.name} {seconds:.1f} s", command, results,
                       signal=number, seconds=seconds, may=(128 + number, -number),
                       check=nothing_left)  # fmt: skip


def nothing_left(folder: Path) -> str:
    """A fault if a temporary folder is left."""
    left = [path.name for path in folder.iterdir() if path.name.endswith(".apt")]
    return f"{left[0]} is left" if left else ""
