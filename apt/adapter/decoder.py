"""The base class of adapters that declare the paths of a decoder's Linears."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from apt.adapter.experts import Experts, one_by_one
from apt.adapter.groups import Groups
from apt.adapter.permutations import Permutable, permutable_channels
from apt.adapter.recording import record_calls
from apt.adapter.samples import ModelInputs
from apt.adapter.sites import Call, Effects, Extra, Sink, Site, State
from apt.adapter.text_config import text_config
from apt.adapter.weight_tap import WeightTap
from apt.errors import AptError
from apt.field_types import check_fields

_POSITIONS = ("max_position_embeddings", "max_seq_len")


@dataclass(frozen=True)
class Input:
    """An input of a block and the Linears that multiply it, for `DecoderAdapter.inputs`.

    Args:
        name: the input's name.
        linears: the paths of the Linears within the block.
        residual: True if their products are added to the residual stream.
        crossing: True if the input is the output of an earlier stack.
        added_to: the name of the input to which their products are added; see `Site`.
    """

    name: str
    linears: tuple[str, ...]
    residual: bool = False
    crossing: bool = False
    added_to: str = ""

    def __post_init__(self) -> None:
        check_fields(self)


class DecoderAdapter:
    """A decoder of Linears, declared by the path of its blocks and the inputs of their Linears.

    Attributes:
        blocks_path: the path of the ``ModuleList`` of blocks.
        inputs: the inputs of a block in the order of the forward pass.
        experts: the routed experts of its blocks; a block may have none of them.
        left_dense: paths within a block of parameters, or of modules with a weight, that are
            neither site nor extra. The routers of ``experts`` need not be listed.
        transposed: types of modules other than Linear whose weight is stored (in, out).
    """

    blocks_path: ClassVar[str]
    inputs: ClassVar[tuple[Input, ...]]
    experts: ClassVar[tuple[Experts, ...]] = ()
    left_dense: ClassVar[tuple[str, ...]] = ()
    transposed: ClassVar[tuple[type[nn.Module], ...]] = ()

    def check(self, config: Any) -> None:
        """Accept every configuration."""

    def positions(self, config: Any) -> int | None:
        """The configuration's ``max_position_embeddings``, also under its other common name."""
        text = text_config(config)
        values = (getattr(text, name, None) for name in _POSITIONS)
        return next((positions for positions in values if positions is not None), None)

    def held(self, config: Any, seqlen: int) -> int:
        """The values of one attention matrix per head; 0 with a fused attention kernel."""
        text = text_config(config)
        heads: int = getattr(text, "num_attention_heads", None) or 0
        fused = getattr(text, "_attn_implementation", None) != "eager"
        return 0 if fused else heads * seqlen

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Multiply the experts one after the other, see `one_by_one`."""
        return one_by_one(model)

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The modules in the list at ``blocks_path``."""
        return self.blocks_at(model, self.blocks_path)

    def blocks_at(self, model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
        """The modules in the list at ``path``, with their full names."""
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            raise AptError(
                f"adapter {type(self).__name__} does not fit {type(model).__name__}: "
                f"it has no '{path}'",
                "choose the model's own adapter, see: apt-prune adapters",
            ) from None
        return [(f"{path}.{name}", block) for name, block in members(layers)]

    def stacks(self, model: nn.Module) -> list[tuple[str, list[tuple[str, nn.Module]]]]:
        """One stack, the decoder."""
        return [("decoder", self.blocks(model))]

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """``inputs``; override this if the model has blocks of several kinds."""
        return self.inputs

    def experts_of(self, block: nn.Module) -> list[Experts]:
        """The declared ``experts`` that exist in the block."""
        paths = dict(block.named_modules())
        return [experts for experts in self.experts if experts.path in paths]

    def left_dense_of(self, block: nn.Module) -> tuple[str, ...]:
        """``left_dense``, and the routers of the block's experts."""
        return (*self.left_dense, *(experts.router for experts in self.experts_of(block)))

    def sites(self, block: nn.Module) -> list[Site]:
        """The declared Linears, checked against the module tree, and the declared experts."""
        experts, dense = self.experts_of(block), self.left_dense_of(block)
        prefixes = tuple(f"{path}." for path in (*dense, *(each.path for each in experts)))
        modules = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, (nn.Linear, *self.transposed))
            and name not in dense
            and not name.startswith(prefixes)
        }
        inputs = self.inputs_of(block)
        names = {linear for entry in inputs for linear in entry.linears}
        if names != set(modules):
            missing, extra = sorted(names - set(modules)), sorted(set(modules) - names)
            gap = f"no {missing[0]}" if missing else f"{extra[0]}, which is not declared"
            raise AptError(
                f"adapter {type(self).__name__} does not fit {type(block).__name__}: it has {gap}",
                "choose the model's own adapter, see: apt-prune adapters",
            )
        declared: dict[nn.Parameter, Site] = {}
        for order, entry in enumerate(inputs):
            for linear in entry.linears:
                parameter = block.get_parameter(f"{linear}.weight")
                if parameter in declared:  # shared with a module that runs earlier
                    first = declared[parameter]
                    declared[parameter] = replace(first, calls=first.calls + 1)
                    continue
                declared[parameter] = Site(
                    linear,
                    f"{linear}.weight",
                    entry.name,
                    order,
                    entry.residual,
                    isinstance(modules[linear], self.transposed),
                    crossing=entry.crossing,
                    added_to=entry.added_to,
                )
        sites = list(declared.values())
        for each in experts:
            sites += each.sites(block, 1 + max((site.order for site in sites), default=-1))
        return sites

    def extras(self, block: nn.Module) -> list[Extra]:
        """No extras."""
        return []

    def effects(
        self, block: nn.Module, extras: Sequence[Extra], sink: Effects
    ) -> AbstractContextManager[None]:
        """Report nothing: the family has no extras."""
        return nullcontext()

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The experts of the block; no other groups."""
        return [groups for each in self.experts_of(block) for groups in each.groups(block, config)]

    def permutable(self, block: nn.Module, config: Any) -> list[Permutable]:
        """The channels among the groups of the block."""
        return list(permutable_channels(self.groups(block, config), self.sites(block)))

    def tables(self, block: nn.Module, call: Call) -> Mapping[str, Tensor]:
        """No further rows: all rows that sites multiply are tokens."""
        return {}

    def idle_of(self, block: nn.Module) -> Sequence[str]:
        """The names of matrices that multiply only zeros, and stay dense; empty by default."""
        return ()

    def ungrouped(self, block: nn.Module, config: Any) -> dict[str, str]:
        """The names of sites whose inputs form no groups, with the reasons; empty by default."""
        return {}

    def enter(self, model: nn.Module, tokens: ModelInputs) -> tuple[State, list[Call]]:
        """Record the call of every block in one run of the model with stubs for blocks."""
        return self.enter_next(model, tokens, ())

    def enter_next(
        self, model: nn.Module, tokens: ModelInputs, ends: Sequence[State]
    ) -> tuple[State, list[Call]]:
        """Record the calls of the next stack; the blocks of earlier stacks return ``ends``."""
        stacks = [[block for _, block in blocks] for _, blocks in self.stacks(model)]
        streams = [self.residual(end) for end in ends]
        earlier = list(zip(stacks, streams, strict=False))
        return record_calls(model, stacks[len(ends)], tokens, earlier)

    def step(self, block: nn.Module, state: State, call: Call) -> State:
        """Replay the block's call, see `Call.run`."""
        return call.run(block, state)

    def residual(self, state: State) -> Tensor:
        """The state, or its first element: the residual stream."""
        stream: Tensor = state[0] if isinstance(state, tuple) else state
        return stream

    def capture(
        self, block: nn.Module, sites: Sequence[Site], sink: Sink
    ) -> AbstractContextManager[None]:
        """Watch every product with a site's weight, even if its module is not called."""
        routed = [site for site in sites if site.routed]
        return WeightTap({site: site.weight(block) for site in sites}, sink, routed)


def members(layers: nn.Module) -> list[tuple[str, nn.Module]]:
    """The direct submodules of a list, with their names; a repeated module is listed each time.

    ``named_children`` omits repeated modules, so that weights shared by blocks would be missed.
    """
    return [(name, block) for name, block in layers._modules.items() if block is not None]
