"""The removal of groups without readers: states of a scan, and experts.

No matrix multiplies the outputs of these groups. So they are chosen by what the block's output
loses: the block is run on a few tokens without each of them (for experts, this is close to the
saliency of REAP, arXiv 2510.13999). The sites behind them then compensate for the loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.adapter.groups import disconnect
from apt.calibration.batches import Batch
from apt.distributed.ranks import Ranks
from apt.planning.plan import PlannedGroups
from apt.solver import ColumnGroups
from apt.tuning.block_forward import stream_after

_TOKENS = 2048


def disconnect_groups(
    adapter: Adapter,
    block: nn.Module,
    index: int,
    batches: list[Batch],
    planned: PlannedGroups,
    ranks: Ranks,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Set the outputs of the groups to zero without which the block's output changes least.

    Args:
        batches: this rank's batches before the block; the first ones are used.
    """
    groups, chosen = planned.groups, planned.chosen
    if chosen is None:
        losses = torch.zeros(groups.count)
        parameters = {path: p.detach() for path, p in block.named_parameters()}
        for batch in _few(batches):
            call = batch.calls[index]
            whole = stream_after(adapter, block, {}, batch.state, call).float()
            for group in range(groups.count):
                paths = {part.parameter for part in groups.outputs}
                without = {path: parameters[path].clone() for path in paths}
                disconnect(without, groups, [group])
                changed = stream_after(adapter, block, without, batch.state, call).float()
                losses[group] += _loss(whole, changed)
                progress()
        ranks.add(losses)
        pattern = ColumnGroups(groups.count, planned.kept, groups.bins)
        chosen = tuple(ranks.share(pattern.lowest(losses).nonzero().squeeze(1).tolist()))
    disconnect(dict(block.named_parameters()), groups, chosen)


def _few(batches: list[Batch]) -> list[Batch]:
    """The first batches, with about `_TOKENS` tokens; at least one."""
    return batches[: 1 + int((_TOKENS - 1) // batches[0].tokens)]


def _loss(whole: Tensor, changed: Tensor) -> float:
    """The sum over tokens of the squared relative change of the stream."""
    size = whole.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((whole - changed).square().sum(-1) / size).sum())
