"""Measure what magnitude pruning does to the BERT and the T5: ``python zoo/magnitude.py bert|t5``.

Each matrix inside the blocks is pruned by itself. The stored weights are computed in float32. The
rows are those of the tables in ``README.md``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import bert
import corpus
import pairs
import t5
import torch
from train import ZOO_DIR
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from apt.patterns import Pattern, parse_pattern

PATTERNS = ("0.3", "0.5", "2:4", "0.6", "0.7")


class Trial(NamedTuple):
    """A model, the prefix of the names of its blocks' matrices, and the text of its figures."""

    model: torch.nn.Module
    blocks: tuple[str, ...]
    figures: Callable[[torch.nn.Module], str]


def open_bert(directory: Path) -> Trial:
    """Open the BERT with the questions of its model card."""
    model = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32)
    documents = corpus.head(corpus.load_split().evaluation, corpus.EVALUATION_BYTES)
    rows = bert.encode(AutoTokenizer.from_pretrained(directory), documents)
    questions = bert.ask(rows, bert.ASKED_PER_DOCUMENT)
    return Trial(
        model, ("bert.encoder.",), lambda pruned: f"{bert.pseudo_perplexity(pruned, questions):.2f}"
    )


def open_t5(directory: Path) -> Trial:
    """Open the T5 with the evaluation pairs."""
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer, held_out = AutoTokenizer.from_pretrained(directory), pairs.evaluation_pairs()
    return Trial(
        model,
        ("encoder.block.", "decoder.block."),
        lambda pruned: t5.measure(pruned, tokenizer, held_out).row(),
    )


OPEN = {"bert": open_bert, "t5": open_t5}


@torch.no_grad()
def prune(trial: Trial, pattern: Pattern) -> torch.nn.Module:
    """Return a copy of the model whose blocks' matrices have zeros at the smallest weights."""
    model = copy.deepcopy(trial.model)
    for name, module in model.named_modules():
        if name.startswith(trial.blocks) and isinstance(module, torch.nn.Linear):
            weight = module.weight
            weight[pattern.lowest(weight.float().abs())] = 0
    return model


def main() -> None:
    """Print the figures of the dense model and of each pattern."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=OPEN)
    name = parser.parse_args().model
    trial = OPEN[name](ZOO_DIR / name)
    print(f"dense {trial.figures(trial.model)}", flush=True)
    for pattern in PATTERNS:
        print(f"{pattern} {trial.figures(prune(trial, parse_pattern(pattern)))}", flush=True)


if __name__ == "__main__":
    main()
