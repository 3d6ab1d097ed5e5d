"""What an adapter is: how one model family is traversed, and what flows into each of its weights.

The core hands an adapter the model and asks for its blocks, the sites of a block, the inputs of
every block, one step through a block, and the capture of what multiplies each site's weight. What
flows between blocks (`State`) is the adapter's own business: a tensor for most families, more
where a residual is threaded beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from apt.errors import AptError
from apt.tap import WeightTap

State = Any
Sink = Callable[["Site", Tensor], None]
Effects = Callable[["Extra", Tensor, float], None]


_SITE_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,), "parameter": (str,), "input": (str,), "order": (int,), "residual": (bool,),
    "transposed": (bool,), "expert": (int, type(None)), "routed": (bool,), "calls": (int,),
}  # fmt: skip


def _check_type(what: str, name: Any, field_name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise TypeError(f"{what} {name!r}: {field_name} is {value!r}, not {wanted}")


@dataclass(frozen=True)
class Site:
    """A weight that can be pruned.

    Args:
        name: its place within the block, for instance ``self_attn.q_proj``; experts of a stack end
            in ``.{expert}``.
        parameter: the path of the parameter within the block.
        input: the name of the input that it multiplies. Sites of a block with the same input share
            one Gram matrix and one factorisation.
        order: sites of a lower order feed those of a higher one.
        residual: whether its product is added to the residual stream.
        transposed: whether it is stored (in, out) instead of (out, in).
        expert: its place in the first dimension of a stacked parameter (experts, …); None where the
            parameter is the weight.
        routed: whether a router decides which tokens it sees. Such a weight has an input of its
            own, is pruned strictly layer by layer, and is not counted on to see every token.
        calls: how often a forward multiplies it with every token: twice where two modules share it.
    """

    name: str
    parameter: str
    input: str
    order: int = 0
    residual: bool = False
    transposed: bool = False
    expert: int | None = None
    routed: bool = False
    calls: int = 1

    def __post_init__(self) -> None:
        for field_name, kind in _SITE_TYPES.items():
            _check_type("Site", self.name, field_name, getattr(self, field_name), kind)
        if self.routed and self.residual:
            raise ValueError(f"{self.name} is routed: declare residual=False")

    @property
    def kind(self) -> str:
        """Its name, which the experts of a stack have in common."""
        return self.name if self.expert is None else self.name.removesuffix(f".{self.expert}")

    def weight(self, block: nn.Module) -> Tensor:
        """The weight in ``block`` as stored: the parameter, or a view of its slice."""
        parameter = block.get_parameter(self.parameter)
        return parameter if self.expert is None else parameter[self.expert]

    def oriented(self, weight: Tensor) -> Tensor:
        """``weight`` as (out, in); a view."""
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class Extra:
    """A parameter beyond the sites that is pruned on request, channel by channel.

    Args:
        kind: what users ask for it by: ``conv1d``.
        name: its place within the block.
        parameter: the path of the parameter within the block; its first dimension is the channels.
        removal: what is lost where weights become zero. ``"product"``: what they multiply, and
            what is kept can make up for it; ``"effect"``: something that only running it tells.
    """

    kind: str
    name: str
    parameter: str
    removal: Literal["product", "effect"] = "product"

    def weight(self, block: nn.Module) -> Tensor:
        """The weights (channels, k); a view."""
        parameter = block.get_parameter(self.parameter)
        return parameter.view(parameter.shape[0], -1)


@dataclass(frozen=True)
class Call:
    """How a model called a block: everything but the state.

    Args:
        args, kwargs: the block's own arguments.
        keyword: the name under which the state was passed; None where it came first.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    keyword: str | None = None

    def replay(self, block: nn.Module, state: Tensor) -> Any:
        """Call ``block`` as the model did, on another state."""
        if self.keyword is None:
            return block(state, *self.args, **self.kwargs)
        return block(*self.args, **{self.keyword: state}, **self.kwargs)


class Adapter(Protocol):
    """What the core asks of a model family."""

    def check(self, config: Any) -> None:
        """Raise `AptError` where a configuration of the family cannot be served."""

    def positions(self, config: Any) -> int | None:
        """The longest sequence that a configuration allows; None where there is no limit."""

    def held(self, config: Any, seqlen: int) -> int:
        """How many values for each token a block's forward holds while a product waits, beside
        its inputs and the residual stream: matrices of attention, where it makes them."""

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Entered around everything that is run of a model: what its family needs meanwhile."""

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks in order, with their full names.

        Raises:
            AptError: the model is not of this family.
        """

    def sites(self, block: nn.Module) -> list[Site]:
        """The sites of a block.

        Raises:
            AptError: a declared site is missing, or the block has a Linear that is not declared.
        """

    def extras(self, block: nn.Module) -> list[Extra]:
        """What can be pruned beside the sites, on request, in the order of execution."""

    def effects(
        self, block: nn.Module, extras: Sequence[Extra], sink: Effects
    ) -> AbstractContextManager[None]:
        """While entered, hand what an extra's weights do in each forward to ``sink``.

        That is, of each channel, the Gram matrix (channels, k, k) of what its weights multiply, or,
        for ``"effect"``, of what the removal of each changes in the block's product; and the energy
        of that product, which the loss is a share of.
        """

    def enter(self, model: nn.Module, tokens: Tensor) -> tuple[State, list[Call]]:
        """The state before the first block, and how each block is called, for one batch.

        Args:
            model: the whole model.
            tokens: token ids (samples, seqlen).
        """

    def step(self, block: nn.Module, state: State, call: Call) -> State:
        """Run one block."""

    def residual(self, state: State) -> Tensor:
        """The residual stream (samples, seqlen, hidden) in a state, as blocks begin with it."""

    def capture(
        self, block: nn.Module, sites: Sequence[Site], sink: Sink
    ) -> AbstractContextManager[None]:
        """While entered, hand every input (..., in) that a site's weight multiplies to ``sink``.

        Before the product is taken: the weight may be changed by then. Captures of several batches
        are entered at once, each in a thread of its own, of which one runs at a time; what a
        capture sees of another thread is ignored.
        """


@dataclass(frozen=True)
class Input:
    """An input of a block and the Linears that multiply it, for `DecoderAdapter.inputs`.

    Args:
        name: the input's name.
        linears: the paths of the Linears within the block.
        residual: whether their products are added to the residual stream.
    """

    name: str
    linears: tuple[str, ...]
    residual: bool = False

    def __post_init__(self) -> None:
        _check_type("Input", self.name, "name", self.name, (str,))
        _check_type("Input", self.name, "residual", self.residual, (bool,))
        linears: Any = self.linears
        if not isinstance(linears, tuple):
            right = f"({linears!r},)" if isinstance(linears, str) else f"tuple({linears!r})"
            raise TypeError(
                f"Input {self.name!r}: linears is {linears!r}, not a tuple of paths: write {right}"
            )
        for path in linears:
            _check_type("Input", self.name, "a path in linears", path, (str,))


class DecoderAdapter:
    """A decoder of Linears, declared by where its blocks are and what their Linears multiply.

    Attributes:
        blocks_path: the path of the ``ModuleList`` of blocks.
        inputs: the inputs of a block in the order of the forward pass.
        left_dense: paths within a block of parameters, or of modules with a weight, that are
            neither site nor extra, for instance a router.
        transposed: types of module, beside Linear, whose weight is stored (in, out).
    """

    blocks_path: ClassVar[str]
    inputs: ClassVar[tuple[Input, ...]]
    left_dense: ClassVar[tuple[str, ...]] = ()
    transposed: ClassVar[tuple[type[nn.Module], ...]] = ()

    def check(self, config: Any) -> None:
        """Accept every configuration."""

    def positions(self, config: Any) -> int | None:
        """``max_position_embeddings``."""
        return getattr(config, "max_position_embeddings", None)

    def held(self, config: Any, seqlen: int) -> int:
        """One matrix of attention for each head, where no fused kernel does without."""
        heads: int = getattr(config, "num_attention_heads", None) or 0
        fused = getattr(config, "_attn_implementation", None) != "eager"
        return 0 if fused else heads * seqlen

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nothing is needed."""
        return nullcontext()

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The modules in ``blocks_path``."""
        try:
            layers = model.get_submodule(self.blocks_path)
        except AttributeError:
            raise AptError(
                f"adapter {type(self).__name__} does not fit {type(model).__name__}: "
                f"it has no '{self.blocks_path}'",
                "choose the model's own adapter, see: apt-prune adapters",
            ) from None
        return [(f"{self.blocks_path}.{name}", block) for name, block in layers.named_children()]

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """``inputs``; override where blocks are of several kinds."""
        return self.inputs

    def sites(self, block: nn.Module) -> list[Site]:
        """The Linears that are declared, held against the module tree."""
        present = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, (nn.Linear, *self.transposed)) and name not in self.left_dense
        }
        inputs = self.inputs_of(block)
        names = {linear for entry in inputs for linear in entry.linears}
        if names != set(present):
            missing, extra = sorted(names - set(present)), sorted(set(present) - names)
            gap = f"no {missing[0]}" if missing else f"{extra[0]}, which is not declared"
            raise AptError(
                f"adapter {type(self).__name__} does not fit {type(block).__name__}: it has {gap}",
                "choose the model's own adapter, see: apt-prune adapters",
            )
        declared: dict[nn.Parameter, Site] = {}
        for order, entry in enumerate(inputs):
            for linear in entry.linears:
                parameter = block.get_parameter(f"{linear}.weight")
                if parameter in declared:  # shared with a module that runs before
                    first = declared[parameter]
                    declared[parameter] = replace(first, calls=first.calls + 1)
                    continue
                declared[parameter] = Site(
                    linear,
                    f"{linear}.weight",
                    entry.name,
                    order,
                    entry.residual,
                    isinstance(present[linear], self.transposed),
                )
        return list(declared.values())

    def extras(self, block: nn.Module) -> list[Extra]:
        """None."""
        return []

    def effects(
        self, block: nn.Module, extras: Sequence[Extra], sink: Effects
    ) -> AbstractContextManager[None]:
        """Nothing is handed over."""
        return nullcontext()

    def enter(self, model: nn.Module, tokens: Tensor) -> tuple[State, list[Call]]:
        """Record every block's own call by one run of the model over stubs."""
        return record_calls(model, [block for _, block in self.blocks(model)], tokens)

    def step(self, block: nn.Module, state: State, call: Call) -> State:
        """Replay the block's call; where it returns a tuple, the state comes first."""
        result = call.replay(block, state)
        return result[0] if isinstance(result, tuple) else result

    def residual(self, state: State) -> Tensor:
        """The state itself."""
        stream: Tensor = state
        return stream

    def capture(
        self, block: nn.Module, sites: Sequence[Site], sink: Sink
    ) -> AbstractContextManager[None]:
        """Watch every product with a site's weight, whether or not its module is called."""
        return WeightTap({site: site.weight(block) for site in sites}, sink)


_STATE = "hidden_states"


class _LastBlock(Exception):
    """Ends a recording run: what comes after the blocks is not needed."""


def record_calls(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor
) -> tuple[Tensor, list[Call]]:
    """Run ``model`` once with every block stubbed, recording each block's own call.

    So blocks of different kinds get their own masks and positions.

    Args:
        model: a transformers model.
        blocks: its blocks, in the order in which it calls them.
        tokens: token ids (samples, seqlen).

    Returns:
        The state before the first block (samples, seqlen, hidden) and one call for each block.
    """
    states: list[Tensor] = []
    calls: list[Call] = []

    def stub(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        (state,) = passed = passed_on(args, kwargs)
        states.append(state)
        given = {name: value for name, value in kwargs.items() if args or name != _STATE}
        calls.append(Call(args[1:], given, None if args else _STATE))
        if len(calls) == len(blocks):
            raise _LastBlock
        return passed

    with stubbed(blocks, stub), torch.no_grad():
        try:
            base: Any = model.base_model
            base(tokens, use_cache=False)
        except _LastBlock:
            return states[0], calls
    raise AptError(f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks")


def passed_on(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor]:
    """What a block's stub returns that was called so: its input, in a tuple.

    A model whose blocks return tuples takes it out, any other hands the tuple to the next stub,
    which takes it out there. So no stub needs to know what its block returns.
    """
    state = args[0] if args else kwargs[_STATE]
    return (state[0] if isinstance(state, tuple) else state,)


@contextmanager
def stubbed(blocks: Sequence[nn.Module], stub: Callable[..., Any]) -> Iterator[None]:
    """While entered, ``stub`` is called in place of each of the blocks."""
    for block in blocks:
        block.forward = stub
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
