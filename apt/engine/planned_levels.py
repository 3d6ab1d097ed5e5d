"""The plan of a dry run with the sparsities that its allocation chooses."""

from collections.abc import Callable

from apt.distributed.ranks import Ranks
from apt.engine.in_memory import InMemory
from apt.engine.prune_model import final_plan, with_own_text
from apt.engine.prune_task import PruneTask
from apt.engine.streamed import Streamed
from apt.planning.plan import Plan


def planned_levels(task: PruneTask, status: Callable[[str], None]) -> Plan:
    """The plan of a run; for an allocation, the text and the model are read as in the run."""
    if task.job.allocation is None:
        return task.job.plan
    status("reading text")
    text = task.read_text(Ranks())
    store = (Streamed if task.stream else InMemory)(task, status=status)
    store.read()
    store.begin(text)
    return final_plan(store, with_own_text(store, text.tokens, task.job_on(text)), task.job)
