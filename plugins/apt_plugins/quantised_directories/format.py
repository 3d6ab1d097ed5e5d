"""The base class of formats: how quantised matrices are stored, and how they are expanded.

A quantised matrix is stored as several tensors, its parts: the small numbers, the scales, and what
else the format needs. Each part has a role, such as ``scales``. The names of the parts of a matrix
have a common beginning, the stem.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Entry, Shards
from apt.errors import AptError
from apt.extending import ExpandedTensor

Parts = Mapping[str, Tensor]
"""The stored tensors of a matrix, by their roles."""

PLAIN = "plain"
"""The role of a tensor that is not quantised."""

_GET_AGAIN = "get the checkpoint again"


class Cut(Enum):
    """What becomes of a part if the matrix, or the stack of matrices, loses rows."""

    ROWS = "it loses the same rows"
    WHOLE = "it stays as it is"
    SHAPE = "it is the shape of the matrix"
    NEVER = "it cannot be cut"


@dataclass(frozen=True)
class Matrix:
    """A tensor of the model, quantised or plain, and where its parts are stored.

    Attributes:
        expanded: the tensor as transformers has it without quantisation.
        keys: the names of the parts, by their roles.
        cuts: how each part loses rows, by its role.
        place: the index of the matrix within stored stacks; None if it is not in stacks.
    """

    expanded: ExpandedTensor
    keys: Mapping[str, str]
    cuts: Mapping[str, Cut]
    place: int | None = None


class Format(ABC):
    """A format of quantised directories.

    Args:
        record: the ``config.json``.
        quantization: the description of the quantisation in ``record``.
        shards: the files of weights.

    Attributes:
        title: the name of the format, for messages.
        marker: the ending of a part that every quantised matrix has, and no other tensor.
        endings: the endings of the parts after the stem, by their roles.
        needed: the roles without which a matrix is damaged.
        expanded_ending: the ending of the name of an expanded tensor, after the stem.
    """

    title: ClassVar[str]
    marker: ClassVar[str]
    endings: ClassVar[Mapping[str, str]]
    needed: ClassVar[tuple[str, ...]]
    expanded_ending: ClassVar[str] = "weight"

    def __init__(
        self, record: Mapping[str, Any], quantization: Mapping[str, Any], shards: Shards
    ) -> None:
        self.record, self.quantization, self.shards = record, quantization, shards
        self.dtype = model_dtype(record)

    @classmethod
    @abstractmethod
    def description(cls, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The description of the quantisation in a ``config.json``; None for another format.

        Raises:
            AptError: it is a kind of this format that is not supported.
        """

    @abstractmethod
    def matrix(
        self, stem: str, entries: Mapping[str, Entry]
    ) -> tuple[ExpandedTensor, dict[str, Cut]]:
        """The expanded tensor that parts with a common stem make, and how each part loses rows.

        Raises:
            ValueError: the parts do not fit.
        """

    @abstractmethod
    def expand(self, stem: str, shape: tuple[int, ...], parts: Parts) -> Tensor:
        """The values of a matrix, in fp32 or in the dtype of the expanded tensor."""

    def can_round(self, stem: str, roles: Iterable[str]) -> bool:
        """True if new values of a matrix with these parts can be rounded."""
        return False

    def rounded(self, stem: str, values: Tensor, stored: Parts) -> dict[str, Tensor]:
        """The new parts for new values, by their roles; the other parts stay as they are.

        Args:
            stem: the stem of the original matrix, for which `can_round` is true.
            values: the new values, in fp32.
            stored: the parts of the original matrix, which may have more rows.
        """
        raise NotImplementedError

    def names(self, key: str, count: int) -> list[tuple[str, int | None]]:
        """The expanded names for a stored name, each with its index in the stack or None.

        Args:
            key: the name of a stored tensor, or of a matrix at a stem.
            count: the size of its first dimension.
        """
        return [(key, None)]

    def location(self, name: str) -> tuple[str, int | None]:
        """The stored name for an expanded name, and the index in the stack; inverse of `names`."""
        return name, None

    def stem(self, name: str) -> str:
        """The stem of a quantised matrix by its expanded name."""
        return self.location(name)[0].removesuffix(self.expanded_ending)

    def keys(self, name: str, roles: Iterable[str]) -> dict[str, str]:
        """The names of the parts of a tensor by its expanded name, by their roles."""
        stem, plain = self.stem(name), self.location(name)[0]
        return {role: plain if role == PLAIN else f"{stem}{self.endings[role]}" for role in roles}


def model_dtype(record: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the model by its ``config.json``: fp16, fp32, or else bf16."""
    text = record.get("text_config")
    records = [record, *([text] if isinstance(text, dict) else [])]
    names = [each.get(field) for each in records for field in ("dtype", "torch_dtype")]
    dtypes = {"float16": torch.float16, "float32": torch.float32}
    first_name = next((name for name in names if isinstance(name, str)), "")
    return dtypes.get(first_name.removeprefix("torch."), torch.bfloat16)


def quantization_of(record: Mapping[str, Any], method: str) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a ``config.json`` if it has this method."""
    quantization = record.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == method:
        return quantization
    return None


def unsupported(title: str) -> AptError:
    """The error for a kind of quantisation that cannot be sliced."""
    return AptError(
        f"experts and blocks are not removed from files of {title}",
        "remove them from the original, and quantise the result",
    )


def damaged(name: str, reason: str) -> AptError:
    """The error for a tensor that has what its format does not allow."""
    return AptError(f"{name} is damaged: {reason}", _GET_AGAIN)


def quantised_matrices(scheme: Format) -> dict[str, Matrix]:
    """All quantised matrices of the files by their expanded names.

    Raises:
        AptError: a part is missing, or the parts of a matrix do not fit.
    """
    matrices: dict[str, Matrix] = {}
    for key in [key for key in scheme.shards.entries if key.endswith(scheme.marker)]:
        stem = key.removesuffix(scheme.marker)
        keys = {role: f"{stem}{ending}" for role, ending in scheme.endings.items()}
        keys = {role: part_key for role, part_key in keys.items() if part_key in scheme.shards}
        if missing_roles := [role for role in scheme.needed if role not in keys]:
            missing_key = f"{stem}{scheme.endings[missing_roles[0]]}"
            raise damaged(f"{stem}{scheme.expanded_ending}", f"{missing_key} is missing")
        entries = {role: scheme.shards.entries[part_key] for role, part_key in keys.items()}
        try:
            expanded, cuts = scheme.matrix(stem, entries)
            if 0 in expanded.shape:
                raise ValueError(f"its shape would be {expanded.shape}")
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise damaged(
                f"{stem}{scheme.expanded_ending}", str(error) or type(error).__name__
            ) from error
        for name, place in scheme.names(f"{stem}{scheme.expanded_ending}", expanded.shape[0]):
            matrices[name] = Matrix(_member_of(expanded, place), keys, cuts, place)
    return matrices


def check_words(*entries: Entry) -> None:
    """Raise `ValueError` if packed integers do not lie in words of 32 bits."""
    for entry in entries:
        if entry.dtype not in (torch.int32, torch.uint32):
            raise ValueError(f"its integers are in {entry.dtype}, not in words of 32 bits")


def check_floats(*entries: Entry) -> None:
    """Raise `ValueError` if scales are no floating-point numbers of 16 bits or more."""
    for entry in entries:
        if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
            raise ValueError(f"its scales are {entry.dtype}")


_AUXILIARY = re.compile(r"(^|[._])([qkv]|kv|input|activation|output)_(global_)?(scale|zero_point)$")


def is_auxiliary(key: str) -> bool:
    """True for a tensor that only a quantised model has, such as the scale of activations.

    It belongs to a module, but the values of matrices do not depend on it.
    """
    return bool(_AUXILIARY.search(key))


def plain_tensors(scheme: Format, used: Iterable[str]) -> dict[str, Matrix]:
    """The tensors that are not quantised, by their expanded names.

    Raises:
        AptError: a tensor is a part of a quantised matrix that lacks another part.
    """
    unused = scheme.shards.entries.keys() - set(used)
    tensors: dict[str, Matrix] = {}
    for key in (key for key in scheme.shards.entries if key in unused and not is_auxiliary(key)):
        entry = scheme.shards.entries[key]
        _check_plain(scheme, key, entry)
        expanded = ExpandedTensor(entry.shape, entry.dtype, kind_of(entry.dtype))
        for name, place in scheme.names(key, entry.shape[0] if entry.shape else 0):
            cuts = {PLAIN: Cut.ROWS if entry.shape else Cut.WHOLE}
            tensors[name] = Matrix(_member_of(expanded, place), {PLAIN: key}, cuts, place)
    return tensors


def _check_plain(scheme: Format, key: str, entry: Entry) -> None:
    """Raise if a tensor is a part of a matrix that lacks the part with the ``marker``."""
    if entry.dtype.itemsize == 1 and entry.dtype.is_floating_point:
        raise damaged(key, "it is FP8, and its scales are missing")
    for ending in set(scheme.endings.values()) - {"", scheme.expanded_ending}:
        if key.endswith(ending):
            stem = key.removesuffix(ending)
            raise damaged(f"{stem}{scheme.expanded_ending}", f"{stem}{scheme.marker} is missing")


def _member_of(stack: ExpandedTensor, place: int | None) -> ExpandedTensor:
    """A matrix of a stack; the tensor itself if ``place`` is None."""
    if place is None:
        return stack
    return ExpandedTensor(stack.shape[1:], stack.dtype, stack.stored)


def kind_of(dtype: torch.dtype) -> str:
    """The short name of a dtype, such as ``bf16``."""
    name = str(dtype).removeprefix("torch.")
    return name.replace("bfloat", "bf").replace("float", "f")
