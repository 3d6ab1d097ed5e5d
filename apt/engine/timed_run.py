"""Runs of a given time: the effort and the samples that fit, and the training afterwards."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from apt.adapter.text_config import hidden_size
from apt.checkpoints.opened import Opened
from apt.engine.costs import PlannedRun, measure_machine
from apt.engine.prune_model import Pruning
from apt.engine.recover_task import RecoverTask
from apt.engine.samples import read_samples
from apt.locations.model_source import Source
from apt.options import Effort, FitRun, PruneRun, RecoverRun
from apt.plugin.registry import Registry, registry
from apt.plugin.specs import MethodSpec

_PRUNING_SHARE = 0.4  # of the time, at most
_SHORT_SEQLEN = 512  # tokens of a sample if the time is short
_PROBED = 32  # samples whose lengths are read beforehand
_MIN_TOKENS: dict[Effort, int] = {"best": 2**14, "default": 2**14, "fast": 2**12}  # tokens
_MINUTES_PER_CHECK, _MAX_CHECKS = 3, 5  # measurements of the loss
# With few steps, a higher rate than that of `recover` is better.
_RATE, _RATE_WIDTH = 4e-4, 576  # measured on SmolLM2; a wider model needs a lower rate (2203.03466)


def fit_to_time(
    options: PruneRun,
    skeleton: Opened,
    job: Pruning,
    method: MethodSpec,
    device: str,
    notice: Callable[[str], None],
) -> PruneRun:
    """The options with an effort and samples for which a part of the given time is enough.

    Both become smaller, never larger. The default effort becomes ``"fast"`` before there are fewer
    than 16,384 tokens, and no effort has fewer than 4,096. A method without efforts is counted as
    the effort ``"fast"``. Windows of text become shorter first; other samples keep their lengths.
    """
    assert options.minutes is not None
    budget, machine = _PRUNING_SHARE * 60 * options.minutes, measure_machine(device)

    windows = skeleton.reads.windows
    length = options.seqlen if windows else _mean_length(options, skeleton)
    shortest = min(length, _SHORT_SEQLEN) if windows else length

    def seconds(effort: Effort, samples: int, seqlen: int) -> float:
        level: Effort = effort if method.efforts else "fast"
        sized = replace(options, samples=samples, seqlen=seqlen)
        allocated = job.allocation is not None
        return PlannedRun(skeleton, job.plan, sized, allocated=allocated).seconds(level, machine)

    first = replace(options, seqlen=length)
    for effort, samples, seqlen in _choices(first, shortest, efforts=method.efforts):
        if seconds(effort, samples, seqlen) <= budget:
            break
    choice = f"effort {effort}, " if method.efforts else ""
    choice += f"{samples} samples" + f" of {seqlen} tokens" * windows + ", then distillation"
    notice(f"minutes: {options.minutes:g}: {choice}")
    seqlen = seqlen if windows else options.seqlen
    return replace(options, effort=effort, samples=samples, seqlen=seqlen)


def _mean_length(options: PruneRun, skeleton: Opened) -> int:
    """The mean number of positions of the first samples that are not windows of text."""
    count = max(1, min(options.samples, _PROBED))
    text = read_samples(
        options, skeleton, registry(), samples=count, windows=None, measures=False, fewer=True
    )
    return max(1, text.tokens.numel() // len(text.tokens))


def _choices(options: PruneRun, seqlen: int, *, efforts: bool) -> Iterator[tuple[Effort, int, int]]:
    """Efforts, samples and tokens of a sample, from the values of the options to the cheapest.

    Args:
        seqlen: the tokens of a sample if the time is short.
    """
    yield options.effort, options.samples, options.seqlen
    all_tokens = options.samples * options.seqlen
    levels: list[Effort] = [options.effort]
    if efforts and options.effort == "default":
        levels.append("fast")
    for level in levels:
        tokens, min_tokens = all_tokens, _MIN_TOKENS[level if efforts else "fast"]
        while tokens >= min(all_tokens, min_tokens):
            yield level, max(1, tokens // seqlen), seqlen
            tokens //= 2


def training_of(
    options: PruneRun, skeleton: Opened, registry: Registry, device: str
) -> RecoverTask:
    """The distillation after a pruning, in the remaining time."""
    spec, rate = registry.recoveries.get("distill"), None  # other samples: measured on MiniLM
    if skeleton.reads.windows:
        rate = _RATE * min(1.0, _RATE_WIDTH / hidden_size(skeleton.config))
    run = replace(
        _recovery(options, "distill", options.minutes or 0.0),
        rate=rate, max_shard_size=options.max_shard_size,
    )  # fmt: skip
    return RecoverTask(
        options=run, registry=registry, skeleton=skeleton, device=device,
        spec=spec if skeleton.reads.windows else spec.for_samples(), earlier={},
        source=skeleton.source,
    )  # fmt: skip


def norms_after(
    options: FitRun,
    skeleton: Opened,
    dense: Source,
    structure: Mapping[str, Any],
    minutes: float,
    registry: Registry,
    device: str,
) -> RecoverTask:
    """The training of norms and biases after a fit, towards the dense model.

    Args:
        skeleton: the fitted model, which may be a smaller one of this structure.
        minutes: the time from the opening of the fitted model to the end of the run.
    """
    return RecoverTask(
        options=_recovery(options, "norms", minutes), registry=registry, skeleton=skeleton,
        device=device, spec=registry.recoveries.get("norms"), earlier={"structure": structure},
        source=dense,
    )  # fmt: skip


def _recovery(options: PruneRun | FitRun, kind: str, minutes: float) -> RecoverRun:
    """The options of a training in the remaining time."""
    return RecoverRun(
        model=str(options.directory), output=options.directory, dense=options.model,
        kind=kind, adapter=options.adapter, tokenizer=options.tokenizer,
        calibration=options.calibration, metrics=options.metrics, bos=options.bos,
        seed=options.seed, seqlen=min(options.seqlen, _SHORT_SEQLEN),
        checks=max(1, min(_MAX_CHECKS, math.ceil(minutes / _MINUTES_PER_CHECK))), minutes=minutes,
        device=options.device, compute=options.compute,
        trust_remote_code=options.trust_remote_code, revision=options.revision,
    )  # fmt: skip
