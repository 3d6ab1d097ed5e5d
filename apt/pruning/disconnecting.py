"""The removal of groups without readers: states of a scan, and experts.

No matrix multiplies the outputs of these groups. So they are chosen by what the block's output
loses: the block is run on a few tokens without each of them (for experts, this is close to the
saliency of REAP, arXiv 2510.13999). The sites behind them then compensate for the loss.
"""

import torch

from apt.adapter.groups import disconnect
from apt.calibration.batches import OpenBlock
from apt.planning.plan import PlannedGroups
from apt.solver import ColumnGroups
from apt.tuning.block_forward import stream_after

_TOKENS = 2048


def disconnect_groups(block: OpenBlock, planned: PlannedGroups) -> None:
    """Set the outputs of the groups to zero without which the block's output changes least."""
    groups, chosen = planned.groups, planned.chosen
    if chosen is None:
        losses = torch.zeros(groups.count)
        parameters = {path: p.detach() for path, p in block.module.named_parameters()}
        for batch in block.first_batches(_TOKENS):
            whole = stream_after(block, {}, batch, batch.state).float()
            for group in range(groups.count):
                paths = {part.parameter for part in groups.outputs}
                without = {path: parameters[path].clone() for path in paths}
                disconnect(without, groups, [group])
                changed = stream_after(block, without, batch, batch.state).float()
                size = whole.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
                losses[group] += float(((whole - changed).square().sum(-1) / size).sum())
                block.progress()
        block.ranks.add(losses)
        pattern = ColumnGroups(groups.count, planned.kept, groups.bins)
        chosen = tuple(block.ranks.share(pattern.lowest(losses).nonzero().squeeze(1).tolist()))
    disconnect(dict(block.module.named_parameters()), groups, chosen)
