"""Specs, the declarations of plugins: frozen data that name the code without importing it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal

from apt.errors import AptError, describe, plugin_error
from apt.field_types import check_fields
from apt.plugin.documents import Document


@dataclass(frozen=True)
class Spec:
    """A named component of a plugin.

    Args:
        name: the name for users.
        summary: one line for listings.
        target: ``"module:attribute"``, imported only on use.
    """

    name: str
    summary: str
    target: str

    def __post_init__(self) -> None:
        check_fields(self)

    def load(self) -> Any:
        """Import the target.

        Raises:
            AptError: it cannot be imported.
        """
        with self.loading():
            return resolve_name(self.target)

    @contextmanager
    def loading(self, item: str = "") -> Iterator[None]:
        """Convert an exception of the plugin's code to an `AptError` of one line.

        Args:
            item: the name of the loaded item; by default the target.
        """
        try:
            yield
        except (AptError, KeyboardInterrupt):
            raise
        except BaseException as error:  # of any kind, as those of `apt.plugin.registry`
            raise AptError(
                f"{item or self.target} of '{self.name}' does not load: {describe(error)}",
                "reinstall or upgrade its package",
            ) from error


@dataclass(frozen=True)
class AdapterSpec(Spec):
    """An adapter; its target is a class whose instances are `apt.adapter.Adapter`.

    Args:
        model_types: the supported values of ``model_type`` in configurations. Empty for an adapter
            that is chosen only by name, or as the default of other types.
        default: True for the adapter of models whose type no other adapter supports.
        zoo: ``"package:folder"`` of a checkpoint that ships with the adapter, for ``zoo:NAME``.
        example: ``"module:function"`` that returns a small random model of the family.
            ``apt-prune check`` checks the adapter with it.
        doctor: ``"module:function"`` that returns a list of `apt.extending.Finding` about the
            implementation that this machine uses for the family, for ``apt-prune doctor``. None
            for plain torch.
    """

    model_types: tuple[str, ...] = ()
    default: bool = False
    zoo: str | None = None
    example: str | None = None
    doctor: str | None = None

    def make(self) -> Any:
        """A new adapter.

        Raises:
            AptError: the class cannot be imported, or its constructor raises an exception.
        """
        adapter_class = self.load()
        with self.loading():
            return adapter_class()

    def examine(self) -> Any:
        """Call the doctor function."""
        assert self.doctor is not None
        return resolve_name(self.doctor)()

    def zoo_path(self) -> Path | None:
        """The folder of the embedded checkpoint; None without one.

        Raises:
            AptError: the package of the checkpoint cannot be imported.
        """
        if self.zoo is None:
            return None
        with self.loading(self.zoo):
            package, folder = self.zoo.split(":")
            return Path(str(files(package))) / folder


@dataclass(frozen=True)
class FormatSpec(Spec):
    """A checkpoint format other than the format of transformers.

    Its target is a function of the location of a checkpoint (a directory or a name on the hub) and
    the content of its ``config.json``, which has no ``model_type``. It returns an
    `apt.extending.Checkpoint`, or None if the checkpoint has another format.
    """


@dataclass(frozen=True)
class QuantisedFormatSpec(Spec):
    """A format of quantised checkpoints whose experts and blocks are removed byte by byte.

    Its target is a function of an `apt.locations.model_source.Source`. It returns an
    `apt.extending.QuantisedCheckpoint`, or None if the checkpoint has another format. It is asked
    about every model that is opened, so it first looks at what is cheap to read.
    """


@dataclass(frozen=True)
class ExportSpec(Spec):
    """A file format of other software, which ``apt-prune export`` writes.

    Its target is an `apt.extending.Export`.

    Args:
        suffix: the suffix of the names of its files, such as ``".gguf"``.
        types: the types of numbers that it writes, by their names for ``--type``.
        requires: the modules that it imports beside those of APT.
        install: the command that installs these modules, for the message if one is missing.
        check: ``"module:function"`` of a function of an `apt.extending.Exportable` that raises
            `apt.AptError` if the format cannot express the model. A run with an export calls it
            first, with the input model. None without a check.
        form: ``"module:function"`` of a function of an `apt.extending.Exportable` that returns the
            levels of its tensors, an `apt.extending.FileForm`; None for a format without levels.
            ``apt-prune fit`` needs them.
    """

    suffix: str = ""
    types: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    install: str = ""
    check: str | None = None
    form: str | None = None

    def file_form(self, model: Any) -> Any:
        """The levels of the tensors of a model."""
        assert self.form is not None
        with self.loading(self.form):
            form = resolve_name(self.form)
        return form(model)

    def examine(self, model: Any) -> None:
        """Call the check of a model; without a check, do nothing."""
        if self.check is not None:
            with self.loading(self.check):
                check = resolve_name(self.check)
            check(model)


@dataclass(frozen=True)
class MethodSpec(Spec):
    """A pruning method; its target is a function `apt.extending.Method`.

    Args:
        rank: the position in the order of measured accuracy. The method of APT with the highest
            rank is the default. A method of another package is used only by name.
        source: the paper.
        per: the default unit, row or layer, in which an unstructured sparsity is counted.
        error_aware: True if its targets are error-aware by default, see methods.md, "The target".
        efforts: True if it uses ``SolverOptions.effort``.
        blocks: True if it uses ``SolverOptions.block_size``.
        factors: False if it factorises no Gram matrix. The predicted memory of a run is then less.
        patterns: the names of the kinds of patterns that it supports, see `PatternSpec`; by default
            the kinds that ship with APT. None for all kinds: the method then gets masks from the
            pattern, as `apt.solver.lowest` does, and does not depend on its type.
    """

    sparse: ClassVar[bool] = True
    """True if it makes zeros, and not a smaller model."""

    rank: int = 0
    source: str = ""
    per: Literal["row", "layer"] = "layer"
    error_aware: bool = False
    efforts: bool = False
    blocks: bool = False
    factors: bool = True
    patterns: tuple[str, ...] | None = ("share", "n:m", "auto:m")


@dataclass(frozen=True)
class PatternSpec(Spec):
    """A kind of pattern of zeros; its target is a subclass of `apt.solver.Pattern`.

    Args:
        form: a text that it reads, for messages. If a kind has sizes and a share, the text is
            ``NAME:SIZES@SHARE``, such as ``"auto:8@0.5"``; the option ``sparsity`` may then give
            the share.
        source: the paper.
    """

    form: str = ""
    source: str = ""


@dataclass(frozen=True)
class ShrinkMethodSpec(MethodSpec):
    """A method that chooses the parts of a model that ``apt-prune shrink`` removes.

    Args:
        chooses: the kind of the target's choices. ``"columns"``: the groups of columns of one
            weight, an `apt.solver.GroupChoice`. ``"experts"``: the experts of one block, an
            `apt.extending.ExpertChoice`. ``"groups"``: an `apt.extending.GroupScores`, the
            importance of the groups of the whole model. ``"blocks"``: an
            `apt.extending.BlockChoice`, the blocks to drop.
        compensate: True if the kept columns, or the last weights of the kept experts, have exact
            least-squares weights by default.
        merges: True if removed experts are averaged into the kept ones.
        random_tokens: the default number of copies with random tokens of each sample, if
            layer-wise.
        tuning_rate: the first learning rate of the tuning, if error-aware; None for the default.
        streams: True if it calls each block about once, so that the blocks can stay on disk.
    """

    sparse: ClassVar[bool] = False

    chooses: Literal["columns", "experts", "groups", "blocks"] = "columns"
    compensate: bool = False
    merges: bool = False
    random_tokens: float = 0.0
    tuning_rate: float | None = None
    streams: bool = True


UNIFORM, AUTO = "uniform", "auto"
"""The names of the default allocations; `apt.planning.allocation.default_allocation` chooses."""


@dataclass(frozen=True)
class AllocationSpec(Spec):
    """An allocation of sparsity to sites; its target is an `apt.extending.Allocation`.

    Args:
        source: the paper.
        streams: True if it runs the model block by block, so that the blocks can stay on disk.
    """

    source: str = ""
    streams: bool = True


@dataclass(frozen=True)
class RecoverySpec(Spec):
    """A kind of recovery: training that keeps the zeros of a pruned model.

    Its target is an `apt.extending.Recovery`, which chooses the trained parameters.

    Args:
        source: the paper.
        rate: the default learning rate.
        zeros: True if it supports only models with zeros. Otherwise it supports smaller models too.
        teacher: True if it needs the dense model.
        dense: True if it also supports models without zeros and without a report, such as models
            from which another tool dropped blocks.
        options: the names of the options ``rank``, ``dropout``, ``blocks``, ``move_masks``,
            ``hidden``, ``top`` and ``save_adapter`` that it uses; ``apt-prune recover`` refuses the
            others. None accepts them all.
    """

    source: str = ""
    rate: float = 1e-4
    zeros: bool = False
    teacher: bool = False
    dense: bool = False
    options: tuple[str, ...] | None = None

    def for_samples(self) -> "RecoverySpec":
        """The kind as it serves models that do not read windows of text.

        The dense model runs beside the trained one, on whole outputs, and neither has dropout.
        """
        options = self.options
        if options is not None:
            options = tuple({*options, "hidden"} - {"top", "dropout"})
        return replace(self, teacher=True, options=options)


@dataclass(frozen=True)
class EvaluatorSpec(Spec):
    """A metric; its target is a function of a model and of what it reads that returns a number.

    By default, the function takes a causal language model of transformers and token ids (windows,
    seqlen) of separate windows.

    Args:
        better: the better direction, ``"lower"`` or ``"higher"``.
        dense: True if it compares the model with the dense one, which is then the third argument.
        mean: the kind of mean, ``"arithmetic"`` or ``"geometric"``, of the metrics of single
            windows or samples that equals the metric of all of them. Then ``apt-prune compare`` and
            ``eval --dense`` give a confidence interval. None if the metric is not such a mean.
        reads: what it is measured on. ``"windows"``: windows of text. ``"samples"``: the samples of
            other models, `apt.adapter.Samples`; a metric that compares then gets what the dense
            model returns, an `apt.evaluation.outputs.Outputs`, in place of the dense model.
            ``"both"``: one or the other, by the model.
    """

    better: Literal["lower", "higher"] = "lower"
    dense: bool = False
    mean: Literal["arithmetic", "geometric"] | None = None
    reads: Literal["windows", "samples", "both"] = "windows"

    def measure(self, *given: Any) -> float:
        """Call the metric.

        Args:
            given: the model, the tokens, and the dense model if the metric needs it.

        Raises:
            AptError: the metric does not load, or it returns no number.
        """
        value = self.load()(*given)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            message = f"returns {type(value).__name__}, not a number"
            raise plugin_error(f"metric {self.name}", message, "metric", "metrics") from error


@dataclass(frozen=True)
class CalibrationSpec(Spec):
    """A text source; its target is a function of a split that yields documents.

    The function takes ``"calibration"`` or ``"evaluation"`` and yields strings, or
    `apt.extending.Conversation`. The two splits must not have text in common.

    Args:
        source: the origin of the text, and its licence.
        images: ``"module:attribute"`` of a function of a split that yields `apt.extending.Item`
            for models of images; empty if the source has none.
        sounds: the same for models of sounds.
    """

    source: str = ""
    images: str = ""
    sounds: str = ""

    def items(self, target: str, split: str) -> Iterator[Any]:
        """The images or the sounds of a split.

        Args:
            target: ``images`` or ``sounds``.

        Raises:
            AptError: the function cannot be imported.
        """
        with self.loading(target):
            function = resolve_name(target)
        yield from function(split)

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split.

        Raises:
            AptError: the source does not load, or yields an item that is not a document.
        """
        texts = self.load()(split)
        iterable = isinstance(texts, Iterable) and not isinstance(texts, str)
        for document in texts if iterable else [texts]:
            if not iterable or not isinstance(document, Document):
                message = f"gives {type(document).__name__} in place of documents"
                raise plugin_error(f"data set '{self.name}'", message, "text")
            yield document


@dataclass(frozen=True)
class CommandSpec(Spec):
    """A subcommand of ``apt-prune``.

    Its target is a function whose parameters are classes of options of `apt.options`, and whose
    docstring is its help. A function with parameters for typer works too.
    """
