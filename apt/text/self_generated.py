"""Text to calibrate on that the model writes itself.

Weights that are fitted to one kind of text lose more on others. What a model writes, begun with
tokens drawn at random, is spread over all that it was trained on, and needs no data: that is
self-calibration (Williams et al., arXiv 2410.17170), here beside text that is given, or alone.
"""

import math
from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

from apt.adapter.eval_mode import eval_mode
from apt.errors import AptError
from apt.text.datasets import begun, text_width
from apt.text.sampling import drawn, generator, vocabulary
from apt.text.special_tokens import named_ids

_PIECE = 256  # tokens that are written in one go; a longer sample is several
_AT_ONCE = 32  # pieces


def cached_tokens(seqlen: int) -> int:
    """Of how many tokens a model keeps keys and values while it writes samples of ``seqlen``."""
    return _AT_ONCE * min(seqlen, _PIECE)


def logits_at_once() -> int:
    """For how many tokens it makes logits at a time."""
    return _AT_ONCE


def writes(model: nn.Module) -> bool:
    """Whether it can write text: whether transformers knows how to generate with it."""
    return isinstance(model, GenerationMixin)


@torch.no_grad()
def own_text(
    model: nn.Module,
    samples: int,
    seqlen: int,
    seed: int = 0,
    *,
    bos: int | None = None,
    special: Collection[int] | None = None,
) -> Tensor:
    """Token ids (samples, seqlen) as the model draws them, without a bias to likely ones.

    A sample is one piece of text or, where it is long, several; each begins with any token.

    Args:
        model: a causal language model of transformers.
        samples, seqlen: how much.
        seed: draws it: the same text on the same machine.
        bos: what each sample begins with, and what the model is given before each piece: the token
            that its tokenizer begins a text with, see `bos_of`. None for none.
        special: tokens that are no text, and with which no piece begins; by default those that the
            model's configurations name.

    Raises:
        AptError: the model cannot generate, or there is no such amount of text, or no such seed.
    """
    if samples < 0 or seqlen < 2:
        raise AptError(
            f"{samples} samples of {seqlen} tokens cannot be written",
            "give 0 or more samples of at least 2 tokens",
        )
    if not isinstance(model, GenerationMixin):
        raise AptError(
            f"{type(model).__name__} cannot write text to calibrate on",
            "use 0 own samples",
            ("own_samples",),
        )
    device, width = next(model.parameters()).device, text_width(seqlen, bos)
    piece = min(width, _PIECE)
    count = math.ceil(samples * width / piece)
    draw = generator(seed)
    special = named_ids(model) if special is None else special
    starts = begun(drawn(vocabulary(model), (count, 1), draw, special), bos).to(device)
    text = _gone_on(model, starts, piece - 1, seed)[:, starts.shape[1] - 1 :].cpu().flatten()
    return begun(text[: samples * width].view(samples, width), bos)


def _gone_on(model: GenerationMixin, starts: Tensor, more: int, seed: int) -> Tensor:
    """``starts`` (pieces, n) with so many tokens more (pieces, n + more)."""
    if not more or not len(starts):
        return starts
    how = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=more, min_new_tokens=more, pad_token_id=0,
        remove_invalid_values=True,  # it is for the pruning to say where they come from
    )  # fmt: skip
    devices = [starts.device] if starts.device.type == "cuda" else []
    with eval_mode(cast(nn.Module, model)), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        parts = [
            model.generate(part, attention_mask=torch.ones_like(part), generation_config=how)
            for part in torch.split(starts, _AT_ONCE)
        ]
    return torch.cat(parts)
