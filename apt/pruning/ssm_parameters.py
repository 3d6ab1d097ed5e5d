"""The pruning of a block's extras, before its sites are solved."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.adapter import Extra
from apt.calibration.batches import OpenBlock
from apt.errors import AptError
from apt.events import SitePruned
from apt.planning.plan import PlannedExtra
from apt.solver import SolverOptions
from apt.solver.channels import prune_channels
from apt.solver.gram import DAMPING


@dataclass
class _Effect:
    """The effect of an extra: the Gram matrices of its channels, and the energy of the output."""

    gram: Tensor
    energy: float


def prune_extras(
    block: OpenBlock, planned: Sequence[PlannedExtra], options: SolverOptions
) -> Iterator[SitePruned]:
    """Prune the extras ``planned`` in place, from one run of the block on all batches.

    Extras are pruned before the sites. The sites then receive the outputs of the pruned extras and
    compensate for the error.

    Raises:
        AptError: the adapter's ``effects`` report nothing for one of the extras.
    """
    sums: dict[Extra, _Effect] = {}

    def add(extra: Extra, gram: Tensor, energy: float) -> None:
        effect = sums.setdefault(extra, _Effect(torch.zeros_like(gram), 0.0))
        effect.gram += gram
        effect.energy += energy

    ranks = block.ranks
    with block.adapter.effects(block.module, [entry.extra for entry in planned], add):
        for batch in block.batches:
            block.step(batch, batch.state)
            block.progress()
    tokens = round(ranks.sum(sum(batch.tokens for batch in block.batches)))
    for entry in planned:
        if entry.extra not in sums:
            raise AptError(
                f"{entry.name} cannot be pruned: the adapter's effects report nothing for it"
            )
        effect = sums[entry.extra]
        ranks.add(effect.gram)
        effect.energy = ranks.sum(effect.energy)
        pruned = _prune(block.module, entry, effect, tokens, options)
        ranks.send(entry.extra.weight(block.module).data, 0)
        yield pruned


def _prune(
    block: nn.Module, planned: PlannedExtra, effect: _Effect, tokens: int, options: SolverOptions
) -> SitePruned:
    started, extra = time.perf_counter(), planned.extra
    weight = extra.weight(block).data
    multiplies = extra.removal == "product"
    factors = weight.double() if multiplies else torch.ones_like(weight, dtype=torch.float64)
    damping = DAMPING if options.damping is None else options.damping
    solution = prune_channels(
        factors, effect.gram, planned.pattern, compensated=multiplies, damping=damping
    )
    weight.copy_(solution.weight if multiplies else weight.masked_fill(solution.mask, 0))
    change = (weight.double() if multiplies else solution.weight) - factors
    loss = float(torch.einsum("ck,ckl,cl->", change, effect.gram.double(), change))
    return SitePruned(
        planned.name,
        extra.name,
        planned.shape,
        str(planned.pattern),
        int((weight == 0).sum()),
        loss / effect.energy if effect.energy else (math.inf if loss else 0.0),
        solution.damping,
        None,
        tokens,
        time.perf_counter() - started,
    )
