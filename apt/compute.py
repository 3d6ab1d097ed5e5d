"""The two dtypes of a model: the dtype of its stored weights, and its compute dtype.

A checkpoint in bf16 or fp16 is read and written in its dtype. If a machine multiplies this dtype
more slowly than fp32, the model computes in fp32: its parameters and buffers are cast to fp32 for
the run, and rounded to their stored dtypes at the end.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from apt.devices import multiplies_bf16, multiplies_fast
from apt.errors import AptError

HALF = (torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in options and reports, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(
    stored: torch.dtype, device: torch.device | str, name: str = "auto"
) -> torch.dtype:
    """The dtype that a model computes in.

    Args:
        stored: the dtype of its weights.
        device: the device that it runs on.
        name: the name of a dtype; ``auto`` means ``stored``, or fp32 if the device multiplies
            ``stored`` more slowly.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    slow = stored in HALF and not multiplies_fast(stored, device)
    return torch.float32 if slow else stored


def mixed_precision(
    weights: Iterable[Tensor], name: str = "auto", *, cache: bool = True
) -> torch.autocast:
    """Autocast to bf16 on the device of the weights, see `product_dtype`.

    Args:
        cache: False if the weights change while a caller's autocast is entered: the copies in bf16
            are then kept until the caller leaves it.
    """
    weights = list(weights)
    device = weights[0].device
    in_bf16 = all(product_dtype(weight.dtype, device, name) != weight.dtype for weight in weights)
    return torch.autocast(device.type, torch.bfloat16, in_bf16, cache_enabled=cache)


def if_it_runs(autocast: torch.autocast, run: Callable[[], Any]) -> torch.autocast:
    """``autocast``; or one that does nothing, if ``run`` fails under it.

    Some models write products, which are bf16 then, into tensors that stay in fp32 (X-MOD), or fill
    products with the least number of fp32 (DeBERTa).
    """
    if not autocast._enabled:
        return autocast
    try:
        with torch.no_grad(), autocast:
            run()
    except RuntimeError:
        return torch.autocast(autocast.device, enabled=False)
    return autocast


def product_dtype(
    weights: torch.dtype, device: torch.device | str, name: str = "auto"
) -> torch.dtype:
    """The dtype in which a training, or an error-aware run, multiplies weights.

    It is the dtype of the weights, or bf16 for weights in fp32.

    Args:
        weights: the dtype of the weights in memory.
        name: the name of a dtype; ``auto`` means bf16 if the device multiplies it faster.
    """
    wanted = multiplies_bf16(device) if name == "auto" else name == "bfloat16"
    return torch.bfloat16 if wanted and weights == torch.float32 else weights


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights of a model in storage, and the dtype that it computes in."""

    stored: torch.dtype
    compute: torch.dtype

    def record(self) -> dict[str, str]:
        """The names of the two dtypes, for the report."""
        dtypes = {"dtype": self.stored, "compute": self.compute}
        return {name: dtype_name(dtype) for name, dtype in dtypes.items()}

    def products(self, device: str, name: str) -> dict[str, str]:
        """The name of the dtype of the products of an error-aware run; see `product_dtype`."""
        return {"products": dtype_name(product_dtype(self.compute, device, name))}


class ComputeDtype:
    """The parameters and buffers of a model in the dtype that it computes in, until `restore`.

    Args:
        model: the model, which is changed in place.
        dtype: the dtype. Tensors of fp64, of integers and of other kinds are not cast. If it is a
            half precision, the tensors that transformers keeps in fp32 stay in fp32: those that
            the class of the model names, such as a router, and tables that are not stored, such as
            tables of positions.

    Attributes:
        stored: the stored dtypes of the tensors that were cast, by their full names.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        tensors = dict(_to_fp32(model) if dtype == torch.float32 else _to_half(model, dtype))
        self.stored: Mapping[str, torch.dtype] = {n: t.dtype for n, t in tensors.items()}
        # For values that the cast rounds and the run does not change: their bits are restored.
        self._rounded = {n: t.data for n, t in tensors.items() if is_lossy(t.dtype, dtype)}
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


def unrounded(values: Tensor, original: Tensor) -> Tensor:
    """The values of a tensor in the dtype of the tensor ``original`` from which it was cast.

    A value that has not changed since the cast has the bits of the original value.
    """
    original = original.to(values.device)
    return torch.where(original.to(values.dtype) == values, original, values.to(original.dtype))


def rounded_to(name: str, values: Tensor, stored: torch.dtype) -> Tensor:
    """The values of a tensor in its stored dtype.

    Args:
        name: the name of the tensor, for the message.

    Raises:
        AptError: a finite value is beyond the range of the dtype.
    """
    rounded = values.to(stored)
    if bool((rounded.isinf() & values.isfinite()).any()):
        message = f"{name} has values that are not finite in {stored}"
        raise AptError(message, "try dtype float32, or more damping", ("dtype", "damping"))
    return rounded


def round_parameter(name: str, parameter: Tensor, stored: torch.dtype) -> None:
    """Round a parameter, in place, to values of its stored dtype.

    Raises:
        AptError: a value is beyond the range of the dtype.
    """
    parameter.data.copy_(rounded_to(name, parameter.data, stored))


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While entered, a model computes in a dtype. At the end its stored dtypes are restored."""
    cast = ComputeDtype(model, dtype)
    try:
        yield
    finally:
        cast.restore()


def _to_fp32(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are cast to fp32: those in half precision."""
    return ((name, tensor) for name, tensor in _tensors(model) if tensor.dtype in HALF)


def _to_half(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are cast to a half precision; none if the model has it already."""
    sizes = Counter[torch.dtype]()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    main = max(sizes, key=sizes.__getitem__, default=dtype)
    if main == dtype or main not in (torch.float32, *HALF):
        return
    stored = model.state_dict(keep_vars=True)
    exempt = fp32_names(model, dtype, stored)
    for name, tensor in _tensors(model):
        if tensor.dtype == main and name in stored and name not in exempt:
            yield name, tensor


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers by their full names; a shared tensor comes with each name."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def is_lossy(stored: torch.dtype, compute: torch.dtype) -> bool:
    """True if a cast from the stored dtype to the compute dtype rounds values."""
    return torch.promote_types(stored, compute) != compute


def fp32_names(model: nn.Module, dtype: torch.dtype, names: Mapping[str, Tensor]) -> set[str]:
    """The names among ``names`` of the tensors that a model in half precision keeps in fp32.

    transformers keeps some tensors in fp32 beside fp16 only, and others always.
    """
    patterns = set[str]()
    if dtype in HALF:
        patterns |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {name for name in names if any(_matches(pattern, name) for pattern in patterns)}


def _matches(pattern: str, name: str) -> bool:
    """True if a pattern of transformers matches a name: version 4 compares whole components."""
    if _compares_components():
        return re.search(rf"((^|\.){pattern}($|\.))", name) is not None
    return re.search(pattern.replace("*", ".*"), name) is not None


@cache
def _compares_components() -> bool:
    return int(version("transformers").split(".")[0]) < 5
