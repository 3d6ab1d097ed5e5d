"""The work of an error-aware run by step, and the time that a machine takes for it.

The products are counted by shape. What a step does beside its products is counted by the bytes
that it moves, or is a factor of the step, which was measured on SmolLM2 with one thread.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter.experts import idle_parameters, picked_experts
from apt.adapter.text_config import hidden_size, text_config
from apt.checkpoints.opened import Opened
from apt.devices import multiplies_bf16
from apt.engine.recipes import augmentation_of, tuning_of
from apt.options import Effort, MachineName, PruneRun, ShrinkRun
from apt.output.report import peak_memory
from apt.planning.plan import Plan, PlannedBlock
from apt.plugin.registry import registry
from apt.solver.admm_search import ROUNDS
from apt.solver.scaled import BF16_WIDTH, NODES
from apt.text.augmentation import Augmentation
from apt.text.self_generated import logits_at_once

_FP32 = 4
_ALLOCATING = 4096  # tokens of the sums of squares of an allocation
_PROBING = 512  # tokens that follow each pruned block of an allocation to the end
_IMPORTANCE = 4096  # tokens of the gradients of row importance
_BACKWARD = 3  # forwards of a forward with its gradients
_TUNING = 1.5  # of the products of tuning: batches held back, small batches, casts
_JOINT = 6  # steps of a joint solve, a mean
_SCANS = 20  # matrices that a step of the search reads or writes beside its product
_BESIDE = 16.0  # elements that a forward moves beside its products, for each input of a site


@dataclass(frozen=True)
class Work:
    """Floating-point operations of products in fp32 and in bf16, and bytes that are moved."""

    fp32: float = 0.0
    bf16: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.fp32 + other.fp32, self.bf16 + other.bf16, self.moved + other.moved)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.fp32 * factor, self.bf16 * factor, self.moved * factor)


@dataclass(frozen=True)
class Machine:
    """What a device does in a second.

    Attributes:
        fp32, bf16: floating-point operations of products.
        bandwidth: bytes that are read from or written to its memory.
        memory: the bytes of its memory; 0 if unknown.
        measured: False if the speeds are a share of those that the maker promises.
    """

    fp32: float
    bf16: float
    bandwidth: float
    memory: int = 0
    measured: bool = True

    def seconds(self, work: Work) -> float:
        """The time for some work."""
        return work.fp32 / self.fp32 + work.bf16 / self.bf16 + work.moved / self.bandwidth


def _promised(fp32: float, bf16: float, bandwidth: float, memory: int) -> Machine:
    """A device by the figures of its maker: TFLOPS, GB/s and GB, of which 40 % are reached."""
    reached = 0.4
    return Machine(
        reached * fp32 * 1e12, reached * bf16 * 1e12, reached * bandwidth * 1e9,
        memory * 10**9, measured=False,
    )  # fmt: skip


MACHINES: dict[MachineName, Machine] = {
    "h100": _promised(67, 989, 3350, 80),
    "h200": _promised(67, 989, 4800, 141),
    "a100": _promised(19.5, 312, 2039, 80),
    "4090": _promised(82.6, 165, 1008, 24),
    "mi300x": _promised(163, 1307, 5300, 192),
}
"""Accelerators by name. Dense products; the fp32 without TF32."""


def measured(device: str) -> Machine:
    """The speeds of a device of this machine, measured in about a second."""
    square = torch.randn(1024, 1024, device=device)
    half = square.bfloat16()
    operations = 2.0 * square.shape[0] ** 3
    fp32 = operations / _seconds(lambda: square @ square)
    bf16 = operations / _seconds(lambda: half @ half) if multiplies_bf16(device) else fp32
    large = torch.ones(2**24, device=device)
    bandwidth = 2 * large.nbytes / _seconds(lambda: large.mul_(1.0))
    return Machine(fp32, bf16, bandwidth)


def _seconds(call: Callable[[], Tensor], rounds: int = 8) -> float:
    """The mean time of a call that returns a tensor."""
    call()
    started = time.perf_counter()
    for _ in range(rounds):
        result = call()
    float(result.flatten()[0])  # waits for the device
    return (time.perf_counter() - started) / rounds


@dataclass(frozen=True)
class Planned:
    """A planned run.

    Attributes:
        skeleton: the model, without weights.
        plan: the pattern of each site.
        options: the options of the run.
        augmentation: the samples beside the given ones.
        device: the device that the model runs on.
        error_aware: True if the activations of the dense model are computed as well.
        tuned: True if the blocks are tuned; not so with effort ``"fast"``.
        factors: True if the method factorises Gram matrices.
        allocated: True if an allocation distributes the sparsity; the work is that of `auto`.
        efforts: those whose time is asked for; none if it is not known, since the run is not an
            error-aware one of the default method.
        on: the name of the accelerator that the run is planned for; None for this machine.
        process: the bytes of this process, before an allocation loads the model.
    """

    skeleton: Opened
    plan: Plan
    options: PruneRun | ShrinkRun
    augmentation: Augmentation = field(default_factory=Augmentation)
    device: str = "cpu"
    error_aware: bool = True
    tuned: bool = True
    factors: bool = True
    allocated: bool = False
    efforts: tuple[Effort, ...] = ()
    on: MachineName | None = None
    process: int = field(default_factory=lambda: peak_memory()["cpu"])

    @property
    def machine(self) -> Machine:
        """What the device does in a second; a device of this machine is measured."""
        return MACHINES[self.on] if self.on else measured(self.device)

    @property
    def parameters(self) -> int:
        """The number of parameters of the whole model."""
        return parameters_of(self.skeleton.module)

    @property
    def active_parameters(self) -> int:
        """The number of parameters that a token uses: those of the experts that it is given."""
        adapter, skeleton = self.skeleton.adapter, self.skeleton
        if (picked := picked_experts(skeleton.config)) is None:
            return self.parameters
        blocks = [block for _, block in adapter.blocks(skeleton.module)]
        idle = (idle_parameters(block, adapter.sites(block), picked) for block in blocks)
        return self.parameters - sum(idle)

    @property
    def samples(self) -> int:
        """The number of all calibration samples."""
        return self.augmentation.samples(self.options.samples, self.options.seqlen)

    @property
    def tokens(self) -> int:
        """The number of all calibration tokens."""
        return self.samples * self.options.seqlen

    def steps(self, effort: Effort) -> dict[str, Work]:
        """The work of each step that there is, in an error-aware run of the default method."""
        options, method = replace(self.options, effort=effort), registry().default_method()
        augmentation = augmentation_of(options, method, options.samples)
        run = replace(self, options=options, augmentation=augmentation)
        found = {"own text": _own_text(run)}
        for block in self.plan.blocks:
            for step, work in _block_work(run, block, _tuned_tokens(run)).items():
                found[step] = found.get(step, Work()) + work
        return {step: work for step, work in found.items() if work != Work()}

    def seconds(self, effort: Effort, machine: Machine) -> float:
        """The time of all steps."""
        return sum(machine.seconds(work) for work in self.steps(effort).values())


def parameters_of(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _tuned_tokens(run: Planned) -> int:
    """The tokens of all steps of block tuning."""
    tuning = tuning_of(run.options, registry().default_method())
    if tuning is None:
        return 0
    return tuning.epochs * min(run.tokens, tuning.tokens or run.tokens)


def _own_text(run: Planned) -> Work:
    """Text that the model generates: all weights are read for each token of a batch."""
    own, seqlen = run.augmentation.own_samples, run.options.seqlen
    weights, dtype = run.parameters, run.skeleton.runs_in
    batches = math.ceil(own / logits_at_once())
    return _products(2.0 * weights * own * seqlen, dtype) + Work(
        moved=float(weights) * dtype.itemsize * batches * seqlen
    )


def _block_work(run: Planned, block: PlannedBlock, tuned: int) -> dict[str, Work]:
    tokens, rounds = run.tokens, ROUNDS[run.options.effort]
    forward, passes = _forward(run, block), 4 if tuned else 3
    factored = 1 + min(len(NODES), len({p for part in rounds for p in part.penalties}))
    stepped = sum(len(part.penalties) for part in rounds)
    widths = list(block.inputs.values())
    products = [2.0 * site.size * site.shape[1] for site in block.pruned]
    narrow = sum(p for p, s in zip(products, block.pruned, strict=True) if s.shape[1] < BF16_WIDTH)
    size = sum(site.size for site in block.pruned)
    mixed = Work(bf16=forward.fp32 + forward.bf16, moved=forward.moved)
    adam = Work(moved=12 * _FP32 * size * tuned / 1024)
    whole_layer = any(s.pattern and not s.pattern.by_row for s in block.pruned)
    work = {
        "forwards": forward * (passes * tokens),
        "Gram matrices": Work(fp32=3.0 * tokens * sum(w**2 for w in widths)),
        "factorisations": Work(fp32=2.0 * factored * sum(w**3 for w in widths)),
        "search": Work(
            fp32=stepped * narrow,
            bf16=stepped * (sum(products) - narrow),
            moved=_FP32 * _SCANS * stepped * size,
        ),
        "joint solves": Work(
            fp32=_JOINT * len(rounds) * sum(products) / 2, moved=_FP32 * _SCANS * _JOINT * size
        ),
        "tuning": mixed * (_BACKWARD * _TUNING * tuned) + adam,
    }
    if whole_layer:
        work["row importance"] = mixed * (_BACKWARD * min(tokens, _IMPORTANCE))
    if run.allocated:
        followed = (len(run.plan.blocks) / 2 + len(block.pruned) + 2) * _PROBING
        given = min(tokens, _ALLOCATING)
        work["allocation"] = forward * (followed + given) + Work(
            fp32=sum(given * w**2 + 2.0 * w**3 for w in widths), moved=100.0 * _FP32 * size
        )
    return work


def _forward(run: Planned, block: PlannedBlock) -> Work:
    """The forward of one token."""
    config, dtype = text_config(run.skeleton.config), run.skeleton.runs_in
    share = _picked_share(config, block)
    multiplied = sum(2.0 * s.size * (share if s.site.routed else 1) for s in block.sites)
    if getattr(config, "num_attention_heads", None):
        multiplied += 4.0 * run.options.seqlen * hidden_size(config)
    moved = _BESIDE * dtype.itemsize * sum(block.inputs.values())
    return _products(multiplied, dtype) + Work(moved=moved)


def _products(operations: float, dtype: torch.dtype) -> Work:
    """Products of weights of a dtype."""
    return Work(fp32=operations) if dtype == torch.float32 else Work(bf16=operations)


def _picked_share(config: Any, block: PlannedBlock) -> float:
    """The share of the experts of a block that a token is given."""
    routed = [site.site for site in block.sites if site.site.routed]
    picked = picked_experts(config)
    if not routed or picked is None:
        return 1.0
    first = min(site.order for site in routed)
    count = len({site.input for site in routed if site.order == first})
    return min(1.0, picked / count)
