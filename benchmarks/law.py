"""The P² law on recoveries of small models: how well it predicts points that it has not seen.

Two sizes (the embedded LLaMA, and a copy of half its size, made by `apt.shrink` and trained towards
it) are pruned at several rates and recovered. The law is fitted

- to the first half of the tokens of each run, and predicts the losses after that;
- to all runs but those of one rate, and predicts the losses of that rate.

Then a training with ``tokens="auto"`` is compared with the full one::

    python benchmarks/law.py --json out/law.json
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from apt_lab.law import Point, fit_law
from common import open_model, save
from rich.console import Console
from torch import Tensor, nn

import apt
from apt.plugin.registry import registry
from apt.text.datasets import documents, tokenize, windows

_FIRST = 0.5  # of the tokens of a run: the points that the law is fitted to
RATES = (0.5, 0.7, 0.8)
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:llama")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--checks", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def loss_of(model: nn.Module, tokens: Tensor) -> float:
    """The mean loss in nats."""
    return float(torch.tensor(apt.perplexity(model, tokens)).log())


def sizes(
    whole: nn.Module, tokenizer: Any, tokens: Tensor, options: argparse.Namespace
) -> dict[str, nn.Module]:
    """The dense models."""
    size = apt.ShrinkOptions(keep=0.5)
    half, _ = apt.shrink(copy.deepcopy(whole), tokens[:64], size=size, tokenizer=tokenizer)
    trained = apt.RecoverOptions(steps=2 * options.steps, rate=options.rate)
    apt.recover(half, tokens, kind="distill", options=trained, dense=whole)
    return {"whole": whole, "half": half}


def curve(
    name: str, dense: nn.Module, rate: float, tokens: Tensor, options: argparse.Namespace
) -> list[Point]:
    """The points of a recovery, without the one before the first step."""
    pruned, _ = apt.prune_copy(dense, tokens[:32], pattern=str(rate), method="wanda")
    training = apt.recover(
        pruned, tokens, dense=dense,
        options=apt.RecoverOptions(steps=options.steps, checks=options.checks, rate=options.rate),
    )  # fmt: skip
    whole = sum(p.numel() for p in dense.parameters())
    zeros = sum(int((p == 0).sum()) for p in pruned.parameters())
    base = loss_of(dense, tokens[-64:])
    return [
        Point(f"{name} {rate}", base, zeros / whole, whole, step * training.tokens, loss)
        for step, loss in training.held_back.items()
        if step
    ]


def prediction(what: str, points: list[Point], seen: Callable[[Point], bool]) -> Row:
    """The mean errors of the law on the points that it is fitted to, and on the others.

    Beside it is the error of the simplest prediction: the last known loss of the curve, or the mean
    of all known ones if there is none.
    """
    known, others = ([p for p in points if seen(p) is wanted] for wanted in (True, False))
    law = fit_law(known)
    last = {p.curve: p.loss for p in known}
    mean = fmean(p.loss for p in known)
    return {
        "what": what, "known": len(known), "others": len(others), "error on known": law.error,
        "error on others": fmean(abs(law.loss(p) - p.loss) for p in others),
        "error of last": fmean(abs(last.get(p.curve, mean) - p.loss) for p in others),
        "law": law.values,
    }  # fmt: skip


def automatic(dense: nn.Module, tokens: Tensor, options: argparse.Namespace) -> Row:
    """A training that ends where the law says, beside one over all of the text."""
    found = {}
    for name, amount in (("auto", "auto"), ("full", int(tokens.numel() * 0.95))):
        pruned, _ = apt.prune_copy(dense, tokens[:32], pattern="0.7", method="wanda")
        training = apt.recover(
            pruned, tokens, dense=dense,
            options=apt.RecoverOptions(tokens=amount, rate=options.rate, checks=16),
        )  # fmt: skip
        found[name] = {
            "tokens": len(training.losses) * training.tokens,
            "loss": min(training.held_back.values()),
            "seconds": training.seconds,
            "stopped": training.stopped,
        }
    return {"what": "tokens=auto", **found}


def main() -> None:
    options, console = arguments(), Console()
    model, tokenizer = open_model(options.model)
    tokens = windows(
        tokenize(tokenizer, documents("builtin", "calibration", registry())), None,
        options.seqlen, "the text",
    )  # fmt: skip
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        save(options.json, rows)
        console.print(json.dumps(row))

    points = list[Point]()
    for name, dense in sizes(model.module, tokenizer, tokens, options).items():
        for rate in options.rates:
            found = curve(name, dense, rate, tokens, options)
            points += found
            add({"what": "curve", "points": [asdict(point) for point in found]})
    most = max(point.tokens for point in points)
    add(prediction("later tokens", points, lambda p: p.tokens <= _FIRST * most))
    for rate in options.rates:
        others = f" {rate}"
        add(prediction(f"rate{others}", points, lambda p, o=others: not p.curve.endswith(o)))
    add(automatic(model.module, tokens, options))


if __name__ == "__main__":
    main()
