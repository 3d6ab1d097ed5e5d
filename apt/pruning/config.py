"""How a run goes about its blocks: error-aware or strictly layer-wise, in order, tuned or not."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from apt.calibration.targets import Targets
from apt.plugin.specs import MethodSpec
from apt.solver import Effort, SolverOptions
from apt.solver.gram import DAMPING
from apt.text.random_tokens import Replaced
from apt.tuning.reconstruct import Reconstruction
from apt.tuning.row_importance import Importance

DAMPING_ERROR_AWARE = 0.05
TUNED_TOKENS = 3 * 2**12
RECONSTRUCTION: dict[Effort, Reconstruction | None] = {
    "fast": None,
    "default": Reconstruction(rate=0.05, epochs=1, tokens=TUNED_TOKENS),
    "best": Reconstruction(),
}
"""How the blocks of an error-aware run are tuned, by effort; by default at a cost that does not
grow with the tokens."""

REPLACED: dict[Effort, Replaced] = {"default": Replaced()}
"""Samples with random tokens in place of some, beside those given to an error-aware run, by effort.
With ``best`` the model writes text, which does more; with ``fast`` they would cost too much."""

SELF_CALIBRATION: dict[Effort, float] = {"best": 0.25}
"""Samples that the model writes for each that is given, in an error-aware run, by effort."""


"""Of the mean diagonal; beyond it the Gram matrix counts for nothing, and fp32 overflows."""


@dataclass(frozen=True)
class Mode:
    """What `apt.pruning.pipeline.prune_blocks` takes beside the method."""

    options: SolverOptions
    targets: Targets | None
    importance: Importance | None
    reconstruction: Reconstruction | None
    replaced: Replaced | None
    ordered: bool

    def sparing(self, special: Sequence[int]) -> "Mode":
        """The same, but that no token drawn at random is one of ``special``."""
        if self.replaced is None:
            return self
        return replace(self, replaced=replace(self.replaced, special=tuple(special)))

    def record(self) -> dict[str, Any]:
        """Plain values, for the report."""
        return {
            "targets": vars(self.targets) if self.targets else None,
            "importance": vars(self.importance) if self.importance else None,
            "reconstruction": vars(self.reconstruction) if self.reconstruction else None,
            "replaced": vars(self.replaced) if self.replaced else None,
            "ordered": self.ordered,
            **asdict(self.options),
        }


def choose_mode(
    method: MethodSpec,
    options: SolverOptions,
    error_aware: bool | None = None,
    ordered: bool | None = None,
) -> Mode:
    """The mode where something is left to choose (None).

    A run is error-aware where the method declares it, and goes in order where it is error-aware;
    an error-aware run of a method with efforts tunes its blocks as well, but for the least effort,
    and by default takes samples beside those given in which tokens are replaced.
    An error-aware run damps more: it is after text of any kind, a strictly layer-wise one after the
    least layer error.
    """
    aware = method.error_aware if error_aware is None else error_aware
    effort = options.effort if aware and method.efforts else None
    if options.damping is None:
        options = replace(options, damping=DAMPING_ERROR_AWARE if aware else DAMPING)
    return Mode(
        options,
        Targets() if aware else None,
        Importance() if aware else None,
        RECONSTRUCTION.get(effort) if effort else None,
        REPLACED.get(effort) if effort else None,
        aware if ordered is None else ordered,
    )


def choose_own_samples(method: MethodSpec, mode: Mode, samples: int) -> int:
    """How many samples the model writes beside those that are given, where it is not said."""
    aware = mode.targets is not None and method.efforts
    share = SELF_CALIBRATION.get(mode.options.effort, 0.0) if aware else 0.0
    return math.ceil(share * samples)
