"""Blocks of packed models that run one token in one call of ``apt-kernels``.

A block of LLaMA takes some 40 operations of torch for a token. In a small model these take longer
than the products.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from apt.runtime.expanded import ExpandedMatrix
from apt.runtime.linear import PackedLinear, kernels

_SERVED = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_ROOM = 128  # places that are added to a full cache at least
_ALIKE = 0.02  # of what a block adds to its input: the largest error of the call's output


class Decoder:
    """The call of ``apt-kernels`` for one block, and what it was made of.

    Args:
        layer: the block, of a class in `_SERVED`.

    Raises:
        ValueError: the kernels do not serve this block.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        linears = {n: getattr(attention, f"{n}_proj") for n in ("q", "k", "v", "o")}
        linears |= {n: getattr(mlp, f"{n}_proj") for n in ("gate", "up", "down")}
        norms = {"input": layer.input_layernorm, "output": layer.post_attention_layernorm}
        norms |= {n: m for n in "qk" if (m := getattr(attention, f"{n}_norm", None)) is not None}
        vectors = {f"{name}_norm": norm.weight for name, norm in norms.items()}
        vectors |= {f"{n}_bias": m.bias for n, m in linears.items() if m.bias is not None}
        epsilons = {norm.variance_epsilon for norm in norms.values()}
        if len(epsilons) > 1 or type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            raise ValueError("the block is not one of LLaMA")
        places = [(attention, f"{n}_proj") for n in ("q", "k", "v", "o")]
        places += [(mlp, f"{n}_proj") for n in ("gate", "up", "down")]
        places += [(layer, f"{n}_layernorm") for n in ("input", "post_attention")]
        places += [(attention, f"{n}_norm") for n in "qk" if n in norms]
        parts = [(owner._modules, name, owner.get_submodule(name)) for owner, name in places]
        self._parts = [(*part, _source(part[-1])) for part in parts]
        self._hooks = [
            hooks
            for module in layer.modules()
            if module is not layer
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._run = kernels().Block(
            {name: _kernel(linear) for name, linear in linears.items()},
            vectors, attention.head_dim, *epsilons, attention.scaling,
        )  # fmt: skip

    def is_current(self) -> bool:
        """True if the block has the same modules, and these the same weights."""
        return all(
            [
                modules[name] is part and _source(part) == source
                for modules, name, part, source in self._parts
            ]
        )

    def is_watched(self) -> bool:
        """True if a hook waits for a part of the block."""
        return any(self._hooks)

    def run(self, x: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> Tensor:
        """The output (1, 1, hidden) of the token whose key and value are the last of the cache."""
        given = (x, *angles)
        found: Tensor = self._run.step(*(t.reshape(-1) for t in given), keys[0], values[0])
        return found.view(x.shape)


class DecodingLayer(nn.Module):
    """A block that runs a token after those in a cache by a `Decoder`, and all else as before.

    The first token runs in both ways. If the outputs differ by more than rounding, the decoder is
    refused.
    """

    _decoder: Decoder | None = None
    _refused = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies make a decoder of their own."""
        return {name: value for name, value in vars(self).items() if name != "_decoder"}

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self).__mro__[2],), self.__getstate__()

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Any:
        """The output of the block for ``hidden_states`` (batch, seqlen, hidden)."""
        cached = None if given or self._refused else _cached(self, hidden_states, named)
        if cached is None:
            return super().forward(hidden_states, *given, **named)
        decoder = self._decoder
        if decoder is None or not decoder.is_current():
            return self._first(hidden_states, cached, named)
        if decoder.is_watched():
            return super().forward(hidden_states, **named)
        return decoder.run(hidden_states, named["position_embeddings"], *_with_room(cached))

    def _first(self, x: Tensor, cached: Any, named: dict[str, Any]) -> Any:
        """The output of a decoder, if it is that of the block itself."""
        own = super().forward(x, **named)
        cache = cached.keys, cached.values
        last = [tensor[:, :, -1].clone() for tensor in cache]
        try:
            self._decoder = Decoder(self)
            found = self._decoder.run(x, named["position_embeddings"], *cache)
        except (AttributeError, ValueError):
            self._refused = True
            return own
        error, added = (found - own).float().norm(), (own - x).float().norm()
        rounding = torch.finfo(x.dtype).eps * own.float().norm()
        if error <= _ALIKE * added + rounding:
            return found
        self._refused = True
        for tensor, kept in zip(cache, last, strict=True):
            tensor[:, :, -1] = kept
        return own


def decode_by_kernels(model: nn.Module) -> None:
    """Let the blocks of a loaded model decode by ``apt-kernels``, where it serves them."""
    if getattr(kernels(), "Block", None) is None:
        return
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__ in _SERVED and kind.__module__.startswith("transformers."):
            module.__class__ = _decoding(kind)


@lru_cache
def _decoding(kind: Any) -> type[nn.Module]:
    """A class of blocks with a decoder, with the name of the given one."""
    return type(kind.__name__, (DecodingLayer, kind), {"__module__": kind.__module__})


def _empty(kind: Any) -> nn.Module:
    """A block of this class without its parts, for a copy."""
    return _decoding(kind).__new__(_decoding(kind))


def _kernel(linear: nn.Module) -> Any:
    """The matrix of ``apt-kernels`` of a Linear module.

    Raises:
        ValueError: the kernels do not serve it.
    """
    found = linear.matrix if isinstance(linear, PackedLinear) else None
    if isinstance(found, ExpandedMatrix):
        raise ValueError("a matrix that is expanded")
    return found or kernels().DenseMatrix(linear.weight)


def _source(part: Any) -> Any:
    """What a decoder has of a module: its matrix or weight, and its bias."""
    weight = part.matrix if isinstance(part, PackedLinear) else _version(part.weight)
    return weight, _version(part._parameters.get("bias"))


def _version(tensor: Tensor | None) -> Any:
    """The place of a tensor, and the number of its changes: a decoder copies norms and biases."""
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _cached(layer: Any, x: Tensor, named: dict[str, Any]) -> Any:
    """The keys and values of the tokens before ``x``; None if the block itself must run.

    The call serves one sequence on the processor, and attention to all tokens before.
    """
    if x.shape[:2] != (1, 1) or x.device.type != "cpu" or x.requires_grad or layer.training:
        return None
    if named.get("attention_mask") is not None or torch.compiler.is_compiling():
        return None
    cache = named.get("cache", named.get("past_key_values"))
    layers, index = getattr(cache, "layers", ()), layer.self_attn.layer_idx
    if index >= len(layers) or type(layers[index]).__name__ != "DynamicLayer":
        return None
    cached = layers[index]
    filled = cached.is_initialized and cached.keys.ndim == 4 and cached.keys.shape[2]
    same = filled and cached.keys.dtype == cached.values.dtype == x.dtype
    cosines = (named.get("position_embeddings") or (x,))[0]
    return cached if same and cosines.dtype == x.dtype and len(cached.keys) == 1 else None


def _with_room(cached: Any) -> tuple[Tensor, Tensor]:
    """Keys and values (1, heads, length + 1, width) with a place for one more token.

    They are parts of larger tensors, so that those before are not copied for each token.
    """
    length, room = cached.keys.shape[2], vars(cached).get("apt_room")
    known = (cached.keys, cached.values)
    if (
        room is None
        or any(r.data_ptr() != k.data_ptr() for r, k in zip(room, known, strict=True))
        or length == room[0].shape[2]
    ):
        more = max(_ROOM, length // 4)
        room = tuple(torch.cat([t, t.new_empty(*t.shape[:2], more, t.shape[3])], 2) for t in known)
        cached.apt_room = room
    cached.keys, cached.values = (t[:, :, : length + 1] for t in room)
    return cached.keys, cached.values
