"""The choice of the structure of a smaller model, from its possible sizes."""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Groups, Samples
from apt.checkpoints.load import fingerprint
from apt.errors import AptError, plugin_error
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

    The groups of lowest importance are removed, the same number in each block. Kinds without
    readers, such as experts, need no scores: without scores, their default choice applies. If
    groups are apart, such as the channels of experts, the columns of each reader have scores.
    """

    def __call__(
        self, model: nn.Module, adapter: Adapter, tokens: Tensor, /
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Scores (count,) by block and kind, from calibration ``tokens`` (samples, seqlen).

        Scores of groups that are apart are by block and reader, (columns,).
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
        sizes: the sizes to choose from; the first is nearest to the request.
        groups, experts, blocks: the methods that choose groups, experts and blocks.
        whole: True if the whole model is in memory, so that widths can be compared.
        drop: the indices of the blocks to drop; empty leaves them to the choice of blocks.
        journal: the journal of a search, with the losses of evaluated candidates.
        known_structure: the structure; None if it is not chosen yet.
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
    known_structure: Structure | None = None

    @property
    def kinds(self) -> set[str]:
        """The kinds of groups that some size reduces."""
        return {kind for size in self.sizes for kind in size.kept}

    def check_streamable(self) -> None:
        """Raise if the whole model must be in memory."""
        if self.mode == "search":
            raise AptError(
                "a search needs the whole model in memory", "do not stream", ("search", "stream")
            )
        specs = (self.groups, self.experts, self.blocks)
        unsuitable = [spec for spec in specs if not spec.streams]
        if unsuitable:
            message = f"method {unsuitable[0].name} needs the whole model in memory"
            raise AptError(message, "choose another method, or do not stream", ("method", "stream"))

    def provisional(self, model: nn.Module, adapter: Adapter) -> Structure:
        """A structure of the first size, with the last blocks dropped if none are chosen."""
        if self.known_structure is not None:
            return self.known_structure
        names = [name for name, _ in adapter.blocks(model)]
        dropped = [names[index] for index in self.drop] or names[self.sizes[0].blocks :]
        return Structure(self.sizes[0].kept, frozenset(dropped))

    def choose(
        self,
        model: nn.Module,
        adapter: Adapter,
        tokens: Tensor | Samples,
        status: Callable[[str], None] = lambda line: None,
        *,
        bos: int | None = None,
        special: Collection[int] | None = None,
    ) -> tuple[Structure, list[Scored]]:
        """Choose a structure.

        Args:
            tokens: calibration token ids (samples, seqlen), or other samples.
            bos, special: the first token of every sample, and special tokens, see
                `apt.text.self_generated.own_text`.

        Returns:
            The structure, and the compared candidates by increasing loss.

        Raises:
            AptError: a search needs the next token, and the model is not a decoder of text.
        """
        if self.known_structure is not None:
            return self.known_structure, []
        if isinstance(tokens, Samples) and self.mode == "search":
            message = f"a search needs the next token, which {type(model).__name__} lacks"
            raise AptError(message, "use the mode width or depth", ("mode",))
        run = _ChoiceRun(self, model, adapter, tokens, status)
        return run.structure(bos, special), run.scored


@dataclass
class _ChoiceRun:
    """One run of the choice, for one model."""

    choice: StructureChoice
    model: nn.Module
    adapter: Adapter
    tokens: Any  # token ids (samples, seqlen), or `Samples`, on which no candidates are compared
    status: Callable[[str], None]
    scored: list[Scored] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = [name for name, _ in self.adapter.blocks(self.model)]
        count = max(1, _FITNESS_TOKENS // self.tokens.shape[1])
        self.fitness_tokens = self.tokens[:count]  # the samples for the losses of candidates
        # The samples for fits: all others, if they are enough.
        self.fit_tokens = self.tokens[count:] if len(self.tokens) >= 2 * count else self.tokens

    def structure(self, bos: int | None, special: Collection[int] | None) -> Structure:
        """The structure; see `StructureChoice.choose`."""
        choice, size = self.choice, self.choice.sizes[0]
        dropped = [self.names[index] for index in sorted(set(choice.drop))]
        compares = (
            choice.mode in ("width", "blocks-first")
            and choice.whole
            and len(choice.sizes) > 1
            and isinstance(self.tokens, Tensor)
        )
        drops = choice.mode == "search" or (compares and choice.mode == "blocks-first")
        if drops and writes(self.model):
            self.status("generating text")
            count, seqlen = self.fitness_tokens.shape
            generated = own_text(self.model, count, seqlen, choice.seed, bos=bos, special=special)
            given = self.fitness_tokens
            self.fitness_tokens = torch.cat([given, generated.to(given)])
        if choice.mode == "search":
            candidate = self.best_candidate()
            size = candidate.size
            dropped = [self.names[index] for index in sorted(candidate.dropped)]
        elif size.blocks < len(self.names) and not dropped:
            self.status(f"choosing the blocks to drop ({choice.blocks.name})")
            dropped = self.dropped_blocks(len(self.names) - size.blocks, self.tokens)
        if compares:
            size = self.best_width(dropped)
        structure = Structure(size.kept, frozenset(dropped))
        if size.kept and choice.groups.chooses == "groups":
            self.status(f"choosing the groups to remove ({choice.groups.name})")
            structure = replace(structure, removed=self.removed_groups(structure))
        return structure

    def dropped_blocks(self, count: int, tokens: Any) -> list[str]:
        """The names of the blocks that the choice of blocks drops."""
        method = self.choice.blocks
        result = cast(BlockChoice, method.load())(self.model, self.adapter, tokens, count)
        dropped = list(result) if isinstance(result, Iterable) else []
        if not len(set(dropped)) == len(dropped) == count or not set(dropped) <= set(self.names):
            message = f"returns {result!r}, not the names of {count} blocks"
            raise plugin_error(f"method {method.name}", message, "method", "method")
        return dropped

    def best_width(self, dropped: Sequence[str]) -> Size:
        """The size of lowest loss among those of equal depth, without the ``dropped`` blocks."""
        sizes = self.choice.sizes
        self.status(f"comparing {len(sizes)} widths")
        model, choice = (self.model, self.adapter, self.fit_tokens), self.choice
        proxy = Proxy(*model, choice.solver, choice.kinds, fit_gaps=bool(dropped))
        indices = frozenset(map(self.names.index, dropped))
        for size in sizes:
            loss = proxy.loss(size.kept, dropped, self.fitness_tokens)
            self.scored.append(Scored(Candidate(size, indices), loss))
        self.scored.sort(key=lambda each: each.loss)
        return self.scored[0].candidate.size

    @torch.no_grad()
    def best_candidate(self) -> Candidate:
        """The candidate of lowest loss."""
        choice, count, started = self.choice, len(self.names), time.monotonic()
        self.status("search: reading the inputs of the dense model")
        proxy_arguments = (self.model, self.adapter, self.fit_tokens, choice.solver, choice.kinds)
        proxy = Proxy(*proxy_arguments, fit_gaps=True)
        inputs = {"inputs": self.inputs_hash()}
        if not choice.journal.serves(inputs):  # the losses of other inputs are forgotten
            choice.journal.begin(inputs)

        def loss(candidate: Candidate) -> float:
            dropped = [self.names[index] for index in candidate.dropped]
            kept = candidate.size.kept
            value: float = choice.journal.remember(
                candidate.key, lambda: proxy.loss(kept, dropped, self.fitness_tokens)
            )
            return value

        def loss_without(index: int) -> float:
            return loss(Candidate(Size({}, count - 1, 1, 1), frozenset([index])))

        def report(number: int, lowest: float) -> None:
            self.status(f"search: {number} candidates, lowest loss {lowest:.4f}")

        self.status("search: ranking the blocks by the loss without each of them")
        ranking = sorted(range(count), key=loss_without)
        first = self.first_candidates()
        search = Search(
            choice.sizes, ranking, loss, choice.search, choice.seed, first, report, started
        )
        self.scored = search.run()
        return self.scored[0].candidate

    def first_candidates(self) -> list[Candidate]:
        """Every size, without the blocks that the choice of blocks drops."""
        drops, sizes = {0: frozenset[int]()}, self.choice.sizes
        for count in {len(self.names) - size.blocks for size in sizes} - {0}:
            dropped = self.dropped_blocks(count, self.fitness_tokens)
            drops[count] = frozenset(map(self.names.index, dropped))
        return [Candidate(size, drops[len(self.names) - size.blocks]) for size in sizes]

    def inputs_hash(self) -> str:
        """A hash of everything that the losses of candidates depend on."""
        tokens = [self.fitness_tokens.tolist(), self.fit_tokens.tolist()]
        damping = self.choice.solver.damping
        parts = (fingerprint(self.model), tokens, damping, "gap fits")
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def removed_groups(self, structure: Structure) -> dict[str, Removed]:
        """The groups of the lowest scores of each block."""
        method, config = self.choice.groups, getattr(self.model, "config", None)
        scores = cast(GroupScores, method.load())(self.model, self.adapter, self.tokens)
        removed = dict[str, Removed]()
        try:
            for name, block in self.adapter.blocks(self.model):
                if name not in structure.dropped:
                    groups = self.adapter.groups(block, config)
                    removed[name] = dict(_lowest_groups(name, groups, structure, scores))
        except MethodError as error:
            raise plugin_error(f"method {method.name}", str(error), "method", "method") from error
        if removed and not any(removed.values()):
            raise AptError(
                f"method {method.name} has no scores for {' and '.join(sorted(structure.kept))}",
                "choose a method for them, or remove other groups too",
                ("method", "sizes"),
            )
        return removed


def _lowest_groups(
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
            for name, column_groups in patterns.items():
                values = _scores_of(scores, block, name, column_groups.count)
                mask = column_groups.lowest(values.cpu())
                yield name, tuple(mask.nonzero().squeeze(1).tolist())


def _has_scores(scores: object, block: str, groups: Groups) -> bool:
    """True if a method scored groups that no site reads."""
    block_scores = scores.get(block) if isinstance(scores, Mapping) else None
    return isinstance(block_scores, Mapping) and groups.kind in block_scores


def _scores_of(
    scores: Mapping[str, Mapping[str, Tensor]], block: str, name: str, count: int
) -> Tensor:
    """The scores (count,) of the groups of a kind, or of the columns of a reader, in a block."""
    try:
        values: object = scores[block][name]
    except (TypeError, KeyError, IndexError) as error:
        raise MethodError(f"returns no scores for the {name} of {block}") from error
    if not isinstance(values, Tensor) or values.shape != (count,):
        kind = type(values).__name__
        if isinstance(values, Tensor):
            kind = f"shape {tuple(values.shape)}"
        raise MethodError(f"returns scores of {kind} for the {name} of {block}, not ({count},)")
    if values.isnan().any():
        raise MethodError(f"returns a score that is NaN for the {name} of {block}")
    return values
