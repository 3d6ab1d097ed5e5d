"""An estimate of the memory of a run, from shapes alone."""

from dataclasses import dataclass

from apt.adapter.text_config import cache_width, hidden_size, text_config
from apt.calibration.batches import TOKENS_PER_BATCH
from apt.checkpoints.opened import Opened
from apt.engine.costs import PlannedRun, parameters_of
from apt.evaluation.logits import part_bytes
from apt.evaluation.metrics import windows_at_once
from apt.evaluation.outputs import POSITIONS
from apt.planning.plan import Plan, PlannedBlock, PlannedSite
from apt.recovery.norm_tuning import STEP_TOKENS, TOKEN_BYTES
from apt.text.sampling import vocabulary
from apt.text.self_generated import cached_tokens, logits_at_once

_FP32 = 4
# Matrices of the size of a Gram matrix: damped, its root, scaled twice, an inverse twice.
_GRAM_MATRICES = 6
# Matrices of the size of a weight during its solve: dense, target, kept, dual variable, …
_SOLVE_MATRICES = 8
# Bytes of a tuned weight: fp32 value, gradient, moments; bf16 value, gradients; masks.
_TUNED_BYTES = 28
_TEXT = 150 * 2**20  # memory that stays allocated after reading and tokenising text
_READING = 140 * 2**20  # additional memory while text is read


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory.

    Attributes:
        process: the present memory of this process, with Python and its libraries, and the memory
            that reading text adds.
        weights: the weights of the model; in a streamed run the weights of its largest block and
            the weights outside the blocks.
        activations: the calibration activations of the pruned and the dense stream between two
            blocks, the inputs of the dense stream within a block, and the products that are stored
            between its stages.
        disk: the part of the activations that is on disk.
        grams: the Gram matrices of the largest block.
        working: the activations of one batch inside a block; and the solve of one site with the
            factors of its Gram matrix, or the weights, gradients and moments of a block that is
            tuned, whichever is larger.
        predicting: the logits, and the tensors made from them, while the model is measured or
            generates calibration text. Only the weights are in memory at the same time.
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
        """The peak memory of the run; for a tiny model, the peak while text is read."""
        run = max(self.activations + self.grams + self.working, self.predicting)
        return self.process + max(self.weights + run, _READING)

    @property
    def on_device(self) -> int:
        """The peak memory of an accelerator."""
        return self.weights + max(self.activations + self.grams + self.working, self.predicting)


def estimate(planned: PlannedRun) -> Estimate:
    """Estimate a run of a plan."""
    skeleton, plan, seqlen = planned.skeleton, planned.plan, planned.options.seqlen
    on_disk, error_aware = planned.options.activations == "disk", planned.error_aware
    element_bytes, config = skeleton.runs_in.itemsize, skeleton.config
    tokens = planned.tokens
    inner_width = skeleton.adapter.held(config, seqlen)
    blocks = [module for _, module in skeleton.adapter.blocks(skeleton.module)]
    parameters, in_blocks = planned.parameters, [parameters_of(block) for block in blocks]
    if planned.options.stream:
        parameters += max(in_blocks) - sum(in_blocks)
    widest = max(sum(site.shape) for site in plan.sites)
    solve_bytes = max(
        (_solve_bytes(site, planned.factors) for block in plan.blocks for site in block.pruned),
        default=0,
    )
    tuned_weights = max(sum(site.size for site in block.pruned) for block in plan.blocks)
    return Estimate(
        process=planned.process + _TEXT,
        weights=parameters * element_bytes,
        activations=(min(tokens, TOKENS_PER_BATCH) if on_disk else tokens)
        * max(_activation_bytes(block, planned) for block in plan.blocks),
        disk=on_disk * activations_on_disk(skeleton, plan, tokens, error_aware=error_aware),
        # They are kept until the sites of the block are measured.
        grams=_FP32
        * max(sum(width**2 for width in block.inputs.values()) for block in plan.blocks),
        working=min(tokens, TOKENS_PER_BATCH) * (4 * widest + inner_width) * element_bytes
        + max(solve_bytes, _TUNED_BYTES * tuned_weights * planned.tuned),
        predicting=max(
            _measuring_bytes(skeleton, seqlen, (4 * widest + inner_width) * element_bytes),
            _generating_bytes(planned, len(blocks)) if planned.augmentation.own_samples else 0,
            _norm_tuning_bytes(planned, len(blocks), (4 * widest + inner_width) * element_bytes),
        ),
    )


def _measuring_bytes(skeleton: Opened, seqlen: int, token_bytes: int) -> int:
    """Bytes of a part of the logits, and ``token_bytes`` for each token of a batch of windows.

    Of a model that does not read windows, of all logits of a batch of samples.
    """
    if not skeleton.reads.windows:
        has_words = skeleton.module.get_output_embeddings() is not None  # type: ignore[operator]
        words = getattr(text_config(skeleton.config), "vocab_size", None) if has_words else None
        return POSITIONS * (token_bytes + _FP32 * (words or 0))
    windows = windows_at_once(seqlen)
    return part_bytes(vocabulary(skeleton.module), windows, seqlen) + windows * seqlen * token_bytes


def _generating_bytes(planned: PlannedRun, blocks: int) -> int:
    """Bytes of the logits of the next tokens, of the cached keys and values, and of copies.

    A model in memory with weights in fp32 that generates in bf16 keeps a copy of its weights.
    """
    skeleton, options = planned.skeleton, planned.options
    config, tokens, computes_in = skeleton.config, cached_tokens(options.seqlen), skeleton.runs_in
    width = cache_width(config) or hidden_size(config)
    logits = part_bytes(vocabulary(skeleton.module), logits_at_once(), 1)
    keys_and_values: int = tokens * blocks * 2 * width * computes_in.itemsize
    has_copies = planned.products != computes_in and not options.stream
    return logits + keys_and_values + planned.parameters * planned.products.itemsize * has_copies


def _norm_tuning_bytes(planned: PlannedRun, blocks: int, token_bytes: int) -> int:
    """Bytes of the kept outputs of the dense model, and of a step: activations and logits.

    Args:
        token_bytes: the activations of a block for each token.
    """
    if (norms := planned.norms) is None:
        return 0
    kept = min(norms.tokens, planned.options.samples * planned.options.seqlen) * TOKEN_BYTES
    step_tokens = max(STEP_TOKENS, planned.options.seqlen)
    logits = 2 * _FP32 * vocabulary(planned.skeleton.module)
    return kept + step_tokens * (blocks * token_bytes + logits)


def activations_on_disk(skeleton: Opened, plan: Plan, tokens: int, *, error_aware: bool) -> int:
    """Bytes of the calibration activations that a run keeps on disk."""
    streams = max(_stream_bytes(block, skeleton, error_aware) for block in plan.blocks)
    drift = hidden_size(skeleton.config) * _FP32 if error_aware else 0
    return tokens * (streams + drift)


def _activation_bytes(block: PlannedBlock, planned: PlannedRun) -> int:
    """Bytes for each token: the streams, the outputs of finished stages, and the drift."""
    skeleton = planned.skeleton
    streams = _stream_bytes(block, skeleton, planned.error_aware)
    if not planned.error_aware:
        return streams
    width = hidden_size(skeleton.config)
    stored = 0
    if planned.options.activations != "disk":
        stored = width + max(
            _stored_elements(block, order)
            for order in {0, *(site.site.order for site in _unrouted(block))}
        )
    return streams + stored * skeleton.runs_in.itemsize + 2 * width * _FP32


def _stored_elements(block: PlannedBlock, order: int) -> int:
    """The elements of a token that the stages before ``order`` add: outputs less dense inputs."""
    done = [site for site in _unrouted(block) if site.site.order < order]
    outputs = sum(site.shape[0] for site in done)
    return outputs - sum({site.site.input: site.shape[1] for site in done}.values())


def _unrouted(block: PlannedBlock) -> list[PlannedSite]:
    """The pruned sites that receive all tokens, unlike the sites of experts."""
    return [site for site in block.pruned if not site.site.routed]


def _stream_bytes(block: PlannedBlock, skeleton: Opened, error_aware: bool) -> int:
    """Bytes for each token: one stream, or two streams and the dense inputs of sites."""
    stream = hidden_size(skeleton.config)
    inputs = sum({site.site.input: site.shape[1] for site in _unrouted(block)}.values())
    return (2 * stream + inputs if error_aware else stream) * skeleton.runs_in.itemsize


def _solve_bytes(site: PlannedSite, factors: bool) -> int:
    """Bytes of a site's solve: its cross matrix, the factors of its Gram matrix, its weights."""
    out, width = site.shape
    grams = (_GRAM_MATRICES * width + min(width, out)) * width * factors
    return (grams + _SOLVE_MATRICES * site.size) * _FP32
