"""Recovery of a pruned model in memory, from a program."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.calibration.batches import check_shape
from apt.checkpoints.load import fingerprint
from apt.checkpoints.masks import masks_of, sparsity_of
from apt.engine.api import find_adapter
from apt.errors import AptError, name_of
from apt.events import TrainingObserver
from apt.files.journal import Journal, Line
from apt.plugin.registry import registry
from apt.plugin.specs import RecoverySpec
from apt.recovery.law import EnoughTokens
from apt.recovery.options import RecoverOptions
from apt.recovery.record import Training
from apt.recovery.recover import RecoveryJob, forget, recover_model
from apt.recovery.trainable import Recovery
from apt.text.datasets import digest


def recover(
    model: nn.Module,
    tokens: Tensor,
    *,
    kind: str | Recovery = "distill",
    options: RecoverOptions | None = None,
    dense: nn.Module | None = None,
    adapter: str | Adapter | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    resume: bool = False,
    observe: TrainingObserver = lambda event: None,
) -> Training:
    """Train the kept weights of a pruned model, in place; every zero stays zero.

    Args:
        model: the pruned model, a causal language model of transformers.
        tokens: samples of text (samples, seqlen), without padding. The last ones are held back to
            measure the loss.
        kind: the name of a kind of recovery, or a function, which is trained with a rate of 1e-4.
        options: the options of the training.
        dense: the dense model, for the kind ``distill``; it is not changed.
        adapter: the name of an adapter, or an adapter; by default the one that serves the model's
            type.
        seed: the seed for the order of the samples and for new adapters.
        folder: a folder for checkpoints; by default a temporary one. Without ``resume``, those of
            an earlier training there are deleted.
        resume: True to continue from the last checkpoint in ``folder``, with the same arguments.
        observe: called with the events of the training.

    Returns:
        The record of the training.

    Raises:
        AptError: the model has no zeros and the kind needs some, an option is out of range,
            ``folder`` has another training, or the training did not lower the loss on the samples
            held back. The weights are then those before the training.
    """
    options = options or RecoverOptions()
    options.check()
    check_shape(tokens)
    spec, made = _kind(kind)
    _, instance = find_adapter(adapter, model, registry())
    if spec.zeros and not sparsity_of(masks_of(model, instance)):
        raise AptError("the model has no zeros", "prune it first, or use the kind layers")
    opened: Callable[[], nn.Module] | None = None if dense is None else lambda: dense
    device = next(model.parameters()).device
    setting = {"kind": spec.name, "seed": seed, "options": options.record()}
    setting |= {"model": fingerprint(model), "tokens": digest(tokens)}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) if folder is None else Path(folder)
        job = RecoveryJob(
            instance,
            spec,
            made,
            options,
            place,
            opened,
            seed,
            str(device),
            rules=(EnoughTokens(),) if options.tokens == "auto" else (),
            journal=_journal(place, setting, resume=resume),
            observe=observe,
        )
        training, _ = recover_model(model, tokens, job)
    return training


def _journal(folder: Path, inputs: Line, *, resume: bool) -> Journal:
    """The journal of the training in a folder, which is made if it is missing.

    Without ``resume``, an earlier training in it is deleted.

    Raises:
        AptError: the training to be resumed has other inputs, or is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remedy = "choose another folder, or begin anew with resume=False"
    journal = Journal(folder / "journal.jsonl", f"the training in {folder}", remedy)
    if resume:
        journal.read()
    if journal.lines:
        journal.check(inputs)
        return journal
    if resume and (folder / "training.json").exists():
        raise AptError(f"{folder} has a training of an earlier version of APT", remedy)
    forget(folder)
    journal.begin(inputs)
    return journal


def _kind(kind: str | Recovery) -> tuple[RecoverySpec, Recovery]:
    """A kind of recovery and its spec."""
    if isinstance(kind, str):
        spec = registry().recoveries.get(kind)
        return spec, spec.load()
    name = name_of("kind", kind)
    return RecoverySpec(name, "a function of the caller", ""), kind
