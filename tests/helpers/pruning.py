"""The loop over blocks on a model in memory."""

from apt.events import SitePruned
from apt.pruning import pipeline
from apt.pruning.block_store import BlockStore
from apt.pruning.layer import BlockPruning, Recipe


def prune_blocks(
    model, adapter, plan, tokens, method, recipe=None, *, store=None, observe=lambda event: None
):
    """Prune a model in place, layer-wise by default; the records of its sites.

    Args:
        store: the store of the activations; by default in memory.
    """
    blocks = BlockStore(model, observe=observe)
    blocks.activations = store or blocks.activations
    job = BlockPruning(adapter, plan, method, recipe or Recipe())
    done = pipeline.prune_blocks(blocks, job, tokens)
    return [record for record in done if isinstance(record, SitePruned)]
