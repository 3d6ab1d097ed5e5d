"""Published choices of the blocks to drop: the last, by Block Influence, by angle, or by loss."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.extending import enter, eval_mode, loss_without

_TOKENS_FOR_LOSS = 2048


def last(model: nn.Module, adapter: Adapter, tokens: Tensor, count: int) -> list[str]:
    """The last blocks, as in "Reassessing layer pruning" (arXiv 2411.15558)."""
    return [name for name, _ in adapter.blocks(model)][-count:]


def block_influence(model: nn.Module, adapter: Adapter, tokens: Tensor, count: int) -> list[str]:
    """The blocks of lowest Block Influence (ShortGPT, arXiv 2403.03853, eq. 1).

    It is one minus the mean cosine, over tokens, of the residual streams before and after a block.
    """
    influence: dict[str, float] = {}
    for name, before, after in _streams(model, adapter, tokens):
        cosine = nn.functional.cosine_similarity(before, after, dim=-1)
        influence[name] = influence.get(name, 0.0) + float((1 - cosine).sum())
    return sorted(influence, key=lambda name: influence[name])[:count]


def angular(model: nn.Module, adapter: Adapter, tokens: Tensor, count: int) -> list[str]:
    """The consecutive blocks over which the stream turns least (arXiv 2403.17887, eq. 6).

    The angular distance is the mean over samples of ``arccos(cos) / π`` at the last token.
    """
    names = [name for name, _ in adapter.blocks(model)]
    streams: dict[str, list[Tensor]] = {name: [] for name in [*names, ""]}
    for name, before, after in _streams(model, adapter, tokens):
        streams[name].append(before[:, -1])
        if name == names[-1]:
            streams[""].append(after[:, -1])
    ends = [torch.cat(streams[name]) for name in [*names, ""]]

    def distance(start: int) -> float:
        cosine = nn.functional.cosine_similarity(ends[start], ends[start + count], dim=-1)
        return float(cosine.clamp(-1, 1).arccos().mean()) / math.pi

    start = min(range(len(names) - count + 1), key=distance)
    return names[start : start + count]


@torch.no_grad()
def by_loss(model: nn.Module, adapter: Adapter, tokens: Tensor, count: int) -> list[str]:
    """Blocks chosen one by one, each with the lowest loss after its removal (arXiv 2402.09025).

    The loss is computed on the first samples, about 2,048 tokens in total.
    """
    sample = tokens[: max(1, _TOKENS_FOR_LOSS // tokens.shape[1])]
    remaining, dropped = [name for name, _ in adapter.blocks(model)], list[str]()
    while len(dropped) < count:
        losses = {n: loss_without(model, adapter, sample, [*dropped, n]) for n in remaining}
        dropped.append(min(losses, key=lambda name: losses[name]))
        remaining.remove(dropped[-1])
    return dropped


@torch.no_grad()
def _streams(
    model: nn.Module, adapter: Adapter, tokens: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The residual streams (samples, seqlen, hidden) before and after each block, by batch."""
    with eval_mode(model), adapter.running(model):
        for batch in enter(adapter, model, tokens):
            state = batch.state
            for (name, block), call in zip(adapter.blocks(model), batch.calls, strict=True):
                before = adapter.residual(state)
                state = adapter.step(block, state, call)
                yield name, before.float(), adapter.residual(state).float()
