"""Recovery of a pruned model in memory, from a program."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.calibration.batches import check_shape
from apt.checkpoints.load import fingerprint
from apt.checkpoints.masks import masks_of, sparsity_of
from apt.engine.api import find_adapter
from apt.errors import AptError, name_of
from apt.events import TrainingObserver
from apt.files.writing import write_file
from apt.output.report import differences
from apt.plugin.registry import registry
from apt.plugin.specs import RecoverySpec
from apt.recovery.law import EnoughTokens
from apt.recovery.options import RecoverOptions
from apt.recovery.record import Training
from apt.recovery.recover import Job, recover_model
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
        memory = _Memory(place, setting, resume=resume)
        job = Job(
            instance,
            spec,
            made,
            options,
            place,
            opened,
            seed,
            str(device),
            resume,
            rules=(EnoughTokens(),) if options.tokens == "auto" else (),
            remember=memory.remember,
            observe=observe,
        )
        training, _ = recover_model(model, tokens, job)
    return training


class _Memory:
    """What a training in a folder has to remember if it is resumed, in a file.

    Args:
        folder: the folder; it is made if it is missing. Without ``resume``, an earlier training in
            it is deleted.
        setting: what the training depends on, as values for JSON.
        resume: True to continue the training that is in the folder.

    Raises:
        AptError: the folder has a training with another setting.
    """

    def __init__(self, folder: Path, setting: dict[str, Any], *, resume: bool) -> None:
        self._path = folder / "training.json"
        setting = json.loads(json.dumps(setting))
        folder.mkdir(parents=True, exist_ok=True)
        if resume and self._path.is_file():
            self._known = json.loads(self._path.read_text(encoding="utf-8"))
            if other := sorted(differences(self._known["setting"], setting)):
                raise AptError(
                    f"{folder} has another training: {', '.join(other)} differ",
                    "choose another folder, or begin anew with resume=False",
                )
            return
        for name in ("steps", "dense", "dense.partial"):
            shutil.rmtree(folder / name, ignore_errors=True)
        self._known = {"setting": setting}
        self._write()

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result of ``compute``, or the one that was remembered by the same key."""
        if key not in self._known:
            self._known[key] = compute()
            self._write()
        return self._known[key]

    def _write(self) -> None:
        write_file(self._path, json.dumps(self._known), overwrite=True)


def _kind(kind: str | Recovery) -> tuple[RecoverySpec, Recovery]:
    """A kind of recovery and its spec."""
    if isinstance(kind, str):
        spec = registry().recoveries.get(kind)
        return spec, spec.load()
    name = name_of("kind", kind)
    return RecoverySpec(name, "a function of the caller", ""), kind
