"""Blocks of packed models that run one token of each sequence in one call of ``apt-kernels``.

A block of LLaMA takes some 40 operations of torch for a token. In a small model these take longer
than the products.

The call replaces a block only if all parts of the block have supported classes, run the methods of
their classes, and have no hooks. Otherwise the block itself runs.
"""

import sys
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from apt.runtime.caches import cache_of, grow, growing
from apt.runtime.dense import DenseLinear
from apt.runtime.linear import FEW, PackedLinear, kernels
from apt.runtime.watched import (
    Watched,
    hooks_of,
    is_capturing,
    is_plain,
    only_captures,
    runs_itself,
)

_BLOCK_CLASSES = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
)
_LINEARS: tuple[type, ...] = (nn.Linear, DenseLinear, PackedLinear)
_ACTIVATIONS: tuple[type, ...] = (nn.SiLU, type(ACT2FN["silu"]))
_ATTENTION = ("sdpa", "eager")
_REGISTERED = ALL_ATTENTION_FUNCTIONS._local_mapping, ALL_ATTENTION_FUNCTIONS._global_mapping
_FORWARD = attrgetter("forward")
_CHOICE = "_attn_implementation_internal"  # the implementation of attention in a configuration
_FUNCTIONS = ("apply_rotary_pos_emb", "eager_attention_forward")  # of a family's module
_ARGUMENTS = {
    "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "cache_position",
    "position_embeddings", "output_attentions", "output_hidden_states", "return_dict",
}  # fmt: skip
_TOLERANCE = 0.02  # the largest error of the call's output, relative to the change by the block


class Family:
    """The classes and functions of the blocks of a family.

    They are recorded when the first model of the family is loaded.

    Args:
        block: the class of the blocks, one of `_BLOCK_CLASSES`.
    """

    def __init__(self, block: Any) -> None:
        self._names = vars(sys.modules[block.__module__])
        prefix = block.__name__.removesuffix("DecoderLayer")
        parts = [self._names.get(f"{prefix}{part}") for part in ("Attention", "MLP", "RMSNorm")]
        self.attention, self.mlp, self.norm = parts
        self.is_known = all(kind.forward.__module__ == block.__module__ for kind in (block, *parts))
        self._classes: tuple[Any, ...] = (block, *parts, *_LINEARS, *_ACTIVATIONS)
        self._functions = [(self._names.get, name) for name in _FUNCTIONS]
        self._functions += [(table.get, name) for table in _REGISTERED for name in _ATTENTION]
        self._original = self._methods()

    def is_unchanged(self) -> bool:
        """True if no method or function of the family has been replaced."""
        return self._methods() == self._original

    def _methods(self) -> list[Any]:
        functions = [get(name) for get, name in self._functions]
        return [*map(_FORWARD, self._classes), *functions]


class Decoder:
    """The call of ``apt-kernels`` for one block.

    Args:
        layer: the block.
        family: its family.

    Attributes:
        proven: True if an output was compared with the block's output.

    Raises:
        ValueError: the kernels do not support this block.
    """

    def __init__(self, layer: Any, family: Family) -> None:
        attention = _part(layer, "self_attn", family.attention)
        mlp = _part(layer, "mlp", family.mlp)
        _part(mlp, "act_fn", *_ACTIVATIONS)
        linears = {n: _part(attention, f"{n}_proj", *_LINEARS) for n in ("q", "k", "v", "o")}
        linears |= {n: _part(mlp, f"{n}_proj", *_LINEARS) for n in ("gate", "up", "down")}
        norms = {"input": _part(layer, "input_layernorm", family.norm)}
        norms["output"] = _part(layer, "post_attention_layernorm", family.norm)
        names = [n for n in "qk" if f"{n}_norm" in attention._modules]
        norms |= {n: _part(attention, f"{n}_norm", family.norm) for n in names}
        vectors = {f"{name}_norm": norm.weight for name, norm in norms.items()}
        vectors |= {f"{n}_bias": m.bias for n, m in linears.items() if m.bias is not None}
        epsilons = {norm.variance_epsilon for norm in norms.values()}
        self._config = vars(attention.config)
        self._attention = self._config.get(_CHOICE)
        if len(epsilons) > 1 or self._attention not in _ATTENTION or not family.is_known:
            raise ValueError("the block is not one of LLaMA")
        if {_dtype(linear) for linear in linears.values()} != {norms["input"].weight.dtype}:
            raise ValueError("matrices in another dtype than the norms")
        parts = (attention, mlp, mlp.act_fn, *linears.values(), *norms.values())
        self._has_hooks = any(hooks_of(part) for part in parts)
        self._run = kernels().Block(
            {name: kernel_of(linear) for name, linear in linears.items()},
            vectors, attention.head_dim, *epsilons, attention.scaling,
        )  # fmt: skip
        self._width, self._dtype = attention.head_dim, self._run.dtype
        self.proven = False

    def serves(self, x: Tensor, angles: Any) -> bool:
        """True if the call can replace the block for an input and the angles of its position."""
        if type(angles) is not tuple or len(angles) != 2 or x.dtype != self._dtype:
            return False
        positions = x.shape[0] if angles[0].shape[:1] == x.shape[:1] else 1
        shape = (positions, 1, self._width)
        for angle in angles:
            if angle.shape != shape or not _is_readable(angle, self._dtype):
                return False
        return self._config.get(_CHOICE) == self._attention and not (
            self._has_hooks and is_capturing()
        )

    def run(self, x: Tensor, angles: tuple[Tensor, Tensor], past: "Past") -> Tensor:
        """The output (batch, 1, hidden) of the tokens whose keys and values are the last ones."""
        inputs = (t.contiguous() for t in (x, *angles))
        output: Tensor = self._run.step(*inputs, *past)
        return output


class Past(NamedTuple):
    """What the tokens of a call attend to.

    Attributes:
        keys, values: the keys and values (batch, heads, length, width), those of the tokens last.
        starts: the first position of each sequence that is not padding (batch,); None for 0.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor | None


class DecodingLayer(nn.Module):
    """A block that runs one token of each sequence by a `Decoder`, and all other inputs itself.

    The first token runs in both ways. If the outputs differ by more than rounding, the decoder is
    not used until a part of the block changes.
    """

    _family: Family
    _decoder: Decoder | None = None
    _watched: Watched | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without the decoder, which a copy builds again."""
        rebuilt = ("_decoder", "_watched")
        return {name: value for name, value in vars(self).items() if name not in rebuilt}

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self).__mro__[2],), self.__getstate__()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of the block for ``hidden_states`` (batch, seqlen, hidden)."""
        cache = None if args else _cached(self, hidden_states, kwargs)
        decoder = None if cache is None else self._current()
        angles: Any = kwargs.get("position_embeddings")
        if decoder is None or not decoder.serves(hidden_states, angles):
            return super().forward(hidden_states, *args, **kwargs)
        if not decoder.proven:
            return self._compared(decoder, hidden_states, cache, kwargs)
        past = Past(*grow(cache), first_positions(kwargs.get("attention_mask")))
        return decoder.run(hidden_states, angles, past)

    def _current(self) -> Decoder | None:
        """The decoder of the block in its current state; None if the kernels do not support it."""
        if not self._family.is_unchanged():
            return None
        if self._watched is None or not self._watched.is_current():
            try:
                self._decoder = Decoder(self, self._family)
            except (AttributeError, ValueError):
                self._decoder = None
            self._watched = Watched(self)
        if self._decoder is not None and self._watched.need_gradients():
            return None
        return self._decoder

    def _compared(self, decoder: Decoder, x: Tensor, cache: Any, kwargs: dict[str, Any]) -> Any:
        """The output of the decoder, if it equals the block's; else the block's own output."""
        expected = super().forward(x, **kwargs)
        keys, values = (
            tensor.clone(memory_format=torch.contiguous_format)
            for tensor in (cache.keys, cache.values)
        )
        past = Past(keys, values, first_positions(kwargs.get("attention_mask")))
        output = decoder.run(x, kwargs["position_embeddings"], past)
        decoder.proven = (
            isinstance(expected, Tensor)
            and _is_near(output, expected, expected - x)
            and _is_near(keys[:, :, -1], cache.keys[:, :, -1])
            and _is_near(values[:, :, -1], cache.values[:, :, -1])
        )
        if not decoder.proven:
            self._decoder = None
            return expected
        cache.keys, cache.values = keys, values  # as later calls with the same input
        return output


def _is_near(tensor: Tensor, expected: Tensor, added: Tensor | None = None) -> bool:
    """True if tensors are equal up to rounding and up to `_TOLERANCE` of the change ``added``."""
    error, size = (tensor - expected).float().norm(), expected.float().norm()
    scale = size if added is None else added.float().norm()
    return bool(error <= _TOLERANCE * scale + torch.finfo(expected.dtype).eps * size)


def is_decoded_by_kernels(block: nn.Module) -> bool:
    """True if the block has decoded a token in one call."""
    decoder = block._decoder if isinstance(block, DecodingLayer) else None
    return decoder is not None and decoder.proven


def decode_by_kernels(model: nn.Module) -> None:
    """Let the blocks of a loaded model decode by ``apt-kernels``, where it supports them."""
    if getattr(kernels(), "Block", None) is None:
        return
    for module in model.modules():
        block_class: Any = type(module)
        if block_class.__name__ in _BLOCK_CLASSES and block_class.__module__.startswith(
            "transformers."
        ):
            module.__class__ = _decoding(block_class)


@lru_cache
def _decoding(block_class: Any) -> type[nn.Module]:
    """A subclass of a class of blocks with a decoder, under the same name."""
    namespace = {"__module__": block_class.__module__, "_family": Family(block_class)}
    return type(block_class.__name__, (DecodingLayer, block_class), namespace)


def _empty(block_class: Any) -> nn.Module:
    """An empty block with a decoder, to be filled by a copy."""
    return _decoding(block_class).__new__(_decoding(block_class))


def _part(owner: nn.Module, name: str, *classes: Any) -> Any:
    """A part of a block.

    Raises:
        ValueError: the part has another class, runs another method, or has hooks.
    """
    part = owner._modules.get(name)
    if (
        part is None
        or type(part) not in classes
        or part.training
        or not runs_itself(part)
        or not all(only_captures(hook) for hook in hooks_of(part))
    ):
        raise ValueError(f"{name} is not a known part of a block")
    return part


def _dtype(linear: Any) -> torch.dtype:
    """The dtype of the matrix of a Linear module, found without expanding the matrix."""
    return linear.dtype if isinstance(linear, PackedLinear) else linear.weight.dtype


def kernel_of(linear: nn.Module) -> Any:
    """The matrix of a Linear module for ``apt-kernels``.

    Raises:
        ValueError: the kernels do not support it.
    """
    if isinstance(linear, DenseLinear):
        return linear.kernel()
    if not isinstance(linear, PackedLinear):
        return kernels().DenseMatrix(linear.weight)
    matrix = linear.current_matrix()
    if not isinstance(matrix, kernels().Matrix):
        raise ValueError("a matrix that is expanded")
    return matrix


def _cached(layer: Any, x: Any, kwargs: dict[str, Any]) -> Any:
    """The cache layer of the tokens before ``x``; None if the block itself must run.

    The call supports a few sequences on the processor, with attention to all earlier tokens but the
    padding before the first one.
    """
    if type(x) is not Tensor or x.ndim != 3 or x.shape[1] != 1 or layer.training:
        return None
    if not 0 < x.shape[0] <= FEW or not _is_readable(x, x.dtype) or not is_plain():
        return None
    if not kwargs.keys() <= _ARGUMENTS or kwargs.get("output_attentions"):
        return None
    index = getattr(layer._modules.get("self_attn"), "layer_idx", None)
    cache = None if index is None else growing(cache_of(kwargs), index, x.shape[0], x.dtype)
    if cache is None or not _is_padding(kwargs.get("attention_mask"), cache.keys):
        return None
    return cache


def _is_padding(mask: Any, keys: Tensor) -> bool:
    """True if a mask hides nothing, or only the first positions of each sequence."""
    if mask is None:
        return True
    shape = (keys.shape[0], 1, 1, keys.shape[2] + 1)  # the new tokens are not in the cache yet
    if type(mask) is not Tensor or mask.dtype != torch.bool or mask.shape != shape:
        return False
    seen = mask[:, 0, 0]
    return mask.is_cpu and bool(seen[:, -1].all()) and bool((seen[:, 1:] >= seen[:, :-1]).all())


def first_positions(mask: Tensor | None) -> Tensor | None:
    """The first position of each sequence that a mask of padding does not hide (batch,)."""
    return None if mask is None else mask.shape[-1] - mask[:, 0, 0].sum(-1)


def _is_readable(tensor: Any, dtype: torch.dtype) -> bool:
    """True for a plain tensor on the processor in the dtype of the kernels."""
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.dtype == dtype
        and not tensor.requires_grad
    )
