"""A test that streamed runs, killed at random times and resumed, give the same bytes.

Each round starts ``apt-prune prune --stream``, kills it with SIGKILL after a random part of the
time of a whole run, and continues it with ``--resume``. In one round of three the resumed run is
killed too. The output is compared with that of a run without interruption::

    python benchmarks/kills.py zoo:llama --rounds 30
    python benchmarks/kills.py ./smollm2 --rounds 30 -- --samples 4 --seqlen 128 --effort fast
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apt.checkpoints.copies import REPORT


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.epilog = "Arguments after -- are further options of apt-prune prune."
    given = [*sys.argv[1:], "--"]
    cut = given.index("--")
    return parser.parse_args(given[:cut], argparse.Namespace(rest=given[cut + 1 : -1]))


def content(folder: Path) -> dict[str, bytes]:
    """The content of every file except the report, which contains times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != REPORT)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run(command: list[str], folder: Path, seconds: float | None = None) -> int | None:
    """The exit status; None if the run was killed after ``seconds``."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def main() -> None:
    options = arguments()
    draw = random.Random(options.seed)
    model = options.model
    if not model.startswith("zoo:"):
        model = str(Path(model).absolute())
    base = [sys.executable, "-m", "apt", "prune", model, "--pattern", "2:4", "--stream"]
    base += options.rest or ["--samples", "8", "--seqlen", "128"]
    folder = Path(tempfile.mkdtemp(prefix="apt-kills-"))
    started = time.perf_counter()
    if run([*base, "-o", "whole"], folder) != 0:
        raise SystemExit("the whole run failed")
    whole, expected = time.perf_counter() - started, content(folder / "whole")
    print(f"a whole run: {whole:.1f} s")
    killed = same = 0
    for number in range(options.rounds):
        command, times = [*base, "-o", f"out{number}"], []
        for _ in range(1 + (number % 3 == 0)):
            seconds = draw.uniform(0, whole)
            status = run(command, folder, seconds)
            if status is None:
                killed += 1
                times.append(seconds)
            if (folder / f".out{number}.apt" / "journal.jsonl").is_file():
                command = [*base, "-o", f"out{number}", "--resume"]
            if status == 0:
                break
        if not (folder / f"out{number}").is_dir() and run(command, folder) != 0:
            raise SystemExit(f"round {number} does not resume, see {folder}")
        equal = content(folder / f"out{number}") == expected
        left = list(folder.glob(f".out{number}*"))
        same += equal and not left
        cut = ", ".join(f"{seconds:.2f}" for seconds in times)
        print(f"round {number}: killed after {cut or '-'} s, {'same' if equal else 'OTHER'} bytes")
        shutil.rmtree(folder / f"out{number}")
    print(f"{killed} kills in {options.rounds} rounds: {same} byte-identical results")
    shutil.rmtree(folder)
    if same != options.rounds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
