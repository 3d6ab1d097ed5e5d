"""Norm tuning: the vectors of a pruned model are trained towards the outputs of the dense model.

The vectors of a model are its norms and biases. Their training needs little memory beyond the
model: no matrix has a gradient, and all matrices keep their bytes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.adapter.recording import eval_mode
from apt.compute import if_it_runs, mixed_precision, round_parameter
from apt.errors import AptError
from apt.recovery.teacher import divergence
from apt.text.language_model import language_model

_TOP = 64  # logits of the dense model that are kept for each token
TOKEN_BYTES = _TOP * (4 + 2)
"""The bytes of the kept outputs for each token."""
STEP_TOKENS = 512
"""The tokens of a step, at least."""
_MEASURED_SHARE, _MOST_MEASURED = 8, 4  # one of eight samples is not trained on, and at most four
_WARM_UP = 0.03  # of the steps
_WHOLE_RATE = 0.8  # nats for each token: the rate is lower for a smaller divergence


@dataclass(frozen=True)
class NormTuning:
    """The settings of norm tuning.

    Attributes:
        epochs: passes over the text.
        rate: the highest learning rate, as a share of the size of an entry. It rises over the first
            3 % of the steps, and falls to zero along a cosine. It is for a divergence of 0.8 nats
            or more from the dense model, and in proportion for less: less is to be corrected.
        tokens: the tokens of the text, at most.
    """

    epochs: int
    rate: float = 1e-2
    tokens: int = 2**15

    def share(self, samples: int, seqlen: int) -> float:
        """The number of windows of the text for each of ``samples`` samples, at most 1."""
        return min(1.0, self.tokens / (samples * seqlen))


@dataclass(frozen=True)
class TunedNorms:
    """The result of norm tuning.

    Attributes:
        names: the names of the trained vectors.
        divergence: the divergence from the dense model before and after, in nats for each token,
            on samples that were not trained.
        kept: False if the divergence did not fall, and the vectors are as before.
    """

    names: tuple[str, ...]
    divergence: tuple[float, float]
    kept: bool

    def record(self) -> dict[str, Any]:
        """The entry of the report."""
        return {
            "vectors": len(self.names), "divergence": list(self.divergence), "kept": self.kept
        }  # fmt: skip


@dataclass(frozen=True)
class DenseOutputs:
    """The largest logits of the dense model on samples of text.

    Attributes:
        samples: the token ids (samples, seqlen).
        tokens: the tokens of the largest logits (samples, seqlen, top).
        logs: their log-probabilities, in fp16.
    """

    samples: Tensor
    tokens: Tensor
    logs: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: nn.Module,
        adapter: Adapter,
        samples: Tensor,
        compute: str,
        progress: Callable[[], None] = lambda: None,
    ) -> "DenseOutputs":
        """Run the dense model on ``samples`` (samples, seqlen).

        Args:
            compute: the name of the compute dtype, see `apt.compute.mixed_precision`.
            progress: called after each sample.
        """
        found = list[tuple[Tensor, Tensor]]()
        with eval_mode(model), adapter.running(model), _precision(model, compute, samples[0]):
            for sample in samples:
                logs = _logits(model, sample[None])[0].float().log_softmax(-1)
                values, tokens = logs.topk(min(_TOP, logs.shape[-1]))
                found.append((tokens.int().cpu(), values.half().cpu()))
                progress()
        return cls(samples, *map(torch.stack, zip(*found, strict=True)))

    def divergence(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """The mean divergence of a model on some samples, see `apt.recovery.teacher.divergence`."""
        index = torch.tensor(rows)
        logits = _logits(model, self.samples[index])
        tokens, logs = self.tokens[index].long(), self.logs[index].float()
        return divergence(logits, tokens.to(logits.device), logs.to(logits.device))


@torch.inference_mode(mode=False)  # the caller's inference mode would rule out gradients
def tune_norms(
    model: nn.Module,
    adapter: Adapter,
    outputs: DenseOutputs,
    tuning: NormTuning,
    compute: str,
    *,
    fixed: Sequence[Tensor] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> TunedNorms:
    """Train the vectors of a pruned model, in place.

    The change of a vector is relative to the size of its entries, so that one rate serves vectors
    of all sizes. If the divergence from the dense model is not lower afterwards, on samples that
    are not trained, the vectors are as before.

    Args:
        outputs: the outputs of the dense model on the calibration text.
        compute: the name of the compute dtype, see `apt.compute.mixed_precision`.
        fixed: parameters that do not change, such as vectors with zeros.
        dtypes: the stored dtypes of parameters, by their names: the vectors are rounded to them.
        progress: called after each step.

    Raises:
        AptError: the model has no vectors, or a value is beyond the range of its stored dtype.
    """
    vectors = [
        _Vector(name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and not any(parameter is other for other in fixed)
    ]
    if not vectors:
        raise AptError("the model has no norms or biases to train", "leave out norm epochs")
    rows = range(len(outputs.samples))
    count = min(len(rows) // _MEASURED_SHARE, _MOST_MEASURED)
    trained, measured = (rows[:-count], rows[-count:]) if count else (rows, rows)

    @torch.no_grad()
    def measure() -> float:
        parts = [float(outputs.divergence(model, [row])) for row in measured]
        return math.fsum(parts) / len(parts)

    with eval_mode(model), adapter.running(model), _precision(model, compute, outputs.samples[0]):
        before = measure()
        try:
            with _gradients_of(model, vectors):
                rate = tuning.rate * min(1.0, before / _WHOLE_RATE)
                _train(model, vectors, outputs, trained, replace(tuning, rate=rate), progress)
            for vector in vectors:
                vector.round((dtypes or {}).get(vector.name))
            after = measure()
        except BaseException:
            _restore(vectors)
            raise
        if not after < before:
            _restore(vectors)
    return TunedNorms(tuple(vector.name for vector in vectors), (before, after), after < before)


class _Vector:
    """A vector that is trained: its values at the start, and the change in units of its entries.

    The unit of an entry is its magnitude, but at least the root mean square of the vector.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.before = parameter.detach().clone()
        self._start = self.before.float()
        self._unit = self._start.abs().clamp_min(self._start.square().mean().sqrt())
        self.change = torch.zeros_like(self._start)

    def receive(self, gradient: Tensor | None) -> None:
        """Set the gradient of the change."""
        if gradient is None:  # a module that does not run
            gradient = torch.zeros_like(self.change)
        self.change.grad = gradient.float() * self._unit

    def apply(self) -> None:
        """Set the values of the parameter."""
        self.parameter.data.copy_(self._start + self._unit * self.change)

    def round(self, dtype: torch.dtype | None) -> None:
        """Round the values to the stored dtype."""
        if dtype is not None:
            round_parameter(self.name, self.parameter, dtype)


def _restore(vectors: Sequence[_Vector]) -> None:
    for vector in vectors:
        vector.parameter.data.copy_(vector.before)


@contextmanager
def _gradients_of(model: nn.Module, vectors: Sequence[_Vector]) -> Iterator[None]:
    """While entered, the vectors need gradients, and no other parameters."""
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for vector in vectors:
        vector.parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, value in needed.items():
            parameter.requires_grad_(value)


def _train(
    model: nn.Module,
    vectors: Sequence[_Vector],
    outputs: DenseOutputs,
    rows: Sequence[int],
    tuning: NormTuning,
    progress: Callable[[], None],
) -> None:
    """Train the vectors on some samples."""
    size = math.ceil(STEP_TOKENS / outputs.samples.shape[1])
    steps = [rows[i : i + size] for i in range(0, len(rows), size)] * tuning.epochs
    warm_up = math.ceil(_WARM_UP * len(steps))

    def factor(index: int) -> float:
        if index < warm_up:
            return (index + 1) / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (index - warm_up) / max(1, len(steps) - warm_up))

    changes = [vector.change for vector in vectors]
    optimizer = torch.optim.Adam(changes, lr=tuning.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for samples in steps:
        loss = outputs.divergence(model, samples)
        parameters = [vector.parameter for vector in vectors]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for vector, gradient in zip(vectors, gradients, strict=True):
            vector.receive(gradient)
        nn.utils.clip_grad_norm_(changes, 1.0)
        optimizer.step()
        schedule.step()
        for vector in vectors:
            vector.apply()
        progress()


def _logits(model: nn.Module, samples: Tensor) -> Tensor:
    tokens = samples.to(next(model.parameters()).device)
    logits: Tensor = language_model(model)(input_ids=tokens, use_cache=False).logits
    return logits


def _precision(model: nn.Module, compute: str, sample: Tensor) -> torch.autocast:
    """The precision of the products. Some models do not run in mixed precision."""
    mixed = mixed_precision(model.parameters(), compute, cache=False)
    return if_it_runs(mixed, lambda: _logits(model, sample[None]))
