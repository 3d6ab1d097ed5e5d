"""The settings of the loop over blocks, from the options of pruning and their defaults."""

import math
from dataclasses import replace
from typing import Any, TypeVar

from apt.calibration.targets import Targets
from apt.checkpoints.opened import Opened
from apt.errors import AptError
from apt.options import (
    DAMPING,
    DAMPING_ERROR_AWARE,
    DRIFT_CORRECTION,
    INPUT_CORRECTION,
    PRESETS,
    ROW_IMPORTANCE,
    SHRINK_TUNING_RATE,
    Preset,
    PruneOptions,
    PruneRun,
    SampleOptions,
    ShrinkRun,
    SolveOptions,
)
from apt.options.prune import QUANTISE_AFTER
from apt.patterns import Grid, IntegerGrid
from apt.plugin.specs import MethodSpec, ShrinkMethodSpec
from apt.pruning.layer import Recipe
from apt.recovery.norm_tuning import NormTuning
from apt.solver import SolverOptions
from apt.text.augmentation import Augmentation, RandomTokens
from apt.text.self_generated import writes
from apt.tuning.block_tuning import BlockTuning
from apt.tuning.row_importance import RowImportance

_OWN_TOKENS = 2**13  # of own text, with the default effort

T = TypeVar("T")
P = TypeVar("P", bound=SolveOptions)


def recipe_of(options: SolveOptions, method: MethodSpec) -> Recipe:
    """The settings for pruning blocks with a method.

    Raises:
        AptError: an option needs an error-aware run, and the run is layer-wise.
    """
    sparse = options if isinstance(options, PruneOptions) else PruneOptions()
    if sparse.quantize and isinstance(method, ShrinkMethodSpec):
        raise AptError(
            "a smaller dense model is not quantised in the same run", QUANTISE_AFTER, ("quantize",)
        )
    aware, tuning = is_aware(options, method), tuning_of(options, method)
    options.check_needed({"error_aware": aware, "tuning_epochs": tuning and tuning.epochs})
    damping = _or_default(options.damping, DAMPING_ERROR_AWARE if aware else DAMPING)
    power = _or_default(sparse.row_importance, ROW_IMPORTANCE) if aware else 0.0
    return Recipe(
        SolverOptions(damping=damping, effort=options.effort, block_size=sparse.block_size),
        _targets(options, method) if aware else None,
        RowImportance(power) if power else None,
        tuning,
        _or_default(
            sparse.permute,
            aware and method.error_aware and not isinstance(method, ShrinkMethodSpec),
        ),
        _or_default(options.ordered, aware),
        compute=options.compute if aware else "float32",  # published methods run in full precision
    )


def for_samples(options: P, method: MethodSpec) -> P:
    """The options with the defaults for models that do not read windows of text.

    They are small, and their samples are short, so that tuning uses all of them. The values were
    chosen on MiniLM at 2:4, on text that no table reports.
    """
    if not (is_aware(options, method) and method.efforts and options.effort == "default"):
        return options
    defaults = {
        "input_correction": 0.5, "drift_correction": 0.75, "tuning_epochs": 4, "tuning_tokens": 0,
    }  # fmt: skip
    given = {name: getattr(options, name) for name in defaults}
    return replace(options, **{n: _or_default(given[n], value) for n, value in defaults.items()})


def augmentation_of(
    options: SolveOptions, method: MethodSpec, samples: int, seqlen: int, *, generates: bool = False
) -> Augmentation:
    """The augmentation of ``samples`` calibration samples of ``seqlen`` tokens.

    Args:
        generates: False if random tokens are preferred to own text, see `prefers_own_text`.
    """
    preset = _preset(options, method)
    own_samples = math.ceil(preset.own_samples * samples)
    if preset.random_tokens:
        own_samples = min(own_samples, max(1, _OWN_TOKENS // seqlen)) if generates else 0
    own_samples = _or_default(options.own_samples, own_samples)
    copies = _or_default(options.random_tokens, 0.0 if own_samples else preset.random_tokens)
    if options.random_tokens is None and isinstance(method, ShrinkMethodSpec):
        copies = max(copies, method.random_tokens)
    return Augmentation(own_samples, RandomTokens(copies=copies) if copies else None)


def prefers_own_text(run: SampleOptions, opened: Opened) -> bool:
    """True if a run with the default effort generates text in place of random tokens.

    A streamed run reads the whole model for each token of a batch of generated samples.
    """
    in_memory = isinstance(run, PruneRun) and not (run.stream or run.resume)
    return in_memory and opened.reads.windows and writes(opened.module)


def norm_tuning_of(run: PruneRun, method: MethodSpec, opened: Opened) -> NormTuning | None:
    """The training of norms and biases at the end; None for none.

    A run of a given time trains all weights at the end. With ``only``, the user has chosen what
    changes.

    Raises:
        AptError: the model is no decoder of text.
    """
    if run.norm_epochs and not opened.reads.windows:
        message = f"norm epochs has no effect on {type(opened.module).__name__}"
        raise AptError(message, "leave it out: it is for decoders of text", ("norm_epochs",))
    excluded = run.stream or run.resume or run.only or run.minutes is not None
    has_vectors = any(parameter.ndim == 1 for parameter in opened.module.parameters())
    trains = opened.reads.windows and has_vectors and not excluded
    default = _preset(run, method).norm_epochs if trains else 0
    epochs = _or_default(run.norm_epochs, default)
    return NormTuning(epochs) if epochs else None


def additions_of(
    run: PruneRun | ShrinkRun, method: MethodSpec, opened: Opened
) -> tuple[Augmentation, NormTuning | None]:
    """The samples in addition to the given ones, and the training of norms at the end."""
    augmentation = augmentation_of(
        run, method, run.samples, run.seqlen, generates=prefers_own_text(run, opened)
    )
    return augmentation, norm_tuning_of(run, method, opened) if isinstance(run, PruneRun) else None


def is_aware(options: SolveOptions, method: MethodSpec) -> bool:
    """True if a run of ``method`` is error-aware."""
    return _or_default(options.error_aware, method.error_aware)


def grid_of(options: PruneOptions) -> IntegerGrid | None:
    """The grid that the kept weights are rounded to; None for no rounding."""
    kind = options.quantize
    return IntegerGrid(int(kind.removeprefix("int")), options.scale_group) if kind else None


def record(recipe: Recipe, augmentation: Augmentation, grid: Grid | None) -> dict[str, Any]:
    """The options of a run with all defaults filled in, by their names in reports."""
    targets, tuning = recipe.targets, recipe.tuning
    random_tokens = augmentation.random_tokens
    integers = grid if isinstance(grid, IntegerGrid) else None
    return {
        "effort": recipe.solver.effort,
        "error_aware": targets is not None,
        "alpha": targets.alpha if targets else 0.0,
        "beta": targets.beta if targets else 0.0,
        "row_importance": recipe.row_importance.power if recipe.row_importance else 0.0,
        "permute": recipe.permute,
        "ordered": recipe.ordered,
        "tuning_epochs": tuning.epochs if tuning else 0,
        "tuning_rate": tuning.rate if tuning else 0.0,
        "tuning_tokens": (tuning.tokens or 0) if tuning else 0,
        "random_tokens": random_tokens.copies if random_tokens else 0.0,
        "own_samples": augmentation.own_samples,
        "damping": recipe.solver.damping,
        "block_size": recipe.solver.block_size,
        "quantize": integers.name if integers else None,
        "group": integers.group if integers else PruneOptions.scale_group,
    }


def _preset(options: SolveOptions, method: MethodSpec) -> Preset:
    searches = is_aware(options, method) and method.efforts
    return PRESETS[options.effort if searches else "fast"]


def _targets(options: SolveOptions, method: MethodSpec) -> Targets:
    sparse = not isinstance(method, ShrinkMethodSpec)
    defaults = (INPUT_CORRECTION, DRIFT_CORRECTION) if sparse else (0.0, 0.0)
    corrections = options.input_correction, options.drift_correction
    return Targets(*map(_or_default, corrections, defaults))


def tuning_of(options: SolveOptions, method: MethodSpec) -> BlockTuning | None:
    """The block tuning of a run; None for no tuning."""
    preset = _preset(options, method)
    if not (epochs := _or_default(options.tuning_epochs, preset.tuning_epochs)):
        return None
    defaults = preset if preset.tuning_epochs else PRESETS["default"]
    if isinstance(method, ShrinkMethodSpec):
        defaults = replace(
            defaults, tuning_rate=_or_default(method.tuning_rate, SHRINK_TUNING_RATE)
        )
    return BlockTuning(
        rate=_or_default(options.tuning_rate, defaults.tuning_rate),
        epochs=epochs,
        tokens=_or_default(options.tuning_tokens, defaults.tuning_tokens) or None,
    )


def _or_default(value: T | None, default: T) -> T:
    return default if value is None else value
