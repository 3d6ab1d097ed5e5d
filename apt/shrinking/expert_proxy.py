"""Approximations of models with fewer experts, to compare their losses without pruning them.

One pass over the dense model chooses the experts to remove in each block. In an approximation the
routers never choose them. No weight changes, so that the loss is above that of a pruned model,
whose kept experts compensate.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Unrouted
from apt.adapter.recording import eval_mode
from apt.calibration.batches import OpenBlock, enter
from apt.pruning.expert_choice import ExpertChoice
from apt.pruning.routed_experts import RoutedExperts, routers_of
from apt.shrinking.skipping import loss_without
from apt.solver import ColumnGroups


class ExpertProxy:
    """The approximations of a model with fewer experts.

    Args:
        tokens: calibration token ids (samples, seqlen).
        choose: chooses the experts to remove.
        counts: the numbers of kept experts that can be compared.

    Raises:
        AptError: the decisions of a router cannot be read.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        tokens: Tensor,
        choose: ExpertChoice,
        counts: Collection[int],
    ) -> None:
        self._model, self._adapter = model, adapter
        self._removed: dict[int, dict[Tensor, Tensor]] = {count: {} for count in counts}
        config = getattr(model, "config", None)
        with eval_mode(model), adapter.running(model):
            batches = enter(adapter, model, tokens)
            for index, (_, module) in enumerate(adapter.blocks(model)):
                block = OpenBlock(adapter, module, index, batches)
                for groups in adapter.groups(module, config):
                    if groups.routed:
                        experts = RoutedExperts(block, groups)
                        for count, removed in self._removed.items():
                            pattern = ColumnGroups(groups.count, count, groups.bins)
                            mask = choose(experts, pattern)
                            for router in routers_of(module, groups):
                                removed[router] = mask.to(router.device)
                for batch in batches:
                    batch.state = block.step(batch, batch.state)

    def loss(self, kept: Mapping[str, int], tokens: Tensor) -> float:
        """The mean loss per token of a model with fewer experts.

        Args:
            kept: the number of kept experts, as the only number.
            tokens: token ids (windows, seqlen).
        """
        (count,) = kept.values()
        with Unrouted(self._removed[count]):
            return loss_without(self._model, self._adapter, tokens)
