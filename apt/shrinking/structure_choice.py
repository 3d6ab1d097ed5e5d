"""The choice of the structure of a smaller model, from its possible sizes."""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Groups
from apt.checkpoints.load import fingerprint
from apt.errors import AptError, faulty
from apt.files.journal import Journal
from apt.options import Mode
from apt.planning.structure import Removed, Structure
from apt.plugin.specs import ShrinkMethodSpec
from apt.shrinking.proxy import Proxy
from apt.shrinking.search import Candidate, Scored, Search, SearchOptions
from apt.shrinking.sizes import Size
from apt.solver import MethodError, SolverOptions
from apt.text.self_generated import own_text, writes


class GroupScores(Protocol):
    """The importance of the groups of every block, by block and by kind.

    The groups of lowest importance are removed, the same number in each block. Kinds that no site
    reads, such as experts, need no scores: they are then chosen as without this method. If groups
    are apart, as the channels of experts are, the columns of each reader have scores.
    """

    def __call__(
        self, model: nn.Module, adapter: Adapter, tokens: Tensor, /
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Scores (count,) by block and kind, from calibration ``tokens`` (samples, seqlen).

        Those of groups that are apart are by block and reader, (columns,).
        """


class BlockChoice(Protocol):
    """The blocks to drop."""

    def __call__(
        self, model: nn.Module, adapter: Adapter, tokens: Tensor, count: int, /
    ) -> Sequence[str]:
        """The names of ``count`` blocks, from calibration ``tokens`` (samples, seqlen)."""


_FITNESS_TOKENS = 2048


@dataclass(frozen=True)
class StructureChoice:
    """The choice of the structure of a smaller model.

    Args:
        sizes: the sizes to choose from; the first comes nearest to the wish.
        groups, experts, blocks: the methods that choose what is removed.
        whole: True if the model is in memory as a whole, so that widths can be compared.
        drop: the indices of the blocks to drop; empty leaves them to the choice of blocks.
        journal: the journal of a search, with the losses that it knows already.
        given: the structure, if it is known already.
    """

    mode: Mode
    sizes: Sequence[Size]
    groups: ShrinkMethodSpec
    experts: ShrinkMethodSpec
    blocks: ShrinkMethodSpec
    solver: SolverOptions
    whole: bool = True
    drop: tuple[int, ...] = ()
    search: SearchOptions = field(default_factory=SearchOptions)
    seed: int = 0
    journal: Journal = field(default_factory=Journal)
    given: Structure | None = None

    @property
    def kinds(self) -> set[str]:
        """The kinds of groups of which some size lacks some."""
        return {kind for size in self.sizes for kind in size.kept}

    def check_streamable(self) -> None:
        """Raise if the model must be in memory as a whole."""
        if self.mode == "search":
            raise AptError(
                "a search needs the whole model in memory", "do not stream", ("search", "stream")
            )
        specs = (self.groups, self.experts, self.blocks)
        used = [spec for spec in specs if not spec.streams]
        if used:
            fault = f"method {used[0].name} needs the whole model in memory"
            raise AptError(fault, "choose another method, or do not stream", ("method", "stream"))

    def provisional(self, model: nn.Module, adapter: Adapter) -> Structure:
        """A structure of the first size; the blocks that it drops may not be chosen yet."""
        if self.given is not None:
            return self.given
        names = [name for name, _ in adapter.blocks(model)]
        dropped = [names[index] for index in self.drop] or names[self.sizes[0].blocks :]
        return Structure(self.sizes[0].kept, frozenset(dropped))

    def choose(
        self,
        model: nn.Module,
        adapter: Adapter,
        tokens: Tensor,
        status: Callable[[str], None] = lambda line: None,
        *,
        bos: int | None = None,
        special: Collection[int] | None = None,
    ) -> tuple[Structure, list[Scored]]:
        """Choose a structure.

        Args:
            tokens: calibration token ids (samples, seqlen).
            bos, special: the first token of every sample, and special tokens, see
                `apt.text.self_generated.own_text`.

        Returns:
            The structure, and the candidates that were compared, those of lowest loss first.
        """
        if self.given is not None:
            return self.given, []
        choosing = _Choosing(self, model, adapter, tokens, status)
        return choosing.structure(bos, special), choosing.scored


@dataclass
class _Choosing:
    """A choice that is being made for a model."""

    choice: StructureChoice
    model: nn.Module
    adapter: Adapter
    tokens: Tensor
    status: Callable[[str], None]
    scored: list[Scored] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = [name for name, _ in self.adapter.blocks(self.model)]
        few = max(1, _FITNESS_TOKENS // self.tokens.shape[1])
        self.few = self.tokens[:few]  # the samples for the losses of candidates
        self.rest = self.tokens[few:] if len(self.tokens) >= 2 * few else self.tokens  # for fits

    def structure(self, bos: int | None, special: Collection[int] | None) -> Structure:
        """The structure; see `StructureChoice.choose`."""
        how, size = self.choice, self.choice.sizes[0]
        dropped = [self.names[index] for index in sorted(set(how.drop))]
        compares = how.mode in ("width", "blocks-first") and how.whole and len(how.sizes) > 1
        drops = how.mode == "search" or (compares and how.mode == "blocks-first")
        if drops and writes(self.model):
            self.status("generating text")
            count, seqlen = self.few.shape
            own = own_text(self.model, count, seqlen, how.seed, bos=bos, special=special)
            self.few = torch.cat([self.few, own.to(self.few)])
        if how.mode == "search":
            best = self.searched()
            size, dropped = best.size, [self.names[index] for index in sorted(best.dropped)]
        elif size.blocks < len(self.names) and not dropped:
            self.status(f"choosing the blocks to drop ({how.blocks.name})")
            dropped = self.dropped(len(self.names) - size.blocks, self.tokens)
        if compares:
            size = self.widest(dropped)
        structure = Structure(size.kept, frozenset(dropped))
        if size.kept and how.groups.chooses == "groups":
            self.status(f"choosing the groups to remove ({how.groups.name})")
            structure = replace(structure, removed=self.removed(structure))
        return structure

    def dropped(self, count: int, tokens: Tensor) -> list[str]:
        """The names of the blocks that the choice of blocks drops."""
        method = self.choice.blocks
        chosen = cast(BlockChoice, method.load())(self.model, self.adapter, tokens, count)
        dropped = list(chosen) if isinstance(chosen, Iterable) else []
        if not len(set(dropped)) == len(dropped) == count or not set(dropped) <= set(self.names):
            fault = f"returns {chosen!r}, not the names of {count} blocks"
            raise faulty(f"method {method.name}", fault, "method", "method")
        return dropped

    def widest(self, dropped: Sequence[str]) -> Size:
        """The size of lowest loss among those of equal depth, without the ``dropped`` blocks."""
        sizes = self.choice.sizes
        self.status(f"comparing {len(sizes)} widths")
        model, how = (self.model, self.adapter, self.rest), self.choice
        proxy = Proxy(*model, how.solver, how.kinds, fit_gaps=bool(dropped))
        indices = frozenset(map(self.names.index, dropped))
        for size in sizes:
            loss = proxy.loss(size.kept, dropped, self.few)
            self.scored.append(Scored(Candidate(size, indices), loss))
        self.scored.sort(key=lambda each: each.loss)
        return self.scored[0].candidate.size

    @torch.no_grad()
    def searched(self) -> Candidate:
        """The candidate of lowest loss."""
        how, count, started = self.choice, len(self.names), time.monotonic()
        self.status("search: reading the inputs of the dense model")
        known = (self.model, self.adapter, self.rest, how.solver, how.kinds)
        proxy = Proxy(*known, fit_gaps=True)
        inputs = {"inputs": self.inputs()}
        if not how.journal.serves(inputs):  # the losses of other inputs are forgotten
            how.journal.begin(inputs)

        def loss(candidate: Candidate) -> float:
            dropped = [self.names[index] for index in candidate.dropped]
            kept = candidate.size.kept
            value: float = how.journal.remember(
                candidate.key, lambda: proxy.loss(kept, dropped, self.few)
            )
            return value

        def alone(index: int) -> float:
            return loss(Candidate(Size({}, count - 1, 1, 1), frozenset([index])))

        def tell(number: int, lowest: float) -> None:
            self.status(f"search: {number} candidates, lowest loss {lowest:.4f}")

        self.status("search: ranking the blocks by the loss without each of them")
        ranking = sorted(range(count), key=alone)
        first = self.first()
        search = Search(how.sizes, ranking, loss, how.search, how.seed, first, tell, started)
        self.scored = search.run()
        return self.scored[0].candidate

    def first(self) -> list[Candidate]:
        """Every size, without the blocks that the choice of blocks drops."""
        chosen, sizes = {0: frozenset[int]()}, self.choice.sizes
        for count in {len(self.names) - size.blocks for size in sizes} - {0}:
            chosen[count] = frozenset(map(self.names.index, self.dropped(count, self.few)))
        return [Candidate(size, chosen[len(self.names) - size.blocks]) for size in sizes]

    def inputs(self) -> str:
        """A hash of everything that the losses of candidates depend on."""
        tokens, damping = [self.few.tolist(), self.rest.tolist()], self.choice.solver.damping
        parts = (fingerprint(self.model), tokens, damping, "gap fits")
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def removed(self, structure: Structure) -> dict[str, Removed]:
        """The groups of the lowest scores of each block."""
        method, config = self.choice.groups, getattr(self.model, "config", None)
        scores = cast(GroupScores, method.load())(self.model, self.adapter, self.tokens)
        removed = dict[str, Removed]()
        try:
            for name, block in self.adapter.blocks(self.model):
                if name not in structure.dropped:
                    groups = self.adapter.groups(block, config)
                    removed[name] = dict(_lowest(name, groups, structure, scores))
        except MethodError as error:
            raise faulty(f"method {method.name}", str(error), "method", "method") from error
        if removed and not any(removed.values()):
            raise AptError(
                f"method {method.name} has no scores for {' and '.join(sorted(structure.kept))}",
                "choose a method for them, or remove other groups too",
                ("method", "sizes"),
            )
        return removed


def _lowest(
    block: str,
    kinds: Iterable[Groups],
    structure: Structure,
    scores: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The groups of the lowest scores of a block, by kind, or by reader if they are apart."""
    for groups in kinds:
        pattern = structure.groups(block, groups)
        patterns = {groups.kind: pattern}
        if groups.apart:
            patterns = {r: structure.columns(block, groups, r) for r in groups.readers}
        if pattern.removed and (groups.readers or _has_scores(scores, block, groups)):
            for name, each in patterns.items():
                mask = each.lowest(_scores_of(scores, block, name, each.count).cpu())
                yield name, tuple(mask.nonzero().squeeze(1).tolist())


def _has_scores(scores: object, block: str, groups: Groups) -> bool:
    """True if a method scored groups that no site reads."""
    own = scores.get(block) if isinstance(scores, Mapping) else None
    return isinstance(own, Mapping) and groups.kind in own


def _scores_of(
    scores: Mapping[str, Mapping[str, Tensor]], block: str, name: str, count: int
) -> Tensor:
    """The scores (count,) of the groups of a kind, or of the columns of a reader, in a block."""
    try:
        own: object = scores[block][name]
    except (TypeError, KeyError, IndexError) as error:
        raise MethodError(f"returns no scores for the {name} of {block}") from error
    if not isinstance(own, Tensor) or own.shape != (count,):
        kind = f"shape {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
        raise MethodError(f"returns scores of {kind} for the {name} of {block}, not ({count},)")
    if own.isnan().any():
        raise MethodError(f"returns a score that is NaN for the {name} of {block}")
    return own
