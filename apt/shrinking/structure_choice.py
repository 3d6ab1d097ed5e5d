"""The choice of the structure of a smaller model, from its possible sizes."""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

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
from apt.solver import ColumnGroups, MethodError, SolverOptions
from apt.text.self_generated import own_text, writes


class GroupScores(Protocol):
    """The importance of the groups of every block, by block and by kind.

    The groups of lowest importance are removed, the same number in each block.
    """

    def __call__(
        self, model: nn.Module, adapter: Adapter, tokens: Tensor, /
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Scores (count,) by block and kind, from calibration ``tokens`` (samples, seqlen)."""


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
        whole: True if the model is in memory as a whole, so that widths can be compared.
        drop: the indices of the blocks to drop; empty leaves them to the choice of blocks.
        journal: the journal of a search, with the losses that it knows already.
        scored: the candidates that were compared, those of lowest loss first; filled by `choose`.
    """

    mode: Mode
    sizes: Sequence[Size]
    groups: ShrinkMethodSpec
    blocks: ShrinkMethodSpec
    solver: SolverOptions
    whole: bool = True
    drop: tuple[int, ...] = ()
    search: SearchOptions = field(default_factory=SearchOptions)
    seed: int = 0
    journal: Journal = field(default_factory=Journal)
    scored: list[Scored] = field(default_factory=list)

    def check_streamable(self) -> None:
        """Raise if the model must be in memory as a whole."""
        if self.mode == "search":
            raise AptError(
                "a search needs the whole model in memory", "do not stream", ("search", "stream")
            )
        used = [spec for spec in (self.groups, self.blocks) if not spec.streams]
        if used:
            fault = f"method {used[0].name} needs the whole model in memory"
            raise AptError(fault, "choose another method, or do not stream", ("method", "stream"))

    def provisional(self, model: nn.Module, adapter: Adapter) -> Structure:
        """A structure of the first size; the blocks that it drops may not be chosen yet."""
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
    ) -> Structure:
        """Choose a structure.

        Args:
            tokens: calibration token ids (samples, seqlen).
            bos, special: the first token of every sample, and special tokens, see
                `apt.text.self_generated.own_text`.
        """
        names = [name for name, _ in adapter.blocks(model)]
        size, dropped = self.sizes[0], [names[index] for index in sorted(set(self.drop))]
        if self.mode == "search":
            few, rest = _split(tokens)
            if writes(model):
                status("search: generating text")
                own = own_text(model, len(few), few.shape[1], self.seed, bos=bos, special=special)
                few = torch.cat([few, own.to(few)])
            best = self._searched(model, adapter, few, rest, names, status)
            size, dropped = best.size, [names[index] for index in sorted(best.dropped)]
        elif self.mode == "width" and self.whole and len(self.sizes) > 1:
            size = self._widest(model, adapter, tokens, status)
        if size.blocks < len(names) and not dropped:
            status(f"choosing the blocks to drop ({self.blocks.name})")
            dropped = self._dropped(model, adapter, tokens, names, len(names) - size.blocks)
        structure = Structure(size.kept, frozenset(dropped))
        if size.kept and self.groups.chooses == "groups":
            status(f"choosing the groups to remove ({self.groups.name})")
            scores = cast(GroupScores, self.groups.load())(model, adapter, tokens)
            try:
                removed = _lowest(model, adapter, structure, scores)
            except MethodError as error:
                raise faulty(
                    f"method {self.groups.name}", str(error), "method", "method"
                ) from error
            structure = replace(structure, removed=removed)
        return structure

    def _dropped(
        self, model: nn.Module, adapter: Adapter, tokens: Tensor, names: Sequence[str], count: int
    ) -> list[str]:
        """The names of the blocks that the choice of blocks drops."""
        chosen = cast(BlockChoice, self.blocks.load())(model, adapter, tokens, count)
        dropped = list(chosen) if isinstance(chosen, Iterable) else []
        if len(set(dropped)) != count or len(dropped) != count or not set(dropped) <= set(names):
            fault = f"returns {chosen!r}, not the names of {count} blocks"
            raise faulty(f"method {self.blocks.name}", fault, "method", "method")
        return dropped

    def _widest(
        self, model: nn.Module, adapter: Adapter, tokens: Tensor, status: Callable[[str], None]
    ) -> Size:
        """The size of lowest loss among those of equal depth."""
        status(f"comparing {len(self.sizes)} widths")
        few, rest = _split(tokens)
        proxy = Proxy(model, adapter, rest, self.solver)
        for size in self.sizes:
            loss = proxy.loss(size.kept, (), few)
            self.scored.append(Scored(Candidate(size, frozenset()), loss))
        self.scored.sort(key=lambda scored: scored.loss)
        return self.scored[0].candidate.size

    @torch.no_grad()
    def _searched(
        self,
        model: nn.Module,
        adapter: Adapter,
        few: Tensor,
        rest: Tensor,
        names: Sequence[str],
        status: Callable[[str], None],
    ) -> Candidate:
        """The candidate of lowest loss on ``few`` samples, with fits to the ``rest``."""
        started = time.monotonic()
        status("search: reading the inputs of the dense model")
        proxy = Proxy(model, adapter, rest, self.solver, fit_gaps=True)
        inputs = {"inputs": self._inputs(model, few, rest)}
        if not self.journal.serves(inputs):  # the losses of other inputs are forgotten
            self.journal.begin(inputs)

        def loss(candidate: Candidate) -> float:
            dropped = [names[index] for index in candidate.dropped]
            kept = candidate.size.kept
            value: float = self.journal.remember(
                candidate.key, lambda: proxy.loss(kept, dropped, few)
            )
            return value

        def alone(index: int) -> float:
            return loss(Candidate(Size({}, len(names) - 1, 1, 1), frozenset([index])))

        status("search: ranking the blocks by the loss without each of them")
        ranking = sorted(range(len(names)), key=alone)
        first = self._first(model, adapter, few, names)
        scored = Search(
            self.sizes, ranking, loss, self.search, self.seed, first,
            lambda count, lowest: status(f"search: {count} candidates, lowest loss {lowest:.4f}"),
            started,
        ).run()  # fmt: skip
        self.scored.extend(scored)
        return scored[0].candidate

    def _first(
        self, model: nn.Module, adapter: Adapter, tokens: Tensor, names: Sequence[str]
    ) -> list[Candidate]:
        """Every size, without the blocks that the choice of blocks drops."""
        chosen = {0: frozenset[int]()}
        for count in {len(names) - size.blocks for size in self.sizes} - {0}:
            dropped = self._dropped(model, adapter, tokens, names, count)
            chosen[count] = frozenset(map(names.index, dropped))
        return [Candidate(size, chosen[len(names) - size.blocks]) for size in self.sizes]

    def _inputs(self, model: nn.Module, *tokens: Tensor) -> str:
        """A hash of everything that the losses of candidates depend on."""
        parts = (fingerprint(model), [t.tolist() for t in tokens], self.solver.damping, "gap fits")
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """About `_FITNESS_TOKENS` tokens for losses, and other ones for fits, if there are as many."""
    few = max(1, _FITNESS_TOKENS // tokens.shape[1])
    return tokens[:few], tokens[few:] if len(tokens) >= 2 * few else tokens


def _lowest(
    model: nn.Module,
    adapter: Adapter,
    structure: Structure,
    scores: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Removed]:
    """The groups of the lowest scores of each block."""
    config: Any = getattr(model, "config", None)
    removed = dict[str, Removed]()
    for name, block in adapter.blocks(model):
        if name in structure.dropped:
            continue
        own = dict[str, tuple[int, ...]]()
        for groups in adapter.groups(block, config):
            kept = structure.kept.get(groups.kind, groups.count)
            if kept < groups.count:
                pattern = ColumnGroups(groups.count, kept, groups.bins)
                mask = pattern.lowest(_scores_of(scores, name, groups).cpu())
                own[groups.kind] = tuple(mask.nonzero().squeeze(1).tolist())
        removed[name] = own
    return removed


def _scores_of(scores: Mapping[str, Mapping[str, Tensor]], block: str, groups: Groups) -> Tensor:
    """The scores (count,) of the groups of a block."""
    try:
        own: object = scores[block][groups.kind]
    except (TypeError, KeyError, IndexError) as error:
        raise MethodError(f"returns no scores for the {groups.kind} of {block}") from error
    if not isinstance(own, Tensor) or own.shape != (groups.count,):
        kind = f"shape {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
        raise MethodError(
            f"returns scores of {kind} for the {groups.kind} of {block}, not ({groups.count},)"
        )
    if own.isnan().any():
        raise MethodError(f"returns a score that is NaN for the {groups.kind} of {block}")
    return own
