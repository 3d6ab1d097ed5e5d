"""APT: one-shot post-training pruning of transformers.

`run` does what a command does, with the options `PruneRun`, `ShrinkRun`, `RecoverRun` or
`ReapplyRun`. `prune` prunes a model in memory, and `prune_copy` prunes a copy of it. `shrink` makes
a smaller model, and `recover` trains what is kept. With `keep_zeros`, or the callback `KeepZeros`
of transformers' Trainer, other code trains a pruned model, and every zero stays. The calibration
tokens come from `calibration_tokens` or `own_text`; `perplexity` and `accuracy` measure a model on
`evaluation_tokens`. `PruneOptions`, `ShrinkOptions` and `RecoverOptions` have the options. With
`Ranks` several processes prune one model together. `apt.solver` works on plain tensors,
`apt.adapter`, `apt.extending` and `apt.hookspecs` are for plugins, and `apt.testing` checks
adapters. Importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apt.errors import AptError

if TYPE_CHECKING:
    from apt.adapter.samples import Samples
    from apt.distributed.ranks import Ranks
    from apt.engine.api import (
        calibration_tokens,
        evaluation_tokens,
        prune,
        prune_copy,
        recover,
        shrink,
    )
    from apt.engine.keep_zeros import KeepZeros, keep_zeros
    from apt.engine.run import run
    from apt.evaluation.metrics import accuracy, perplexity
    from apt.options import (
        FitRun,
        PruneOptions,
        PruneRun,
        ReapplyRun,
        RecoverOptions,
        RecoverRun,
        ShrinkOptions,
        ShrinkRun,
    )
    from apt.output.report import Report
    from apt.planning.plan import Selection
    from apt.text.self_generated import own_text

__all__ = [
    "AptError", "FitRun", "KeepZeros", "PruneOptions", "PruneRun", "Ranks", "ReapplyRun",
    "RecoverOptions", "RecoverRun", "Report", "Samples", "Selection", "ShrinkOptions", "ShrinkRun",
    "__version__", "accuracy", "calibration_tokens", "evaluation_tokens", "keep_zeros", "own_text",
    "perplexity", "prune", "prune_copy", "recover", "run", "shrink",
]  # fmt: skip
__version__ = "0.1.0"
_LAZY = {
    **dict.fromkeys(("PruneOptions", "RecoverOptions", "ShrinkOptions"), "apt.options"),
    **dict.fromkeys(("FitRun", "PruneRun", "ReapplyRun", "RecoverRun", "ShrinkRun"), "apt.options"),
    **dict.fromkeys(("calibration_tokens", "evaluation_tokens"), "apt.engine.api"),
    **dict.fromkeys(("prune", "prune_copy", "recover", "shrink"), "apt.engine.api"),
    **dict.fromkeys(("KeepZeros", "keep_zeros"), "apt.engine.keep_zeros"),
    **dict.fromkeys(("accuracy", "perplexity"), "apt.evaluation.metrics"),
    "Ranks": "apt.distributed.ranks",
    "Report": "apt.output.report",
    "Samples": "apt.adapter.samples",
    "Selection": "apt.planning.plan",
    "own_text": "apt.text.self_generated",
    "run": "apt.engine.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562): most of them need torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'apt' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name)
