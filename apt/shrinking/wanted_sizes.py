"""The sizes that meet the wish of a user, or the reason why none does."""

from collections.abc import Callable

from apt.errors import AptError
from apt.shrinking.options import Mode, ShrinkOptions
from apt.shrinking.sizes import MULTIPLE, TOLERANCE, Size, Sizes


def wanted_sizes(
    sizes: Callable[[int], Sizes], options: ShrinkOptions, notice: Callable[[str], None]
) -> tuple[Mode, list[Size]]:
    """The mode, and the sizes that meet the options. Those that change the fewest kinds come first.

    Args:
        sizes: the sizes of the model for a multiple of channels.
        options: the options.
        notice: called with a line about each choice that the user did not make.

    Raises:
        AptError: the family has no groups, or no size is near the wish.
    """
    options.check()
    if options.explicit:
        return _explicit(sizes(1), options)
    first = sizes(options.multiple_of or MULTIPLE)
    mode = options.mode or ("width" if first.groups else "depth")
    if mode == "width" and not first.groups:
        raise AptError(
            "this family's configuration has no widths that could be smaller",
            "drop blocks instead",
            ("depth_only",),
        )
    if options.mode is None:
        notice(f"mode: {mode} (default)")
    found = _near(first, options.keep, mode)
    multiples = [MULTIPLE >> n for n in range(1, MULTIPLE.bit_length())]
    for multiple in multiples if options.multiple_of is None else []:
        if _met(found, options.keep) or not first.groups or mode == "depth":
            break
        smaller = _near(sizes(multiple), options.keep, mode)
        if _met(smaller, options.keep):
            notice(f"multiple of channels: {multiple}, since no multiple of {MULTIPLE} comes near")
            found = smaller
    return mode, _nearest(found, options.keep, notice)


def _explicit(sizes: Sizes, options: ShrinkOptions) -> tuple[Mode, list[Size]]:
    blocks = sizes.blocks if options.blocks is None else options.blocks
    size = sizes.size(options.sizes, blocks)
    if not size.kept and size.blocks == sizes.blocks:
        raise AptError("nothing would be removed", "give smaller numbers", ("keep",))
    return "width" if size.kept else "depth", [size]


def _near(sizes: Sizes, keep: float, mode: Mode) -> list[Size]:
    return sizes.near(keep, width=mode != "depth", depth=mode != "width")


def _met(found: list[Size], keep: float) -> bool:
    return bool(found) and abs(found[0].share - keep) <= TOLERANCE


def _nearest(found: list[Size], keep: float, notice: Callable[[str], None]) -> list[Size]:
    """The sizes within the tolerance; the nearest one, with a notice, if there is none."""
    if not found:
        raise AptError("this model has one block and no groups: nothing can be removed")
    if _met(found, keep):
        near = [size for size in found if abs(size.share - keep) <= TOLERANCE]
        return sorted(near, key=lambda size: len(size.kept))
    nearest = found[0]
    if keep < min(size.share for size in found) - TOLERANCE:
        raise AptError(
            f"no model keeps {keep:.2%}: the smallest, {nearest}, keeps {nearest.share:.2%}",
            "keep more",
            ("keep",),
        )
    if keep > max(size.share for size in found) + TOLERANCE:
        raise AptError(
            f"no model keeps {keep:.2%}: the largest, {nearest}, keeps {nearest.share:.2%}",
            "keep less",
            ("keep",),
        )
    notice(f"keep: {nearest.share:.2%}, the nearest to {keep:.2%}: {nearest}")
    return [nearest]
