"""The fit of dropped blocks by the block before them, from the streams of the dense model.

Dropped blocks leave a gap. The last site that writes to the residual stream before a gap takes over
the sum that the dropped blocks add, as in `apt.pruning.pipeline`. Here the fit uses the dense model
alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.calibration.batches import Batch
from apt.calibration.capture import as_rows
from apt.calibration.dense_activations import mean_squares, stream_rows
from apt.solver import Gram, SolverOptions
from apt.solver.precision import full_precision


class GapFits:
    """The least-squares fits of the gaps of a model; all recorded streams stay in memory."""

    def __init__(
        self,
        adapter: Adapter,
        blocks: Sequence[nn.Module],
        batches: Sequence[Batch],
        options: SolverOptions,
    ) -> None:
        self._adapter, self._blocks, self._batches = adapter, blocks, batches
        self._options = options
        self._states: list[list[State]] = []
        self._changes: dict[tuple[int, int], Tensor] = {}

    def record(self) -> None:
        """Record the streams before the next block, or after the last block."""
        self._states.append([batch.state for batch in self._batches])

    def writer(self, index: int) -> Site | None:
        """The site of a block that takes over a gap behind the block; None if no site can."""
        sites = self._adapter.sites(self._blocks[index])
        writers = [site for site in sites if site.residual and not site.routed]
        return max(writers, key=lambda site: site.order, default=None)

    def change(self, index: int, behind: int) -> Tensor:
        """The change of the writer's weight (out, in): ``EᵀX H⁻¹`` of the mean token.

        ``E`` is the sum that the dropped blocks add to the stream, ``X`` are the writer's inputs.
        Tokens are weighted by the inverse mean square of the stream, as in the pruning of the
        block.

        Args:
            index: the index of the block before the gap.
            behind: the index of the first block behind the gap; the number of blocks for a gap at
                the end.
        """
        if (index, behind) not in self._changes:
            self._changes[index, behind] = self._fit(index, behind)
        return self._changes[index, behind]

    def _fit(self, index: int, behind: int) -> Tensor:
        writer, block = self.writer(index), self._blocks[index]
        assert writer is not None
        weight = writer.oriented(writer.weight(block).data)
        gram = Gram(weight.shape[1], weight.device)
        cross = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for number, batch in enumerate(self._batches):
            state_before, start, end = (self._states[i][number] for i in (index, index + 1, behind))
            scale = mean_squares(stream_rows(self._adapter, state_before)).sqrt()
            rows = self._inputs(index, writer, weight, batch, state_before) / scale
            error = stream_rows(self._adapter, end) - stream_rows(self._adapter, start)
            gram.add(rows)
            with full_precision():  # the model itself runs with the caller's settings
                cross.addmm_((error / scale).T, rows)
        return gram.damped(self._options.damping).solve(cross / gram.tokens)

    def _inputs(
        self, index: int, writer: Site, weight: Tensor, batch: Batch, before: State
    ) -> Tensor:
        """The inputs (tokens, in) of the writer in fp32."""
        parts, block = list[Tensor](), self._blocks[index]

        def add(site: Site, inputs: Tensor) -> None:
            parts.append(as_rows(site, inputs, weight).float())

        with self._adapter.capture(block, [writer], add):
            self._adapter.step(block, before, batch.calls[index])
        return torch.cat(parts)
