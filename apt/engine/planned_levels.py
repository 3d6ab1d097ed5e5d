"""The plan of a dry run with the sparsities that its allocation chooses."""

from contextlib import AbstractContextManager, nullcontext

from apt.checkpoints.load import load
from apt.checkpoints.offload import StoredBlocks, assemble
from apt.checkpoints.stored import open_stored
from apt.compute import compute_dtype
from apt.distributed.ranks import Ranks
from apt.engine.disk_blocks import DiskBlocks
from apt.engine.prune_model import final_plan, with_own_text
from apt.engine.prune_task import PruneTask
from apt.engine.store import ModelStore
from apt.events import Status
from apt.planning.plan import Plan


def planned_levels(task: PruneTask, status: Status) -> Plan:
    """The plan of a run; for an allocation, the text and the model are read as in the run."""
    if task.job.allocation is None:
        return task.job.plan
    status("reading text")
    text, store = task.read_text(Ranks()), ModelStore(status=status)
    status("opening the model", "loading the model")
    with (_open_on_disk if task.stream else _load)(task, store):
        text = with_own_text(store, text, task.job)
    return final_plan(store, text, task.job)


def _load(task: PruneTask, store: ModelStore) -> AbstractContextManager[None]:
    """Load the model; return a context in which it can run."""
    dtype, compute = task.dtype or task.skeleton.dtype, task.options.compute
    store.model = load(task.skeleton, dtype, task.device, compute).module
    return nullcontext()


def _open_on_disk(task: PruneTask, store: ModelStore) -> AbstractContextManager[None]:
    """Load the weights outside the blocks; return a context in which the model can run."""
    stored = open_stored(task.skeleton)
    parts = (stored.shards, stored.layout)
    own = stored.dtype(task.skeleton, task.plan)
    dtype = compute_dtype(own, task.device, task.options.compute)
    store.model = assemble(task.skeleton, *parts, task.device, dtype)
    blocks = dict(task.skeleton.adapter.blocks(store.model))
    source = StoredBlocks(*parts, blocks, task.device, cast=True)
    both = (source, source)
    store.blocks = DiskBlocks(task.job.plan, *both, task.device, store.journal, store.ranks)
    return source.read_on_call()
