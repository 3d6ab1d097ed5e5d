"""The measurements for a page that need the models: losses by frequency, and continuations."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt import Report
from apt.checkpoints.architecture import quantised_with
from apt.checkpoints.load import fingerprint
from apt.compute import ComputeDtype, compute_dtype
from apt.errors import AptError
from apt.extending import (
    Document,
    Registry,
    Source,
    capped,
    check_same_vocabulary,
    check_vocabulary,
    load,
    load_tokenizer,
    open_skeleton,
)
from apt.locations.model_source import find
from apt.text.datasets import documents, evaluation_tokens
from apt.text.special_tokens import bos_of
from apt_lab.reporting.beside_dense import (
    Continuation,
    FrequencyGroup,
    by_frequency,
    continuations,
    token_losses,
)

_SEQLEN, _WINDOWS = 512, 16
_PROMPT, _NEW = 24, 40  # tokens
_CHARACTERS = 400  # of a paragraph, more than a prompt has


@dataclass(frozen=True)
class Beside:
    """The comparison of a model of the page with the dense model.

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
    weights: str | None = None,
) -> Beside:
    """Compare a model of a page with the dense model.

    Args:
        directory: the directory of the pruned model.
        dense: the dense model.
        source: the data source of the text.
        prompts: the number of continuations.
        registry: the plugins.
        status: called with a text for each step.
        weights: the fingerprint that the dense model must have; None for any model.

    Raises:
        AptError: a model or the text cannot be read, the models have different vocabularies, or the
            dense model has another fingerprint.
    """
    status(f"reading {source}")
    tokenizer = load_tokenizer(dense)
    sources = dense, find(str(directory), registry)
    skeletons = [open_skeleton(model_source, registry, packed=True) for model_source in sources]
    check_same_vocabulary(skeletons[1], skeletons[0])
    texts = documents(source, "evaluation", registry)
    bos = bos_of(tokenizer)
    seqlen = min(capped(_SEQLEN, skeleton, lambda line: None) for skeleton in skeletons)
    tokens = evaluation_tokens(tokenizer, texts, _WINDOWS, seqlen, source, bos, fewer=True)
    check_vocabulary(tokens, skeletons[0].module, dense.reference)
    status("loading the models")
    models = [load(skeleton, None, "cpu") for skeleton in skeletons]
    if weights not in (None, fingerprint(models[0].module)):
        raise AptError(
            f"{dense.reference} is not the model from which {directory} was pruned",
            "name that model",
            ("dense",),
        )
    losses = []
    for model in models:
        if quantised_with(model.config) is None:
            ComputeDtype(model.module, compute_dtype(model.dtype, "cpu"))
        status(f"measuring {model.source.reference}")
        with model.adapter.running(model.module):
            losses.append(token_losses(model.module, tokens))
    status("writing text")
    length = min(_PROMPT, seqlen // 2)
    texts = documents(source, "evaluation", registry)
    begins = _beginnings(tokenizer, texts, prompts, length)
    new = min(_NEW, seqlen - length)
    written = continuations([model.module for model in models], tokenizer, begins, new)
    return Beside(source, by_frequency(tokens, *losses), written)


def weights_before(report: Report) -> str | None:
    """The fingerprint of the dense weights of a run; None if it cannot be compared.

    A streamed run records the checksum of the files instead, and ``--dtype`` changes the weights.
    """
    options = report.options
    if options.get("stream") or options.get("dtype") != "auto" or report.recovery:
        return None
    return report.model.get("sha256")


def _beginnings(tokenizer: Any, texts: Iterable[Document], count: int, length: int) -> list[Tensor]:
    """The first ``length`` tokens of the first paragraphs or conversations that have as many."""
    paragraphs = (
        part
        for text in texts
        for part in (text.split("\n\n") if isinstance(text, str) else [text.rendered(tokenizer)])
    )
    encoded = (tokenizer(part[:_CHARACTERS])["input_ids"][:length] for part in paragraphs)
    prompts = (torch.tensor(ids) for ids in encoded if len(ids) == length)
    return list(islice(prompts, count))
