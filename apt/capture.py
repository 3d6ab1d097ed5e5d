"""What flows into each weight, gathered into Gram matrices, with coverage asserted."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.errors import AptError
from apt.solver import Gram


class InputGram:
    """The Gram matrix of one input, and the sites that multiply it.

    The sites of one input are fed the same tensor in turn; it is summed for the first of them and
    checked, by identity or by value, for the others.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.gram = Gram(width, device)
        self.tokens: dict[Site, int] = {}
        self._current: Tensor | None = None
        self._seen: set[Site] = set()

    def add(self, site: Site, inputs: Tensor) -> None:
        """Take ``inputs`` (..., in) of one product with the weight of ``site``."""
        if inputs.shape[-1] != self.gram.width:
            raise AptError(
                f"{site.name} multiplies inputs of width {inputs.shape[-1]}, not "
                f"{self.gram.width}: is it declared transposed the wrong way round?"
            )
        self.tokens[site] = self.tokens.get(site, 0) + inputs.numel() // inputs.shape[-1]
        if self._current is None or site in self._seen:
            self.gram.add(inputs)
            self._current = inputs
            self._seen.clear()
        elif not _same(self._current, inputs):
            raise AptError(
                f"{site.name} is declared to share the input '{site.input}', but gets another one"
            )
        self._seen.add(site)


def _same(left: Tensor, right: Tensor) -> bool:
    if left.data_ptr() == right.data_ptr() and left.shape == right.shape:
        return True
    return left.shape == right.shape and torch.equal(left, right)


def capture_grams(
    adapter: Adapter, block: nn.Module, sites: Sequence[Site], run: Callable[[], None], tokens: int
) -> dict[str, Gram]:
    """Run a block while the inputs of ``sites`` are summed into Gram matrices.

    Args:
        adapter: the block's adapter.
        block: the block.
        sites: the sites to capture.
        run: runs the block over all calibration tokens.
        tokens: how many those are.

    Returns:
        The Gram matrix of each input name.

    Raises:
        AptError: a site saw no tokens, or not exactly those that were run.
    """
    inputs: dict[str, InputGram] = {}
    for site in sites:
        weight = site.oriented(site.weight(block))
        inputs.setdefault(site.input, InputGram(weight.shape[1], weight.device))
    with adapter.capture(block, sites, lambda site, x: inputs[site.input].add(site, x)):
        run()
    for site in sites:
        seen = inputs[site.input].tokens.get(site, 0)
        if seen != tokens:
            raise AptError(
                f"{site.name} saw {seen:,} of {tokens:,} calibration tokens: "
                f"the adapter's capture misses {'some of' if seen else ''} its inputs"
            )
    return {name: group.gram for name, group in inputs.items()}
