"""The measurements of a page that need the models: losses by frequency, and continuations."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.checkpoints.load import load, load_tokenizer, skeleton
from apt.errors import AptError
from apt.evaluation.beside_dense import (
    Continuation,
    FrequencyGroup,
    by_frequency,
    continuations,
    token_losses,
)
from apt.locations.model_source import Source, find
from apt.plugin.registry import Registry
from apt.runs.prepare import capped
from apt.runs.text import check_vocabulary
from apt.text.datasets import documents, evaluation_tokens
from apt.text.special_tokens import bos_of

_SEQLEN, _WINDOWS = 512, 16
_PROMPT, _NEW = 24, 40  # tokens
_CHARACTERS = 400  # of a paragraph, more than a prompt has


@dataclass(frozen=True)
class Beside:
    """What a model of the page does beside the dense one.

    Attributes:
        source: the data source of the text.
        groups: the losses by frequency.
        texts: the continuations.
    """

    source: str
    groups: Sequence[FrequencyGroup]
    texts: Sequence[Continuation]


def compare_texts(
    directory: Path,
    dense: Source,
    source: str,
    prompts: int,
    registry: Registry,
    status: Callable[[str], None] = lambda text: None,
) -> Beside:
    """Measure a model of a page beside the dense one.

    Args:
        directory: the directory of the pruned model.
        dense: the dense model.
        source: the data source of the text.
        prompts: the number of continuations.
        registry: the plugins.
        status: called with a text for each step.

    Raises:
        AptError: a model or the text cannot be read, or the models have different vocabularies.
    """
    status(f"reading {source}")
    tokenizer = load_tokenizer(dense)
    sources = dense, find(str(directory), registry)
    shells = [skeleton(found, registry, packed=True) for found in sources]
    sizes = {shell.module.get_input_embeddings().weight.shape[0] for shell in shells}  # type: ignore[operator]
    if len(sizes) > 1:
        raise AptError(
            f"{directory} and {dense.reference} have different vocabularies",
            "name the model from which it was pruned",
            ("dense",),
        )
    texts, bos = documents(source, "evaluation", registry), bos_of(tokenizer)
    room = min(capped(_SEQLEN, shell, lambda line: None) for shell in shells)
    tokens = evaluation_tokens(tokenizer, texts, _WINDOWS, room, source, bos, fewer=True)
    check_vocabulary(tokens, shells[0].module, dense.reference)
    losses, models = [], []
    for shell in shells:
        status(f"measuring {shell.source.reference}")
        models.append(load(shell, None, "cpu"))
        with models[-1].adapter.running(models[-1].module):
            losses.append(token_losses(models[-1].module, tokens))
    status("writing text")
    length = min(_PROMPT, room // 2)
    begins = _beginnings(
        tokenizer, documents(source, "evaluation", registry), prompts, length
    )  # fmt: skip
    new = min(_NEW, room - length)
    written = continuations([model.module for model in models], tokenizer, begins, new)
    return Beside(source, by_frequency(tokens, *losses), written)


def _beginnings(tokenizer: Any, texts: Iterable[str], count: int, length: int) -> list[Tensor]:
    """The first ``length`` tokens of the first paragraphs that are long enough."""
    paragraphs = (part for text in texts for part in text.split("\n\n"))
    encoded = (tokenizer(part[:_CHARACTERS])["input_ids"][:length] for part in paragraphs)
    whole = (torch.tensor(ids) for ids in encoded if len(ids) == length)
    return list(islice(whole, count))
