"""The speed of prefill and decoding, and of models that read samples."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from apt.adapter.recording import eval_mode
from apt.devices import synchronize
from apt.evaluation.generation import token_times
from apt_lab.benchmark.measures import Speed

_WARM_UP = 2  # generated tokens: one prefill and one step of decoding
_LEAST = 0.3  # seconds of forwards, so that a short one is measured several times


def speed(model: Any, tokens: Tensor, generate: int) -> Speed:
    """The speed of one batch.

    First, the batch runs once with two generated tokens and without a measurement: the first run of
    a shape allocates memory and may load or choose kernels.

    Args:
        model: a model of transformers that can generate text.
        tokens: token ids (batch, prompt).
        generate: the number of tokens to generate in each sequence. The end of a text is ignored.
    """
    token_times(model, tokens, _WARM_UP)
    first, *_, last = token_times(model, tokens, generate)
    batch = len(tokens)
    return Speed(batch, tokens.numel() / first, batch * (generate - 1) / (last - first))


def speed_on_samples(model: Any, inputs: Mapping[str, Tensor], generate: int | None) -> Speed:
    """The speed of one batch of a model that does not read windows of text.

    Args:
        inputs: the inputs by the names of the model's arguments (batch, …).
        generate: the number of tokens to write for each sample; None for a model that does not
            write.
    """
    batch = len(next(iter(inputs.values())))
    if generate is None:
        return Speed(batch, batch / _forward_seconds(model, inputs), None)
    token_times(model, inputs, _WARM_UP)
    first, *_, last = token_times(model, inputs, generate)
    return Speed(batch, batch / first, batch * (generate - 1) / (last - first))


@torch.no_grad()
def _forward_seconds(model: Any, inputs: Mapping[str, Tensor]) -> float:
    """The mean seconds of a forward, after one that is not measured."""
    device, count = next(model.parameters()).device, 0
    with eval_mode(model):
        model(**inputs)
        synchronize(device)
        start = perf_counter()
        while (seconds := perf_counter() - start) < _LEAST or not count:
            model(**inputs)
            synchronize(device)
            count += 1
    return seconds / count
