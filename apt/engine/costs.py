"""The work of an error-aware run by step, and the time that a machine takes for it.

Products are counted by shape. The other work of a step is counted by the bytes that it moves, or is
a factor of the step that was measured on SmolLM2 with one thread.
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
from apt.compute import product_dtype
from apt.devices import multiplies_bf16
from apt.engine.recipes import additions_of, tuning_of
from apt.options import Effort, MachineName, PruneRun, ShrinkRun
from apt.output.report import peak_memory
from apt.planning.plan import Plan, PlannedBlock
from apt.plugin.registry import registry
from apt.recovery.norm_tuning import NormTuning
from apt.solver.admm_search import ROUNDS
from apt.solver.scaled import BF16_WIDTH, NODES
from apt.text.augmentation import Augmentation
from apt.text.self_generated import logits_at_once
from apt.tuning.row_importance import RowImportance

_FP32 = 4
_ALLOCATION_TOKENS = 4096  # tokens of the sums of squares of an allocation
_PROBE_TOKENS = 512  # tokens that follow each pruned block of an allocation to the end
_BACKWARD = 3  # the work of a forward with gradients, in forwards
_TUNING_FACTOR = 1.5  # for the work of tuning beside products: held-back batches, casts
_JOINT_STEPS = 6  # the mean number of steps of a joint solve
_SCANS = 20  # matrices that a step of the search reads or writes beside its product
_EXTRA_MOVED = 16.0  # elements that a forward moves beside its products, for each input of a site


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
    """The speeds and the memory of a device, per second.

    Attributes:
        fp32, bf16: floating-point operations of products.
        bandwidth: bytes that are read from or written to its memory.
        memory: the bytes of its memory; 0 if unknown.
        measured: False if the speeds are a share of the figures of the maker.
    """

    fp32: float
    bf16: float
    bandwidth: float
    memory: int = 0
    measured: bool = True

    def seconds(self, work: Work) -> float:
        """The seconds for this work."""
        return work.fp32 / self.fp32 + work.bf16 / self.bf16 + work.moved / self.bandwidth


def _by_maker(fp32: float, bf16: float, bandwidth: float, memory: int) -> Machine:
    """A device by the figures of its maker: TFLOPS, GB/s and GB. It reaches 40 % of the speeds."""
    share = 0.4
    return Machine(
        share * fp32 * 1e12, share * bf16 * 1e12, share * bandwidth * 1e9,
        memory * 10**9, measured=False,
    )  # fmt: skip


MACHINES: dict[MachineName, Machine] = {
    "h100": _by_maker(67, 989, 3350, 80),
    "h200": _by_maker(67, 989, 4800, 141),
    "a100": _by_maker(19.5, 312, 2039, 80),
    "4090": _by_maker(82.6, 165, 1008, 24),
    "mi300x": _by_maker(163, 1307, 5300, 192),
}
"""Accelerators by name, with the figures of dense products, and of fp32 without TF32."""


def measure_machine(device: str) -> Machine:
    """The speeds of a device of this machine, measured in about a second."""
    square = torch.randn(1024, 1024, device=device)
    half = square.bfloat16()
    operations = 2.0 * square.shape[0] ** 3
    fp32 = operations / _mean_seconds(lambda: square @ square)
    bf16 = operations / _mean_seconds(lambda: half @ half) if multiplies_bf16(device) else fp32
    large = torch.ones(2**24, device=device)
    # A new tensor for each result, as in a model: in place it would stay in the cache.
    bandwidth = 2 * large.nbytes / _mean_seconds(lambda: large * 1.0)
    return Machine(fp32, bf16, bandwidth)


def _mean_seconds(call: Callable[[], Tensor], rounds: int = 8) -> float:
    """The mean time of a call that returns a tensor."""
    call()
    started = time.perf_counter()
    for _ in range(rounds):
        result = call()
    float(result.flatten()[0])  # waits for the device
    return (time.perf_counter() - started) / rounds


@dataclass(frozen=True)
class PlannedRun:
    """A planned run.

    Attributes:
        skeleton: the model, without weights.
        plan: the pattern of each site.
        options: the options of the run.
        augmentation: the samples in addition to the given ones.
        device: the device that the model runs on.
        error_aware: True if the activations of the dense model are computed as well.
        tuned: True if the blocks are tuned.
        norms: the training of norms and biases at the end; None for none.
        factors: True if the method factorises Gram matrices.
        allocated: True if an allocation distributes the sparsity; its work is counted as that of
            ``auto``.
        efforts: the efforts whose time is estimated; empty if the run is not an error-aware run of
            the default method, whose time is not known.
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
    norms: NormTuning | None = None
    factors: bool = True
    allocated: bool = False
    efforts: tuple[Effort, ...] = ()
    on: MachineName | None = None
    process: int = field(default_factory=lambda: peak_memory()["cpu"])

    @property
    def machine(self) -> Machine:
        """The speeds of the device. A device of this machine is measured."""
        return MACHINES[self.on] if self.on else measure_machine(self.device)

    @property
    def products(self) -> torch.dtype:
        """The dtype in which the model multiplies its weights, see `apt.compute.product_dtype`."""
        name = self.options.compute if self.error_aware else "float32"
        if self.on and name == "auto":  # the other devices multiply all dtypes fast
            name = "bfloat16"
        return product_dtype(self.skeleton.runs_in, self.device, name)

    @property
    def parameters(self) -> int:
        """The number of parameters of the whole model."""
        return parameters_of(self.skeleton.module)

    @property
    def active_parameters(self) -> int:
        """The number of parameters that a token uses; of the experts, those that a router picks."""
        adapter, skeleton = self.skeleton.adapter, self.skeleton
        if (experts_per_token := picked_experts(skeleton.config)) is None:
            return self.parameters
        blocks = [block for _, block in adapter.blocks(skeleton.module)]
        idle = (idle_parameters(block, adapter.sites(block), experts_per_token) for block in blocks)
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
        """The work of each step of an error-aware run of the default method."""
        options, method = replace(self.options, effort=effort), registry().default_method()
        augmentation, norms = additions_of(options, method, self.skeleton)
        run = replace(self, options=options, augmentation=augmentation, norms=norms)
        work_by_step = {"own text": _own_text(run)}
        for block in self.plan.blocks:
            for step, work in _block_work(run, block, _tuned_tokens(run)).items():
                work_by_step[step] = work_by_step.get(step, Work()) + work
        return {step: work for step, work in work_by_step.items() if work != Work()}

    def seconds(self, effort: Effort, machine: Machine) -> float:
        """The time of all steps."""
        return sum(machine.seconds(work) for work in self.steps(effort).values())


def parameters_of(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _tuned_tokens(run: PlannedRun) -> int:
    """The tokens of all steps of block tuning."""
    tuning = tuning_of(run.options, registry().default_method())
    if tuning is None:
        return 0
    return tuning.epochs * min(run.tokens, tuning.tokens or run.tokens)


def _own_text(run: PlannedRun) -> Work:
    """The generation of text. All weights are read for each token of a batch."""
    samples, seqlen = run.augmentation.own_samples, run.options.seqlen
    weights, dtype = run.parameters, run.skeleton.runs_in
    batches = math.ceil(samples / logits_at_once())
    return _products(2.0 * weights * samples * seqlen, dtype) + Work(
        moved=float(weights) * dtype.itemsize * batches * seqlen
    )


def _block_work(run: PlannedRun, block: PlannedBlock, tuned_tokens: int) -> dict[str, Work]:
    tokens, rounds = run.tokens, ROUNDS[run.options.effort]
    forward, passes = _forward(run, block), 4 if tuned_tokens else 3
    penalties = [penalty for part in rounds for penalty in part.penalties]
    factorisations, search_steps = 1 + min(len(NODES), len(set(penalties))), len(penalties)
    widths = list(block.inputs.values())
    products = [2.0 * site.size * site.shape[1] for site in block.pruned]
    narrow = sum(
        product
        for product, site in zip(products, block.pruned, strict=True)
        if site.shape[1] < BF16_WIDTH
    )
    size = sum(site.size for site in block.pruned)
    mixed = Work(bf16=forward.fp32 + forward.bf16, moved=forward.moved)
    adam = Work(moved=12 * _FP32 * size * tuned_tokens / 1024)
    whole_layer = any(site.pattern and not site.pattern.by_row for site in block.pruned)
    work = {
        "forwards": (forward if run.options.compute == "float32" else mixed) * (passes * tokens),
        "Gram matrices": Work(fp32=3.0 * tokens * sum(w**2 for w in widths)),
        "factorisations": Work(fp32=2.0 * factorisations * sum(w**3 for w in widths)),
        "search": Work(
            fp32=search_steps * narrow,
            bf16=search_steps * (sum(products) - narrow),
            moved=_FP32 * _SCANS * search_steps * size,
        ),
        "joint solves": Work(
            fp32=_JOINT_STEPS * len(rounds) * sum(products) / 2,
            moved=_FP32 * _SCANS * _JOINT_STEPS * size,
        ),
        "tuning": mixed * (_BACKWARD * _TUNING_FACTOR * tuned_tokens) + adam,
    }
    if norms := run.norms:
        trained = min(run.options.samples * run.options.seqlen, norms.tokens)
        work["norms"] = mixed * ((1 + _BACKWARD * norms.epochs) * trained)
    if whole_layer:
        work["row importance"] = mixed * (_BACKWARD * min(tokens, RowImportance.tokens))
    if run.allocated:
        probe_tokens = (len(run.plan.blocks) / 2 + len(block.pruned) + 2) * _PROBE_TOKENS
        allocation_tokens = min(tokens, _ALLOCATION_TOKENS)
        work["allocation"] = forward * (probe_tokens + allocation_tokens) + Work(
            fp32=sum(allocation_tokens * w**2 + 2.0 * w**3 for w in widths),
            moved=100.0 * _FP32 * size,
        )
    return work


def _forward(run: PlannedRun, block: PlannedBlock) -> Work:
    """The work of the forward of one token."""
    config, dtype = text_config(run.skeleton.config), run.skeleton.runs_in
    share = _picked_share(config, block)
    multiplied = sum(2.0 * s.size * (share if s.site.routed else 1) for s in block.sites)
    if getattr(config, "num_attention_heads", None):
        multiplied += 4.0 * run.options.seqlen * hidden_size(config)
    moved = _EXTRA_MOVED * dtype.itemsize * sum(block.inputs.values())
    return _products(multiplied, dtype) + Work(moved=moved)


def _products(operations: float, dtype: torch.dtype) -> Work:
    """The work of products with weights of a dtype."""
    return Work(fp32=operations) if dtype == torch.float32 else Work(bf16=operations)


def _picked_share(config: Any, block: PlannedBlock) -> float:
    """The share of the experts of a block that a router picks for a token."""
    routed = [site.site for site in block.sites if site.site.routed]
    picked = picked_experts(config)
    if not routed or picked is None:
        return 1.0
    first = min(site.order for site in routed)
    count = len({site.input for site in routed if site.order == first})
    return min(1.0, picked / count)
