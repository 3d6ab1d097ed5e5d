"""The plan of a run: the pattern of each site, checked before any work is done."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import comb
from typing import Any

from torch import nn

from apt.adapter import Adapter, DecoderAdapter, Extra, Groups, Permutable, Site
from apt.errors import AptError, plugin_error
from apt.patterns import Granularity, Grid, Pattern, SitePattern, TargetForm, keeps_all, read
from apt.plugin.registry import registry
from apt.solver import MAX_REMOVAL_SETS


@dataclass(frozen=True)
class Selection:
    """The selection of sites, by globs over full names such as ``model.layers.3.mlp.*``.

    Args:
        only: if given, sites that match none of these globs stay dense.
        skip: sites that match one of these globs stay dense.
        overrides: pairs of a glob and a pattern for the sites that match; the last match counts. A
            pattern may be given as in `apt.prune`.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Pattern | str | float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("only", "skip"):
            globs = getattr(self, name)
            if isinstance(globs, str):
                message = f"{name} is one text, '{globs}', and not a tuple of globs"
                raise AptError(message, f"give ('{globs}',)", (name,))
            if not _is_list_of(globs, lambda glob: isinstance(glob, str)):
                raise AptError(f"{name} is {globs!r}", "give a tuple of globs", (name,))
        if not _is_list_of(self.overrides, _is_override):
            hint = "give a tuple of pairs, such as (('*.q_proj', 0.4),)"
            raise AptError(f"overrides is {self.overrides!r}", hint, ("overrides",))

    def pattern(self, name: str, default: Pattern) -> Pattern | None:
        """The pattern for the site with this full name; None if it stays dense."""
        if (self.only and not _matches(name, self.only)) or _matches(name, self.skip):
            return None
        return self.override(name) or default

    def override(self, name: str) -> Pattern | None:
        """The pattern of the override for this site; None without an override."""
        index = self.deciding(name)
        return None if index is None else read_pattern(self.overrides[index][1])

    def deciding(self, name: str) -> int | None:
        """The index of the override for this site, the last one that matches; None without one."""
        matching = [i for i, (glob, _) in enumerate(self.overrides) if _matches(name, [glob])]
        return matching[-1] if matching else None

    def record(self) -> dict[str, Any]:
        """The selection as plain values, for the report."""
        overrides = dict[str, str]()
        for glob, pattern in self.overrides:
            overrides.pop(glob, None)  # the last match counts, so a repeated glob moves to the end
            overrides[glob] = str(pattern)
        return {"only": self.only, "skip": self.skip, "overrides": overrides}

    def globs(self) -> list[str]:
        """All globs."""
        return [*self.only, *self.skip, *(glob for glob, _ in self.overrides)]


def _is_list_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


def _is_override(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


def read_pattern(pattern: Pattern | str | float) -> Pattern:
    """The pattern, or the pattern of a text such as ``"2:4"``; raises `AptError` for others."""
    plugins = registry()
    specs = plugins.pattern_kinds()
    forms = [spec.form for spec in specs if not plugins.patterns.is_own(spec)]
    try:
        return read(pattern, (spec.load() for spec in specs), forms)
    except ValueError as error:
        raise AptError(str(error)) from error
    except TypeError as error:
        raise plugin_error(f"pattern '{pattern}'", str(error), "pattern", "pattern") from error


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def removed_by(pattern: SitePattern | None, shape: tuple[int, int]) -> int:
    """The number of weights that a pattern removes from a weight (out, in); 0 for None."""
    return 0 if pattern is None else pattern.required(shape)


@dataclass(frozen=True)
class PlannedSite:
    """A site and its target form.

    Attributes:
        name: its full name.
        site: the site.
        shape: (out, in).
        form: the target form of its weight; None if the weight does not change.
        fixed: True if an override gives the pattern, which no allocation changes.
    """

    name: str
    site: Site
    shape: tuple[int, int]
    form: TargetForm | None
    fixed: bool = False

    @property
    def pattern(self) -> SitePattern | None:
        """Its pattern; None if it stays dense."""
        return None if self.form is None else self.form.pattern

    @property
    def grid(self) -> Grid | None:
        """The grid of its kept weights; None if they are not rounded."""
        return None if self.form is None else self.form.grid

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.shape[0] * self.shape[1]

    def with_pattern(self, pattern: SitePattern | None) -> "PlannedSite":
        """The site with another pattern and the same grid; None leaves the weight unchanged."""
        form = None if pattern is None else TargetForm(pattern, self.grid)
        return replace(self, form=form)


@dataclass(frozen=True)
class PlannedExtra:
    """An extra to prune, with its pattern; its shape is (channels, k)."""

    name: str
    extra: Extra
    shape: tuple[int, int]
    pattern: Pattern


@dataclass(frozen=True)
class PlannedGroups:
    """Groups of one kind, and the number of kept ones; ``chosen`` are the removed groups."""

    groups: Groups
    kept: int
    chosen: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PlannedBlock:
    """A block, its sites, and its extras to prune.

    Attributes:
        name: its full name.
        sites, extras: its sites and extras; none if it is dropped.
        dropped: True if the whole block is removed from the model.
        groups: the kinds of groups from which some are removed.
        tied: the names of sites that lose the same groups of columns; the last site decides.
        permutable: the inputs that change places before the sites are pruned.
    """

    name: str
    sites: tuple[PlannedSite, ...]
    extras: tuple[PlannedExtra, ...] = ()
    dropped: bool = False
    groups: tuple[PlannedGroups, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    permutable: tuple[Permutable, ...] = ()

    @property
    def disconnected(self) -> list[PlannedGroups]:
        """The kinds of groups without readers from which some are removed."""
        return [entry for entry in self.groups if not entry.groups.readers]

    @property
    def kept(self) -> dict[str, int]:
        """The number of kept groups of each kind from which some are removed."""
        return {entry.groups.kind: entry.kept for entry in self.groups}

    @property
    def changes(self) -> bool:
        """True if a weight of the block may change."""
        return bool(self.pruned or self.groups or self.extras or self.permutable)

    @property
    def pruned(self) -> list[PlannedSite]:
        """The sites with a pattern."""
        return [site for site in self.sites if site.pattern is not None]

    @property
    def inputs(self) -> dict[str, int]:
        """The width of each distinct input of the pruned sites."""
        return {entry.site.input: entry.shape[1] for entry in self.pruned}

    @property
    def targets(self) -> list["PlannedSite | PlannedExtra"]:
        """The sites and extras to prune."""
        return [*self.pruned, *self.extras]

    def with_patterns(self, patterns: Mapping[str, SitePattern | None]) -> "PlannedBlock":
        """The block with other patterns, by the names of the sites within it."""
        return replace(
            self,
            sites=tuple(
                entry.with_pattern(patterns.get(entry.site.name, entry.pattern))
                for entry in self.sites
            ),
        )


@dataclass(frozen=True)
class Plan:
    """All blocks of a model.

    Attributes:
        shared: the names of the sites whose weight several blocks use; they stay dense.
        candidates: the records of the candidates from which the structure was chosen.
    """

    blocks: tuple[PlannedBlock, ...]
    shared: tuple[str, ...] = ()
    candidates: tuple[dict[str, Any], ...] = ()

    @property
    def sites(self) -> list[PlannedSite]:
        """The sites of all blocks."""
        return [site for block in self.blocks for site in block.sites]

    @property
    def names(self) -> list[str]:
        """The names of all sites, and of the extras to prune."""
        extras = [extra.name for block in self.blocks for extra in block.extras]
        return [*(site.name for site in self.sites), *extras]

    @property
    def dense(self) -> list[str]:
        """The names of the sites that stay dense."""
        return [site.name for site in self.sites if site.pattern is None]

    @property
    def dropped(self) -> list[str]:
        """The names of the blocks that are dropped."""
        return [block.name for block in self.blocks if block.dropped]

    @property
    def per(self) -> Granularity | None:
        """The unit over which its unstructured patterns are counted; None without such patterns."""
        return next((s.pattern.per for s in self.sites if s.pattern and s.pattern.per), None)

    @property
    def grid(self) -> Grid | None:
        """The grid that its sites are rounded to; None if no site is rounded."""
        return next((site.grid for site in self.sites if site.grid), None)

    @property
    def structured(self) -> bool:
        """True if groups of columns or whole blocks are removed."""
        return any(
            block.dropped
            or block.groups
            or any(site.pattern.structured for site in block.pruned if site.pattern)
            for block in self.blocks
        )

    def outline(self) -> str:
        """A line with the number of blocks of each kind, and their sites grouped by input."""
        kinds: dict[str, list[str]] = {}
        for block in self.blocks:
            kinds.setdefault(_outline(block), []).append(block.name)
        return ". ".join(f"{len(n)} × {n[0]}: {sites}" for sites, n in kinds.items())


def _outline(block: PlannedBlock) -> str:
    """The sites of a block, grouped by input; a plus marks sites that write to the stream."""
    fed: dict[str, dict[str, None]] = {}
    for site in (entry.site for entry in block.sites):
        fed.setdefault(site.input, {})[site.kind + "+" * site.residual] = None
    return "; ".join(", ".join(kinds) for kinds in fed.values())


def make_plan(
    model: nn.Module,
    adapter: Adapter,
    pattern: Pattern,
    selection: Selection | None = None,
    per: Granularity = "layer",
    also: Sequence[str] = (),
    grid: Grid | None = None,
) -> Plan:
    """Plan a run; the model may be a skeleton.

    Args:
        pattern: the pattern of every selected site without an override.
        selection: the sites to prune; all by default.
        per: the unit over which unstructured patterns are counted, also in overrides. The unit of
            ``pattern`` takes precedence.
        also: the kinds of extras to prune in addition to the sites.
        grid: the grid that the kept weights of every selected site are rounded to; None for no
            rounding.

    Raises:
        AptError: the adapter does not fit the model, a pattern does not fit a site, a glob matches
            no site, an override has no effect, no site is selected, or the model has no extra of a
            kind in ``also``.
    """
    selection, per = selection or Selection(), pattern.per or per
    shared = shared_sites(model, adapter)
    selection = replace(selection, skip=(*selection.skip, *shared))
    blocks = list[PlannedBlock]()
    for name, block in adapter.blocks(model):
        sites = [
            _planned(block, site, name, selection, pattern, per, grid)
            for site in adapter.sites(block)
        ]
        some = [extra for extra in adapter.extras(block) if extra.kind in also]
        extras = [_planned_extra(block, extra, name, selection, pattern) for extra in some]
        blocks.append(PlannedBlock(name, tuple(sites), tuple(filter(None, extras))))
    plan = Plan(tuple(blocks), shared)
    _check_extras(adapter, model, also)
    check_globs(plan, selection)
    _check_overrides(plan, selection)
    if not any(block.pruned for block in plan.blocks):
        several = f": several blocks use the weight of {shared[0]}" if shared else ""
        raise AptError(f"no site is left to prune{several}", "select more", ("only", "skip"))
    return plan


def check_globs(plan: Plan, selection: Selection) -> None:
    """Raise if a glob of a selection matches no site."""
    for glob in selection.globs():
        if not any(_matches(name, [glob]) for name in plan.names):
            raise AptError(f"'{glob}' matches no site", f"names look like {plan.names[0]}")


def _check_overrides(plan: Plan, selection: Selection) -> None:
    """Raise if an override applies to no site."""
    dense = set(plan.dense)
    deciding = {selection.deciding(name) for name in plan.names if name not in dense}
    for index, (glob, pattern) in enumerate(selection.overrides):
        if index not in deciding:
            raise AptError(
                f"override '{glob}={pattern}' has no effect: the sites that it matches stay dense, "
                "or a later override matches them",
                "leave it out",
                ("overrides",),
            )


def shared_sites(model: nn.Module, adapter: Adapter) -> tuple[str, ...]:
    """The names of the sites whose weight several blocks use; each block would prune it anew."""
    names: dict[tuple[nn.Parameter, int | None], list[str]] = {}
    for name, block in adapter.blocks(model):
        for site in adapter.sites(block):
            key = (block.get_parameter(site.parameter), site.expert)
            names.setdefault(key, []).append(f"{name}.{site.name}")
    return tuple(name for users in names.values() if len(users) > 1 for name in users)


def _planned(
    block: nn.Module,
    site: Site,
    prefix: str,
    chosen: Selection,
    default: Pattern,
    per: Granularity,
    grid: Grid | None,
) -> PlannedSite:
    out, width = site.oriented(site.weight(block)).shape
    name = f"{prefix}.{site.name}"
    pattern = chosen.pattern(name, default)
    if pattern is None:
        return PlannedSite(name, site, (out, width), None)
    if misfit := pattern.misfit((out, width)):
        hint = f"choose another pattern, or skip '*.{site.name}'"
        raise AptError(f"{name} {misfit} (pattern {pattern})", hint, ("pattern", "skip"))
    fixed = chosen.override(name) is not None and pattern.settled
    return PlannedSite(name, site, (out, width), TargetForm(pattern.counted(per), grid), fixed)


def _planned_extra(
    block: nn.Module, extra: Extra, prefix: str, chosen: Selection, default: Pattern
) -> PlannedExtra | None:
    """The plan of an extra; None if it stays dense."""
    name, (channels, width) = f"{prefix}.{extra.name}", extra.weight(block).shape
    pattern = chosen.pattern(name, default)
    if pattern is None:
        return None
    own, problem = pattern.of_channels(), ""
    if own is None:
        problem = f"cannot be pruned to {pattern}: its channels are pruned separately"
    elif misfit := own.misfit((channels, width), "weights per channel"):
        problem = f"{misfit} (pattern {own})"
    elif (size := own.group) and comb(size, own.required((1, size))) > MAX_REMOVAL_SETS:
        problem = (
            f"cannot be pruned to {own}: a group has more than {MAX_REMOVAL_SETS:,} removal sets"
        )
    if own is None or problem:
        hint = f"give it a separate sparsity: '*.{extra.name}=0.5'"
        raise AptError(f"{name} {problem}", hint, ("overrides",))
    return PlannedExtra(name, extra, (channels, width), own)


def _check_extras(adapter: Adapter, model: nn.Module, also: Sequence[str]) -> None:
    """Raise if no block has an extra of a kind in ``also``."""
    kinds = {extra.kind for _, block in adapter.blocks(model) for extra in adapter.extras(block)}
    for kind in also:
        if kind not in kinds:
            listed = ", ".join(sorted(kinds)) or "nothing but its sites"
            raise AptError(f"this model has no '{kind}' to prune", f"it has: {listed}")


def tell_shared(plan: Plan, notice: Callable[[str], None]) -> None:
    """Call ``notice`` with a line about sites that stay dense because several blocks use them."""
    if plan.shared:
        count, first = len(plan.shared), plan.shared[0]
        notice(f"left dense: {count} sites, whose weights several blocks use ({first}, …)")


def tell_idle(adapter: Adapter, model: nn.Module, notice: Callable[[str], None]) -> None:
    """Call ``notice`` with a line about matrices that stay dense because they multiply zeros."""
    if not isinstance(adapter, DecoderAdapter):
        return
    blocks = adapter.blocks(model)
    names = [f"{name}.{each}" for name, block in blocks for each in adapter.idle_of(block)]
    if names:
        inputs = "whose inputs are only zeros, at least in one block of their kind"
        notice(f"left dense: {len(names)} matrices {inputs} ({names[0]}, …)")


def check_rounding(
    plan: Plan, notice: Callable[[str], None] = lambda line: None, quantized: bool = False
) -> None:
    """Raise if a plan prunes no weight; ``notice`` gets a line about sites that lose no weight.

    Args:
        quantized: True if weights become integers, so that a sparsity of 0 has an effect.
    """
    pruned = [site for block in plan.blocks for site in block.pruned]
    for site in pruned:
        if removed_by(site.pattern, site.shape) == site.size:
            message = f"{site.name} would lose all of its {site.size:,} weights: {site.pattern} of "
            hint = "give a smaller sparsity, or skip it"
            raise AptError(f"{message}them rounds to all", hint, ("sparsity", "skip"))
    unpruned = [site for site in pruned if not removed_by(site.pattern, site.shape)]
    if quantized:
        unpruned = [site for site in unpruned if not keeps_all(site.pattern)]
    if not unpruned:
        return
    first = unpruned[0]
    row = first.pattern is not None and first.pattern.per == "row"
    count = f"{first.shape[1]:,} in each row" if row else f"{first.size:,}"
    message = f"{first.pattern} of the weights of {first.name} ({count}) rounds to none"
    if len(unpruned) == len(pruned) and not any(block.extras for block in plan.blocks):
        hint = "give a larger sparsity" + ", or quantize" * keeps_all(first.pattern)
        options = ("sparsity", "quantize") if keeps_all(first.pattern) else ("sparsity",)
        raise AptError(f"nothing would be pruned: {message}", hint, options)
    notice(f"{len(unpruned)} of {len(pruned)} sites lose no weight: {message}")
