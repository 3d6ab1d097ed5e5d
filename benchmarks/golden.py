"""Golden runs: what APT writes before and after a change of its code.

Some 200 commands and programs run on small models, each in a folder of its own. The result is one
JSON file with the exit status, the output and every written file of each of them: text as it is,
other files as SHA-256. Times, memory, dates, versions and places are replaced, so that two results
of one version of APT on one machine are equal. The version is that on ``PYTHONPATH``::

    python benchmarks/golden.py --out before.json
    PYTHONPATH=$OTHER:$OTHER/adapters:$OTHER/plugins python benchmarks/golden.py --out after.json
    python benchmarks/golden.py --compare before.json after.json

Some commands are killed in a process of their own and then resumed; all others run in this process.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from golden_commands import KILLS, PROGRAMS, TEXT, Kill, commands, models

ROOT = Path(__file__).resolve().parent.parent
NOISE = {
    "seconds", "solve_seconds", "seconds_left", "peak_memory_bytes", "memory", "timeline",
    "versions", "created", "process",
}  # fmt: skip
"""Keys of JSON objects whose values change from run to run."""

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_SUBSTITUTIONS = [
    (re.compile(rf"\s+{_NUMBER} (?:s|min|h) left"), ""),
    (re.compile(rf"\b{_NUMBER} (ms|s|min|h)\b"), r"N \1"),
    (re.compile(rf"\b{_NUMBER} (?:B|KiB|MiB|GiB)"), "N B"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(?:[,.]\d+)?(\+00:00)?"), "DATE"),
]
_TIMES = re.compile(r"(?:solve s|seconds)\s*\|?$")  # the last heading of a table
_LAST = re.compile(rf"\s*{_NUMBER}\s*(\|?)$")
_PACKED = {"apt_packed.safetensors"}  # its hash in a report, see `weights`
_BAR = re.compile(r"\d+%\|")  # a progress bar of another library
_LARGEST = 100_000  # bytes of a text that is kept as it is


def normal(value: Any) -> Any:
    """A value from JSON without noise."""
    if isinstance(value, dict):
        return {k: "-" if k in NOISE or k in _PACKED else normal(v) for k, v in value.items()}
    return [normal(v) for v in value] if isinstance(value, list) else value


def lines(text: str, root: Path) -> list[Any]:
    """The lines of a text without noise; a line of JSON as a value."""
    made, table = [], False
    for line in text.replace(str(root), "ROOT").splitlines():
        if _BAR.search(line) or not line.strip():
            table = False
            continue
        if line.startswith(("{", "[")):
            with contextlib.suppress(ValueError):
                made.append(normal(json.loads(line)))
                continue
        table = bool(_TIMES.search(line)) or table
        if table:
            line = _LAST.sub(r" N\1", line)
        for pattern, replacement in _SUBSTITUTIONS:
            line = pattern.sub(replacement, line)
        made.append(line)
    return made


def weights(data: bytes) -> str:
    """The SHA-256 of a safetensors file. The order of its metadata differs from run to run."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    return hashlib.sha256(header + data[end:]).hexdigest()


def content(path: Path, root: Path) -> Any:
    """What a file has: its value if it is JSON, lines if it is a text, else its SHA-256."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return weights(data)
    if path.suffix == ".csv":  # a table of a comparison
        head, *rows = [line.split(",") for line in data.decode().splitlines()]
        return [[n if h != "seconds" else "-" for h, n in zip(head, row, strict=True)]
                for row in (head, *rows)]  # fmt: skip
    if len(data) <= _LARGEST:
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode()
            if path.suffix == ".json":
                return normal(json.loads(text.replace(str(root), "ROOT")))
            return lines(text, root)
    return hashlib.sha256(data).hexdigest()


def written(folder: Path, root: Path) -> dict[str, Any]:
    """All files below a folder, but for the locks of a comparison."""
    paths = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    names = {path: str(path.relative_to(folder)) for path in paths}
    return {name: content(path, root) for path, name in names.items() if ".claims" not in name}


def freeze(folder: Path) -> None:
    """Set all times in reports and comparisons below a folder to one value.

    A page about them, or a comparison with them, is then the same in each run.
    """

    def frozen(key: str, value: Any) -> Any:
        if key == "timeline" and value:
            phases = [[name, number] for number, (name, _) in enumerate(value["phases"])]
            return {"phases": phases, "memory": [[0, 2**30], [1, 2**30]], "end": len(phases)}
        if key == "created":
            return "2026-01-01T00:00:00+00:00"
        if isinstance(value, dict):
            return {k: frozen(k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [frozen("", v) for v in value]
        return value if value is None else 2**30 if key in ("cpu", "cuda") else (
            1.5 if key in NOISE else value
        )  # fmt: skip

    for path in [*folder.rglob("apt_report.json"), *folder.rglob("comparison.json")]:
        text = path.read_text(encoding="utf-8")
        path.write_text(json.dumps(frozen("", json.loads(text)), indent=2) + "\n")


def quiet_call(function: Callable[[], object], folder: Path) -> tuple[int, str, str]:
    """Call a function in a folder: an exit status, and what it wrote to the two streams."""
    out, err, before, status = io.StringIO(), io.StringIO(), os.getcwd(), 0
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            function()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        err.write("".join(traceback.format_exception_only(error)))
        status = 1
    finally:
        os.chdir(before)
    return status, out.getvalue(), err.getvalue()


def command_line(words: list[str]) -> Callable[[], None]:
    """The call of a command in this process."""

    def call() -> None:
        from apt.cli import main

        arguments, sys.argv = sys.argv, ["apt-prune", *words]
        try:
            main()
        finally:
            sys.argv = arguments

    return call


def kill(words: list[str], folder: Path, moment: Kill) -> None:
    """Start a command in a process of its own, and kill it at a moment."""
    command = [sys.executable, "-m", "apt", *words, *["--json"][: "--json" not in words]]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    count = 0
    for line in process.stderr:
        count += moment.text in line
        if count == moment.count:
            time.sleep(0.03)  # the record of this step is written after the line
            break
    process.kill()
    process.communicate()
    if process.returncode != -9:
        raise SystemExit(f"{shlex.join(command)} ended before it was killed")


def run(name: str, root: Path, command: str | None) -> dict[str, Any]:
    """Run a command, or the program of this name; its record."""
    folder = root / name
    folder.mkdir()
    if command is None:
        function: Callable[[], object] = lambda: PROGRAMS[name](folder)  # noqa: E731
    else:
        words = command.split()
        if (moment := KILLS.get(name)) is not None:
            kill(words, folder, moment)
            command += moment.resume
        function = command_line(command.split())
    status, out, err = quiet_call(function, folder)
    record = {"status": status, "out": lines(out, root), "err": lines(err, root)}
    record |= {"command": command, "files": written(folder, root)}
    freeze(folder)
    return record


def matches(name: str, globs: str) -> bool:
    """True if a name matches one of several globs, separated by commas."""
    return any(fnmatch(name, glob) for glob in globs.split(","))


def differences(first: Any, second: Any, place: str = "") -> Iterator[str]:
    """The places in which two values differ, with the two values."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in first.keys() | second.keys():
            there = f"{place} › {key}" if place else key
            if key not in first or key not in second:
                yield f"{there}: only in the {'first' if key in first else 'second'}"
            else:
                yield from differences(first[key], second[key], there)
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, pair in enumerate(zip(first, second, strict=True)):
            yield from differences(*pair, f"{place}[{index}]")
    elif isinstance(first, list) and isinstance(second, list):
        index = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
                     min(len(first), len(second)))  # fmt: skip
        shown = [json.dumps(v[index : index + 1], ensure_ascii=False) for v in (first, second)]
        yield f"{place}[{index}] of {len(first)} and {len(second)}: {' → '.join(shown)}"
    elif first != second:
        yield f"{place}: {json.dumps(first)} → {json.dumps(second)}"


def compare(first: Path, second: Path, only: str, most: int) -> int:
    """Print the differences of two results, at most some of each run; the number of such runs."""
    one, two = (
        {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if matches(k, only)}
        for path in (first, second)
    )
    total = 0
    for name in [*one, *(two.keys() - one.keys())]:
        found = sorted(differences(one.get(name, {}), two.get(name, {}), name))
        for line in found[:most]:
            print(line[:400])
        if len(found) > most:
            print(f"{name}: {len(found) - most} more")
        total += bool(found)
    print(f"{total} of {len(one)} runs differ")
    return total


def selected(only: str) -> dict[str, str | None]:
    """The commands, and None for programs, whose names match, and those whose files they read."""
    every: dict[str, str | None] = {**commands(), **dict.fromkeys(PROGRAMS)}
    wanted: set[str] = set()
    queue = [name for name in every if matches(name, only)]
    while queue:
        wanted.add(name := queue.pop())
        queue += {*re.findall(r"\.\./([\w.-]+)/", every[name] or "")} & every.keys() - wanted
    return {name: command for name, command in every.items() if name in wanted}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="run everything, and write FILE")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="compare two results")
    parser.add_argument("--most", type=int, default=5, help="differences to print of each run")
    parser.add_argument("--only", default="*", metavar="GLOBS", help="runs with these names, and "
                        "those whose files they read")  # fmt: skip
    parser.add_argument("--folder", type=Path, help="keep the written files here")
    options = parser.parse_args()
    if (options.out is None) == (options.compare is None):
        parser.error("give --out or --compare")
    return options


def main() -> None:
    options = arguments()
    if options.compare:
        raise SystemExit(bool(compare(*options.compare, options.only, options.most)))
    root = (options.folder or Path(tempfile.mkdtemp(prefix="golden-"))).resolve()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    shutil.copyfile(ROOT / "tests/helpers/text.txt", root / Path(TEXT).name)
    models(root / "models")
    records = {}
    for name, command in selected(options.only).items():
        before = time.process_time()
        records[name] = run(name, root, command)
        seconds = time.process_time() - before
        print(f"{name}: {records[name]['status']}, {seconds:.1f} s", flush=True)
        options.out.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(records)} runs, {time.process_time():.0f} s of CPU time")
    if options.folder is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
