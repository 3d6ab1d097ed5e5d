"""Smaller models: perplexity on two texts of what each method makes, at one share of parameters.

The default is SmolLM2-135M-Instruct with the texts of ``benchmarks/common.py``, as in
``benchmarks/accuracy.py``::

    python benchmarks/shrink.py --keep 0.75 --json out/shrink.json

A row is MODE[:METHOD] and options of ``apt.PruneOptions`` and ``apt.ShrinkOptions``:
``width:joint``, ``width:llm-pruner/compensate=true``, ``depth:loss/error_aware=false``,
``width/sizes={"channels":1024}``, ``search``; the mode of ``given/blocks=24`` follows from its
numbers. ``zeros:METHOD/channels=N/first=K/last=L`` sets the
channels that METHOD removes to zero, and leaves the first K and the last L blocks whole, as the
authors of LLM-Pruner do. No configuration describes such a model. Rows are added to the JSON file
as soon as they are measured. A row in the file is not measured again. ``--save FOLDER`` writes the
smaller models. For a mixture of experts::

    python benchmarks/shrink.py --model zoo:moe --text builtin --samples 64 --seqlen 256 \\
        --eval-samples 112 --dictionary foldoc.dict.dz --experts 12 8 4
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import FORTUNES, calibration_and_texts, known_rows, open_model, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import apt
from apt.checkpoints.opened import Opened
from apt.evaluation.metrics import perplexity
from apt.plugin.registry import registry
from apt.solver import ColumnGroups

_WIDTH = 'sizes={"channels":1024}'  # of SmolLM2: 75 % of the parameters, as `--keep 0.75` chooses
BASELINES = [
    "group-magnitude", "group-wanda", "flap",
    "llm-pruner", "llm-pruner-vector", "llm-pruner-second", "llm-pruner-mix",
]  # fmt: skip
ROWS = [
    *(f"depth:{name}/error_aware=false" for name in ("last", "block-influence", "angular", "loss")),
    *(f"width:{name}/{_WIDTH}/error_aware=false" for name in BASELINES),
    f"width:group-wanda/{_WIDTH}/error_aware=false/compensate=true",
    f"width:llm-pruner/{_WIDTH}/error_aware=false/compensate=true",
    f"width:joint/{_WIDTH}/random_tokens=0",
    f"width:joint/{_WIDTH}",
    f"width:joint/{_WIDTH}/error_aware=true/tuning_epochs=0",
    f"width:joint/{_WIDTH}/error_aware=true",
    "depth:angular/error_aware=true",
    "search",
    "zeros:llm-pruner/channels=1024",
    "zeros:llm-pruner/channels=945/first=3/last=1",  # the same total in 26 of 30 blocks
]
EXPERTS = ["expert-frequency", "reap", "expert-merge", "expert-effect", "expert-joint"]
TUNED_ON = 16  # windows of each evaluation text, used to choose APT's defaults: not reported
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model reference; SmolLM2 by default")
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument(
        "--experts", nargs="+", type=int, metavar="N",
        help="the rows of every choice of N experts, with and without exact weights",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument(
        "--skip", type=int, default=TUNED_ON, help="leading windows to leave out; 0: tuning windows"
    )
    parser.add_argument("--text", help="a data source instead of the wiki summaries")
    parser.add_argument("--fortunes", type=Path, default=FORTUNES, help="folder of the second text")
    parser.add_argument("--dictionary", type=Path, help="a third text: foldoc.dict.dz")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--save", type=Path, help="write each smaller model into this folder")
    options = parser.parse_args()
    if options.experts:
        options.rows = [
            f'width:{name}/sizes={{"experts":{count}}}/compensate={exact}'
            for count in options.experts
            for name in EXPERTS
            for exact in ("false", "true")
        ]
    return options


def read_row(text: str, keep: float) -> tuple[str | None, apt.ShrinkOptions, apt.PruneOptions]:
    """The method and the options of a row."""
    name, *words = text.split("/")
    mode, _, method = name.partition(":")
    size: Row = {"mode": None if mode == "given" else mode, "keep": keep}
    options: Row = {}
    for word in words:
        option, _, value = word.partition("=")
        known = option in apt.ShrinkOptions.__dataclass_fields__
        (size if known else options)[option] = _value(value)
    return method or None, apt.ShrinkOptions(**size), apt.PruneOptions(**options)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def shrink(
    model: Opened, text: str, keep: float, tokens: Tensor, tokenizer: Any
) -> tuple[nn.Module, Row]:
    """A smaller model, with its size and the time that it took."""
    method, size, options = read_row(text, keep)
    started = time.perf_counter()
    module, report = apt.shrink(
        model.module, tokens, size=size, adapter=model.spec.name, method=method, options=options,
        tokenizer=tokenizer,
    )  # fmt: skip
    structure = report.structure
    kept = {kind: entry["kept"] for kind, entry in structure["groups"].items()}
    return module, {
        "share": structure["share"],
        "blocks": structure["blocks"]["kept"],
        "dropped": structure["blocks"]["dropped"],
        "kept": kept,
        "error": report.relative_layer_error,
        "seconds": time.perf_counter() - started,
    }


@torch.no_grad()
def zeroed(model: Opened, text: str, tokens: Tensor) -> tuple[nn.Module, Row]:
    """A copy of the model without the outputs of channels of the lowest scores of a method."""
    name, *words = text.removeprefix("zeros:").split("/")
    wish = {"first": 0, "last": 0, **{k: int(v) for k, _, v in (w.partition("=") for w in words)}}
    scores = registry().shrink_methods.get(name).load()(model.module, model.adapter, tokens)
    module = copy.deepcopy(model.module)
    blocks = model.adapter.blocks(module)
    pruned = blocks[wish["first"] : len(blocks) - wish["last"]]
    for block_name, block in pruned:
        for groups in model.adapter.groups(block, module.config):
            if groups.kind == "channels":
                pattern = ColumnGroups(groups.count, wish["channels"], groups.bins)
                removed = pattern.lowest(scores[block_name]["channels"])
                for site in model.adapter.sites(block):
                    if site.name in groups.readers:
                        site.oriented(site.weight(block))[:, removed] = 0
    return module, {"blocks": len(blocks), "kept": {"channels": wish["channels"]}}


def measure(options: argparse.Namespace, known: dict[str, Row]) -> Iterator[Row]:
    """One row for each smaller model, after that of the dense one."""
    model, tokenizer = open_model(options.model)
    tokens, held_out = calibration_and_texts(options, tokenizer)
    for text in ["dense", *options.rows]:
        if text in known:
            yield known[text]
            continue
        module, row = model.module, Row()
        if text.startswith("zeros:"):
            module, row = zeroed(model, text, tokens)
        elif text != "dense":
            module, row = shrink(model, text, options.keep, tokens, tokenizer)
        with model.adapter.running(module):
            scores = {name: perplexity(module, window) for name, window in held_out.items()}
        if options.save and text != "dense":
            folder = options.save / text.replace("/", " ").replace(":", " ")
            module.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        yield {"row": text, **scores, **row}


def main() -> None:
    options, console = arguments(), Console()
    found = known_rows(options)
    third = ["dictionary"] if options.dictionary else []
    columns = ["wiki", "fortunes", *third, "share", "blocks", "seconds"]
    table, rows = Table("row", *columns), list[Row]()
    for row in measure(options, {row["row"]: row for row in found}):
        rows.append(row)
        shown = [f"{row[key]:.4g}" if key in row else "" for key in columns]
        table.add_row(row["row"], *shown)
        console.print(*shown, row["row"], row.get("kept", ""))
        fresh = {r["row"] for r in rows}
        save(options.json, rows + [r for r in found if r["row"] not in fresh], options)
    console.print(table)


if __name__ == "__main__":
    main()
