"""The time of a block of a smaller model on this machine."""

import time
from collections.abc import Callable, Mapping
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import nn

from apt.adapter import Adapter, Groups
from apt.adapter.recording import eval_mode
from apt.adapter.text_config import text_config
from apt.checkpoints.skeletons import skeleton_of_class, with_random_weights
from apt.checkpoints.smaller import resized
from apt.devices import synchronize
from apt.text.sampling import generator

_ROUNDS, _WARM_UP = 9, 2


def block_times(
    model: nn.Module, adapter: Adapter, config: Any, device: str, seqlen: int
) -> Callable[[Mapping[str, int]], float]:
    """A function from numbers of groups to the seconds of a forward of the first block.

    The block has random weights and gets one sample of random tokens. Each number of groups of a
    kind is measured once, in a block with all groups of the other kinds. Groups of different kinds
    have different readers, so that the saved times add up.

    Args:
        model: the model; it may be a skeleton.
    """
    blocks = adapter.blocks(model)
    groups = {g.kind: g for _, block in blocks for g in adapter.groups(block, config)}

    @cache
    def measured_seconds(*kept: tuple[str, int]) -> float:
        small = _one_block(type(model), config, groups, dict(kept), len(blocks), device)
        return _seconds(small, adapter, seqlen, device)

    def seconds(kept: Mapping[str, int]) -> float:
        return measured_seconds() - sum(
            measured_seconds() - measured_seconds(entry) for entry in kept.items()
        )

    return seconds


def _one_block(
    kind: Any,
    config: Any,
    groups: Mapping[str, Groups],
    kept: Mapping[str, int],
    blocks: int,
    device: str,
) -> nn.Module:
    """A model of one block with ``kept`` groups."""
    removed = [(groups[name], groups[name].count - count) for name, count in kept.items()]
    model = skeleton_of_class(kind, resized(config, removed, range(1), blocks), config)
    return with_random_weights(model, device)


@torch.no_grad()
def _seconds(model: nn.Module, adapter: Adapter, seqlen: int, device: str) -> float:
    """The median time of a forward of the first block."""
    vocabulary = text_config(model.config).vocab_size
    tokens = torch.randint(vocabulary, (1, seqlen), generator=generator(0)).to(device)
    with eval_mode(model), adapter.running(model):
        state, calls = adapter.enter(model, tokens)
        block, times = adapter.blocks(model)[0][1], list[float]()
        for _ in range(_WARM_UP + _ROUNDS):
            synchronize(device)
            started = time.perf_counter()
            adapter.step(block, state, calls[0])
            synchronize(device)
            times.append(time.perf_counter() - started)
    return median(times[_WARM_UP:])
