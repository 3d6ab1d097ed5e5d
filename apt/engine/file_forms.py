"""What a file can hold of a model, and of the smaller models that can be made of it."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from apt.checkpoints.exporting import Exportable
from apt.checkpoints.opened import Opened
from apt.checkpoints.smaller import smaller_skeleton
from apt.errors import AptError
from apt.fit.choice import smallest_size
from apt.fit.levels import FileForm
from apt.fit.outer import outer_names
from apt.options.fit import DEPTH, EXPERTS, WIDTH
from apt.planning.structure import Structure, make_structured_plan
from apt.plugin.specs import ExportSpec
from apt.shrinking.sizes import Size, Sizes

Means = Literal["width", "depth", "experts"]
SMALLER: tuple[Means, ...] = (WIDTH, DEPTH, EXPERTS)
"""The means that make a smaller model."""

_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of the parameters of the blocks
_SHARES_BESIDE = (0.95, 0.9, 0.85, 0.8)  # of the blocks, in models with fewer groups too
_COLUMNS, _FEW_COLUMNS = 256, 32
"""The columns of the long and short blocks of grids: narrower rows should still consist of them."""

_MANY = 4  # long blocks in a row, so that multiples of them are near the shares


@dataclass(frozen=True)
class SmallerModel:
    """A smaller model that can be made.

    Attributes:
        means: width for fewer channels, depth for fewer blocks, or both; experts for fewer experts.
        size: its numbers of blocks and groups.
        form: what a file of it can hold.
    """

    means: tuple[Means, ...]
    size: Size
    form: FileForm

    @property
    def numbers(self) -> dict[str, int]:
        """The kept numbers of the kinds of which some are removed."""
        blocks = {"blocks": self.size.blocks} if DEPTH in self.means else {}
        return blocks | dict(self.size.kept)

    @property
    def label(self) -> str:
        """The kept numbers, such as ``27-blocks`` or ``27-blocks-1280-channels``."""
        return "-".join(f"{count}-{kind}" for kind, count in self.numbers.items())

    @property
    def smallest(self) -> int:
        """The bytes of its smallest file."""
        return smallest_size(self.form)


def form_of(spec: ExportSpec, model: Exportable, opened: Opened) -> FileForm:
    """The levels of the sites, the embedding and the head; other tensors keep their values."""
    form = spec.file_form(model)
    names = {
        f"{block}.{site.parameter}"
        for block, module in opened.adapter.blocks(opened.module)
        for site in opened.adapter.sites(module)
    } | set(outer_names(opened.module))
    kept = (levels for name, levels in form.levels.items() if name not in names)
    rest = form.rest + sum(level.size for levels in kept for level in levels if not level.grid)
    return FileForm({n: levels for n, levels in form.levels.items() if n in names}, rest)


def smaller_models(
    form_of_smaller: Callable[[Opened], FileForm],
    opened: Opened,
    means: Collection[str],
    *,
    given: bool,
    smallest: bool = False,
) -> Iterator[Iterator[SmallerModel]]:
    """Rows of smaller models, in each row the largest first.

    The first rows have one of the means each. The others have both width and depth: in each, the
    models have the same number of blocks, and fewer and fewer groups. A model takes the time to lay
    out a file, so that the models are made one by one.

    Args:
        form_of_smaller: returns what the output can hold of a smaller model without weights.
        opened: the whole model.
        means: the allowed means.
        given: True if the user has named the means: one without a smaller model is an error.
        smallest: True for the smallest model of each row alone.

    Raises:
        AptError: the model, its family or the format has no smaller model of one of the means.
    """
    rows: list[tuple[tuple[Means, ...], Callable[[], list[Size]]]] = [
        ((name,), partial(smaller_sizes, opened, name)) for name in SMALLER if name in means
    ]
    if {WIDTH, DEPTH} <= set(means):
        with suppress(AptError):  # of the row of one of the means
            rows += [
                ((DEPTH, WIDTH), partial(_sizes_of_depth, opened, blocks))
                for blocks in _depths(opened, _SHARES_BESIDE)
            ]
    ends = slice(-1, None) if smallest else slice(None)
    for row, sizes in rows:
        yield _models(form_of_smaller, opened, row, sizes, ends, given=given)


def _models(
    form_of_smaller: Callable[[Opened], FileForm],
    opened: Opened,
    means: tuple[Means, ...],
    sizes: Callable[[], Sequence[Size]],
    part: slice,
    *,
    given: bool,
) -> Iterator[SmallerModel]:
    """The models of a row; see `smaller_models`."""
    try:
        for size in sizes()[part]:
            yield _smaller_model(form_of_smaller, opened, means, size)
    except AptError:
        if given:
            raise


def smaller_sizes(opened: Opened, means: Means) -> list[Size]:
    """The sizes of the smaller models of one of the means, the largest first."""
    if means == WIDTH:
        return _widths(opened)
    if means == EXPERTS:
        return _numbers_of_experts(opened)
    sizes = Sizes(opened.module, opened.adapter, opened.config, 1)
    return [sizes.size({}, count) for count in _depths(opened, _SHARES)]


def _sizes_of_depth(opened: Opened, blocks: int) -> list[Size]:
    """The sizes with a number of blocks and fewer groups, the largest first."""
    sizes = Sizes(opened.module, opened.adapter, opened.config, 1)
    return [sizes.size(size.kept, blocks) for size in _widths(opened)]


def _smaller_model(
    form_of_smaller: Callable[[Opened], FileForm],
    opened: Opened,
    means: tuple[Means, ...],
    size: Size,
) -> SmallerModel:
    """The smaller model of a size."""
    family = (opened.module, opened.adapter)
    names = [name for name, _ in opened.adapter.blocks(opened.module)]
    structure = Structure(size.kept, frozenset(names[size.blocks :]))
    plan = make_structured_plan(*family, opened.config, structure)
    module = smaller_skeleton(*family, plan)
    smaller = replace(opened, module=module, config=module.config)
    return SmallerModel(means, size, form_of_smaller(smaller))


def _depths(opened: Opened, shares: Sequence[float]) -> list[int]:
    """The numbers of blocks of about these shares, the largest first."""
    whole = len(opened.adapter.blocks(opened.module))
    counts = {round(share * whole) for share in shares} - {0, whole}
    if not counts:
        raise AptError("this model has one block, which cannot be dropped", options=("may",))
    return sorted(counts, reverse=True)


def _numbers_of_experts(opened: Opened) -> list[Size]:
    """The sizes with fewer experts, the largest first."""
    sizes = Sizes(opened.module, opened.adapter, opened.config, 1, experts=True)
    if not sizes.automatic:
        raise AptError("this model has no routed experts to remove", "leave it out", ("may",))
    groups = next(iter(sizes.automatic.values()))
    counts = {round(share * groups.count / groups.step) * groups.step for share in _SHARES}
    return [
        sizes.size({groups.kind: count}, sizes.blocks)
        for count in sorted(counts - {groups.count}, reverse=True)
        if count >= max(groups.least, groups.step)
    ]


def _widths(opened: Opened) -> list[Size]:
    """The sizes with fewer groups of the largest kind, in multiples that suit the grids."""
    family = (opened.module, opened.adapter, opened.config)
    sizes = Sizes(*family, 1)
    kind = sizes.largest
    if kind is None or not sizes.groups[kind].readers:
        message = "this family has no widths whose loss can be estimated"
        raise AptError(message, "leave width out", ("may",))
    count = sizes.groups[kind].count
    columns = _COLUMNS if count >= _MANY * _COLUMNS else _FEW_COLUMNS
    sizes = Sizes(*family, math.gcd(count, columns))
    narrower = [
        size
        for size in sizes.smaller_sizes([sizes.blocks], width=True)
        if size.kept.keys() == {kind}
    ]
    nearest = {
        size.kept[kind]: size
        for share in _SHARES
        for size in [min(narrower, key=lambda size: abs(size.share - share), default=None)]
        if size is not None
    }
    return list(nearest.values())
