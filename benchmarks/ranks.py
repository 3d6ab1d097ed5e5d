"""One run on 1, 2 and 4 ranks of one thread each: work, time, and agreement of the results.

The last row is one process of two threads: it shows the effect of rounding alone::

    python benchmarks/ranks.py zoo:llama --samples 64 --seqlen 256
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from apt.checkpoints.copies import REPORT


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="zoo:llama")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("rest", nargs="*", help="further options of apt-prune prune, after --")
    return parser.parse_args()


def run(options: argparse.Namespace, folder: Path, ranks: int, threads: int) -> dict[str, Any]:
    """The report of a run, with its weights and its wall time."""
    command = [sys.executable, "-m", "apt", "prune", options.model, "-o", str(folder)]
    if ranks > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command[1:1] = start
    command += ["--samples", str(options.samples), "--seqlen", str(options.seqlen)]
    command += ["--eval", "builtin", *options.rest]
    began = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    seconds = time.perf_counter() - began
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    return {"weights": weights, "wall": seconds, **json.loads((folder / REPORT).read_text())}


def differing(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The share of weights of the pruned sites that are zero in only one of two runs."""
    names = [f"{site['name']}.weight" for site in one["sites"]]
    pairs = [(one["weights"][name] == 0, other["weights"][name] == 0) for name in names]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def main() -> None:
    options, console = arguments(), Console()
    made = Table(
        "ranks", "threads", "tokens", "solves", "solve s", "wall s", "layer error", "perplexity",
        "other masks",
    )  # fmt: skip
    first = None
    with tempfile.TemporaryDirectory(prefix="apt-ranks-") as name:
        for ranks, threads in [*((ranks, 1) for ranks in options.ranks), (1, 2)]:
            found = run(options, Path(name) / f"{ranks}-{threads}", ranks, threads)
            first = first or found
            work = found["ranks"]
            made.add_row(
                str(ranks),
                str(threads),
                " ".join(f"{part['tokens']}" for part in work),
                " ".join(f"{part['solves']}" for part in work),
                " ".join(f"{part['solve_seconds']:.1f}" for part in work),
                f"{found['wall']:.1f}",
                f"{found['relative_layer_error']:.5f}",
                f"{found['scores']['after']['perplexity']:.3f}",
                f"{differing(first, found):.2%}",
            )
            console.print(made)


if __name__ == "__main__":
    main()
