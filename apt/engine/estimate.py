"""An estimate of the memory of a run, from shapes alone."""

from dataclasses import dataclass

from apt.adapter.text_config import hidden_size, text_config
from apt.calibration.batches import TOKENS_PER_BATCH
from apt.checkpoints.opened import Opened
from apt.engine.costs import Planned, parameters_of
from apt.evaluation.logits import part_bytes
from apt.evaluation.metrics import windows_at_once
from apt.planning.plan import Plan, PlannedBlock, PlannedSite
from apt.text.sampling import vocabulary
from apt.text.self_generated import cached_tokens, logits_at_once

_FP32 = 4
_FACTORS = 6  # matrices of a Gram matrix's size: damped, its root, scaled twice, an inverse twice
_SOLVED = 8  # matrices of a weight's size during its solve: dense, target, kept, dual variable, …
_TUNED = 28  # bytes of a tuned weight: fp32 value, gradient, moments; bf16 value, gradients; masks
_TEXT = 150 * 2**20  # memory that stays allocated after reading and tokenising text
_READING = 140 * 2**20  # additional memory while text is read


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory.

    Attributes:
        process: the memory of this process now, with Python and its libraries, and the memory that
            reading text will add.
        weights: the weights of the model; if streamed, those of its largest block and those outside
            the blocks.
        activations: the calibration activations of the pruned and the dense stream between two
            blocks, the inputs of the dense stream within a block, and the products that are stored
            between its stages.
        disk: the part of the activations that is on disk.
        grams: the Gram matrices of the largest block.
        working: the activations of one batch inside a block, and the larger of two: the solve of
            one site with the factors of its Gram matrix, or the weights, gradients and moments of a
            block while it is tuned.
        predicting: the logits, and the tensors made from them, while the model is measured or
            generates calibration text. At that time only the weights are in memory beside them.
    """

    process: int
    weights: int
    activations: int
    disk: int
    grams: int
    working: int
    predicting: int

    @property
    def memory(self) -> int:
        """The peak memory: that of the run, or that of reading text if the model is tiny."""
        run = max(self.activations + self.grams + self.working, self.predicting)
        return self.process + max(self.weights + run, _READING)

    @property
    def on_device(self) -> int:
        """The peak memory of an accelerator."""
        return self.weights + max(self.activations + self.grams + self.working, self.predicting)


def estimate(planned: Planned) -> Estimate:
    """Estimate a run of a plan."""
    skeleton, plan, seqlen = planned.skeleton, planned.plan, planned.options.seqlen
    on_disk, aware = planned.options.activations == "disk", planned.error_aware
    own = planned.augmentation.own_samples
    bytes_each, config = skeleton.runs_in.itemsize, skeleton.config
    tokens = planned.tokens
    held = skeleton.adapter.held(config, seqlen)
    blocks = [module for _, module in skeleton.adapter.blocks(skeleton.module)]
    parameters, in_blocks = planned.parameters, [parameters_of(block) for block in blocks]
    if planned.options.stream:
        parameters += max(in_blocks) - sum(in_blocks)
    widest = max(sum(site.shape) for site in plan.sites)
    solved = max(
        (_solve_bytes(e, planned.factors) for block in plan.blocks for e in block.pruned), default=0
    )
    in_block = max(sum(entry.size for entry in block.pruned) for block in plan.blocks)
    return Estimate(
        process=planned.process + _TEXT,
        weights=parameters * bytes_each,
        activations=(min(tokens, TOKENS_PER_BATCH) if on_disk else tokens)
        * max(_activations(block, planned) for block in plan.blocks),
        disk=on_disk * activations_on_disk(skeleton, plan, tokens, error_aware=aware),
        grams=max(_gram_bytes(block) for block in plan.blocks),
        working=min(tokens, TOKENS_PER_BATCH) * (4 * widest + held) * bytes_each
        + max(solved, _TUNED * in_block * planned.tuned),
        predicting=max(
            _measuring(skeleton, seqlen, (4 * widest + held) * bytes_each),
            _generating(skeleton, len(blocks), seqlen, bytes_each) if own else 0,
        ),
    )


def _measuring(skeleton: Opened, seqlen: int, each: int) -> int:
    """Bytes of a part of the logits, and ``each`` bytes for each token of a batch of windows."""
    windows = windows_at_once(seqlen)
    return part_bytes(vocabulary(skeleton.module), windows, seqlen) + windows * seqlen * each


def _generating(skeleton: Opened, blocks: int, seqlen: int, bytes_each: int) -> int:
    """Bytes of the logits of the next tokens, and of the cached keys and values."""
    config, cached = text_config(skeleton.config), cached_tokens(seqlen)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = hidden_size(config) * (getattr(config, "num_key_value_heads", None) or heads) // heads
    logits = part_bytes(vocabulary(skeleton.module), logits_at_once(), 1)
    keys_and_values: int = cached * blocks * 2 * width * bytes_each
    return logits + keys_and_values


def activations_on_disk(skeleton: Opened, plan: Plan, tokens: int, *, error_aware: bool) -> int:
    """Bytes of the calibration activations that a run keeps on disk."""
    kept = max(_kept(block, skeleton, error_aware) for block in plan.blocks)
    drift = hidden_size(skeleton.config) * _FP32 if error_aware else 0
    return tokens * (kept + drift)


def _activations(block: PlannedBlock, planned: Planned) -> int:
    """Bytes for each token: kept activations, the products between two stages, and the drift."""
    skeleton, kept = planned.skeleton, _kept(block, planned.skeleton, planned.error_aware)
    if not planned.error_aware:
        return kept
    width, whole = hidden_size(skeleton.config), [e for e in block.pruned if not e.site.routed]
    stored = 0
    if (
        planned.options.activations != "disk"
    ):  # attention is stored, and the inputs that are done are not
        stored = width + max(
            sum(e.shape[0] for e in whole if e.site.order < order)
            - sum({e.site.input: e.shape[1] for e in whole if e.site.order < order}.values())
            for order in {0, *(entry.site.order for entry in whole)}
        )
    return kept + stored * skeleton.runs_in.itemsize + 2 * width * _FP32


def _kept(block: PlannedBlock, skeleton: Opened, error_aware: bool) -> int:
    """Bytes for each token: one stream, or two and the dense inputs."""
    stream, inputs = hidden_size(skeleton.config), sum(_shared_inputs(block).values())
    return (2 * stream + inputs if error_aware else stream) * skeleton.runs_in.itemsize


def _shared_inputs(block: PlannedBlock) -> dict[str, int]:
    """The width of each input that all tokens have, which is not so for those of experts."""
    return {entry.site.input: entry.shape[1] for entry in block.pruned if not entry.site.routed}


def _gram_bytes(block: PlannedBlock) -> int:
    """Bytes of the Gram matrices, which are kept until the sites of the block are measured."""
    return sum(width * width for width in block.inputs.values()) * _FP32


def _solve_bytes(entry: PlannedSite, factors: bool) -> int:
    """Bytes of a site's solve: its cross matrix, the factors of its Gram matrix, its weights."""
    out, width = entry.shape
    grams = (_FACTORS * width + min(width, out)) * width * factors
    return (grams + _SOLVED * entry.size) * _FP32
