"""The pruning of a model block by block, for whole runs and for programs."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from apt.adapter import Samples
from apt.calibration.sources import SampleSources
from apt.checkpoints.smaller import smaller_skeleton
from apt.checkpoints.stored import pruned_parameters
from apt.engine.reports import calibration_of
from apt.engine.store import ModelStore
from apt.engine.text import Text
from apt.evaluation.generated import greedy_outputs, lacks_outputs, with_outputs
from apt.events import BlockRecord, ExpertsRemoved, ExpertsRouted, SitePruned, Working
from apt.locations.text_sources import labels
from apt.output.report import Report
from apt.planning.allocation import Allocation, Unallocated, allocated, with_shares
from apt.planning.plan import Plan
from apt.planning.structure import make_structured_plan
from apt.plugin.specs import UNIFORM
from apt.pruning.layer import BlockPruning
from apt.pruning.pipeline import prune_blocks, remove_chosen
from apt.recovery.norm_tuning import DenseOutputs, NormTuning, TunedNorms, tune_norms
from apt.shrinking.record import candidate_records, removed_experts, structure_record
from apt.shrinking.structure_choice import StructureChoice
from apt.text.augmentation import Augmentation
from apt.text.mixes import in_turn
from apt.text.sampling import mixed

_FILLER = -1  # behind the end of a shorter output

OWN_TEXT, RANDOM_TOKENS = "own text", "random tokens"
"""The sources of generated samples, in the record of experts' tokens by source."""


@dataclass(frozen=True)
class Pruning(BlockPruning):
    """The pruning of one model: its options with all values filled in.

    Attributes:
        augmentation: the calibration samples in addition to the given ones.
        allocation: the name and the function of an allocation; None keeps the plan's patterns.
        structure: the choice of the structure of a smaller model; None for a sparse one.
        norms: the training of norms and biases at the end; None for none.
        seed: the seed for the text that the model generates.
    """

    augmentation: Augmentation
    allocation: tuple[str, Allocation] | None = None
    structure: StructureChoice | None = None
    norms: NormTuning | None = None
    seed: int = 0

    @property
    def allocation_name(self) -> str:
        """The name of the allocation."""
        return self.allocation[0] if self.allocation else UNIFORM


def decide(store: ModelStore, text: Text, job: Pruning) -> tuple[Text, Plan]:
    """The text with the samples that the dense model generates, and the final plan."""
    text = with_own_text(store, text, job)
    return text, final_plan(store, text, job)


def prune_model(store: ModelStore, text: Text, job: Pruning, report: Report) -> Report:
    """Prune block by block, with the text and the plan of `decide`.

    Args:
        store: the model, pruned in place.
        report: the report at the beginning of the run.

    Returns:
        The report with the record of each site.
    """
    records, structure = list[BlockRecord](), dict[str, Any]()
    calibration, outputs = report.calibration, _dense_outputs(store, text, job)
    if job.recipe.experts.scores:  # the report has the calibration of the run that computed them
        records = remove_chosen(store, job)
    else:
        calibration = calibration | calibration_of(text.tokens)
        if job.recipe.error_aware or any(block.changes for block in job.plan.blocks):
            records = prune_blocks(store, job, *_samples(store, text, job))
    if job.structure is not None:
        config = getattr(store.model, "config", None)
        structure = structure_record(job.structure.mode, job.plan, store.model, job.adapter, config)
        removed = [record for record in records if isinstance(record, ExpertsRemoved)]
        structure["experts"] = removed_experts(removed)
    if job.norms is not None:
        norms = _tune_norms(store, job, outputs).record() | _norm_text(text, job.norms)[1]
        report = replace(report, norms=norms)
    return replace(
        report,
        calibration=calibration,
        sites=[record for record in records if isinstance(record, SitePruned)],
        skipped=job.plan.dense,
        ranks=store.ranks.gather(store.ranks.work),
        structure=structure,
        routing=report.routing
        | {
            record.name: {"tokens": dict(record.tokens), "weights": dict(record.weights)}
            for record in records
            if isinstance(record, ExpertsRouted)
        },
    )


def _dense_outputs(store: ModelStore, text: Text, job: Pruning) -> DenseOutputs | None:
    """What the norms are trained towards; None if they are not trained, or by another process."""
    if job.norms is None or not store.ranks.first:
        return None
    store.status("training", "running the dense model")
    progress = partial(store.observe, Working("norms", "running"))
    windows, _ = _norm_text(text, job.norms)
    return DenseOutputs.of(store.model, job.adapter, windows, job.recipe.compute, progress)


def _norm_text(text: Text, tuning: NormTuning) -> tuple[Tensor, dict[str, Any]]:
    """The windows (windows, seqlen) that the norms are trained on, and their record.

    They are as many as the samples, or fewer for long text. The weights were fitted to the samples:
    the pruned model is nearer to the dense one there than elsewhere. So other windows are
    preferred. They are the last ones, which are measured.
    """
    samples = text.windows
    count = min(len(samples), max(1, tuning.tokens // samples.shape[1]))
    others = samples[:0] if text.others is None else text.others[:count]
    windows = torch.cat([samples[: count - len(others)], others.to(samples)])
    return windows, {"shape": list(windows.shape), "others": len(others)}


def _tune_norms(store: ModelStore, job: Pruning, outputs: DenseOutputs | None) -> TunedNorms:
    """Train the norms and biases: the first rank shares them."""
    assert job.norms is not None
    store.status("training", "training the norms")
    tuned = None
    if outputs is not None:
        fixed = [
            store.model.get_parameter(f"{block.name}.{path}")
            for block in job.plan.blocks
            for path in pruned_parameters(block)
        ]
        tuned = tune_norms(
            store.model, job.adapter, outputs, job.norms, job.recipe.compute,
            fixed=fixed, dtypes=store.dtypes,
            progress=partial(store.observe, Working("norms", "tuning")),
        )  # fmt: skip
    tuned = store.ranks.share(tuned)
    assert tuned is not None
    for name in tuned.names:
        parameter = store.model.get_parameter(name)
        parameter.data.copy_(store.ranks.share(parameter.data.cpu()))
    store.tuned = tuned.names if tuned.kept else ()
    return tuned


def _samples(store: ModelStore, text: Text, job: Pruning) -> tuple[Tensor | Samples, SampleSources]:
    """All samples, with copies with random tokens, and the sources of the samples.

    The samples of a mix are in an order in which any first samples are of all sources, generated
    text included, in proportion to the numbers of samples.
    """
    tokens = job.augmentation.with_random_tokens(store.model, text.tokens, text.special)
    names = tuple(labels([source.name for source in text.sources]).values()) or ("calibration",)
    owners = _owners(text)
    owners = torch.where(owners < 0, len(names), owners)  # the model's own text
    copies = torch.full((len(tokens) - len(owners),), len(names) + 1)
    of = owners if not len(copies) else mixed(owners.unsqueeze(1), copies.unsqueeze(1)).squeeze(1)
    sources = SampleSources((*names, OWN_TEXT, RANDOM_TOKENS), of, len(names))
    if len(names) == 1:
        return tokens, sources
    order = of.argsort(stable=True)
    order = order[in_turn(torch.bincount(of, minlength=len(sources.names)).tolist())]
    return tokens[order], sources.part(order)


def _owners(text: Text) -> Tensor:
    """The index of the source of each sample (samples,); 0 for all if no source is known."""
    return torch.zeros(len(text.tokens)).long() if text.owners is None else text.owners.long()


def with_own_text(store: ModelStore, text: Text, job: Pruning) -> Text:
    """A text with the samples, or with the ends of the samples, that the model generates."""
    if isinstance(text.tokens, Samples):
        return replace(text, tokens=_with_targets(store, text.tokens))

    def generate() -> Tensor:
        assert isinstance(text.tokens, Tensor)
        with job.adapter.running(store.model):
            return job.augmentation.with_own_text(
                store.model, text.tokens, job.seed, bos=text.bos, special=text.special,
                compute=job.recipe.compute,
            )  # fmt: skip

    own_samples = job.augmentation.own_samples
    if not own_samples:
        return text
    owners = _owners(text).unsqueeze(1)
    owners = mixed(owners, torch.full((own_samples, 1), -1), job.seed).squeeze(1)
    return replace(text, tokens=store.generated(generate), owners=owners)


def _with_targets(store: ModelStore, samples: Samples) -> Samples:
    """Samples with the greedy outputs of the model for its decoder, if they lack them.

    Raises:
        AptError: the decoder needs outputs, and the model cannot write them.
    """
    with store.readable():
        lacks = store.ranks.share(store.ranks.first and lacks_outputs(store.model, samples))
    if not lacks:
        return samples

    def generate() -> Tensor:
        return pad_sequence(greedy_outputs(store.model, samples), True, padding_value=_FILLER)

    rows = store.generated(generate, "targets")
    return with_outputs(samples, [row[row != _FILLER] for row in rows])


def final_plan(store: ModelStore, text: Text, job: Pruning) -> Plan:
    """The plan with the structure or the sparsities that depend on the dense model."""
    plan = job.plan
    if job.structure is not None:
        with store.readable():
            plan = _structured_plan(store, text, job) if store.ranks.first else plan
    elif job.allocation is not None and store.ranks.first:
        name, allocation = job.allocation
        store.status("allocation", f"distributing the sparsity ({name})")
        unallocated = Unallocated(
            store.model, job.adapter, plan, text.tokens, store.open, job.recipe.error_aware
        )
        shares = store.journal.remember("shares", lambda: allocated(name, allocation, unallocated))
        plan = with_shares(plan, name, shares)
    return store.ranks.share(plan)


def _structured_plan(store: ModelStore, text: Text, job: Pruning) -> Plan:
    """The plan of a smaller model."""
    assert job.structure is not None
    model = store.model
    structure, candidates = job.structure.choose(
        model, job.adapter, text.tokens, partial(store.status, "structure"),
        bos=text.bos, special=text.special,
    )  # fmt: skip
    config = getattr(model, "config", None)
    plan = make_structured_plan(
        model, job.adapter, config, structure, adjusted=job.recipe.error_aware
    )
    smaller_skeleton(model, job.adapter, plan)  # raises if transformers has no model of these sizes
    return replace(plan, candidates=candidate_records(candidates))
