"""The outputs of ``apt-prune fit``: the levels of their tensors, and their form on disk."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from apt.checkpoints.exporting import EncodedRows, Export, Exportable, Exported
from apt.checkpoints.opened import Opened
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import local_directory
from apt.engine.compressed_form import compressed_form
from apt.engine.export import original_file
from apt.engine.file_forms import form_of
from apt.engine.fitted import Fitted
from apt.engine.in_file import InFile
from apt.engine.in_packed import InCompressed, InPacked
from apt.engine.opening import RunRequest, check_export
from apt.engine.packed_form import Means, PackedForm, cache_bytes, packed_form
from apt.engine.prepare import Notice, check_place, input_paths
from apt.errors import AptError
from apt.files.writing import check_file
from apt.fit.levels import FileForm
from apt.options import ExportRun, FitRun
from apt.options.fit import DIRECTORIES
from apt.output.report import read_report, report_beside
from apt.packing.directory import loaded_bytes, stored_tensors
from apt.patterns import Grid, IntegerGrid, Unstructured
from apt.planning.plan import Plan, make_plan
from apt.plugin.registry import Registry
from apt.plugin.specs import ExportSpec


class FitTarget(ABC):
    """The output of a fit.

    Attributes:
        store: the kind of store that writes it.
        is_file: True if it is one file, False if it is a directory.
    """

    store: ClassVar[type[Fitted]]
    is_file: ClassVar[bool]

    @property
    @abstractmethod
    def words(self) -> str:
        """The words for such an output in messages."""

    @property
    @abstractmethod
    def form(self) -> FileForm:
        """The levels of the tensors, and the bytes of the rest."""

    @property
    def is_exact(self) -> bool:
        """True if the sizes do not depend on the values."""
        levels = (level for row in self.form.levels.values() for level in row)
        return all(level.expected is None for level in levels)

    @property
    def plan(self) -> Plan | None:
        """A plan with all parameters that may change; None if the whole model is written anew."""
        return None

    @abstractmethod
    def smaller_form(self, opened: Opened) -> FileForm:
        """The levels of a smaller model that is not on disk yet.

        Args:
            opened: the smaller model, without weights.
        """

    @abstractmethod
    def of_smaller(self, opened: Opened) -> "FitTarget":
        """The output for a smaller model on disk, in place of the whole one."""


@dataclass(frozen=True)
class FileTarget(FitTarget):
    """One file in the format of an export.

    Attributes:
        export: the format.
        model: the model on disk, from which the tensors that keep their values are written.
    """

    store = InFile
    is_file = True

    export: ExportSpec
    model: Exportable
    file_form: FileForm

    @property
    def words(self) -> str:
        """The name of the format."""
        return f"{self.export.name} file"

    @property
    def form(self) -> FileForm:
        """The levels of the format."""
        return self.file_form

    def smaller_form(self, opened: Opened) -> FileForm:
        """See `FitTarget`."""
        smaller = self.model.resized(opened.module, opened.config)
        self.export.examine(smaller)
        return form_of(self.export, smaller, opened)

    def of_smaller(self, opened: Opened) -> "FileTarget":
        """See `FitTarget`."""
        whole = self.model
        model = Exportable(opened, original=whole.original, title=whole.title, changed=True)
        return FileTarget(self.export, model, form_of(self.export, model, opened))

    def write(
        self, encoded: Mapping[str, EncodedRows], values: Mapping[str, Tensor], target: Path
    ) -> Exported:
        """Write the file; tensors that are not given have the values of the model on disk."""
        write: Export = self.export.load()
        return write(self.model.with_encoded(encoded, values), target)


@dataclass(frozen=True)
class PackedTarget(FitTarget):
    """A packed directory.

    Attributes:
        packed: its levels.
        means: the means by which its matrices become smaller.
        context: the tokens of the cache, if the bytes in memory are counted; else None.
        changes: the plan with all parameters that may change; None if the whole model is written
            anew.
        cache: the bytes of the cache, if the bytes in memory are counted; else None.
    """

    store: ClassVar[type[Fitted]] = InPacked
    is_file = False

    packed: PackedForm
    means: Means
    context: int | None
    changes: Plan | None
    cache: int | None = None

    @property
    def words(self) -> str:
        """The words for a packed directory."""
        return "packed directory" if self.cache is None else "packed model with its cache"

    @property
    def form(self) -> FileForm:
        """The levels of the matrices."""
        return self.packed.form

    @property
    def plan(self) -> Plan | None:
        """See `FitTarget`."""
        return self.changes

    def smaller_form(self, opened: Opened) -> FileForm:
        """See `FitTarget`."""
        return self._of_smaller(opened, opened.dtype).form

    def of_smaller(self, opened: Opened) -> "PackedTarget":
        """See `FitTarget`."""
        return self._of_smaller(opened, None)

    def _of_smaller(self, opened: Opened, dtype: torch.dtype | None) -> "PackedTarget":
        """The output for a smaller model.

        Args:
            dtype: the dtype of its weights; None for that of its checkpoint on disk.
        """
        return _packed(opened, _plan_of(opened, self.means), self.means, dtype, self.context)

    def coded(self, name: str, parameter: Tensor, grid: Grid | None) -> int:
        """The bytes of a parameter with its final values."""
        assert grid is None or isinstance(grid, IntegerGrid)
        return self.packed.matrices[name].coded(parameter, grid)

    def measured(self, directory: Path) -> int:
        """The counted bytes of a written directory."""
        if self.cache is not None:
            return loaded_bytes(directory) + self.cache
        return sum(path.stat().st_size for path in stored_tensors(directory).files)


@dataclass(frozen=True)
class CompressedTarget(FitTarget):
    """A directory in the format of compressed-tensors, which vLLM opens.

    Attributes:
        file_form: its levels.
        means: the means by which its matrices become smaller.
        changes: the plan with all parameters that may change; None if the whole model is written
            anew.
    """

    store: ClassVar[type[Fitted]] = InCompressed
    is_file = False

    file_form: FileForm
    means: Means
    changes: Plan | None

    @property
    def words(self) -> str:
        """The words for such a directory."""
        return "directory for vLLM"

    @property
    def form(self) -> FileForm:
        """The levels of the matrices."""
        return self.file_form

    @property
    def plan(self) -> Plan | None:
        """See `FitTarget`."""
        return self.changes

    def smaller_form(self, opened: Opened) -> FileForm:
        """See `FitTarget`."""
        return compressed_form(opened, _plan_of(opened, self.means), self.means, opened.dtype)

    def of_smaller(self, opened: Opened) -> "CompressedTarget":
        """See `FitTarget`."""
        return _compressed(opened, _plan_of(opened, self.means), self.means, None)

    def measured(self, directory: Path) -> int:
        """The bytes of the weights in a written directory."""
        return sum(path.stat().st_size for path in Shards(directory).files)


def _plan_of(opened: Opened, means: Means) -> Plan:
    """A plan with all sites of a model."""
    return make_plan(opened.module, opened.adapter, Unstructured(0.0), per=means.per)


def check_target_place(
    request: RunRequest[FitRun], texts: Sequence[str | None], registry: Registry, notice: Notice
) -> ExportSpec | None:
    """Check the place of the output of a fit; returns the format of a file.

    Raises:
        AptError: it has a wrong name or exists, or the format has no levels.
    """
    options, output = request.options, request.options.directory
    if options.target in DIRECTORIES:
        check_place(options, request.source, texts, notice)
        return None
    run = ExportRun(model=options.model, output=output, format=options.target)
    spec = check_export(run, registry, ("output",))
    if spec.form is None:
        raise AptError(f"{spec.name} files have no levels to choose from", options=("output",))
    inputs = input_paths(request.source, texts)
    for path in (output, report_beside(output)):
        check_file(path, overwrite=options.overwrite, inputs=inputs, options=("output",))
    return spec


def file_target(spec: ExportSpec, skeleton: Opened) -> FileTarget:
    """The target of a file; raises `AptError` if the format cannot express the model."""
    source = skeleton.source
    original = source.files()[0] if source.gguf else original_file(local_directory(skeleton), spec)
    model = Exportable(skeleton, original=original, changed=_was_changed(skeleton))
    spec.examine(model)
    return FileTarget(spec, model, form_of(spec, model, skeleton))


def packed_target(
    skeleton: Opened,
    plan: Plan,
    means: Means,
    dtype: torch.dtype | None,
    budget: int | None,
    context: int | None,
) -> PackedTarget:
    """The target of a packed directory.

    Args:
        budget: the largest number of bytes; None if something else is limited.
        context: the tokens of the cache, to count the bytes in memory; None to count those of the
            files.

    Raises:
        AptError: the model has no matrices to pack, or is small enough already.
    """
    target = _packed(skeleton, plan, means, dtype, context)
    packed, name = target.packed, skeleton.source.reference
    if not packed.matrices:
        message = f"no weight of {name} belongs to a torch.nn.Linear module or to stacked experts"
        raise AptError(message, "other modules, such as Conv1D, cannot be packed", ("target",))
    if budget is not None:
        _check_large(name, packed.dense, budget)
    return target


def compressed_target(
    skeleton: Opened, plan: Plan, means: Means, dtype: torch.dtype | None, budget: int
) -> CompressedTarget:
    """The target of a directory for vLLM; see `packed_target`.

    Raises:
        AptError: the model has no matrices that can be integers, or is small enough already.
    """
    target = _compressed(skeleton, plan, means, dtype)
    form, name = target.form, skeleton.source.reference
    if not any(len(levels) > 1 for levels in form.levels.values()):
        message = (
            f"no weight of {name} belongs to a torch.nn.Linear module whose columns are a multiple "
            "of the scale group"
        )
        raise AptError(message, "choose another group, or another kind", ("scale_group", "target"))
    dense = form.rest + sum(levels[0].size for levels in form.levels.values())
    _check_large(name, dense, budget)
    return target


def _compressed(
    skeleton: Opened, plan: Plan, means: Means, dtype: torch.dtype | None
) -> CompressedTarget:
    """The target of a directory for vLLM; see `compressed_target`."""
    changes = plan if skeleton.quantised is None else None
    return CompressedTarget(compressed_form(skeleton, plan, means, dtype), means, changes)


def _check_large(name: str, dense: int, budget: int) -> None:
    """Raise if a model with dense weights is small enough."""
    if dense <= budget:
        size = f"{dense:,} bytes ({dense / 2**20:.1f} MiB)"
        message = f"{name} fits already: with dense weights it has at most {size}"
        raise AptError(message, "give a smaller size", ("size", "bits", "memory"))


def _packed(
    skeleton: Opened, plan: Plan, means: Means, dtype: torch.dtype | None, context: int | None
) -> PackedTarget:
    """The target of a packed directory; see `packed_target`."""
    cache = None if context is None else cache_bytes(skeleton, context, dtype)
    packed = packed_form(skeleton, plan, means, dtype, cache)
    changes = plan if skeleton.quantised is None else None
    return PackedTarget(packed, means, context, changes, cache)


def _was_changed(skeleton: Opened) -> bool:
    """True if the weights are no longer those of the file from which the model was made."""
    record = {} if skeleton.source.gguf else read_report(local_directory(skeleton)) or {}
    return any(record.get(entry) for entry in ("sites", "structure", "recovery"))
