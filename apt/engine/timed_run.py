"""A pruning of a given time: the effort and the samples that fit, and the training after it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from apt.adapter.text_config import hidden_size
from apt.checkpoints.opened import Opened
from apt.engine.costs import Planned, measured
from apt.engine.prune_model import Pruning
from apt.engine.recover_task import RecoverTask
from apt.options import Effort, PruneRun, RecoverRun
from apt.plugin.registry import Registry
from apt.plugin.specs import MethodSpec

_PRUNING = 0.4  # of the time, at most
_SHORT = 512  # tokens of a sample where the time is short
_LEAST: dict[Effort, int] = {"best": 2**14, "default": 2**14, "fast": 2**12}  # tokens
_BETWEEN, _CHECKS = 3, 5  # minutes between measurements of the loss, and the most measurements
# With few steps, a higher rate than that of `recover` is better.
_RATE, _WIDTH = 4e-4, 576  # measured on SmolLM2; a wider model needs a lower rate (2203.03466)


def fitted(
    options: PruneRun,
    skeleton: Opened,
    job: Pruning,
    method: MethodSpec,
    device: str,
    notice: Callable[[str], None],
) -> PruneRun:
    """The options with the effort and the samples that take a part of the given time.

    Both become smaller, never larger. The default effort becomes ``"fast"`` before there are fewer
    than 16,384 tokens, and no effort has fewer than 4,096. A method without efforts is taken for
    one of the effort ``"fast"``.
    """
    assert options.minutes is not None
    budget, machine = _PRUNING * 60 * options.minutes, measured(device)

    def seconds(effort: Effort, samples: int, seqlen: int) -> float:
        taken: Effort = effort if method.efforts else "fast"
        sized = replace(options, samples=samples, seqlen=seqlen)
        allocated = job.allocation is not None
        return Planned(skeleton, job.plan, sized, allocated=allocated).seconds(taken, machine)

    for effort, samples, seqlen in _choices(options, efforts=method.efforts):
        if seconds(effort, samples, seqlen) <= budget:
            break
    said = f"effort {effort}, " if method.efforts else ""
    said += f"{samples} samples of {seqlen} tokens, then distillation"
    notice(f"minutes: {options.minutes:g}: {said}")
    return replace(options, effort=effort, samples=samples, seqlen=seqlen)


def _choices(options: PruneRun, *, efforts: bool) -> Iterator[tuple[Effort, int, int]]:
    """Efforts, samples and tokens of a sample, from those of the options down to the cheapest."""
    yield options.effort, options.samples, options.seqlen
    seqlen, whole = min(options.seqlen, _SHORT), options.samples * options.seqlen
    levels: list[Effort] = [options.effort]
    if efforts and options.effort == "default":
        levels.append("fast")
    for level in levels:
        tokens, least = whole, _LEAST[level if efforts else "fast"]
        while tokens >= min(whole, least):
            yield level, max(1, tokens // seqlen), seqlen
            tokens //= 2


def training_of(
    options: PruneRun, skeleton: Opened, registry: Registry, device: str
) -> RecoverTask:
    """The distillation after a pruning, which lasts as long as there is time."""
    seqlen = min(options.seqlen, _SHORT)
    checks = min(_CHECKS, math.ceil((options.minutes or 0) / _BETWEEN))
    rate = _RATE * min(1.0, _WIDTH / hidden_size(skeleton.config))
    run = RecoverRun(
        model=str(options.directory), output=options.directory, dense=options.model,
        kind="distill", adapter=options.adapter, tokenizer=options.tokenizer,
        calibration=options.calibration, bos=options.bos, seed=options.seed, seqlen=seqlen,
        rate=rate, checks=checks, minutes=options.minutes,
        device=options.device, compute=options.compute,
        trust_remote_code=options.trust_remote_code, revision=options.revision,
        max_shard_size=options.max_shard_size,
    )  # fmt: skip
    return RecoverTask(
        options=run, registry=registry, skeleton=skeleton, device=device,
        spec=registry.recoveries.get("distill"), earlier={}, source=skeleton.source,
    )  # fmt: skip
