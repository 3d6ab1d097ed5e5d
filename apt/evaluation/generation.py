"""The times of the tokens of a greedy generation with a cache, by transformers."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

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
    model: Any,
    inputs: Tensor | Mapping[str, Tensor],
    generate: int,
    clock: Callable[[], float] = perf_counter,
) -> list[float]:
    """The seconds from the start to each generated token of a batch.

    Args:
        model: a model of transformers that can generate text.
        inputs: token ids (batch, prompt), or the inputs of an encoder with a decoder by the names
            of its arguments (batch, …).
        generate: the number of tokens to generate in each sequence. The end of a text is ignored.
        clock: returns the time in seconds.

    Raises:
        RuntimeError: the model generated another number of tokens.
    """
    tokens = inputs if isinstance(inputs, Tensor) else inputs.get("input_ids")
    masks = {} if tokens is None else {"attention_mask": torch.ones_like(tokens)}
    given = {"inputs": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    # A model's own configuration may sample, penalise repetition or stop at the end of a text.
    config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, pad_token_id=0,
        max_new_tokens=generate, eos_token_id=None,
        decoder_start_token_id=_start_of_output(model),
    )  # fmt: skip
    model.generation_config = config
    # Whisper's own way transcribes long sounds in parts, and ends early.
    run = type(model).generate if isinstance(inputs, Tensor) else GenerationMixin.generate
    arrivals, device = _Arrivals(clock), next(iter(given.values())).device
    synchronize(device)
    start = clock()
    text = run(model, **given, **masks, generation_config=config, stopping_criteria=[arrivals])
    before = inputs.shape[1] if isinstance(inputs, Tensor) else 1
    if len(arrivals.times) != generate or text.shape[1] != before + generate:
        raise RuntimeError(f"it generated {text.shape[1] - before} tokens, not {generate}")
    return [time - start for time in arrivals.times]


def _start_of_output(model: Any) -> int | None:
    """The token with which the output of an encoder with a decoder begins; else None."""
    places = getattr(model, "generation_config", None), model.config
    starts = (getattr(place, "decoder_start_token_id", None) for place in places)
    return next((start for start in starts if start is not None), None)
