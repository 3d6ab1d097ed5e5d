"""The time of a decoding step on this processor, by the levels of a model's matrices.

Decoding is measured with one sequence, after a prompt. The models have random weights: the time
depends on the shapes, the dtype and the zeros alone. Three things are measured:

1. a step with dense matrices, and one with the fastest level of each matrix;
2. the products of one vector, for each shape at each level (`apt.packing.times`).

The time of a step is then ``rest + factor · Σ product``, with the rest and the factor of the two
measured steps.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from apt.checkpoints.opened import Opened
from apt.checkpoints.skeletons import skeleton_module, with_random_weights
from apt.errors import AptError
from apt.evaluation.generation import prompts, token_times
from apt.fit.levels import FileForm, Level
from apt.fit.table import LossTable, MeasuredLevel
from apt.packing.times import (
    MatrixKind,
    PackedKind,
    ProductTimes,
    clock,
    packed_linear,
    product_times,
)
from apt.patterns import IntegerGrid
from apt.runtime.decoding import decode_by_kernels, is_decoded_by_kernels
from apt.runtime.dense import use_kernels
from apt.text.self_generated import writes

PROMPT = 512
"""The tokens before the measured steps."""

_STEPS = (16, 128)  # the least and the largest number of measured steps
_SECONDS = 10.0  # the time of the measured steps, between these numbers of steps
_WARM_UP = 9  # tokens
_SEED = 0


@dataclass(frozen=True)
class Pace:
    """The time of a decoding step in nanoseconds, by the levels of the matrices.

    Attributes:
        skeleton: the model, without weights.
        dtype: the dtype of its dense weights.
        form: the levels of the matrices.
        kinds: the kind of each matrix, by the name of its parameter.
        times: the times of products.
        dense, fastest: the measured times of a step with dense matrices, and with the fastest
            levels.
        factor: the factor of the times of products.
        rest: the time of everything else.
    """

    skeleton: Opened
    dtype: torch.dtype
    form: FileForm
    kinds: Mapping[str, MatrixKind]
    times: ProductTimes
    dense: float
    fastest: float
    factor: float
    rest: float

    def table(self, losses: LossTable) -> LossTable:
        """A table of losses with nanoseconds in place of bytes."""

        def price(name: str, measured: MeasuredLevel) -> int:
            level = self.form.level(name, measured.name)
            product = _product_time(self.times, self.kinds[name], level, measured.zeros)
            return max(0, round(self.factor * product))

        return losses.priced(price, round(self.rest))

    def measured(self, losses: LossTable, choice: Mapping[str, str]) -> float:
        """The time of a step of a model with a level for each matrix.

        The packed matrices have the shares of zeros of the table.
        """
        kinds = dict[str, PackedKind]()
        for name, level_name in choice.items():
            level, zeros = self.form.level(name, level_name), losses.level(name, level_name).zeros
            if level.form is not None:
                kinds[name] = PackedKind(_grid(level), max(zeros, _removed(level)))
        model = _random_model(self.skeleton, self.dtype)
        return 1e9 * step_seconds(_packed(model, kinds), self.skeleton)


def measured_pace(skeleton: Opened, form: FileForm, dtype: torch.dtype) -> Pace:
    """Measure the times of a model's products, and of its decoding steps.

    Raises:
        AptError: it cannot generate text, or it has stacked experts.
    """
    name = skeleton.source.reference
    if not writes(skeleton.module):
        message = f"{type(skeleton.module).__name__} of {name} cannot generate text"
        raise AptError(message, "it has no speed of decoding: give a size", ("speed", "size"))
    modules = {n: _module(skeleton.module, n) for n in form.levels}
    if stacked := [n for n, module in modules.items() if not isinstance(module, nn.Linear)]:
        message = f"{stacked[0]} of {name} is no Linear module, so that no speed is predicted"
        raise AptError(message, "give a size", ("speed", "size"))
    model = _random_model(skeleton, dtype)
    dense = 1e9 * step_seconds(model, skeleton)
    called = {
        f"{block_name}."
        for block_name, block in skeleton.adapter.blocks(model)
        if is_decoded_by_kernels(block)
    }
    kinds = {
        n: MatrixKind(m.out_features, m.in_features, n.startswith(tuple(called)))
        for n, m in modules.items()
        if isinstance(m, nn.Linear)
    }
    every = (level for levels in form.levels.values() for level in levels)
    packed = {PackedKind(_grid(level), _removed(level)) for level in every if level.form}
    times = product_times(Counter(kinds.values()), list(packed), dtype)
    best = {
        n: min(levels, key=lambda level: _product_time(times, kinds[n], level))
        for n, levels in form.levels.items()
    }
    changed = {n: PackedKind(_grid(x), _removed(x)) for n, x in best.items() if x.form is not None}
    fastest = 1e9 * step_seconds(_packed(model, changed), skeleton) if changed else dense
    before = sum(times.dense[kind] for kind in kinds.values())
    after = sum(_product_time(times, kinds[n], level) for n, level in best.items())
    factor = (dense - fastest) / (before - after) if changed and fastest < dense else 1.0
    return Pace(
        skeleton, dtype, form, kinds, times, dense, min(fastest, dense), factor,
        dense - factor * before,
    )  # fmt: skip


def step_seconds(model: Any, skeleton: Opened) -> float:
    """The median seconds of a decoding step of one sequence, after `PROMPT` tokens.

    Args:
        model: a model in memory.
        skeleton: the model of whose family it is.
    """
    positions = skeleton.adapter.positions(skeleton.config) or PROMPT + _STEPS[1]
    with skeleton.adapter.running(model):
        first = _steps(token_times(model, prompts(model, 1, 1, _SEED), _WARM_UP, clock))
        least, most = _STEPS
        count = int(min(max(_SECONDS / first, least), most, positions - 1))
        length = max(1, min(PROMPT, positions - count))
        return _steps(token_times(model, prompts(model, 1, length, _SEED), count, clock))


def _steps(times: list[float]) -> float:
    """The median step between tokens; the first token belongs to the prompt."""
    return median(later - earlier for earlier, later in pairwise(times))


def _random_model(skeleton: Opened, dtype: torch.dtype) -> Any:
    """The model with dense random weights, as the packed format is loaded."""
    trust = skeleton.source.trust_remote_code
    model: Any = skeleton_module(skeleton.config, dtype, trust_remote_code=trust)
    model = with_random_weights(model, "cpu").eval().requires_grad_(False)
    model.tie_weights()
    use_kernels(model)
    decode_by_kernels(model)
    return model


def _packed(model: nn.Module, kinds: Mapping[str, PackedKind]) -> nn.Module:
    """A model with packed matrices, changed in place; equal ones are copies of each other."""
    first = dict[Any, nn.Module]()
    for name, kind in kinds.items():
        path, module = name.removesuffix(".weight"), _module(model, name)
        assert isinstance(module, nn.Linear)
        key = (module.weight.shape, module.bias is None, kind.grid, round(kind.zeros, 2))
        if key not in first:
            first[key] = packed_linear(module, kind)
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, copy.deepcopy(first[key]))
    return model


def _module(model: nn.Module, name: str) -> nn.Module:
    """The module of a weight."""
    return model.get_submodule(name.rpartition(".")[0])


def _product_time(
    times: ProductTimes, kind: MatrixKind, level: Level, zeros: float | None = None
) -> float:
    """The nanoseconds of a product at a level.

    Args:
        zeros: the share of zeros; None for those of the level without those of a rounding.
    """
    if level.form is None:
        return times.dense[kind]
    return times.packed_time(kind, _grid(level), _removed(level) if zeros is None else zeros)


def _grid(level: Level) -> IntegerGrid | None:
    assert level.grid is None or isinstance(level.grid, IntegerGrid)
    return level.grid


def _removed(level: Level) -> float:
    """The share of zeros of the pattern."""
    return 0.0 if level.pattern is None else level.pattern.sparsity
