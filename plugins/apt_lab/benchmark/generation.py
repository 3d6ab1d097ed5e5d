"""The speed of prefill and decoding."""

from typing import Any

from torch import Tensor

from apt.evaluation.generation import token_times
from apt_lab.benchmark.measures import Speed

_WARM_UP = 2  # generated tokens: one prefill and one step of decoding


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
