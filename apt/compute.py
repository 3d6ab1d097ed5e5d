"""The two dtypes of a model: the one in which its weights are stored, and the one it computes in.

A checkpoint in bf16 or fp16 is read and written in this dtype. On a machine that multiplies it more
slowly than fp32, the model computes in fp32: its parameters and buffers are raised for the time of
a run, and rounded to their stored dtypes at its end.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor, nn

from apt.devices import multiplies_bf16, multiplies_fast
from apt.errors import AptError

HALF = (torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in options and reports, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(
    stored: torch.dtype, device: torch.device | str, asked: str = "auto"
) -> torch.dtype:
    """The dtype that a model computes in.

    Args:
        stored: the dtype of its weights.
        device: the device that it runs on.
        asked: the name of a dtype; ``auto`` means ``stored``, or fp32 where the device multiplies
            ``stored`` more slowly.
    """
    if asked != "auto":
        asked_dtype: torch.dtype = getattr(torch, asked)
        return asked_dtype
    slow = stored in HALF and not multiplies_fast(stored, device)
    return torch.float32 if slow else stored


def mixed_precision(weights: Iterable[Tensor], asked: str = "auto") -> torch.autocast:
    """Autocast to bf16 for a training, enabled as `trains_in_bf16` says for the weights' device."""
    weights = list(weights)
    device = weights[0].device
    return torch.autocast(device.type, torch.bfloat16, trains_in_bf16(weights, device, asked))


def trains_in_bf16(
    weights: Iterable[Tensor], device: torch.device | str, asked: str = "auto"
) -> bool:
    """True if the products of a training are bf16: the weights are fp32.

    Args:
        asked: the name of a dtype; ``auto`` means bf16 where the device multiplies it faster.
    """
    wanted = multiplies_bf16(device) if asked == "auto" else asked == "bfloat16"
    return wanted and all(weight.dtype == torch.float32 for weight in weights)


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights of a model in storage, and the dtype that it computes in."""

    stored: torch.dtype
    compute: torch.dtype

    def record(self) -> dict[str, str]:
        """The names of both, for the report."""
        both = {"dtype": self.stored, "compute": self.compute}
        return {name: dtype_name(dtype) for name, dtype in both.items()}


class ComputeDtype:
    """The parameters and buffers of a model in the dtype that it computes in, until `restore`.

    Args:
        model: the model, which is changed in place.
        dtype: the dtype. Tensors in fp64, of integers and of other kinds keep theirs. As in a
            model that transformers opens in half precision, what its class keeps in fp32, such as
            a router, and tables that are not stored, such as those of positions, stay in fp32.

    Attributes:
        stored: the dtypes before, by the full names of the tensors that were cast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        tensors = dict(_to_fp32(model) if dtype == torch.float32 else _to_half(model, dtype))
        self.stored: Mapping[str, torch.dtype] = {n: t.dtype for n, t in tensors.items()}
        # A value that the cast rounds and the run does not change comes back as it was.
        self._rounded = {n: t.data for n, t in tensors.items() if loses(t.dtype, dtype)}
        for tensor in tensors.values():
            tensor.data = tensor.data.to(dtype)

    def restore(self) -> None:
        """Give each tensor its stored dtype again. Values that did not change are bit-identical.

        Raises:
            AptError: a value is beyond the range of the stored dtype.
        """
        for name, tensor in _tensors(self._model):
            stored = self.stored.get(name, tensor.dtype)
            if tensor.dtype != stored:
                tensor.data = self._restored(name, tensor.data, stored)

    def _restored(self, name: str, values: Tensor, stored: torch.dtype) -> Tensor:
        before = self._rounded.pop(name, None)
        if before is None or before.shape != values.shape:
            return rounded_to(name, values, stored)
        return unrounded(values, before)


def unrounded(values: Tensor, before: Tensor) -> Tensor:
    """The values of a tensor in the dtype of the tensor ``before`` from which it was cast.

    A value that has not changed since is the one before the cast, with all its bits.
    """
    before = before.to(values.device)
    return torch.where(before.to(values.dtype) == values, before, values.to(before.dtype))


def rounded_to(name: str, values: Tensor, stored: torch.dtype) -> Tensor:
    """The values of a tensor of that name in the dtype in which they are stored.

    Raises:
        AptError: one of them is finite, and beyond the range of the dtype.
    """
    rounded = values.to(stored)
    if bool((rounded.isinf() & values.isfinite()).any()):
        fault = f"{name} has values that are not finite in {stored}"
        raise AptError(fault, "try dtype float32, or more damping", ("dtype", "damping"))
    return rounded


def round_parameter(name: str, parameter: Tensor, stored: torch.dtype) -> None:
    """Round a parameter, in place, to the values that it has in its stored dtype.

    Raises:
        AptError: a value is beyond the range of the dtype.
    """
    parameter.data.copy_(rounded_to(name, parameter.data, stored))


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While entered, a model computes in a dtype; then its tensors have their dtypes again."""
    cast = ComputeDtype(model, dtype)
    try:
        yield
    finally:
        cast.restore()


def _to_fp32(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are cast to fp32: all in half precision."""
    return ((name, tensor) for name, tensor in _tensors(model) if tensor.dtype in HALF)


def _to_half(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are cast to a half precision; none if the model has it already."""
    sizes = Counter[torch.dtype]()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    own = max(sizes, key=sizes.__getitem__, default=dtype)
    if own == dtype or own not in (torch.float32, *HALF):
        return
    stored = model.state_dict(keep_vars=True)
    kept = fp32_names(model, dtype, stored)
    for name, tensor in _tensors(model):
        if tensor.dtype == own and name in stored and name not in kept:
            yield name, tensor


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers by their full names, those that are shared by each name."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def loses(stored: torch.dtype, compute: torch.dtype) -> bool:
    """True if not all values of a dtype are values of another one."""
    return torch.promote_types(stored, compute) != compute


def fp32_names(model: nn.Module, dtype: torch.dtype, names: Mapping[str, Tensor]) -> set[str]:
    """The names among ``names`` of what the class of a model keeps in fp32 beside a half precision.

    transformers keeps some tensors in fp32 beside fp16 only, and others always.
    """
    kept = set[str]()
    if dtype in HALF:
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {name for name in names if any(_means(pattern, name) for pattern in kept)}


def _means(pattern: str, name: str) -> bool:
    """True if a pattern of transformers means a tensor: version 4 compares whole components."""
    if _whole_components():
        return re.search(rf"((^|\.){pattern}($|\.))", name) is not None
    return re.search(pattern.replace("*", ".*"), name) is not None


@cache
def _whole_components() -> bool:
    return int(version("transformers").split(".")[0]) < 5
