"""A block of LLaMA for a token: one call in place of some 40 operations of torch."""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from apt_kernels.library import LIBRARY, MATRICES, VECTORS, BlockFields
from apt_kernels.matrix import Kernel

_NEEDED = ("input_norm", "output_norm")


class Block:
    """A block of LLaMA, Mistral, Qwen 2 or Qwen 3, for the token after those in a cache.

    It runs on one token of each of some sequences, whose caches have one length.

    Args:
        matrices: the matrices of the block by `apt_kernels.library.MATRICES`.
        vectors: the existing norms and biases by `apt_kernels.library.VECTORS`, all in bf16 or all
            in fp32, contiguous, on the processor. They are not copied, so that a change of their
            values takes effect.
        head_width: the number of channels of a head.
        epsilon: the number that the norms add to the variance.
        scaling: the factor of the products of queries and keys.

    Raises:
        RuntimeError: the library was not compiled.
        ValueError: the shapes do not fit together, or a tensor has another dtype, layout or device.

    Attributes:
        dtype: the dtype of the vectors, and of the tensors of `step`.
    """

    def __init__(
        self,
        matrices: Mapping[str, Kernel],
        vectors: Mapping[str, Tensor],
        head_width: int,
        epsilon: float,
        scaling: float,
    ) -> None:
        if LIBRARY is None:
            raise RuntimeError("apt_kernels was installed without a compiler")
        self._matrices = dict(matrices)
        self._vectors = {name: vector.detach() for name, vector in vectors.items()}
        if missing := [n for n in MATRICES if not isinstance(matrices.get(n), Kernel)]:
            raise ValueError(f"a block without matrices of the kernels for {', '.join(missing)}")
        if missing := [name for name in _NEEDED if name not in vectors]:
            raise ValueError(f"a block without {', '.join(missing)}")
        self.dtype = vectors[_NEEDED[0]].dtype
        self.hidden, self.head_width = matrices["q"].columns, head_width
        self.heads = matrices["q"].rows // head_width
        self.kv_heads = matrices["k"].rows // head_width
        self._check()
        self._fields = BlockFields(
            *(ctypes.pointer(matrices[name].fields) for name in MATRICES),
            *(self._address(name) for name in VECTORS),
            self.hidden, self.heads, self.kv_heads, head_width, epsilon, scaling,
            matrices["q"].level,
        )  # fmt: skip
        self._pointer = ctypes.pointer(self._fields)

    def _address(self, name: str) -> int | None:
        vector = self._vectors.get(name)
        return None if vector is None else vector.data_ptr()

    def _check(self) -> None:
        """Raise for shapes with which the kernels would read or write outside of their memory."""
        width, heads, kv_heads = self.head_width, self.heads, self.kv_heads
        middle = self._matrices["gate"].rows
        inner, outer, shared = heads * width, self.hidden, kv_heads * width
        shapes = {
            "q": (inner, outer), "k": (shared, outer), "v": (shared, outer), "o": (outer, inner),
            "gate": (middle, outer), "up": (middle, outer), "down": (outer, middle),
        }  # fmt: skip
        sizes = {
            "q_bias": inner, "k_bias": shared, "v_bias": shared, "o_bias": outer,
            "input_norm": outer, "output_norm": outer, "q_norm": width, "k_norm": width,
        }  # fmt: skip
        for name, shape in shapes.items():
            actual = self._matrices[name].rows, self._matrices[name].columns
            if actual != shape:
                raise ValueError(f"matrix {name} of {actual}, not of {shape}")
        if unknown := sorted(self._vectors.keys() - sizes.keys()):
            raise ValueError(f"a block with {', '.join(unknown)}")
        for name, vector in self._vectors.items():
            if vector.shape != (sizes[name],):
                raise ValueError(f"{name} of {tuple(vector.shape)}, not of {sizes[name]}")
            if not _is_readable(vector, self.dtype):
                raise ValueError(f"{name} in {vector.dtype} on {vector.device}")
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"a block in {self.dtype}")
        if width % 2 or not kv_heads or heads % kv_heads:
            raise ValueError(f"{heads} heads of {width} channels for {kv_heads} of keys")

    def step(
        self,
        x: Tensor,
        cosines: Tensor,
        sines: Tensor,
        keys: Tensor,
        values: Tensor,
        starts: Tensor | None = None,
    ) -> Tensor:
        """The block of the last tokens, whose keys and values are written to the cache.

        Args:
            x: the inputs of the block (batch, hidden) or (batch, 1, hidden), in the block's dtype,
                as all other tensors.
            cosines, sines: the rotary embedding of their positions (batch, head_width) or
                (batch, 1, head_width). The first size is 1 if all sequences have one position.
            keys, values: the cache (batch, kv_heads, length, head_width). The last position is for
                these tokens. Within a head, the memory must be contiguous.
            starts: the first position that each sequence attends to (batch,), as integers; None for
                position 0. The positions before it are padding.

        Returns:
            The outputs of the block, with the shape of ``x``.

        Raises:
            ValueError: a tensor has another shape, dtype, layout or device, or a position is not in
                the cache.
        """
        assert LIBRARY is not None
        self._check_step(x, cosines, sines, keys, values)
        batch, length = keys.shape[0], keys.shape[2]
        if starts is not None:
            starts = starts.to("cpu", torch.int64).contiguous()
            if starts.shape != (batch,) or bool(((starts < 0) | (starts >= length)).any()):
                raise ValueError(
                    f"starts {starts.tolist()} for {batch} sequences of {length} positions"
                )
        out = torch.empty_like(x)
        LIBRARY.apt_decode(
            self._pointer, batch, x.data_ptr(), out.data_ptr(), cosines.data_ptr(),
            sines.data_ptr(), self.head_width if cosines.shape[0] > 1 else 0, keys.data_ptr(),
            values.data_ptr(), *keys.stride()[:2], length,
            None if starts is None else starts.data_ptr(), x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _check_step(
        self, x: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Raise for tensors that the kernels would read or write outside of their memory."""
        width = self.head_width
        batch, length = (keys.shape[0], keys.shape[2]) if keys.ndim == 4 else (0, 0)
        strides = keys.stride()
        if (
            not all(t.dtype == self.dtype and t.is_cpu for t in (x, cosines, sines, keys, values))
            or not all(t.is_contiguous() for t in (x, cosines, sines))
            or not batch * length
            or x.shape not in ((batch, self.hidden), (batch, 1, self.hidden))
            or cosines.shape[:1] not in ((1,), (batch,))
            or cosines.shape[-1:] != (width,)
            or cosines.numel() != cosines.shape[0] * width
            or sines.shape != cosines.shape
            or keys.shape != (batch, self.kv_heads, length, width)
            or values.shape != keys.shape
            or values.stride() != strides
            or strides[2:] != (width, 1)
        ):
            raise ValueError("tensors of other shapes, dtypes, layouts or devices than the block's")


def _is_readable(vector: Tensor, dtype: torch.dtype) -> bool:
    """True if the library can read a vector in its memory."""
    return vector.is_cpu and vector.dtype == dtype and vector.is_contiguous()
