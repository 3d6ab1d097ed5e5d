"""APT: one-shot post-training pruning of language models.

``apt.prune`` prunes an in-memory model, ``apt.prune_copy`` a copy of it, with ``apt.Ranks`` on
several processes together; ``apt.own_text`` is text to calibrate on that a model writes itself.
`apt.solver` works on plain tensors; the command line is in `apt.cli`.
Importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apt.errors import AptError

if TYPE_CHECKING:
    from apt.distributed.ranks import Ranks
    from apt.runs.api import prune, prune_copy
    from apt.text.self_generated import own_text

__all__ = ["AptError", "Ranks", "__version__", "own_text", "prune", "prune_copy"]
__version__ = "0.1.0"
_LAZY = {
    "prune": "apt.runs.api",
    "prune_copy": "apt.runs.api",
    "Ranks": "apt.distributed.ranks",
    "own_text": "apt.text.self_generated",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'apt' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name)
