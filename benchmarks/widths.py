"""Narrower models of many types: each kind of groups of a tiny random model is removed in part.

A row says whether plain transformers opens the narrower model without a warning, how far its logits
are from those of the whole model whose readers have zeros for the removed groups, compared with the
effect of these zeros, and whether it generates text::

    python benchmarks/widths.py --json benchmarks/results/widths.json
    python benchmarks/pages.py
    python benchmarks/widths.py --only 'qwen*' gpt2
"""

import argparse
import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from common import save
from families import adapter_for
from torch import Tensor, nn

from apt.adapter import Adapter, Groups
from apt.checkpoints.smaller import shrunk

Row = dict[str, Any]
Chosen = dict[str, list[int]]  # the removed groups of each block

TYPES = (
    "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "glm4", "cohere2", "olmo2", "smollm3", "granite",
    "gpt2", "gpt_neox", "starcoder2", "falcon",
)  # fmt: skip
SHARES = {"channels": 0.75}
"""The share of the groups that is kept, by kind; one half of the others."""


def rows(model_type: str, adapter: Adapter | None = None) -> Iterator[Row]:
    """A row for each kind of groups of a type; with two query heads for a key/value head.

    The adapter is the one that serves the type by default.
    """
    fields = tiny.config(model_type).to_dict()
    shared = {"num_key_value_heads": 2} if "num_key_value_heads" in fields else {}
    model = tiny.model(model_type, **shared)
    name, usual = adapter_for(model_type)
    adapter = adapter or usual
    _, first = adapter.blocks(model)[0]
    for groups in adapter.groups(first, model.config):
        removed = chosen(model, adapter, groups)
        gone = len(next(iter(removed.values())))
        yield {
            "type": model_type,
            "adapter": name,
            "kind": groups.kind,
            "count": groups.count,
            "kept": groups.count - gone,
            **narrowed(model, adapter, groups.kind, removed),
        }


def chosen(model: nn.Module, adapter: Adapter, groups: Groups) -> Chosen:
    """Groups to remove, as many of each bin, and others in each block."""
    each = groups.count // groups.bins
    gone = round(each * (1 - SHARES.get(groups.kind, 0.5)))
    return {
        name: [
            first + (index + 2 * place) % each
            for first in range(0, groups.count, each)
            for place in range(gone)
        ]
        for index, (name, _) in enumerate(adapter.blocks(model))
    }


@torch.no_grad()
def narrowed(model: Any, adapter: Adapter, kind: str, removed: Chosen) -> Row:
    """What becomes of a model without some groups."""
    tokens = tiny.tokens(2, 16)
    masked = copy.deepcopy(model)
    silence(masked, adapter, kind, removed)
    expected = masked(tokens).logits
    small = shrunk(model, adapter, {name: {kind: gone} for name, gone in removed.items()})
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        with told() as lines:
            opened = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found = opened(tokens).logits
    start = {"inputs": tokens[:, :4], "attention_mask": torch.ones(2, 4), "pad_token_id": 0}
    text = opened.generate(**start, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return {
        "difference": float((found - expected).abs().max()),
        "effect": float((expected - model(tokens).logits).abs().max()),
        "warnings": lines,
        "generates": text.shape == (2, 7),
    }


def silence(model: nn.Module, adapter: Adapter, kind: str, removed: Chosen) -> None:
    """Set the columns that read the removed groups to zero."""
    config: Any = model.config
    for name, block in adapter.blocks(model):
        sites = {site.name: site for site in adapter.sites(block)}
        for groups in adapter.groups(block, config):
            for reader in groups.readers if groups.kind == kind else ():
                weight: Tensor = sites[reader].oriented(sites[reader].weight(block))
                torch.unflatten(weight, 1, (groups.count, -1))[:, removed[name]] = 0


@contextmanager
def told() -> Iterator[list[str]]:
    """Inside the context, the warnings of transformers and of Python are appended to a list."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
        lines += [str(warning.message) for warning in caught]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    found = []
    for model_type in TYPES:
        if any(fnmatch(model_type, glob) for glob in options.only):
            for row in rows(model_type):
                found.append(row)
                print(row, flush=True)
    save(options.json, found)


if __name__ == "__main__":
    main()
