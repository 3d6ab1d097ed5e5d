"""The interface of recovery plugins: the choice of trained parameters and their loss."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from apt.adapter import Adapter, Sample
from apt.options import RecoverOptions
from apt.recovery.objective import Loss
from apt.recovery.teacher import Teacher


@dataclass(frozen=True)
class Unrecovered:
    """The single argument of a kind of recovery.

    Attributes:
        model: the pruned model, a model of transformers with its head. Its parameters are fp32 and
            need no gradients yet.
        adapter: the adapter of its family.
        masks: the zeros that must stay (True where pruned), by the full names of parameters.
        options: the options of the run.
        teacher: the outputs of the dense model; None if the kind needs none, or if there is a
            ``sample``: the dense model then runs beside the trained one.
        sample: the inputs of one sample (1, …), by the names of the model's arguments; None for a
            model that reads windows of text.
    """

    model: nn.Module
    adapter: Adapter
    masks: Mapping[str, Tensor]
    options: RecoverOptions
    teacher: Teacher | None = None
    sample: Sample | None = None

    def linears(self) -> list[str]:
        """The full names of the `torch.nn.Linear` modules whose weights can be pruned."""
        paths = []
        for name, block in self.adapter.blocks(self.model):
            for site in self.adapter.sites(block):
                path, _, leaf = site.parameter.rpartition(".")
                if leaf == "weight" and isinstance(block.get_submodule(path), nn.Linear):
                    paths.append(f"{name}.{path}")
        return list(dict.fromkeys(paths))


def _nothing() -> None:
    """Do nothing: the weights of the model itself are trained."""


@dataclass(frozen=True)
class Trainable:
    """The module to train, and its loss.

    Attributes:
        module: the model to train; parameters that need gradients are trained. It can be a model of
            peft.
        loss: a function of the module and a batch that returns a scalar; None for the loss that is
            measured on the samples held back: `next_token_loss`, or for a model that does not read
            windows of text the divergence from the dense model. The batch has ``input_ids``
            (samples, seqlen) or ``groups``, a list of the inputs of samples of equal shapes by the
            names of the model's arguments; and ``row`` (samples,), the indices of the samples in
            the training text, in no order if there are groups.
        merge: called after the training, to write the trained weights to the given model.
        undo: called in place of ``merge`` if the training fails, after the caller has restored the
            values of all trained parameters.
        save: writes the trained adapter to a directory, in the format of peft; None if there is no
            adapter. It is called before ``merge``, for the option ``save_adapter``.
        masked: True if trained parameters have zeros, which are then kept by masked gradients.
    """

    module: nn.Module
    loss: Loss | None = None
    merge: Callable[[], Any] = field(default=_nothing)
    undo: Callable[[], Any] = field(default=_nothing)
    save: Callable[[Path], Any] | None = None
    masked: bool = False


class Recovery(Protocol):
    """A function that chooses what is trained; the target of `apt.hookspecs.RecoverySpec`.

    APT trains: a recovery needs no optimizer, learning rate, batches, measurements, stopping rule
    or state on disk. After the training, the zeros of the masks are counted. A recovery that
    filled zeros is refused.
    """

    def __call__(self, given: Unrecovered, /) -> Trainable:
        """Choose what is trained, and prepare the model for it.

        Args:
            given: the pruned model and its masks.

        Returns:
            The module to train. Its parameters that need gradients are trained.

        Raises:
            AptError: the kind is not usable for this model.
        """


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Require gradients of ``parameters`` only."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
