"""The times of the tokens of a greedy generation with a cache, by transformers."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from apt.devices import synchronize
from apt.text.sampling import drawn, generator, vocabulary
from apt.text.special_tokens import named_ids


class _Arrivals:
    """A stopping criterion that never stops, and records the time of each of its calls."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.times, self._clock = list[float](), clock

    def __call__(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        synchronize(tokens.device)
        self.times.append(self._clock())
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def prompts(model: Any, batch: int, length: int, seed: int) -> Tensor:
    """Random token ids (batch, length) on the model's device, without special tokens.

    A tokenizer is not needed: the configurations of the model name the special tokens.
    """
    tokens = drawn(vocabulary(model), (batch, length), generator(seed), named_ids(model))
    return tokens.to(next(model.parameters()).device)


def token_times(
    model: Any, tokens: Tensor, generate: int, clock: Callable[[], float] = perf_counter
) -> list[float]:
    """The seconds from the start to each generated token of a batch.

    Args:
        model: a model of transformers that can generate text.
        tokens: token ids (batch, prompt).
        generate: the number of tokens to generate in each sequence. The end of a text is ignored.
        clock: returns the time in seconds.

    Raises:
        RuntimeError: the model generated another number of tokens.
    """
    # A model's own configuration may sample, penalise repetition or stop at the end of a text.
    config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, pad_token_id=0,
        max_new_tokens=generate, eos_token_id=None,
    )  # fmt: skip
    model.generation_config = config
    arrivals = _Arrivals(clock)
    synchronize(tokens.device)
    start = clock()
    text = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=config,
        stopping_criteria=[arrivals],
    )  # fmt: skip
    if len(arrivals.times) != generate or text.shape[1] != tokens.shape[1] + generate:
        raise RuntimeError(f"it generated {text.shape[1] - tokens.shape[1]} tokens, not {generate}")
    return [time - start for time in arrivals.times]
