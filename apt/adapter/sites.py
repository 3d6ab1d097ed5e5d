"""Sites, extras and recorded calls: the types by which an adapter describes a block."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from apt.field_types import check_fields

State = Any
Sink = Callable[["Site", Tensor], None]
Effects = Callable[["Extra", Tensor, float], None]


@dataclass(frozen=True)
class Site:
    """A weight that can be pruned.

    Args:
        name: the path within the block, for instance ``self_attn.q_proj``; the name of an expert in
            a stack ends in ``.{expert}``.
        parameter: the path of the parameter within the block.
        input: the name of the input of the weight. Sites of a block with the same input share one
            Gram matrix and one factorisation.
        order: the order of execution: outputs of a site can reach sites of a higher order.
        residual: True if the product is added to the residual stream.
        transposed: True if the weight is stored (in, out) instead of (out, in).
        expert: the index in the first dimension of a stacked parameter (experts, …); None if the
            parameter itself is the weight.
        routed: True if a router selects the tokens of the weight. Such a weight has an input of its
            own, is pruned layer-wise, without error-aware targets, and need not receive every
            token.
        calls: the number of products with every token in a forward: 2 if two modules share the
            weight.
        crossing: True if the input is the output of an earlier stack, as the keys and values of a
            cross attention have it.
        stack: the index of this earlier stack; -1 for the stack before.
        added_to: the name of the input of the block to which the product is added, if that is not
            the residual stream: a post-norm block adds its later products to a normalised stream.
            Sites of that input run earlier.
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
    crossing: bool = False
    stack: int = -1
    added_to: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.routed and self.residual:
            raise ValueError(f"{self.name} is routed: declare residual=False")

    @property
    def kind(self) -> str:
        """The name without the index of the expert: the same for all experts of a stack."""
        return self.name if self.expert is None else self.name.removesuffix(f".{self.expert}")

    def weight(self, block: nn.Module) -> Tensor:
        """The weight in ``block`` as stored: the parameter, or a view of the expert's slice."""
        return self.slice_of(block.get_parameter(self.parameter))

    def slice_of(self, parameter: Tensor) -> Tensor:
        """The weight as stored: ``parameter``, or a view of the expert's slice."""
        return parameter if self.expert is None else parameter[self.expert]

    def oriented(self, weight: Tensor) -> Tensor:
        """``weight`` as (out, in); a view."""
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class Extra:
    """A parameter beyond the sites that is pruned on request, channel by channel.

    Args:
        kind: the name by which users select it, for instance ``conv1d``.
        name: the path within the block.
        parameter: the path of the parameter within the block; the first dimension is the channels.
        removal: the effect of zero weights. ``"product"``: the products of the weights with the
            inputs are lost, and kept weights can compensate for them. ``"effect"``: the loss can
            only be measured by a run.
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
    """The arguments of one call of a block, without the state.

    Args:
        args, kwargs: the other arguments.
        keyword: the keyword of the state; None if the state was the first positional argument.
        carried: the arguments that the block before returns beside the stream: the index of the
            returned value, by the position or keyword of the argument.
        keeps: the number of values, the stream included, that blocks of the model take from the
            block before. If there are several, a state is a tuple of these values.
        shared: the keywords of mappings that all blocks get: one block fills them, and later blocks
            read them. Then a state is a tuple, and its last item is the content of the mappings.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    keyword: str | None = None
    carried: dict[int | str, int] = field(default_factory=dict)
    keeps: int = 1
    shared: tuple[str, ...] = ()

    @property
    def passes(self) -> bool:
        """True if blocks pass more than the stream to later ones."""
        return self.keeps > 1 or bool(self.shared)

    def run(self, block: nn.Module, state: State) -> State:
        """Call ``block`` with these arguments and a state, and return the state after it.

        The new state is the first returned value, with the values that later blocks take.
        """
        values = state if isinstance(state, tuple) else (state,)
        args, kwargs = list(self.args), dict(self.kwargs)
        for key, place in self.carried.items() if len(values) > 1 else ():
            if isinstance(key, int):
                args[key] = values[place]
            else:
                kwargs[key] = values[place]
        for name in self.shared:  # each state has its own
            kwargs[name] = copy(kwargs[name])
            kwargs[name].update(values[-1][name] if len(values) > 1 else {})
        if self.keyword is None:
            result = block(values[0], *args, **kwargs)
        else:
            result = block(*args, **{self.keyword: values[0]}, **kwargs)
        kept = tuple(result[: self.keeps]) if isinstance(result, tuple | list) else (result,)
        if self.shared:
            kept += (None,) * (self.keeps - len(kept))
            return (*kept, {name: dict(kwargs[name]) for name in self.shared})
        return kept if any(value is not None for value in kept[1:]) else kept[0]
