"""What plugins declare: frozen descriptions, cheap to import, with the code behind a name."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal


@dataclass(frozen=True)
class Spec:
    """A named thing that a plugin offers.

    Args:
        name: what users type.
        summary: one line, shown in listings.
        target: ``"module:attribute"``, imported only when it is used.
    """

    name: str
    summary: str
    target: str

    def load(self) -> Any:
        """Import the target."""
        return resolve_name(self.target)


@dataclass(frozen=True)
class AdapterSpec(Spec):
    """An adapter; its target is a class whose instances are `apt.adapter.Adapter`.

    Args:
        model_types: the ``model_type`` of the configurations that it serves; none where it serves
            whatever it fits, and is chosen by name only.
        zoo: ``"package:folder"`` of a checkpoint that ships with the adapter, for ``zoo:NAME``.
        example: ``"module:function"`` that makes a small random model of the family, by which
            ``apt-prune check`` checks the adapter.
        doctor: ``"module:function"`` that says what this machine will run the family with, as a
            list of `apt.plugin.doctor.Finding`, for ``apt-prune doctor``; none for plain torch.
    """

    model_types: tuple[str, ...] = ()
    zoo: str | None = None
    example: str | None = None
    doctor: str | None = None

    def load_example(self) -> Any:
        """Make the example."""
        assert self.example is not None
        return resolve_name(self.example)()

    def examine(self) -> Any:
        """Ask the family's doctor."""
        assert self.doctor is not None
        return resolve_name(self.doctor)()

    def zoo_path(self) -> Path | None:
        """The folder of the embedded checkpoint, if there is one."""
        if self.zoo is None:
            return None
        package, folder = self.zoo.split(":")
        return Path(str(files(package))) / folder


@dataclass(frozen=True)
class FormatSpec(Spec):
    """A format of checkpoints that is not transformers' own.

    Its target is a function from the location of a checkpoint (a directory or a name on the hub)
    and its ``config.json``, one without a ``model_type``. It returns an
    `apt.checkpoints.formats.Checkpoint`, or None where the checkpoint has another format.
    """


@dataclass(frozen=True)
class MethodSpec(Spec):
    """A pruning method; its target is a function `apt.pruning.layer.Method`.

    Args:
        rank: its place by measured accuracy. Of APT's own methods, the one of the highest rank is
            the default; that of another package is used where it is named.
        source: the paper that it comes from.
        per: where it counts an unstructured sparsity unless told otherwise.
        error_aware: whether its targets are error-aware by default, see `apt.calibration.targets`.
        efforts: whether it heeds ``SolverOptions.effort``.
        blocks: whether it heeds ``SolverOptions.block_size``.
    """

    rank: int = 0
    source: str = ""
    per: Literal["row", "layer"] = "layer"
    error_aware: bool = False
    efforts: bool = False
    blocks: bool = False


@dataclass(frozen=True)
class AllocationSpec(Spec):
    """An allocation of sparsity to sites; its target is an `apt.planning.allocation.Allocation`.

    Args:
        source: the paper that it comes from.
    """

    source: str = ""


@dataclass(frozen=True)
class EvaluatorSpec(Spec):
    """A measure of a model; its target is a function from model and tokens to a number.

    The function takes a causal language model of transformers and token ids (windows, seqlen) of
    separate windows.

    Args:
        better: whether lower or higher is better.
    """

    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class CalibrationSpec(Spec):
    """A text source; its target is a function from a split to documents.

    The function takes ``"calibration"`` or ``"evaluation"`` and yields strings; the two splits
    must not share text.

    Args:
        source: where the text comes from, and its licence.
    """

    source: str = ""
