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

from typing import TYPE_CHECKING

from apt.errors import AptError
from apt.lazy_names import lazy_names

if TYPE_CHECKING:
    from apt.adapter.samples import Samples
    from apt.distributed.ranks import Ranks
    from apt.engine.api import (
        calibration_tokens,
        evaluation_tokens,
        other_tokens,
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
    "__version__", "accuracy", "calibration_tokens", "evaluation_tokens", "keep_zeros",
    "other_tokens", "own_text", "perplexity", "prune", "prune_copy", "recover", "run", "shrink",
]  # fmt: skip
__version__ = "0.1.0"
__getattr__ = lazy_names(__name__, {
    "apt.adapter.samples": ("Samples",),
    "apt.distributed.ranks": ("Ranks",),
    "apt.engine.api": (
        "calibration_tokens", "evaluation_tokens", "other_tokens", "prune", "prune_copy",
        "recover", "shrink",
    ),
    "apt.engine.keep_zeros": ("KeepZeros", "keep_zeros"),
    "apt.engine.run": ("run",),
    "apt.evaluation.metrics": ("accuracy", "perplexity"),
    "apt.options": (
        "FitRun", "PruneOptions", "PruneRun", "ReapplyRun", "RecoverOptions", "RecoverRun",
        "ShrinkOptions", "ShrinkRun",
    ),
    "apt.output.report": ("Report",),
    "apt.planning.plan": ("Selection",),
    "apt.text.self_generated": ("own_text",),
})  # fmt: skip
