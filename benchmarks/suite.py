"""All tables of docs/benchmarks.md, one after the other, on one machine and with one commit.

Each table is the JSON file of a script in ``benchmarks/results``. A run that was stopped continues
where it was, if the commit is the same. At the end the tables and pictures are written into
the documents, see ``benchmarks/pages.py`` and ``benchmarks/plots.py``::

    make benchmarks                                # everything
    python benchmarks/suite.py solver stream       # these tables
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import COMMIT, commit
from tables import FORMER, WITHOUT

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WHOLE = ".complete"  # the suffix of a file that says that a table is complete
ZOO = (
    "--text builtin --samples 64 --seqlen 256 --eval-samples 112 --methods magnitude wanda ss alps"
)
ZOO += " admm/layer-wise admm --dictionary /usr/share/dictd/foldoc.dict.dz --patterns"
SUITE = {
    "smollm2": "comparison.py",
    "variants": "accuracy.py --eval-samples 16 --patterns 0.5 2:4"
    f" --methods admm admm:fast admm/layer-wise {' '.join(WITHOUT)}",
    "seeds": "accuracy.py --eval-samples 16 --patterns 0.5 2:4 0.7 0.8 --seed 1 2 3"
    f" --methods admm {FORMER}",
    "own": "accuracy.py --eval-samples 16 --patterns 2:4 --methods ss ss/own_samples=8"
    " admm:best admm:best/own_samples=0",
    "paper": "accuracy.py --eval-samples 16 --patterns 2:4 4:8 --methods ss sm ms mm",
    "tokens": "calibration.py",
    "solver": "solver.py --blocks 0 12 20 --patterns 2:4 0.5 0.7"
    " --methods ss sm alps admm:fast admm:default",
    "endtoend": "endtoend.py",
    "scaling": "endtoend.py --scaling",
    **{
        f"zoo-{name}": f"accuracy.py --model zoo:{name} {ZOO} {patterns}"
        for name, patterns in (
            ("llama", "0.5 2:4"),
            ("opt", "0.5 2:4"),
            ("bloom", "0.5 2:4"),
            ("mamba", "0.5 0.6 2:4"),
            ("mamba2", "0.5 0.6 2:4"),
            ("moe", "0.5 2:4 0.7"),
        )
    },
    "stream": "stream.py --blocks 2 8 32 --hidden 1024 --samples 2 --seqlen 128 --method ss",
    "stream-7b": "stream.py --blocks 2 8 --hidden 4096 --intermediate 11008"
    " --vocabulary 32000 --samples 2 --seqlen 64 --method wanda",
    "mamba": "mamba.py",
    "llm_compressor": "llm_compressor.py --patterns 2:4 --methods ss admm",
    "quantize": "quantize.py",
    "packed": "packed.py",
    "packed-threads": "packed.py --threads 2 --patterns 0.5 0.7 --kinds bfloat16",
    "packed-1.5b": "packed.py --shape 1.5b",
    "products": "packed.py --matrices",
    "minutes": "minutes.py --patterns 0.5 2:4 0.7 --minutes 2 5 10 30",
    "costs": "costs.py",
    "memory": "memory.py",
}
TIMED = {
    "solver", "endtoend", "scaling", "stream", "stream-7b", "mamba", "llm_compressor",
    "packed-threads", "minutes", "costs",
}  # fmt: skip
"""Tables of times with two threads: nothing else should run. The others have one thread. Those of
packed models are times as well; two processes of this script can make the rest side by side."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(SUITE)}; by default all")
    options = parser.parse_args()
    if unknown := set(options.tables) - SUITE.keys():
        raise SystemExit(f"unknown tables: {', '.join(sorted(unknown))}")
    return options


def measure(name: str, work: Path) -> None:
    """Run the script of a table. Most scripts continue a file with a part of the rows."""
    script, *rest = SUITE[name].split()
    threads = {"OMP_NUM_THREADS": "2" if name in TIMED else "1"}
    started = time.perf_counter()
    command = [sys.executable, HERE / script, *rest, "--json", f"{name}.json"]
    subprocess.run(command, check=True, cwd=work, env={**os.environ, **threads, COMMIT: commit()})
    (work / name).with_suffix(WHOLE).touch()
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    options, now = arguments(), commit()
    if now.endswith("-dirty"):
        raise SystemExit("commit your changes first: a table names the commit of the code")
    work = Path("out/benchmarks").absolute() / now  # so that no run continues another commit's
    work.mkdir(parents=True, exist_ok=True)
    tables = options.tables or list(SUITE)
    for name in tables:
        if not (work / name).with_suffix(WHOLE).is_file():
            measure(name, work)
    for name in tables:
        shutil.copy(work / f"{name}.json", RESULTS)
    for script in ("plots.py", "pages.py"):
        subprocess.run([sys.executable, HERE / script], check=True)


if __name__ == "__main__":
    main()
