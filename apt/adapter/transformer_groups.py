"""The groups of attention and of a gated MLP, as LLaMA has them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from apt.adapter.groups import Groups, columns, rows

_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")


def mlp_channels(block: nn.Module, config: Any, mlp: str = "mlp") -> Groups:
    """The channels of a gated MLP with the Linears ``gate_proj``, ``up_proj`` and ``down_proj``.

    Args:
        block: the block.
        config: the configuration; its ``intermediate_size`` is the number of channels.
        mlp: the path of the MLP within the block.
    """
    down = f"{mlp}.down_proj"
    parts = [*rows(block, f"{mlp}.gate_proj"), *rows(block, f"{mlp}.up_proj"), columns(down)]
    fields = {"intermediate_size": int}
    return Groups("channels", config.intermediate_size, (down,), tuple(parts), fields)


def attention_heads(block: nn.Module, config: Any) -> list[Groups]:
    """The heads of ``self_attn``, with the Linears ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.

    The configuration must allow a ``head_dim`` of its own.

    If several query heads share a key/value head, there are two kinds: query heads, of which the
    same number goes from each key/value head, and key/value heads with all their query heads.
    """
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    given = getattr(config, "head_dim", None)
    size = given or config.hidden_size // heads
    queries = heads // shared
    together = [
        *rows(block, _Q, queries * size),
        *rows(block, _K, size),
        *rows(block, _V, size),
        columns(_O, queries * size),
    ]
    same = {} if given else {"head_dim": lambda kept: size}  # Qwen2-MoE, Mistral before 5.0
    fields: dict[str, Callable[[int], int]] = {
        "num_attention_heads": lambda kept: kept * queries,
        "num_key_value_heads": int,
        **same,
    }
    whole = Groups("key-value-heads", shared, (_O,), tuple(together), fields)
    if queries == 1:
        return [Groups("heads", heads, (_O,), tuple(together), fields)]
    parts = (*rows(block, _Q, size), columns(_O, size))
    return [
        Groups("heads", heads, (_O,), parts, {"num_attention_heads": int, **same}, shared),
        whole,
    ]
