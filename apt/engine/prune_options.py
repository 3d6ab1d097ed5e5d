"""The options of pruning and all of their defaults.

The command line, programs and the benchmarks set the fields of `PruneOptions`. From them and from
the method follow a `Recipe` for the loop over blocks and an `Augmentation` of the calibration text.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from apt.calibration.targets import Targets
from apt.engine.limits import check_prune_options
from apt.errors import AptError
from apt.plugin.specs import MethodSpec, ShrinkMethodSpec
from apt.pruning.layer import Recipe
from apt.solver import Effort, IntegerGrid, SolverOptions
from apt.solver.gram import DAMPING
from apt.solver.integers import ScaleGroup
from apt.text.augmentation import Augmentation, RandomTokens
from apt.tuning.block_tuning import BlockTuning
from apt.tuning.row_importance import RowImportance

DAMPING_ERROR_AWARE = 0.05
T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """The defaults of an effort, in an error-aware run of a method with a mask search.

    Attributes:
        tuning_epochs, tuning_rate, tuning_tokens: see `PruneOptions`.
        random_tokens: see `PruneOptions`.
        own_samples: the number of generated samples for each given sample.
    """

    tuning_epochs: int
    tuning_rate: float
    tuning_tokens: int
    random_tokens: float
    own_samples: float


PRESETS: dict[Effort, Preset] = {
    "fast": Preset(0, 0.0, 0, random_tokens=0.0, own_samples=0.0),
    "default": Preset(1, 0.05, 3 * 2**12, random_tokens=0.25, own_samples=0.0),
    "best": Preset(8, 0.025, 0, random_tokens=0.0, own_samples=0.25),
}
"""The presets by effort. The cost of the tuning of ``default`` does not grow with the number of
tokens. Own samples improve the result more than random tokens do, but cost more."""


@dataclass(frozen=True)
class PruneOptions:
    """The options that the pruned weights depend on, beside model, tokens, pattern and method.

    ``None`` means the default, which depends on the effort or on the method. Each option can be set
    separately, for instance for an ablation.

    Args:
        effort: a preset, ``"fast"``, ``"default"`` or ``"best"``: the length of the mask search,
            and the defaults of tuning, random tokens and own samples. Only methods with a mask
            search use it.
        error_aware: True if each site compensates a part of the error of the sites before it
            (methods.md, "The target"). The default depends on the method. If False, pruning is
            strictly layer-wise, and ``alpha``, ``beta``, ``row_importance`` and tuning are off.
        alpha: α, the share of the error of its own inputs that a site compensates. Default 0.25,
            and 0 for `apt.shrink`.
        beta: β, the share of the drift of the residual stream that a site which writes to this
            stream compensates. Default 0.25, and 0 for `apt.shrink`.
        row_importance: the exponent p by which rows that are more important to the block keep more
            weights (methods.md, "Row importance"); 0 turns it off. Default 0.35.
        ordered: True to solve the sites of a block in their order of execution, each on the inputs
            that the pruned sites before it give (GPTQ calls this "true-sequential"). Default True
            if the run is error-aware, else False.
        tuning_epochs: the passes of block tuning (methods.md, "Block tuning"; after EBFT, arXiv
            2402.12419) over its tokens; 0 turns it off. Default 0, 1, 8 by effort.
        tuning_rate: the first learning rate of the tuning, as a share of the root mean square of a
            weight. 0.05 for ``default``, 0.025 for ``best``, and 0.03 for `apt.shrink`.
        tuning_tokens: the approximate number of calibration tokens for the tuning; 0 uses all.
            12,288 for ``default``, 0 for ``best``.
        random_tokens: the number of copies with random tokens for each given sample
            (methods.md, "Random tokens"); 0 turns them off. 0.25 for ``default``, and for the
            default choice of `apt.shrink`, else 0.
        own_samples: the number of samples that the model generates (see `apt.own_text`; after
            arXiv 2410.17170). A fourth of the given samples for ``best``, else 0.
        damping: λ as a share of the mean of the Gram matrix's diagonal (SparseGPT calls this
            "percdamp"). Default 0.05 if error-aware, else 0.01.
        block_size: the columns of one joint compensation, for methods that use it; None uses all.
        quantize: ``"int8"`` or ``"int4"`` rounds the kept weights to integers times a scale, after
            the tuning of their block, so that later roundings and later blocks make up for the
            error. The result is a plain checkpoint; ``apt-prune pack`` stores the integers.
        group: the number of columns that share a scale, or ``"row"`` for all columns.
    """

    effort: Effort = "default"
    error_aware: bool | None = None
    alpha: float | None = None
    beta: float | None = None
    row_importance: float | None = None
    ordered: bool | None = None
    tuning_epochs: int | None = None
    tuning_rate: float | None = None
    tuning_tokens: int | None = None
    random_tokens: float | None = None
    own_samples: int | None = None
    damping: float | None = None
    block_size: int | None = None
    quantize: str | None = None
    group: ScaleGroup = IntegerGrid.group

    def check(self) -> None:
        """Raise `AptError` if a value is out of range."""
        check_prune_options(vars(self))

    def recipe(self, method: MethodSpec) -> Recipe:
        """The settings for pruning blocks with a method, with all defaults filled in.

        Raises:
            AptError: an option is out of range, or needs an error-aware run and this is not one.
        """
        self.check()
        if self.quantize and isinstance(method, ShrinkMethodSpec):
            raise AptError(
                "a smaller dense model is not quantised here",
                "quantise the result with the tool of your runtime",
                ("quantize",),
            )
        aware = self.is_aware(method)
        if not aware:
            self._check_layer_wise()
        damping = _or(self.damping, DAMPING_ERROR_AWARE if aware else DAMPING)
        return Recipe(
            SolverOptions(damping=damping, effort=self.effort, block_size=self.block_size),
            self._targets(method) if aware else None,
            self._row_importance() if aware else None,
            self._tuning(method),
            _or(self.ordered, aware),
            IntegerGrid(int(self.quantize[3:]), self.group) if self.quantize else None,
        )

    def augmentation(self, method: MethodSpec, samples: int) -> Augmentation:
        """The augmentation of ``samples`` calibration samples."""
        preset = self._preset(method)
        copies = _or(self.random_tokens, preset.random_tokens)
        if self.random_tokens is None and isinstance(method, ShrinkMethodSpec):
            copies = max(copies, method.random_tokens)
        return Augmentation(
            _or(self.own_samples, math.ceil(preset.own_samples * samples)),
            RandomTokens(copies=copies) if copies else None,
        )

    def is_aware(self, method: MethodSpec) -> bool:
        """True if a run of ``method`` is error-aware."""
        return _or(self.error_aware, method.error_aware)

    def _preset(self, method: MethodSpec) -> Preset:
        return PRESETS[self.effort if self.is_aware(method) and method.efforts else "fast"]

    def _check_layer_wise(self) -> None:
        for name in ("alpha", "beta", "row_importance", "tuning_epochs"):
            if getattr(self, name):
                raise AptError(
                    f"{name} has no effect in a layer-wise run",
                    "leave it out, or make the run error-aware",
                    (name, "error_aware"),
                )

    def _targets(self, method: MethodSpec) -> Targets:
        base = Targets(0, 0) if isinstance(method, ShrinkMethodSpec) else Targets()
        return Targets(_or(self.alpha, base.alpha), _or(self.beta, base.beta))

    def _row_importance(self) -> RowImportance | None:
        base = RowImportance()
        power = _or(self.row_importance, base.power)
        return replace(base, power=power) if power else None

    def _tuning(self, method: MethodSpec) -> BlockTuning | None:
        preset = self._preset(method)
        if not (epochs := _or(self.tuning_epochs, preset.tuning_epochs)):
            return None
        usual = preset if preset.tuning_epochs else PRESETS["default"]
        if isinstance(method, ShrinkMethodSpec):
            usual = replace(usual, tuning_rate=method.tuning_rate)
        return BlockTuning(
            rate=_or(self.tuning_rate, usual.tuning_rate),
            epochs=epochs,
            tokens=_or(self.tuning_tokens, usual.tuning_tokens) or None,
        )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def record(recipe: Recipe, augmentation: Augmentation) -> dict[str, Any]:
    """The options of a run with all defaults filled in, by their names in `PruneOptions`."""
    targets, tuned = recipe.targets, recipe.tuning
    random = augmentation.random_tokens
    return {
        "effort": recipe.solver.effort,
        "error_aware": targets is not None,
        "alpha": targets.alpha if targets else 0.0,
        "beta": targets.beta if targets else 0.0,
        "row_importance": recipe.row_importance.power if recipe.row_importance else 0.0,
        "ordered": recipe.ordered,
        "tuning_epochs": tuned.epochs if tuned else 0,
        "tuning_rate": tuned.rate if tuned else 0.0,
        "tuning_tokens": (tuned.tokens or 0) if tuned else 0,
        "random_tokens": random.copies if random else 0.0,
        "own_samples": augmentation.own_samples,
        "damping": recipe.solver.damping,
        "block_size": recipe.solver.block_size,
        "quantize": f"int{recipe.integers.bits}" if recipe.integers else None,
        "group": recipe.integers.group if recipe.integers else IntegerGrid.group,
    }
