"""Calibration text that the model generates itself.

Weights that are fitted to one kind of text have larger errors on other kinds. Text that a model
generates after random first tokens covers the whole range of its training data, and requires no
data. This is self-calibration (Williams et al., arXiv 2410.17170). Here it is used alone or in
addition to given text.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from apt.adapter.recording import eval_mode
from apt.adapter.wrapped import check_in_memory
from apt.arguments import checked
from apt.compute import if_it_runs, mixed_precision
from apt.devices import keep_random_states
from apt.errors import AptError
from apt.modes import default_modes
from apt.text.datasets import text_width, with_bos
from apt.text.language_model import language_model
from apt.text.sampling import drawn, generator, vocabulary
from apt.text.special_tokens import named_ids, tokens_of

_PIECE = 256  # tokens of one generated sequence; a longer sample consists of several
_AT_ONCE = 32  # sequences in a batch
_USES, _GIVEN_PER_OWN = 2, 3  # of generated samples in a training


def cached_tokens(seqlen: int) -> int:
    """The number of tokens in the key-value cache while samples of ``seqlen`` are generated."""
    return _AT_ONCE * min(seqlen, _PIECE)


def logits_at_once() -> int:
    """The number of tokens whose logits are computed at a time."""
    return _AT_ONCE


def writes(model: nn.Module) -> bool:
    """True if transformers can generate text with ``model``."""
    return isinstance(model, GenerationMixin)


@default_modes()
@torch.no_grad()
@checked
def own_text(
    model: nn.Module,
    samples: int,
    seqlen: int,
    seed: int = 0,
    *,
    bos: int | None = None,
    special: Collection[int] | None = None,
    compute: str = "float32",
) -> Tensor:
    """Token ids (samples, seqlen) that the model generates.

    A sample is one generated sequence, or several if it is long. Each sequence begins with a random
    token. All other tokens are sampled at temperature 1, without top-k or top-p.

    Args:
        model: a causal language model of transformers.
        samples, seqlen: the shape of the result.
        seed: the seed; it gives the same text on the same machine.
        bos: the token with which the tokenizer begins a text, see `bos_of`; None for none. Each
            sample begins with it, and the model receives it before each sequence.
        special: special tokens, with which no sequence begins; by default the tokens that the
            model's configurations name.
        compute: the name of the dtype of products with fp32 weights, see
            `apt.compute.mixed_precision`.

    Raises:
        AptError: the model cannot generate text, or the shape or the seed is out of range.
    """
    if samples < 0 or seqlen < 2:
        message = f"{samples} samples of {seqlen} tokens cannot be generated"
        raise AptError(message, "give 0 or more samples of at least 2 tokens")
    if not isinstance(model, GenerationMixin):
        message = f"{type(model).__name__} cannot generate calibration text"
        raise AptError(message, "use 0 own samples", ("own_samples",))
    check_in_memory(model, streamed=True)
    if bos is not None and not 0 <= bos < vocabulary(model):
        message = f"bos is {bos}, and the model has {vocabulary(model)} tokens"
        raise AptError(message, "give a token of the model, or None", ("bos",))
    device, width = next(model.parameters()).device, text_width(seqlen, bos)
    piece = min(width, _PIECE)
    count = math.ceil(samples * width / piece)
    draw = generator(seed)
    special = named_ids(model) if special is None else special
    starts = with_bos(drawn(vocabulary(model), (count, 1), draw, special), bos).to(device)
    with (
        eval_mode(cast(nn.Module, model)),
        keep_random_states(),  # OPT draws random numbers in each forward
        _precision(model, compute, starts[:1]),
    ):
        use_cache = piece > 1 and _continues_from_cache(model, starts[:1])
        torch.manual_seed(seed)
        text = _continued(model, starts, piece - 1, seed, use_cache=use_cache)
    text = text[:, starts.shape[1] - 1 :].cpu().flatten()
    return with_bos(text[: samples * width].view(samples, width), bos)


def beside_given(given: Tensor, own: Tensor) -> Tensor:
    """Given windows (windows, seqlen) to train on, and generated samples among the first of them.

    Every fourth window is a generated one, until each was used twice or the given text is used up.
    The last windows, which a training holds back, are given ones.

    Args:
        own: the generated samples, which may be longer.
    """
    seqlen = given.shape[1]
    pieces = [piece for piece in torch.split(own, seqlen, dim=1) if piece.shape[1] == seqlen]
    if not pieces:
        return given
    own = torch.cat(pieces).repeat(_USES, 1)
    count = min(len(own), len(given) // (_GIVEN_PER_OWN + 1))
    rest = _GIVEN_PER_OWN * count
    groups = given[:rest].view(count, _GIVEN_PER_OWN, seqlen), own[:count].unsqueeze(1)
    return torch.cat([torch.cat(groups, 1).flatten(0, 1), given[rest:]])


def _continues_from_cache(model: GenerationMixin, start: Tensor) -> bool:
    """True if the model can continue a text from its cached keys and values.

    In transformers 5.24, a decoder of Blenderbot without its encoder, and hybrids whose layers have
    no attention at all, cannot. They read the whole text for each token.
    """
    if model.generation_config.use_cache is False:
        return False
    try:
        _continued(model, start, 2, 0, use_cache=True)
    except (IndexError, ValueError):
        return False
    return True


def _continued(
    model: GenerationMixin, starts: Tensor, count: int, seed: int, *, use_cache: bool
) -> Tensor:
    """``starts`` (sequences, n) continued by the model (sequences, n + count)."""
    if not count or not len(starts):
        return starts
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
        eos_token_id=tokens_of(model.generation_config, "eos_token_id") or None,
        use_cache=use_cache,
    )  # fmt: skip
    sampling = LogitsProcessorList([_Sampling(seed)])
    reader: Any = language_model(cast(nn.Module, model))
    with _generation_config(reader, config):
        parts = [
            reader.generate(
                part,
                attention_mask=torch.ones_like(part),
                generation_config=config,
                logits_processor=sampling,
            )
            for part in torch.split(starts, _AT_ONCE)
        ]
    return torch.cat(parts)


class _Sampling(LogitsProcessor):  # type: ignore[misc]  # transformers: untyped
    """Draws the next token from its distribution, so that greedy generation chooses this token.

    It needs one random number for each sequence. ``torch.multinomial`` draws one for each token of
    the vocabulary, on one thread, which takes a third of the time of a small model.
    """

    def __init__(self, seed: int) -> None:
        self._generator = generator(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (sequences, vocabulary) that are finite for the drawn tokens only."""
        # The pruning reports values that are not finite with their block.
        scores = scores.nan_to_num(0.0, torch.finfo(scores.dtype).max, -math.inf)
        sums = scores.softmax(-1, torch.float32).cumsum(-1, dtype=torch.float64)
        random = torch.rand((len(sums), 1), generator=self._generator, dtype=torch.float64)
        drawn_token = torch.searchsorted(sums, random.to(sums.device) * sums[:, -1:], right=True)
        chosen = torch.full_like(scores, -math.inf)
        return chosen.scatter_(1, drawn_token.clamp_max(scores.shape[1] - 1), 0.0)


def _precision(model: nn.Module, compute: str, start: Tensor) -> torch.autocast:
    """The precision of the products. A model in memory keeps copies of its weights in bf16."""
    in_memory = not any(parameter.is_meta for parameter in model.parameters())
    mixed = mixed_precision(model.parameters(), compute, cache=in_memory)
    return if_it_runs(mixed, lambda: language_model(model)(input_ids=start, use_cache=False))


@contextmanager
def _generation_config(model: GenerationMixin, config: GenerationConfig) -> Iterator[None]:
    """Inside the context, the model has another configuration.

    ``generate`` takes unset options from the configuration of the model. Its own configuration may
    penalise repetition, and would change the distribution of the tokens.
    """
    previous = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = previous
