"""Sites, extras and recorded calls: the vocabulary in which an adapter describes a block."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

State = Any
Sink = Callable[["Site", Tensor], None]
Effects = Callable[["Extra", Tensor, float], None]


_SITE_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,), "parameter": (str,), "input": (str,), "order": (int,), "residual": (bool,),
    "transposed": (bool,), "expert": (int, type(None)), "routed": (bool,), "calls": (int,),
}  # fmt: skip


def check_type(what: str, name: Any, field_name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Raise TypeError where a declared value has none of ``kinds``."""
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
            check_type("Site", self.name, field_name, getattr(self, field_name), kind)
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
