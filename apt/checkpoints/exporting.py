"""The interface of exports: the model on disk, read parameter by parameter, and the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from apt.checkpoints.load import load_tokenizer
from apt.checkpoints.opened import Opened
from apt.checkpoints.stored import Stored, find_stored, open_stored, read_parameter
from apt.errors import AptError, NotStoredError


@dataclass(frozen=True)
class Exported:
    """The summary of an exported file.

    Attributes:
        type: the type of most weights.
        tensors: the number of tensors.
        size: the bytes of the file.
        zeros: the number of zeros in the matrices of the blocks, before the export.
        kept: the number of these zeros that are zero in the file too.
        notes: a line for each choice that the user might not expect.
    """

    type: str
    tensors: int
    size: int
    zeros: int
    kept: int
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class EncodedRows:
    """A matrix in the form in which a file stores it.

    Attributes:
        level: the name of its kind of numbers in the format, such as ``q4_K``.
        rows: the bytes of each row (out, bytes) in uint8, or (experts, out, bytes) for a stack.
    """

    level: str
    rows: Tensor


class Exportable:
    """A model on disk, of which one parameter at a time is in memory.

    Args:
        opened: the model, without weights.
        type: the type of the weights to write, one of the types of the export's spec; None for the
            type in the checkpoint.
        original: the file of the same format from which the model was made; None without one.
        integers: ``"int8"`` or ``"int4"`` if the weights of the blocks are integers of that type
            times scales; else None.
        encoded: the matrices that are written as they are here, in place of those on disk, by the
            names of their parameters.
        values: the parameters that have other values than those on disk.
        title: the name of the model in the file; by default the name of its directory.
        changed: True if its weights are no longer those of the original. They then have no values
            in the types of the original's tensors.

    Attributes:
        config: the configuration, as an object of transformers.
        module: the model without weights, on the meta device.
        name: the user's name for the model.
        is_fitted: True if the levels of the tensors were chosen for a budget.
    """

    def __init__(
        self,
        opened: Opened,
        type: str | None = None,
        original: Path | None = None,
        integers: str | None = None,
        encoded: Mapping[str, EncodedRows] | None = None,
        title: str | None = None,
        *,
        values: Mapping[str, Tensor] | None = None,
        changed: bool = False,
    ) -> None:
        self.type, self.original, self.integers = type, original, integers
        self.changed, self._values = changed, values or {}
        self.encoded, self.is_fitted = encoded or {}, encoded is not None
        self.config: Any = opened.config
        self.module: nn.Module = opened.module
        self.name = opened.source.reference
        self._opened, self._title = opened, title

    def with_encoded(
        self, encoded: Mapping[str, EncodedRows], values: Mapping[str, Tensor] | None = None
    ) -> "Exportable":
        """The same model, with these matrices and these values in place of those on disk."""
        parts = (self._opened, self.type, self.original, self.integers)
        return Exportable(*parts, encoded, self._title, values=values, changed=self.changed)

    def resized(self, module: nn.Module, config: Any) -> "Exportable":
        """A smaller model that is not on disk yet, with the stored dtypes of this one.

        Its tensors have shapes and no values.

        Args:
            module: the smaller model without weights.
            config: its configuration.
        """
        opened = replace(self._opened, module=module, config=config)
        smaller = Exportable(
            opened, self.type, self.original, self.integers, title=self.title, changed=True
        )
        smaller._stored = self._stored  # the tensors of the whole model
        return smaller

    @cached_property
    def _stored(self) -> Stored:
        """The tensors; raises `AptError` if they cannot be read one by one."""
        try:
            return open_stored(self._opened)
        except NotStoredError as error:
            message = f"{self.name} is not exported: its tensors cannot be read one by one"
            raise AptError(message, "write it anew, with apt-prune convert") from error

    @property
    def is_stored(self) -> bool:
        """True if the parameters can be read one by one, as in each output of a run."""
        return find_stored(self._opened) is not None

    @property
    def directory(self) -> Path:
        """The local directory, with the configuration and the tokenizer."""
        return self._stored.directory if self.is_stored else Path(self._opened.source.location)

    @property
    def title(self) -> str:
        """The name of the model in the file."""
        return self._title or self.directory.resolve().name

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the stored parameters and buffers, by their names in the model.

        Of several tied parameters, only the stored one is included.
        """
        state = self.module.state_dict()
        return {name: tuple(state[name].shape) for name in self._stored.layout if name in state}

    @property
    def dtype(self) -> Any:
        """The dtype in which the weights of the sites are stored; fp32 if they have several."""
        return self._stored.dtype(self._opened)

    @property
    def blocks(self) -> Sequence[str]:
        """The names of the blocks."""
        return [name for name, _ in self._opened.adapter.blocks(self.module)]

    def tokenizer(self) -> Any:
        """The tokenizer of the model; raises `AptError` if there is none."""
        return load_tokenizer(self._opened.source)

    def read(self, name: str) -> Tensor:
        """A parameter, in its stored dtype; raises `AptError` if a value is not finite."""
        if (value := self._values.get(name)) is not None:
            return value
        return read_parameter(self._stored.layout[name], self.shapes[name], self._stored.shards)


class Export(Protocol):
    """A function that writes a model as a file; the target of `apt.hookspecs.ExportSpec`."""

    def __call__(self, model: Exportable, target: Path, /) -> Exported:
        """Write the file.

        APT moves it to its place when it is complete, and deletes it after an error.

        Args:
            model: the model.
            target: the path of the file to create.

        Returns:
            The summary of the file, with the zeros counted in it.

        Raises:
            AptError: the format cannot express the model.
        """
