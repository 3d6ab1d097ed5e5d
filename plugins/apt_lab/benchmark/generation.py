"""The time of prefill and decoding: greedy generation with a cache by transformers."""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from apt.devices import synchronize
from apt.text.sampling import drawn, generator, vocabulary
from apt.text.special_tokens import named_ids
from apt_lab.benchmark.measures import Speed

_WARM_UP = 2  # generated tokens: one prefill and one step of decoding


class _FirstToken:
    """A stopping criterion that never stops, and records the time of its first call."""

    def __init__(self) -> None:
        self.time: float | None = None

    def __call__(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.time is None:
            synchronize(tokens.device)
            self.time = perf_counter()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def prompts(model: Any, batch: int, length: int, seed: int) -> Tensor:
    """Random token ids (batch, length) on the model's device, without special tokens.

    A tokenizer is not needed: the configurations of the model name the special tokens.
    """
    tokens = drawn(vocabulary(model), (batch, length), generator(seed), named_ids(model))
    return tokens.to(next(model.parameters()).device)


def speed(model: Any, tokens: Tensor, generate: int) -> Speed:
    """The speed of one batch.

    First, the batch runs once with two generated tokens and without a measurement: the first run of
    a shape allocates memory and may load or choose kernels.

    Args:
        model: a model of transformers that can generate text.
        tokens: token ids (batch, prompt).
        generate: the number of tokens to generate in each sequence. The end of a text is ignored.
    """
    _timed(model, tokens, _WARM_UP)
    prefill, decode = _timed(model, tokens, generate)
    batch = len(tokens)
    return Speed(batch, tokens.numel() / prefill, batch * (generate - 1) / decode)


def _timed(model: Any, tokens: Tensor, generate: int) -> tuple[float, float]:
    """The seconds to the first generated token, and the seconds for all others."""
    # A model's own configuration may sample, penalise repetition or stop at the end of a text.
    config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, pad_token_id=0,
        max_new_tokens=generate, eos_token_id=None,
    )  # fmt: skip
    model.generation_config = config
    first_token = _FirstToken()
    synchronize(tokens.device)
    start = perf_counter()
    text = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=config,
        stopping_criteria=[first_token],
    )  # fmt: skip
    synchronize(tokens.device)
    end = perf_counter()
    if first_token.time is None or text.shape[1] != tokens.shape[1] + generate:
        raise RuntimeError(f"it generated {text.shape[1] - tokens.shape[1]} tokens, not {generate}")
    return first_token.time - start, end - first_token.time
