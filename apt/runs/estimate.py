"""What a run will need: memory and time, from shapes alone."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apt.calibration.batches import TOKENS_PER_BATCH
from apt.checkpoints.model import Model
from apt.evaluation.logits import part_bytes
from apt.evaluation.metrics import windows_at_once
from apt.output.report import peak_memory
from apt.planning.plan import Plan, PlannedBlock
from apt.pruning.paused_forward import can_pause
from apt.runs.prune_options import PRESETS
from apt.text.sampling import vocabulary
from apt.text.self_generated import cached_tokens, logits_at_once

_FP32 = 4
_FORWARDS = 4  # of the dense stream, of the pruned one after tuning and before, and of the drift
_TUNING = 3.5  # a forward and its backward, and what is held back
_TEXT = 150 * 2**20  # what reading and tokenising leaves behind
_READING = 140 * 2**20  # and what it takes for a moment
_SOLVE_STEPS = 40  # products of (out, in) by (in, in) that two rounds and their joint solves take


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory and seconds.

    Attributes:
        process: Python and its libraries: this process now, and what reading text will add.
        weights: the model's weights; streamed, of its largest block and of what is not in blocks.
        activations: the calibration activations between two blocks, of the pruned and of the dense
            stream, and within one: the dense stream's inputs, and what waits before a product.
        grams: the Gram and cross matrices of the largest block, with their factors.
        disk: of the activations, what lies there.
        working: one batch's activations inside a block, and one site's solve or, if that is more,
            the block's weights, gradients and moments while it is tuned.
        predicting: the logits, and what is made with them, where the model is measured or writes
            text to calibrate on: before and after all of the above but the weights.
        seconds: the time of an error-aware run of default effort; forwards of attention and scans
            that are not products of weights are not counted.
    """

    process: int
    weights: int
    activations: int
    disk: int
    grams: int
    working: int
    predicting: int
    seconds: float

    @property
    def memory(self) -> int:
        """The peak: all of it, or that of reading text where a model is tiny."""
        run = max(self.activations + self.grams + self.working, self.predicting)
        return self.process + max(self.weights + run, _READING)


def estimate(
    shell: Model,
    plan: Plan,
    samples: int,
    seqlen: int,
    dtype: torch.dtype,
    device: str,
    *,
    streamed: bool,
    on_disk: bool = False,
    writing: bool = False,
) -> Estimate:
    """Estimate an error-aware run of ``plan`` on ``samples`` of ``seqlen`` tokens.

    Args:
        shell: the model, without weights.
        plan: what to do to each site.
        samples, seqlen: the calibration samples in all, and the tokens of each.
        dtype: of weights and activations.
        device: where it runs.
        streamed: whether no more than one block is in memory.
        on_disk: whether no more than one batch of activations is.
        writing: whether the model writes text to calibrate on.
    """
    bytes_each, config = dtype.itemsize, shell.config
    tokens = samples * seqlen
    held = shell.adapter.held(config, seqlen)
    waits = not on_disk and can_pause(shell.adapter, config, seqlen, config.hidden_size)
    blocks = [module for _, module in shell.adapter.blocks(shell.module)]
    parameters, in_blocks = _parameters(shell.module), [_parameters(block) for block in blocks]
    if streamed:
        parameters += max(in_blocks) - sum(in_blocks)
    widest = max(sum(site.shape) for site in plan.sites)
    largest = max(site.size for site in plan.sites)
    tuned = max(sum(entry.size for entry in block.pruned) for block in plan.blocks)
    return Estimate(
        process=peak_memory()["cpu"] + _TEXT,
        weights=parameters * bytes_each,
        activations=(min(tokens, TOKENS_PER_BATCH) if on_disk else tokens)
        * max(_activations(b, config, bytes_each, held if waits else 0) for b in plan.blocks),
        disk=activations_on_disk(shell, plan, tokens, dtype) if on_disk else 0,
        grams=max(_gram_bytes(block) for block in plan.blocks),
        working=min(tokens, TOKENS_PER_BATCH) * (4 * widest + held) * bytes_each
        + max(8 * largest, 5 * tuned) * _FP32,
        predicting=max(
            _measuring(shell, seqlen, (4 * widest + held) * bytes_each),
            _writing(shell, len(blocks), seqlen, bytes_each) if writing else 0,
        ),
        seconds=_operations(plan, tokens) / _throughput(device),
    )


def _measuring(shell: Model, seqlen: int, each: int) -> int:
    """Bytes of a part of the logits, and of ``each`` of the tokens of some windows in a block."""
    windows = windows_at_once(seqlen)
    return part_bytes(vocabulary(shell.module), windows, seqlen) + windows * seqlen * each


def _writing(shell: Model, blocks: int, seqlen: int, bytes_each: int) -> int:
    """Bytes of the logits of the next tokens, and of the keys and values of those written."""
    config, known = shell.config, cached_tokens(seqlen)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = config.hidden_size * (getattr(config, "num_key_value_heads", None) or heads) // heads
    logits = part_bytes(vocabulary(shell.module), logits_at_once(), 1)
    written: int = known * blocks * 2 * width * bytes_each
    return logits + written


def activations_on_disk(shell: Model, plan: Plan, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of what an error-aware run has on disk of its calibration activations."""
    kept = max(_kept(block, shell.config, dtype.itemsize) for block in plan.blocks)
    drift: int = shell.config.hidden_size * _FP32
    return tokens * (kept + drift)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _inputs(block: PlannedBlock) -> dict[str, int]:
    """The width of each distinct input of the pruned sites."""
    return {entry.site.input: entry.shape[1] for entry in block.pruned}


def _activations(block: PlannedBlock, config: Any, bytes_each: int, held: int) -> int:
    """Bytes for each token: what is kept, what waits in a block, and the drift.

    Before the last product wait its input, what is normalised and what is added to it; before that
    of attention, what it ``held`` may be more.
    """
    last = max(_shared_inputs(block).values(), default=0)
    waiting = 2 * config.hidden_size + max(last, held)
    kept = _kept(block, config, bytes_each)
    total: int = kept + waiting * bytes_each + 2 * config.hidden_size * _FP32
    return total


def _kept(block: PlannedBlock, config: Any, bytes_each: int) -> int:
    """Bytes for each token: two streams, and the dense inputs."""
    total: int = (2 * config.hidden_size + sum(_shared_inputs(block).values())) * bytes_each
    return total


def _shared_inputs(block: PlannedBlock) -> dict[str, int]:
    """The width of each input that is every token's."""
    return {entry.site.input: entry.shape[1] for entry in block.pruned if not entry.site.routed}


def _gram_bytes(block: PlannedBlock) -> int:
    total = 0
    for name, width in _inputs(block).items():
        made = sum(entry.shape[0] for entry in block.pruned if entry.site.input == name)
        total += (5 * width + min(width, made)) * width * _FP32
    return total


def _operations(plan: Plan, tokens: int) -> float:
    """Floating-point operations: forwards, Gram and cross products, factorisations and solves."""
    total = 0.0
    for block in plan.blocks:
        passes = _FORWARDS * tokens + _TUNING * min(tokens, PRESETS["default"].tuning_tokens)
        total += sum(passes * 2 * site.size for site in block.sites)
        total += sum(3 * tokens * w**2 + 6 * w**3 for w in _inputs(block).values())
        total += sum(_SOLVE_STEPS * 2 * site.size * site.shape[1] for site in block.pruned)
    return total


def _throughput(device: str) -> float:
    """Operations a second of an fp32 product on this machine, now."""
    x = torch.randn(1024, 1024, device=device)
    x @ x
    started, rounds = time.perf_counter(), 8
    for _ in range(rounds):
        y = x @ x
    float(y[0, 0])
    return rounds * 2 * 1024**3 / (time.perf_counter() - started)
