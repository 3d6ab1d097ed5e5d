"""The loss of models that do not read windows of text: the divergence from the dense model.

The dense model runs beside the trained one, on the same batches, so that nothing is kept on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from apt.adapter import Sample, Samples
from apt.adapter.recording import eval_mode
from apt.errors import AptError
from apt.evaluation.generated import greedy_outputs, lacks_outputs, with_outputs
from apt.evaluation.outputs import embeddings_of, watched_body
from apt.recovery.objective import Batch, Objective
from apt.recovery.teacher import relative_error
from apt.text.sampling import generator

GROUPS = "groups"
"""The key of the samples of a batch: a list of the inputs of samples of equal shapes."""

_LOGITS = ("logits", "start_logits", "end_logits")
_STATES = ("last_hidden_state", "encoder_last_hidden_state")
_HIDDEN_SHARE = 0.15  # of the tokens of a text for a masked language model, as in its pre-training


def beside_dense(model: nn.Module, dense: nn.Module, samples: Samples, hidden: float) -> Objective:
    """The divergence of a model from the outputs of the dense model.

    The model runs without its dropout: the outputs of the dense model have none either.

    Args:
        model: the pruned model.
        dense: the dense model. It writes what the decoders of both models read, if the samples lack
            it.
        samples: all samples.
        hidden: the weight of the relative error of the states, see `divergence_from`.
    """
    written = _Written(dense) if lacks_outputs(dense, samples) else None

    def stack(chosen: Sequence[Sample]) -> Batch:
        batch = samples.with_samples(chosen)
        if written is not None:
            batch = written.beside(batch)
        return {GROUPS: [inputs for inputs, _ in batch.batches(batch.numel())]}

    def loss(trained: nn.Module, batch: Batch) -> Tensor:
        sizes = [len(next(iter(inputs.values()))) for inputs in batch[GROUPS]]
        with eval_mode(trained):
            losses = [
                size * divergence_from(dense, model, inputs, hidden, trained)
                for size, inputs in zip(sizes, batch[GROUPS], strict=True)
            ]
        return torch.stack(losses).sum() / sum(sizes)

    return Objective(loss, stack, dense=True)


class _Written:
    """The outputs of the dense model that its decoder reads, each written once."""

    def __init__(self, dense: nn.Module) -> None:
        self._dense, self._known = dense, dict[int, tuple[Sample, Tensor]]()

    def beside(self, samples: Samples) -> Samples:
        """The samples with the outputs."""
        if new := [sample for sample in samples if id(sample) not in self._known]:
            outputs = greedy_outputs(self._dense, samples.with_samples(new))
            pairs = zip(new, outputs, strict=True)
            # A sample is kept, so that no other one gets its id.
            self._known |= {id(sample): (sample, ids) for sample, ids in pairs}
        return with_outputs(samples, [self._known[id(sample)][1] for sample in samples])


@dataclass(frozen=True)
class _Observed:
    """What a model returns for a batch.

    Attributes:
        logits: the logits of its head: of tokens, classes or positions, in the last dimension.
        states: the embeddings that it returns, or else the states after its last block.
    """

    logits: list[Tensor]
    states: Tensor | None


def _observed(model: nn.Module, inputs: dict[str, Tensor], called: nn.Module) -> _Observed:
    """What a model returns, if ``called``, which may be a wrapper, runs it."""
    with watched_body(model) as bodies:
        output: Any = called(**inputs)
    logits = [each for name in _LOGITS if isinstance(each := getattr(output, name, None), Tensor)]
    returned = [getattr(output, name, None) for name in _STATES]
    states = [embeddings_of(output), *bodies, *returned]
    return _Observed(logits, next((each for each in states if isinstance(each, Tensor)), None))


def divergence_from(
    dense: nn.Module,
    model: nn.Module,
    inputs: dict[str, Tensor],
    hidden: float,
    called: nn.Module | None = None,
) -> Tensor:
    """The mean divergence of a model from the dense model on samples of equal shapes.

    It is the Kullback-Leibler divergence of the logits of a head, plus ``hidden`` times the mean of
    ``‖h − h_dense‖² / ‖h_dense‖²``. ``h`` are the embeddings that a pair of towers returns, or else
    the last states at a position.

    Args:
        called: the module that runs the model; by default the model.

    Raises:
        AptError: the model has no head, and the weight of its states is zero.
    """
    device = next(dense.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        expected = _observed(dense, inputs, dense)
    found = _observed(model, inputs, model if called is None else called)
    separate = _has_separate_labels(model)
    terms = [
        _divergence(*pair, separate=separate)
        for pair in zip(found.logits, expected.logits, strict=True)
    ]
    if hidden and found.states is not None and expected.states is not None:
        terms.append(hidden * relative_error(found.states, expected.states.float()))
    if not terms:
        raise AptError(
            f"{type(model).__name__} has no head, so that only its states can be compared",
            "choose a weight above 0",
            ("hidden",),
        )
    return torch.stack(terms).sum()


def _has_separate_labels(model: nn.Module) -> bool:
    """True for a classifier whose labels do not exclude each other."""
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    return bool(kind == "multi_label_classification")


def _divergence(logits: Tensor, dense: Tensor, *, separate: bool) -> Tensor:
    """The mean divergence in nats over positions; of separate labels, the sum over labels.

    A single logit, such as that of a reranker, is that of a label beside 0.
    """
    if separate or logits.shape[-1] == 1:
        logits, dense = (torch.stack([x, torch.zeros_like(x)], -1) for x in (logits, dense))
    logs, expected = (x.float().log_softmax(-1) for x in (logits, dense))
    total = kl_div(logs, expected, reduction="sum", log_target=True)
    return total / expected[..., 0].numel() * (expected.shape[-2] if separate else 1)


def hiding_tokens(samples: Samples, seed: int) -> Samples:
    """Texts for a masked language model: a share of their tokens is hidden by the mask.

    Special tokens are not hidden.
    """
    draw, special = generator(seed), torch.tensor(samples.special)
    assert samples.mask is not None
    hidden = list[Sample]()
    for sample in samples:
        ids = sample["input_ids"]
        chosen = torch.rand(ids.shape, generator=draw) < _HIDDEN_SHARE
        chosen &= ~torch.isin(ids, special)
        hidden.append({**sample, "input_ids": ids.masked_fill(chosen, samples.mask)})
    return samples.with_samples(hidden)
