"""APT: one-shot post-training pruning of language models.

``apt.prune`` prunes an in-memory model, ``apt.prune_copy`` a copy of it; `apt.solver` works on
plain tensors; the command line is in `apt.cli`. Importing this package does not import torch.
"""

from typing import TYPE_CHECKING, Any

from apt.errors import AptError

if TYPE_CHECKING:
    from apt.api import prune, prune_copy

__all__ = ["AptError", "__version__", "prune", "prune_copy"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for (PEP 562)."""
    if name not in ("prune", "prune_copy"):
        raise AttributeError(f"module 'apt' has no attribute '{name}'")
    from apt import api

    return getattr(api, name)
