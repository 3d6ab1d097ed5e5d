"""The checks of a pattern."""

import torch

from apt.patterns import Pattern
from apt.planning.plan import read_pattern


def check_pattern(pattern: Pattern, shape: tuple[int, int]) -> None:
    """Check that a pattern keeps the promises of its protocol, on random scores.

    Args:
        pattern: the pattern; its kind is that of an installed plugin.
        shape: the shape (out, in) of a weight that the pattern fits and of which it removes a part,
            with several windows of its `apt.solver.Pattern.alignment`.

    Raises:
        AssertionError: a promise is broken; the message names it.
    """
    draw = torch.Generator().manual_seed(0)
    scores, needed = torch.rand(shape, generator=draw) + 0.1, pattern.required(shape)

    def expect(promise: str, kept: object) -> None:
        if not kept:
            rows, columns = shape
            raise AssertionError(f"{pattern} of {rows} × {columns} weights, not kept: {promise}")

    def expect_mask(mask: torch.Tensor, given: Pattern, name: str) -> None:
        expect(f"{name} has the shape of the scores", mask.shape == scores.shape)
        zeros = given.required(shape)
        expect(f"{name} has {zeros:,} ones, as required", int(mask.sum()) == zeros)
        pruned = scores.masked_fill(mask, 0)
        expect(f"shortfall is empty for {name}", not given.shortfall(pruned))
        expect(f"surplus is 0 for {name}", not given.surplus(pruned, scores))

    read = read_pattern(str(pattern))
    expect(f"its text is read as a pattern with {needed:,} zeros", read.required(shape) == needed)
    expect(f"its text is read as of the kind {pattern.kind}", read.kind == pattern.kind)
    expect("sparsity is a share", 0 < pattern.sparsity < 1)
    expect("misfit is empty", not pattern.misfit(shape))
    expect("it removes some and not all weights", 0 < needed < scores.numel())
    expect("shortfall names what a dense weight lacks", pattern.shortfall(scores))
    zeros_everywhere = torch.zeros_like(scores)
    expect("surplus counts the zeros beyond it", pattern.surplus(zeros_everywhere, scores))
    expect_mask(pattern.lowest(scores), pattern, "the mask of lowest")
    expect_mask(pattern.lowest(torch.ones(shape)), pattern, "the mask of equal scores")
    expect_mask(pattern.smallest(scores), pattern, "the mask of smallest")
    half = shape[1] // 2 // pattern.alignment * pattern.alignment
    windows = (pattern.lowest(scores[:, :half]), pattern.lowest(scores[:, half:], offset=half))
    expect("the masks of two windows add up", int(torch.cat(windows, 1).sum()) == needed)
    kept = scores.T.contiguous()
    pattern.keep_largest(kept)
    expect("keep_largest makes ones and zeros", bool(((kept == 0) | (kept == 1)).all()))
    about = abs(int((kept == 0).sum()) - needed) <= 0.1 * scores.numel()
    expect("keep_largest makes about as many zeros as required", about)
    if pattern.allocatable:
        step = pattern.step(shape)
        less = pattern.with_zeros(needed - step, shape)
        fewer = 0 if less is None else less.required(shape)
        expect("with_zeros has one step less", fewer == needed - step)
        if less is not None:
            expect_mask(less.lowest(scores), less, "the mask of with_zeros")
