"""The sizes that meet the options of a user, or an error with the reason."""

from collections.abc import Callable, Sequence

from apt.errors import AptError
from apt.options import Mode, ShrinkOptions
from apt.shrinking.sizes import MULTIPLE, TOLERANCE, Size, Sizes

_DEEP_BLOCKS = 8  # blocks; on smaller models of the zoo, fewer groups cost as little or less


def wanted_sizes(
    sizes: Callable[[int], Sizes],
    options: ShrinkOptions,
    notice: Callable[[str], None],
    chooses: str | None = None,
) -> tuple[Mode, list[Size]]:
    """The mode, and the sizes that meet the options; sizes with fewer reduced kinds come first.

    Args:
        sizes: the sizes of the model for a multiple of channels.
        notice: called with a line about each default.
        chooses: the kind of choice of the given method, see `ShrinkMethodSpec`; None without one.

    Returns:
        The mode, and sizes of equal depth unless they are searched. The mode ``"blocks-first"``
        becomes ``"depth"`` or ``"width"`` if nothing else is removed.

    Raises:
        AptError: the family has no groups, or no size is near the request.
    """
    if options.explicit:
        return _explicit_sizes(sizes(1), options, notice)
    first = sizes(options.multiple_of or MULTIPLE)
    mode = options.mode or _default_mode(first, options.keep, chooses)
    if mode == "width" and not first.groups:
        message = "this family's configuration has no widths that could be smaller"
        raise AptError(message, "drop blocks instead", ("depth_only",))
    if mode == "search":
        _check_searchable(first)
    chosen = _sizes_near_keep(sizes, first, options, mode, notice)
    if mode == "blocks-first":  # tuning compensates for channels better than for heads
        chosen = [size for size in chosen if size.kept.keys() <= {first.largest}] or chosen
        full = chosen[0].blocks == first.blocks
        narrower = any(size.kept for size in chosen)
        mode = "width" if full else "blocks-first" if narrower else "depth"
    if options.mode is None:
        notice(f"mode: {mode} (default)")
    return mode, chosen


def _default_mode(sizes: Sizes, keep: float, chooses: str | None) -> Mode:
    """The default mode: blocks first, since they cost the least accuracy in deep models.

    Groups are removed if the model is not deep, or if the given method chooses them.
    """
    if chooses is not None:
        return "blocks-first" if chooses == "blocks" else "width"
    narrower = sizes.smaller_sizes([sizes.blocks], width=True)
    narrow = bool(narrower) and narrower[0].cost <= keep + TOLERANCE
    return "width" if narrow and sizes.blocks < _DEEP_BLOCKS else "blocks-first"


def _check_searchable(sizes: Sizes) -> None:
    """Raise if the loss of a model with fewer groups is not approximated, see `Proxy`."""
    if sizes.groups and not any(groups.readers for groups in sizes.groups.values()):
        raise AptError(
            f"a search cannot compare numbers of {' and '.join(sizes.groups)}: no site reads them",
            "drop blocks only, or remove groups only",
            ("depth_only", "width_only"),
        )


def _sizes_near_keep(
    sizes: Callable[[int], Sizes],
    first: Sizes,
    options: ShrinkOptions,
    mode: Mode,
    notice: Callable[[str], None],
) -> list[Size]:
    """The sizes near the requested share, for a smaller multiple if needed; else the nearest."""
    keep, best = options.keep, first
    nearest = _nearest_sizes(best, keep, mode)
    if not nearest:
        raise AptError("this model has one block and no groups: nothing can be removed")
    multiples = [MULTIPLE >> n for n in range(1, MULTIPLE.bit_length())]
    for multiple in multiples if options.multiple_of is None and first.groups else []:
        if _is_near(nearest, keep):
            break
        smaller = _nearest_sizes(sizes(multiple), keep, mode)
        if abs(smaller[0].cost - keep) < abs(nearest[0].cost - keep):
            best, nearest = sizes(multiple), smaller
    if best is not first:
        notice(f"multiple of channels: {best.multiple}, since no multiple of {MULTIPLE} comes near")
    if _is_near(nearest, keep):
        near = [size for size in nearest if abs(size.cost - keep) <= TOLERANCE]
        return sorted(near, key=lambda size: len(size.kept))
    _check_range(best, keep, mode)
    notice(f"keep: {nearest[0].cost:.2%}, the nearest to {keep:.2%}: {nearest[0]}")
    return [nearest[0]]


def _check_range(sizes: Sizes, keep: float, mode: Mode) -> None:
    """Raise if every size is smaller, or larger, than the requested share."""
    all_sizes = sizes.smaller_sizes(_depths(sizes, mode), width=mode != "depth")
    smallest, largest = all_sizes[0], all_sizes[-1]
    if keep < smallest.cost - TOLERANCE:
        raise _out_of_range(keep, "smallest", smallest, "keep more")
    if keep > largest.cost + TOLERANCE:
        raise _out_of_range(keep, "largest", largest, "keep less")


def _out_of_range(keep: float, word: str, size: Size, hint: str) -> AptError:
    message = f"no model keeps {keep:.2%}: the {word}, {size}, keeps {size.cost:.2%}"
    return AptError(message, hint, ("keep",))


def _explicit_sizes(
    sizes: Sizes, options: ShrinkOptions, notice: Callable[[str], None]
) -> tuple[Mode, list[Size]]:
    blocks = sizes.blocks if options.blocks is None else options.blocks
    if options.drop:
        blocks = sizes.blocks - len(set(options.drop))
        _check_drop(sizes, options)
    size = sizes.size(options.sizes, blocks)
    for kind, wanted in options.sizes.items():
        groups = sizes.groups[kind]
        kept = size.kept.get(kind, groups.count)
        if isinstance(wanted, float) and kept != wanted * groups.count:
            step = f", in steps of {groups.step}" if groups.step > 1 else ""
            notice(f"{kind}: {kept} of {groups.count}, the nearest to {wanted:g}{step}")
    if not size.kept and size.blocks == sizes.blocks:
        given = [name for name in ("sizes", "blocks") if getattr(options, name)]
        raise AptError("nothing would be removed", "give smaller numbers", given)
    return "width" if size.kept else "depth", [size]


def _check_drop(sizes: Sizes, options: ShrinkOptions) -> None:
    """Raise if a block to drop does not exist, or if their number is given as well."""
    for index in options.drop:
        if not 0 <= index < sizes.blocks:
            raise AptError(
                f"there is no block {index}: they are 0 to {sizes.blocks - 1}", options=("drop",)
            )
    left = sizes.blocks - len(set(options.drop))
    if options.blocks not in (None, left):
        raise AptError(
            f"without the dropped blocks there are {left} of {sizes.blocks}, not {options.blocks}",
            "leave out one of the two",
            ("blocks", "drop"),
        )


def _nearest_sizes(sizes: Sizes, keep: float, mode: Mode) -> list[Size]:
    """The sizes nearest to the share; in the mode ``"blocks-first"``, with the fewest blocks."""
    depths = _depths(sizes, mode)
    for blocks in depths if mode == "blocks-first" else []:
        if blocks >= (keep - TOLERANCE) * sizes.blocks:  # no width makes it larger
            found = sizes.nearest_sizes(keep, [blocks], width=True)
            if _is_near(found, keep):
                return found
    return sizes.nearest_sizes(keep, depths, width=mode != "depth")


def _depths(sizes: Sizes, mode: Mode) -> Sequence[int]:
    return [sizes.blocks] if mode == "width" else range(1, sizes.blocks + 1)


def _is_near(nearest: list[Size], keep: float) -> bool:
    return bool(nearest) and abs(nearest[0].cost - keep) <= TOLERANCE
