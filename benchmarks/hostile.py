"""Hostile use: hundreds of commands with mistakes or malicious input.

Each case runs the command line in a separate folder on damaged checkpoints, texts, options, paths
or environments. All cases have to meet the same rules:

- the exit status is 0, 1 (a check fails), 2 (an error that the user can correct), or that of the
  signal that was sent;
- an error is one line, without a traceback;
- nothing that is printed has control characters;
- no file changes except the output.

::

    python benchmarks/hostile.py            # all cases, with a count at the end
    python benchmarks/hostile.py --only texts --verbose
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_ignored
import hostile_outputs
import hostile_packed
import hostile_programs
import hostile_requests
from hostile_cases import GROUPS, Case
from transformers.utils.logging import disable_progress_bar

from apt.cli import main as command_line
from apt.plugin.registry import registry

ROOT = Path(__file__).resolve().parent.parent
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")
_LONGEST = 300  # seconds that a command may take
ALL = GROUPS | {
    function.__name__: function
    for function in (
        hostile_requests.overrides,
        hostile_requests.tasks,
        hostile_outputs.files,
        hostile_outputs.packed,
        hostile_outputs.interruptions,
        hostile_programs.reports,
        hostile_programs.requests,
        hostile_ignored.ignored,
        hostile_packed.parts,
    )
}
"""All groups of cases by name."""


@dataclass
class Result:
    """The result of a command."""

    code: int
    out: str
    err: str


def in_this_process(case: Case, folder: Path) -> Result:
    """Run a case in this process, which is faster."""
    out, err = io.StringIO(), io.StringIO()
    before, arguments, code = os.getcwd(), sys.argv, 0
    os.chdir(folder)
    sys.argv = ["apt-prune", *case.arguments]
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(_LONGEST)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command_line()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException as error:
        err.write(f"Traceback: {type(error).__name__}: {error}")
        code = 1
    finally:
        signal.alarm(0)
        os.chdir(before)
        sys.argv = arguments
    return Result(code, out.getvalue(), err.getvalue())


def _hangs(number: int, frame: Any) -> None:
    raise TimeoutError(f"nothing happened in {_LONGEST} s")


def in_new_process(case: Case, folder: Path) -> Result:
    """Run a case in a new process."""
    words = [sys.executable, "-P", "-c", "from apt.cli import main; main()", *case.arguments]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "adapters", ROOT / "plugins")))
    environment = {**os.environ, "PYTHONPATH": paths, **case.environment}
    line = f"exec 3>&1; {case.before} {shlex.join(words)} {case.shell}"
    command = ["bash", "-o", "pipefail", "-c", line]
    started = command if case.shell or case.before else words
    process = subprocess.Popen(started, cwd=folder, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, errors="replace")  # fmt: skip
    if case.signal:
        time.sleep(case.seconds)
        process.send_signal(case.signal)
    out, err = process.communicate(timeout=_LONGEST)
    return Result(process.returncode, out, err)


def content(folder: Path) -> dict[str, bytes | None]:
    """The content of all files below a folder, and the targets of links; None for other paths."""
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink()
        else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


def judge(case: Case, result: Result, before: dict[str, Any], folder: Path) -> str:
    """The violated rule; empty if there is none."""
    if "Traceback" in result.err:
        return f"traceback: {result.err.strip().splitlines()[-1][:150]}"
    if _CONTROL.search(result.out + result.err):
        return "a control character was printed"
    if case.refused and result.code != 2:
        return f"exit status {result.code}, not 2"
    if result.code not in (0, 2, *case.may):
        return f"exit status {result.code}: {result.err.strip()[-150:]}"
    if result.code == 2 and not result.err.strip():
        return "no message about the error"
    if "pwned" in os.listdir(folder):
        return "code of the checkpoint was run"
    after = content(folder)
    if lost := [name for name in before if name not in after or after[name] != before[name]]:
        return f"{lost[0]} was lost or changed"
    added = {name.split("/")[0] for name in after.keys() - before.keys()} - set(case.keeps)
    if result.code == 2 and (left := [n for n in added if not n.endswith(".apt")]):
        return f"failed, but {left[0]} exists"
    if result.code == 2 and case.group != "signals" and (left := sorted(added)):
        return f"failed, but {left[0]} is left"
    return case.check(folder) if result.code in (0, *case.may) else ""


def run(case: Case, model: Path) -> tuple[Result, str]:
    """Run a case and check the rules."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name)
        shutil.copytree(model, folder / "m")
        shutil.copyfile(ROOT / "tests/helpers/text.txt", folder / "t.txt")
        case.prepare(folder)
        if case.arguments[:1] == ["prune"] and "--calibration" not in case.arguments:
            case.arguments += ["--calibration", "t.txt"]
        before = content(folder)
        separate = case.environment or case.shell or case.before or case.signal
        result = (in_new_process if separate else in_this_process)(case, folder)
        return result, judge(case, result, before, folder)


def main() -> None:
    disable_progress_bar()  # the command line does that before it imports transformers
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ALL, action="append")
    parser.add_argument("--verbose", action="store_true", help="show the message of every case")
    given = parser.parse_args()
    path = registry().adapters.get("llama").zoo_path()
    assert path is not None
    counts: dict[str, Counter[str]] = {}
    for group in given.only or ALL:
        counts[group] = Counter()
        for case in ALL[group]():
            result, wrong = run(case, path)
            counts[group][f"exit {result.code}"] += 1
            counts[group]["wrong"] += bool(wrong)
            if wrong or given.verbose:
                last = (result.err.strip() or result.out.strip() or "-").splitlines()[-1]
                print(f"{'WRONG ' + wrong if wrong else 'right'} | {group} | {case.name} | "
                      f"{result.code} | {last[:200]}", flush=True)  # fmt: skip
    for group, found in counts.items():
        print(f"{group}: {dict(sorted(found.items()))}")
    total = sum(found["wrong"] for found in counts.values())
    cases = sum(sum(found.values()) - found["wrong"] for found in counts.values())
    print(f"{cases} cases, {total} wrong")
    raise SystemExit(bool(total))


if __name__ == "__main__":
    main()
