"""Pruned models in int4: rounded after the pruning, or in the same run; beside GPTQ's dense int4.

SmolLM2-135M-Instruct in bf16 with the texts of ``benchmarks/common.py``. GPTQ is that of
llm-compressor, in an environment of its own (see ``benchmarks/llm_compressor.py``). All rows have
the same calibration tokens, and the same number of columns that share a scale. Bytes are those of
the weights of all Linears: dense integers with their scales, or the parts of APT's packed format::

    python benchmarks/quantize.py --json out/quantize.json

A row in the JSON file is not measured again.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import FORTUNES, fortunes, known_rows, open_model, sample, save, wiki
from llm_compressor import TUNED_ON, environment, other
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import apt
from apt.checkpoints.opened import Opened
from apt.evaluation.metrics import perplexity
from apt.runtime.matrix import Parts, decode, encode
from apt.runtime.rounding import encode_integers, encode_rounded

Row = dict[str, Any]
Made = tuple[nn.Module, float]
"""A model, and the bytes of its Linears."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=["0.5"])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--fortunes", type=Path, default=FORTUNES)
    parser.add_argument("--work", type=Path, default=Path("out/llm-compressor"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def weights(model: Opened, module: nn.Module) -> list[nn.Parameter]:
    """The weights of all sites."""
    return [
        block.get_parameter(site.parameter)
        for _, block in model.adapter.blocks(module)
        for site in model.adapter.sites(block)
    ]


def size(parts: Parts) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


def dense(model: Opened) -> Made:
    return model.module, sum(w.numel() * 2 for w in weights(model, model.module))


def gptq(model: Opened, options: argparse.Namespace, python: Path) -> Made:
    """Dense int4 by GPTQ; a scale of 16 bits for each group."""
    found, _, _ = other(python, options.work, "GPTQModifier", str(options.group))
    count = sum(w.numel() for w in weights(model, model.module))
    return found.module, count * (4 + 16 / options.group) / 8


def pruned(
    model: Opened, module: nn.Module, tokens: Tensor, tokenizer: Any, pattern: str, **options: Any
) -> nn.Module:
    return apt.prune_copy(
        module, tokens, pattern=pattern, adapter=model.spec.name, tokenizer=tokenizer,
        options=apt.PruneOptions(**options),
    )[0]  # fmt: skip


def packed(model: Opened, module: nn.Module, group: int, how: str) -> Made:
    """A packed model, with values as they are, rounded, or found to be integers."""
    module, total = copy.deepcopy(module), 0
    for weight in weights(model, module):
        if how == "rounded":
            entry, parts = encode_rounded(weight.data, "int4", group)
        elif how == "integers":
            found = encode_integers(weight.data, "int4", group)
            assert found is not None, "the weights are not integers"
            entry, parts = found
        else:
            entry, parts = encode(weight.data)
        weight.data.copy_(decode(entry, parts))
        total += size(parts)
    return module, total


def prepare(options: argparse.Namespace) -> tuple[Opened, Any, Tensor, dict[str, Tensor]]:
    """The model in bf16, on disk as well, its tokenizer, and the tokens."""
    model, tokenizer = open_model()
    model.module.to(torch.bfloat16)
    calibration, evaluation = wiki()
    tokens = sample(tokenizer, calibration, options.samples, options.seqlen)
    held_out = {
        name: sample(tokenizer, text, options.eval_samples, options.seqlen, TUNED_ON)
        for name, text in (("wiki", evaluation), ("fortunes", fortunes(options.fortunes)))
    }
    options.work.mkdir(parents=True, exist_ok=True)
    model.module.save_pretrained(options.work / "dense")
    tokenizer.save_pretrained(options.work / "dense")
    save_file({"tokens": tokens}, options.work / "tokens.safetensors")
    return model, tokenizer, tokens, held_out


def models(
    options: argparse.Namespace, model: Opened, tokenizer: Any, tokens: Tensor
) -> dict[str, Callable[[], Made]]:
    """The function that makes the model of each row."""
    integers: dict[str, Any] = {"quantize": "int4", "scale_group": options.group}
    prune = partial(pruned, model, tokens=tokens, tokenizer=tokenizer)
    known: dict[str, nn.Module] = {"dense": model.module}

    def plain(pattern: str) -> nn.Module:
        if pattern not in known:
            known[pattern] = prune(module=model.module, pattern=pattern)
        return known[pattern]

    def made(start: str, how: str, pattern: str = "", **more: Any) -> Callable[[], Made]:
        def make() -> Made:
            module = plain(start)
            if pattern:
                module = prune(module=module, pattern=pattern, **more)
            return packed(model, module, options.group, how)

        return make

    found: dict[str, Callable[[], Made]] = {"dense": partial(dense, model)}
    python = environment(options.work)
    found["dense int4 (GPTQ)"] = partial(gptq, model, options, python)
    found["dense int4 with --sparsity 0"] = made("dense", "integers", "0", **integers)
    for pattern in options.patterns:
        found[pattern] = made(pattern, "kept")
        found[f"{pattern}, then int4"] = made(pattern, "rounded")
        found[f"{pattern}, then int4 with --sparsity 0"] = made(
            pattern, "integers", "0", **integers
        )
        found[f"{pattern} and int4 jointly"] = made("dense", "integers", pattern, **integers)
    return found


def main() -> None:
    options, console = arguments(), Console()
    known = known_rows(options)
    model, tokenizer, tokens, held_out = prepare(options)
    columns = ["wiki", "fortunes", "bytes"]
    rows, table = [], Table("row", *columns)
    for name, make in models(options, model, tokenizer, tokens).items():
        row = next((row for row in known if row["row"] == name), None)
        if row is None:
            module, count = make()
            with model.adapter.running(module):
                scores = {text: perplexity(module, held) for text, held in held_out.items()}
            row = {"row": name, "bytes": count, **scores}
        rows.append(row)
        shown = [f"{row[key]:,.5g}" for key in columns]
        table.add_row(name, *shown)
        console.print(*shown, name)
        names = {row["row"] for row in rows}
        save(options.json, rows + [row for row in known if row["row"] not in names], options)
    console.print(table)


if __name__ == "__main__":
    main()
