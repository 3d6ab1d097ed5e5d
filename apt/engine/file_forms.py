"""What a file can hold of a model, and of the smaller models that can be made of it."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from apt.checkpoints.exporting import Exportable
from apt.checkpoints.opened import Opened
from apt.checkpoints.smaller import smaller_skeleton
from apt.errors import AptError
from apt.fit.choice import smallest_size
from apt.fit.levels import FileForm
from apt.fit.outer import outer_names
from apt.options.fit import DEPTH, WIDTH
from apt.planning.structure import Structure, make_structured_plan
from apt.plugin.specs import ExportSpec
from apt.shrinking.sizes import Size, Sizes

Means = Literal["width", "depth"]
SMALLER: tuple[Means, ...] = (WIDTH, DEPTH)
"""The means that make a smaller model."""

_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of the parameters of the blocks
_COLUMNS, _FEW_COLUMNS = 256, 32
"""The columns of the long and short blocks of grids: narrower rows should still consist of them."""

_MANY = 4  # long blocks in a row, so that multiples of them are near the shares


@dataclass(frozen=True)
class SmallerModel:
    """A smaller model that can be made.

    Attributes:
        means: width for fewer channels, depth for fewer blocks.
        size: its numbers of blocks and groups.
        form: what a file of it can hold.
    """

    means: Means
    size: Size
    form: FileForm

    @property
    def label(self) -> str:
        """The kept number, such as ``27-blocks``."""
        numbers = self.size.kept or {"blocks": self.size.blocks}
        return "-".join(f"{count}-{kind}" for kind, count in numbers.items())

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
) -> Iterator[SmallerModel]:
    """The smaller models of some shares of the size, of each of the means the largest first.

    Each takes the time to lay out a file, so that they are made one by one.

    Args:
        form_of_smaller: returns what the output can hold of a smaller model without weights.
        opened: the whole model.
        means: the allowed means.
        given: True if the user has named the means: one without a smaller model is an error.
        smallest: True for the smallest one of each of the means alone.

    Raises:
        AptError: the model, its family or the format has no smaller model of one of the means.
    """
    for name in SMALLER:
        if name in means:
            try:
                sizes = smaller_sizes(opened, name)
                for size in sizes[-1:] if smallest else sizes:
                    yield _smaller_model(form_of_smaller, opened, name, size)
            except AptError:
                if given:
                    raise


def smaller_sizes(opened: Opened, means: Means) -> list[Size]:
    """The sizes of the smaller models of one of the means, the largest first."""
    return _depths(opened) if means == "depth" else _widths(opened)


def _smaller_model(
    form_of_smaller: Callable[[Opened], FileForm], opened: Opened, means: Means, size: Size
) -> SmallerModel:
    """The smaller model of a size."""
    family = (opened.module, opened.adapter)
    names = [name for name, _ in opened.adapter.blocks(opened.module)]
    structure = Structure(size.kept, frozenset(names[size.blocks :]))
    plan = make_structured_plan(*family, opened.config, structure)
    module = smaller_skeleton(*family, plan)
    smaller = replace(opened, module=module, config=module.config)
    return SmallerModel(means, size, form_of_smaller(smaller))


def _depths(opened: Opened) -> list[Size]:
    """The sizes with fewer blocks."""
    sizes = Sizes(opened.module, opened.adapter, opened.config, 1)
    counts = {round(share * sizes.blocks) for share in _SHARES} - {0, sizes.blocks}
    if not counts:
        raise AptError("this model has one block, which cannot be dropped", options=("may",))
    return [sizes.size({}, count) for count in sorted(counts, reverse=True)]


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
