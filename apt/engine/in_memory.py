"""A checkpoint that is read into memory completely."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Samples
from apt.adapter.recording import eval_mode
from apt.checkpoints.copies import copied_size, keep_side_files, save_model
from apt.checkpoints.load import fingerprint, load
from apt.checkpoints.opened import Opened
from apt.checkpoints.smaller import smaller
from apt.checkpoints.stored import Stored, find_stored, local_directory
from apt.compute import ComputeDtype
from apt.distributed.ranks import Ranks
from apt.engine.machine import activation_store
from apt.engine.store import ModelStore
from apt.engine.task import Task, TaskResult
from apt.engine.text import Text
from apt.events import Status
from apt.output.staging import Staging, write_errors
from apt.planning.plan import Plan
from apt.shrinking.same_function import check_same_function


class InMemory(ModelStore):
    """A checkpoint in memory, which is written at the end."""

    def __init__(
        self,
        task: Task,
        ranks: Ranks | None = None,
        observe: Callable[[Any], None] = lambda event: None,
        status: Status = lambda phase, text="": None,
    ) -> None:
        super().__init__(ranks, observe, status)
        self._task, self._dtype = task, task.dtype
        self._stored: Stored | None = None  # if the output can be a modified copy
        if task.dtype is None and task.plan is not None:
            self._stored = find_stored(task.skeleton)
        self.activations = activation_store(getattr(task.options, "activations", "memory"))

    def output_bytes(self) -> int:
        """The bytes of the output."""
        if self._stored is not None:
            return copied_size(self._stored.directory, self._stored.shards)
        skeleton = self._task.skeleton
        dtype = self._dtype or skeleton.dtype
        return sum(p.numel() for p in skeleton.module.parameters()) * dtype.itemsize

    def read(self) -> None:
        """Read the model, and cast it to its compute dtype."""
        self.status("opening the model", "loading the model")
        task, dtypes = self._task, dict[str, torch.dtype]()
        if self._stored is not None:
            self._dtype = self._stored.dtype(task.skeleton, task.plan)
        loaded = load(task.skeleton, self._dtype, task.device)
        self.model = loaded.module
        if self._stored is not None and not _equals_stored(self._stored, loaded):
            self._stored = None
        if self._stored is not None and task.plan is not None and not task.plan.structured:
            dtypes = self._stored.dtypes(task.plan)
        if (compute := getattr(task.options, "compute", None)) is not None:
            self.compute_in(compute, loaded.dtype, task.device, dtypes)

    def begin(self, text: Text, out: Path | None = None, *, resumed: bool = False) -> None:
        """Do nothing: the model is in memory, and a training continues from its checkpoints."""

    def write(self, result: TaskResult, work: Staging, text: Text) -> Path:
        """Save the model, and read the saved model, which is then measured."""
        self.status("writing", "saving and verifying")
        task, plan, written = self._task, result.plan, None
        self.restore()
        if plan is not None and plan.structured:
            self._shrink(plan, text.tokens)
            written = fingerprint(self.model)
        with write_errors(work.name):
            self._save(plan, work.out, text.tokenizer)
        del self.model
        gc.collect()
        self.model = load(task.open(work.out), self._dtype, task.device).module
        if written is not None and fingerprint(self.model) != written:
            raise RuntimeError("the smaller model on disk differs from that in memory")
        return work.out

    def _shrink(self, plan: Plan, tokens: Tensor | Samples) -> None:
        """Replace the model by a smaller model of the same function."""
        adapter, compute = self._task.skeleton.adapter, self.precision.compute
        smaller_model = smaller(self.model, adapter, plan)
        check_same_function(self.model, smaller_model, adapter, plan, tokens, compute)
        self.model, self._stored = smaller_model, None

    def _save(self, plan: Plan | None, directory: Path, tokenizer: Any) -> None:
        """Write the model, if possible as a modified copy of its checkpoint."""
        options, skeleton = self._task.options, self._task.skeleton
        largest = getattr(options, "max_shard_size", None)
        if self._stored is not None and plan is not None:
            replacement = tokenizer if options.tokenizer else None
            self._stored.copy(directory, replacement, largest)
            others = (*self.dense_outer, *self.tuned)
            self._stored.write(self.model, plan, directory, others)
            return
        save_model(self.model, tokenizer, directory, skeleton.checkpoint, largest)
        if not skeleton.source.gguf:
            keep_side_files(local_directory(skeleton), directory)

    def written(self, name: str) -> AbstractContextManager[nn.Module]:
        """A block of the saved model."""
        return nullcontext(dict(self._task.skeleton.adapter.blocks(self.model))[name])

    @contextmanager
    def measurable(self, held_out: Tensor | Samples, when: str) -> Iterator[nn.Module]:
        """While entered, the model ``"before"`` or ``"after"`` can run on these windows."""
        if when == "after":  # the saved model has its stored dtypes
            ComputeDtype(self.model, self.precision.compute)
        with eval_mode(self.model), self._task.skeleton.adapter.running(self.model):
            yield self.model


def _equals_stored(stored: Stored, model: Opened) -> bool:
    """True if the blocks equal the stored tensors, so that the output can be a modified copy."""
    names = [
        f"{name}.{path}"
        for name, block in model.adapter.blocks(model.module)
        for path, _ in block.named_parameters()
    ]
    return stored.equals(model.module, names)
