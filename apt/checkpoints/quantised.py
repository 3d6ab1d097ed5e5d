"""Checkpoints of quantised weights, which are expanded tensor by tensor and sliced byte by byte.

A model with fewer experts or blocks needs no new rounding: the stored bytes of the kept experts and
blocks are copied. A plugin supports a format of quantised files with a class that has the protocol
`QuantisedCheckpoint`. The rest of APT sees a checkpoint of transformers, each tensor of which is
expanded when it is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpandedTensor:
    """A tensor of the checkpoint as transformers stores it without quantisation.

    Attributes:
        shape: the shape of the expanded tensor.
        dtype: the dtype of the expanded tensor, in which it is read.
        stored: the kind of numbers in the file, for messages and reports, such as ``q4_K``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str


@dataclass(frozen=True)
class Slices:
    """The tensors of a smaller model, as parts of the tensors of a checkpoint.

    Attributes:
        config: the configuration of the smaller model.
        sources: for each tensor of the smaller model, by its expanded name, the expanded name of
            its source. All other tensors of the checkpoint are left out.
        rows: for each tensor of the smaller model that has fewer rows, the kept indices of the
            first dimension of its source: rows of a matrix, entries of a vector, or experts of a
            stack.
        values: new values of tensors of the smaller model, expanded. They are rounded to the kind
            of numbers in which their source is stored.
        blocks: the indices of the kept blocks, in order.
        experts: the number of experts that each block keeps; None if no expert is removed.
    """

    config: Any
    sources: Mapping[str, str]
    rows: Mapping[str, Sequence[int]]
    blocks: Sequence[int]
    experts: int | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)


class QuantisedCheckpoint(Protocol):
    """A checkpoint of quantised weights, of a model that transformers knows.

    Attributes:
        config: the configuration, as an object of transformers, without quantisation.
        tensors: all tensors of the model by the names that a plain checkpoint of transformers has.
            Experts that the file stores as one stack have the name, the shape and the order of
            dimensions of the parameter of transformers, such as ``mlp.experts.gate_up_proj``, even
            if the file has a stack for each of two joined weights.
        files: the files of the checkpoint.
    """

    config: Any
    files: Sequence[Path]

    @property
    def tensors(self) -> Mapping[str, ExpandedTensor]:
        """The tensors, see the class. A property, so that a format may compute them when asked."""

    def read(self, name: str) -> Tensor:
        """A tensor, expanded; raises `AptError` if its bytes are damaged."""

    def check_slices(self, slices: Slices) -> None:
        """Raise `AptError` if `write_sliced` would refuse a smaller model.

        It is called before the run, when new values are not known: `Slices.values` has tensors on
        the meta device, with shapes alone.
        """

    def write_sliced(self, slices: Slices, target: Path) -> None:
        """Write a smaller model, whose tensors have the stored bytes of their sources.

        Tensors keep their order, their kinds of numbers and their alignment. All metadata stays
        except for the numbers of blocks, of experts and of weights. A format of directories writes
        the weights and ``config.json``: the caller copies all other files.

        Args:
            target: the file, or the directory for a format of directories. It does not exist.

        Raises:
            AptError: the format cannot express the smaller model. Nothing is written then.
        """
