"""Recoveries of one pruned model: perplexity on two texts before and after each kind.

The default is SmolLM2-135M-Instruct at 70 % with the texts of ``benchmarks/common.py``: the model
is pruned and trained on summaries of Wikipedia articles, and measured on other summaries and on
quotations and jokes::

    python benchmarks/recover.py --pattern 0.7 --rows spp/minutes=30 distill/minutes=30 \\
        --json out/recover.json

A row is KIND and options of ``apt.RecoverOptions``: ``distill/steps=200``, ``lora/rate=1e-3``,
``layers/minutes=30``. ``--pattern`` may also be ``without:3,12,13``: the blocks with these indices
are dropped instead. ``--text builtin`` takes another text, for an embedded model. Rows are added to
the JSON file as soon as they are measured. A row in the file is not measured again.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import FORTUNES, fortunes, known_rows, open_model, sample, save, wiki
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import apt
from apt.checkpoints.masks import masks_of, sparsity_of
from apt.checkpoints.opened import Opened
from apt.evaluation.metrics import perplexity
from apt.plugin.registry import registry
from apt.recovery.recover import NotRecoveredError
from apt.text.datasets import documents, tokenize, windows

ROWS = [f"{kind}/steps={n}" for kind in ("spp", "lora", "layers", "distill") for n in (200, 1000)]
TUNED_ON = 16  # windows of each evaluation text, used to choose APT's defaults: not reported
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model reference; SmolLM2 by default")
    parser.add_argument("--pattern", default="0.7")
    parser.add_argument("--method", help="of the pruning; the default method of APT by default")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--samples", type=int, default=32, help="of the pruning")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--train", type=int, default=2000, help="samples to train on at most")
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument(
        "--skip", type=int, default=TUNED_ON, help="leading windows to leave out; 0: tuning windows"
    )
    parser.add_argument("--text", help="a data source instead of the summaries and the fortunes")
    parser.add_argument("--fortunes", type=Path, default=FORTUNES, help="folder of the second text")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def texts(options: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The tokens to prune with, those to train on, and those to measure on."""
    if options.text:
        calibration, evaluation = (
            list(documents(options.text, split, registry()))
            for split in ("calibration", "evaluation")
        )
        held_out = {options.text: evaluation}
    else:
        calibration, evaluation = wiki()
        held_out = {"wiki": evaluation, "fortunes": fortunes(options.fortunes)}
    pruning = sample(tokenizer, calibration, options.samples, options.seqlen)
    every = windows(tokenize(tokenizer, calibration), None, options.seqlen, "the text")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return (
        pruning,
        every[order[: options.train]],
        {
            name: sample(tokenizer, text, options.eval_samples, options.seqlen, options.skip)
            for name, text in held_out.items()
        },
    )


def prune(model: Opened, options: argparse.Namespace, tokens: Tensor, tokenizer: Any) -> Any:
    """The pruned model."""
    given = {"adapter": model.spec.name, "tokenizer": tokenizer}
    if options.pattern.startswith("without:"):
        drop = tuple(int(index) for index in options.pattern.partition(":")[2].split(","))
        size = apt.ShrinkOptions(drop=drop, mode="depth")
        plain = apt.PruneOptions(error_aware=False)
        return apt.shrink(model.module, tokens, size=size, options=plain, **given)[0]
    method = {"method": options.method} if options.method else {}
    return apt.prune_copy(model.module, tokens, pattern=options.pattern, **given, **method)[0]


def read_row(row: str) -> tuple[str, apt.RecoverOptions]:
    """Parse a row: ``distill/steps=200/rate=1e-3``."""
    kind, *words = row.split("/")
    values = {}
    for word in words:
        option, _, value = word.partition("=")
        values[option] = json.loads(value)
    return kind, apt.RecoverOptions(**values)


def recover(
    model: Opened, pruned: nn.Module, row: str, tokens: Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    """A recovered copy, with the record of its training."""
    kind, options = read_row(row)
    module, started = copy.deepcopy(pruned), time.perf_counter()
    before = masks_of(module, model.adapter)
    try:
        training = apt.recover(
            module, tokens, kind=kind, options=options, dense=model.module, adapter=model.spec.name
        )
    except NotRecoveredError as error:
        print(f"{row}: {error.message}", flush=True)
        return pruned, {"error": error.message}
    after = masks_of(module, model.adapter)
    same = before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    return module, {
        "zeros": sparsity_of(after),
        "same zeros": same,
        "steps": len(training.losses),
        "best": training.best,
        "tokens": training.best * training.tokens,
        "held back": list(training.held_back.items()),
        "training": training.seconds,
        "seconds": time.perf_counter() - started,
    }


def measure(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """One row for each recovery."""
    model, tokenizer = open_model(options.model)
    pruning, training, held_out = texts(options, tokenizer)
    measured = {(row["row"], row["pattern"]): row for row in known}
    runs = [("dense", ""), ("pruned", options.pattern)]
    runs += [(row, options.pattern) for row in options.rows]
    pruned: Any = None
    for name, pattern in runs:
        if (name, pattern) in measured:
            yield measured[name, pattern]
            continue
        if pruned is None and pattern:
            pruned = prune(model, options, pruning, tokenizer)
        module, row = pruned if pattern else model.module, dict[str, Any]()
        if name not in ("dense", "pruned"):
            module, row = recover(model, pruned, name, training)
        with model.adapter.running(module):
            scores = {text: perplexity(module, tokens) for text, tokens in held_out.items()}
        yield {"row": name, "pattern": pattern, **scores, **row}


def main() -> None:
    options, console = arguments(), Console()
    known, rows = known_rows(options), []
    held_out = [options.text] if options.text else ["wiki", "fortunes"]
    columns = [*held_out, "best", "tokens", "seconds", "same zeros"]
    table = Table("row", "pattern", *columns)
    for row in measure(options, known):
        rows.append(row)
        shown = [f"{row[key]:.5g}" if key in row else "" for key in columns]
        table.add_row(row["row"], row["pattern"], *shown)
        console.print(*shown, row["row"], row["pattern"])
        fresh = {(r["row"], r["pattern"]) for r in rows}
        others = [r for r in known if (r["row"], r["pattern"]) not in fresh]
        save(options.json, rows + others, options)
    console.print(table)


if __name__ == "__main__":
    main()
