"""Sites, extras and recorded calls: the types by which an adapter describes a block."""

from collections.abc import Callable
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
        name: its path within the block, for instance ``self_attn.q_proj``; the name of an expert in
            a stack ends in ``.{expert}``.
        parameter: the path of the parameter within the block.
        input: the name of the input that it multiplies. Sites of a block with the same input share
            one Gram matrix and one factorisation.
        order: the order of execution: outputs of a site can reach sites of a higher order.
        residual: True if its product is added to the residual stream.
        transposed: True if it is stored (in, out) instead of (out, in).
        expert: its index in the first dimension of a stacked parameter (experts, …); None if the
            parameter itself is the weight.
        routed: True if a router selects its tokens. Such a weight has an input of its own, is
            pruned layer-wise, without error-aware targets, and need not receive every token.
        calls: the number of times that a forward multiplies it with every token: 2 if two modules
            share it.
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
        check_fields(self)
        if self.routed and self.residual:
            raise ValueError(f"{self.name} is routed: declare residual=False")

    @property
    def kind(self) -> str:
        """Its name without the index of the expert: the same for all experts of a stack."""
        return self.name if self.expert is None else self.name.removesuffix(f".{self.expert}")

    def weight(self, block: nn.Module) -> Tensor:
        """The weight in ``block`` as stored: the parameter, or a view of the expert's slice."""
        return self.slice_of(block.get_parameter(self.parameter))

    def slice_of(self, parameter: Tensor) -> Tensor:
        """The weight as stored, of its parameter."""
        return parameter if self.expert is None else parameter[self.expert]

    def oriented(self, weight: Tensor) -> Tensor:
        """``weight`` as (out, in); a view."""
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class Extra:
    """A parameter beyond the sites that is pruned on request, channel by channel.

    Args:
        kind: the name by which users select it, for instance ``conv1d``.
        name: its path within the block.
        parameter: the path of the parameter within the block; its first dimension is the channels.
        removal: the effect of zero weights. ``"product"``: their products with the inputs are lost,
            and kept weights can compensate for them. ``"effect"``: the loss can only be measured by
            a run.
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
        carried: the other arguments that the block before returned beside the stream, by their
            position or keyword, with their places among what it returned.
        keeps: the number of values, the stream included, that blocks of the model take from the
            block before. If there are several, a state is a tuple of them.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    keyword: str | None = None
    carried: dict[int | str, int] = field(default_factory=dict)
    keeps: int = 1

    def replay(self, block: nn.Module, state: State) -> Any:
        """Call ``block`` with these arguments and another state."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if self.keeps > 1 and isinstance(state, tuple):
            for key, place in self.carried.items():
                if isinstance(key, int):
                    args[key] = state[place]
                else:
                    kwargs[key] = state[place]
            state = state[0]
        if self.keyword is None:
            return block(state, *args, **kwargs)
        return block(*args, **{self.keyword: state}, **kwargs)

    def state_in(self, result: Any) -> State:
        """The state after a block, in what it returned: the first value, and those it passes on."""
        if not isinstance(result, tuple | list):
            return result
        kept = tuple(result[: self.keeps])
        return kept if any(value is not None for value in kept[1:]) else kept[0]
