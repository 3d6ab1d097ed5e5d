"""Metrics of models that do not predict the next token: what they return, beside the dense model.

The vector of a sample is the mean of the states after the last block, over its positions, or the
state of its first position (`Samples.first`), or the embeddings that the model itself returns. Its
predictions are the classes or the tokens that are ranked first, at each position.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Samples
from apt.adapter.recording import eval_mode
from apt.adapter.samples import on_device
from apt.errors import AptError
from apt.evaluation.generated import changes, greedy_outputs, lacks_outputs, with_outputs, writes
from apt.modes import default_modes

POSITIONS = 4096  # of a batch
_NEIGHBOURS = 10
_MASKED = 8  # tokens of a text, each masked alone
_EMBEDDINGS = ("image_embeds", "text_embeds")


@dataclass
class Outputs:
    """What a model returns for samples, in the order of the samples.

    Attributes:
        vectors: the vectors (samples, width).
        predictions: the predictions of each sample (positions,) or (); None without a head that
            returns logits.
        written: the tokens that the model writes for each sample (tokens,), of `dense_outputs`;
            None without a decoder that writes.
    """

    vectors: Tensor
    predictions: list[Tensor] | None = None
    written: list[Tensor] | None = None

    def __getitem__(self, chosen: slice) -> "Outputs":
        """The outputs for some of the samples."""
        parts = (
            None if each is None else each[chosen] for each in (self.predictions, self.written)
        )
        return Outputs(self.vectors[chosen], *parts)


@default_modes()
@torch.no_grad()
def outputs_of(model: nn.Module, samples: Samples) -> Outputs:
    """What a model returns for samples."""
    device, order = next(model.parameters()).device, list[Tensor]()
    vectors, predictions = list[Tensor](), list[Tensor]()
    with eval_mode(model), watched_body(model) as states:
        for inputs, indices in samples.batches(POSITIONS):
            found = model(**on_device(inputs, device))  # type: ignore[arg-type]
            last = states.pop() if states else None
            vectors.append(_vectors(found, last, len(indices), first=samples.first))
            states.clear()
            if isinstance(logits := getattr(found, "logits", None), Tensor):
                predictions += logits.argmax(-1).cpu().unbind()
            order.append(indices)
    places = torch.cat(order).argsort()
    ranked = [predictions[place] for place in places.tolist()] if predictions else None
    return Outputs(torch.cat(vectors)[places], ranked)


def dense_outputs(model: nn.Module, samples: Samples) -> tuple[Outputs, Samples]:
    """What the dense model returns for samples, and the samples with what its decoder reads.

    Raises:
        AptError: the decoder needs outputs that the samples do not have, and cannot write them.
    """
    written = greedy_outputs(model, samples) if writes(model) else None
    if lacks_outputs(model, samples):
        assert written is not None
        samples = with_outputs(samples, written)
    return replace(outputs_of(model, samples), written=written), samples


@contextmanager
def watched_body(model: Any) -> Iterator[list[Tensor]]:
    """Inside the context, the list gets the states that the body of a model with a head returns."""
    states, body = list[Tensor](), getattr(model, "base_model", model)

    def take(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0])

    handle = body.register_forward_hook(take) if body is not model else None
    try:
        yield states
    finally:
        if handle is not None:
            handle.remove()


def embeddings_of(output: Any) -> Tensor | None:
    """The embeddings that a model itself returns (samples, width); None if it returns none."""
    found = [each for name in _EMBEDDINGS if (each := getattr(output, name, None)) is not None]
    return torch.cat(found, dim=-1) if found else None


def _vectors(output: Any, states: Tensor | None, samples: int, *, first: bool) -> Tensor:
    """The vectors of a batch (samples, width)."""
    if (embeddings := embeddings_of(output)) is not None:
        return embeddings.float().cpu()
    found = output[0] if states is None else states
    if len(found) != samples:  # the patches of all images are one sequence
        found = found.flatten(0, -2).unflatten(0, (samples, -1))
    if found.ndim == 2:
        return found.float().cpu()
    positions = found.float().flatten(1, -2)
    return (positions[:, 0] if first else positions.mean(1)).cpu()


def similarity(model: nn.Module, samples: Samples, dense: Outputs) -> float:
    """The mean cosine of the vectors of samples to those of the dense model."""
    found = outputs_of(model, samples).vectors
    return float(nn.functional.cosine_similarity(found, dense.vectors).mean())


def neighbours(model: nn.Module, samples: Samples, dense: Outputs) -> float:
    """The share of the ten nearest neighbours of each sample that are the dense model's too.

    Neighbours are other samples, by the cosine of their vectors. Of fewer than twenty samples, half
    as many are the nearest ones as there are samples.

    Raises:
        AptError: there is one sample.
    """
    if len(samples) < 2:
        raise AptError("neighbours needs several samples", "measure on more", ("samples",))
    count = min(_NEIGHBOURS, len(samples) // 2)
    found, expected = (
        _nearest(each.vectors, count) for each in (outputs_of(model, samples), dense)
    )
    return float((found & expected).sum()) / (count * len(samples))


def _nearest(vectors: Tensor, count: int) -> Tensor:
    """For each pair of samples (samples, samples), True if the second is near the first."""
    units = nn.functional.normalize(vectors)
    cosines = (units @ units.T).fill_diagonal_(-math.inf)
    nearest = cosines.topk(count).indices
    return torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, nearest, True)


def same_predictions(model: nn.Module, samples: Samples, dense: Outputs) -> float:
    """The share of predictions that are the dense model's too; the mean over samples.

    Raises:
        AptError: the model has no head that predicts.
    """
    found = outputs_of(model, samples).predictions
    if found is None or dense.predictions is None:
        message = f"{type(model).__name__} has no head that predicts classes or tokens"
        raise AptError(message, "choose the metric similarity or neighbours", ("metrics",))
    pairs = zip(found, dense.predictions, strict=True)
    return sum(float((one == other).float().mean()) for one, other in pairs) / len(samples)


def class_accuracy(model: nn.Module, samples: Samples) -> float:
    """The share of samples whose class the model ranks first.

    Raises:
        AptError: the model does not classify samples, or their classes are not known.
    """
    if samples.labels is None:
        message = f"accuracy needs a model that classifies samples ({type(model).__name__}), and "
        raise AptError(
            f"{message}the class of each sample",
            "give a column label, or choose another metric",
            ("evaluation", "metrics"),
        )
    found = outputs_of(model, samples).predictions
    assert found is not None
    return float((torch.stack(found) == samples.labels).float().mean())


def spearman(model: nn.Module, samples: Samples) -> float:
    """The rank correlation of the cosines of pairs of texts with their scores.

    It is the main measure of MTEB's tasks of semantic similarity (Muennighoff et al., arXiv
    2210.07316, section 3.2).

    Raises:
        AptError: the samples are no pairs with scores, or all cosines or scores are equal.
    """
    from scipy.stats import spearmanr

    if samples.pairs is None:
        raise AptError(
            "spearman needs a model that reads each text alone, and pairs of texts with scores",
            "give the columns sentence1, sentence2 and score, or choose another metric",
            ("evaluation", "metrics"),
        )
    one, other = (outputs_of(model, each).vectors for each in (samples, samples.pairs.others))
    cosines, scores = nn.functional.cosine_similarity(one, other), samples.pairs.scores
    if any(bool((each == each[0]).all()) for each in (cosines, scores)):
        message = (
            f"spearman has no value: all scores or all cosines of {len(scores)} pairs are equal"
        )
        raise AptError(message, "measure on more pairs", ("samples",))
    return float(spearmanr(cosines.double().numpy(), scores.double().numpy()).statistic)


def token_changes(model: nn.Module, samples: Samples, dense: Outputs) -> float:
    """The changes from what the dense model writes to what a model writes, for each dense token.

    They are the fewest tokens to insert, remove or replace (the word error rate of transcripts,
    over tokens).

    Raises:
        AptError: the model does not write.
    """
    if dense.written is None or not writes(model):
        message = f"{type(model).__name__} has no decoder that writes"
        raise AptError(message, "choose another metric", ("metrics",))
    texts = [[each.tolist() for each in s] for s in (greedy_outputs(model, samples), dense.written)]
    count = sum(map(changes, *texts))
    return count / max(1, sum(map(len, texts[1])))


@default_modes()
@torch.no_grad()
def pseudo_perplexity(model: nn.Module, samples: Samples) -> float:
    """The exponential of the mean negative log-likelihood of masked tokens.

    Of each text, eight evenly spaced tokens are masked, each of them alone, so that all other
    tokens are read (Salazar et al., arXiv 1910.14659, eq. 2, on a part of the tokens). Special
    tokens are not masked.

    Raises:
        AptError: the model is not a masked language model.
    """
    if samples.mask is None or not hasattr(model, "get_output_embeddings"):
        message = f"{type(model).__name__} is no masked language model"
        raise AptError(message, "choose another metric", ("metrics",))
    device, special = next(model.parameters()).device, torch.tensor(samples.special)
    total, count = 0.0, 0
    with eval_mode(model):
        for sample in samples:
            ids = sample["input_ids"]
            plain = (~torch.isin(ids, special)).nonzero().flatten()
            if not len(plain):
                continue
            chosen = plain[torch.linspace(0, len(plain) - 1, min(_MASKED, len(plain))).long()]
            rows = torch.arange(len(chosen))
            inputs = {
                name: each.expand(len(chosen), *each.shape).clone() for name, each in sample.items()
            }
            inputs["input_ids"][rows, chosen] = samples.mask
            logits = model(**on_device(inputs, device)).logits  # type: ignore[arg-type]
            masked = logits[rows.to(device), chosen.to(device)].float()
            total += float(
                nn.functional.cross_entropy(masked, ids[chosen].to(device), reduction="sum")
            )
            count += len(chosen)
    return math.exp(min(total / max(1, count), 700.0))
