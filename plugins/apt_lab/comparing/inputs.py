"""What a comparison calibrates and measures on: windows of text, or the samples of other models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from apt import PruneRun, calibration_tokens, evaluation_tokens, other_tokens
from apt.adapter import Samples
from apt.engine.samples import held_out_samples, metrics_for, read_samples
from apt.evaluation.generated import greedy_outputs, lacks_outputs, with_outputs
from apt.evaluation.outputs import Outputs, dense_outputs
from apt.extending import Opened, capped, check_vocabulary, load_tokenizer, registry
from apt.hookspecs import EvaluatorSpec
from apt_lab.options import SAMPLES, CompareRun
from apt_lab.windows import Windows, score


@dataclass
class Measured:
    """What models are measured on.

    Attributes:
        inputs: token ids (windows, seqlen) of a decoder of text, or the samples of another model.
        outputs: what the dense model returns for the samples; None for windows.
    """

    inputs: Tensor | Samples
    outputs: Outputs | None = None

    def score(
        self, spec: EvaluatorSpec, module: nn.Module, dense: nn.Module
    ) -> tuple[float, Windows | None]:
        """A metric of a model, and that of each window or sample if it is a mean over them."""
        return score(spec, module, self.inputs, self.outputs or dense)


@dataclass
class Inputs:
    """The inputs of a comparison.

    Attributes:
        metrics: the metrics by name.
        tokenizer: the tokenizer of a decoder of text; None for other models.
        calibration: token ids (samples, seqlen), or the samples of another model.
        measured: what is measured on, by the names of the sources.
        other_tokens: token ids (windows, seqlen) of the calibration text that are not among the
            samples, for the training of norms; None for other models.
        words: the kinds of inputs of a model that reads no windows of text; else None.
    """

    metrics: dict[str, EvaluatorSpec]
    tokenizer: Any
    calibration: Tensor | Samples
    measured: dict[str, Measured]
    other_tokens: Tensor | None = None
    words: str | None = None

    def complete(self, model: nn.Module) -> None:
        """Add what the dense model writes or returns for samples.

        Args:
            model: the dense model, in the dtype that it computes in.

        Raises:
            AptError: the decoder needs outputs that the samples do not have, and cannot write them.
        """
        if isinstance(self.calibration, Samples) and lacks_outputs(model, self.calibration):
            written = greedy_outputs(model, self.calibration)
            self.calibration = with_outputs(self.calibration, written)
        for name, each in self.measured.items():
            if isinstance(each.inputs, Samples):
                outputs, samples = dense_outputs(model, each.inputs)
                self.measured[name] = Measured(samples, outputs)


def read_inputs(run: CompareRun, skeleton: Opened, notice: Callable[[str], None]) -> Inputs:
    """Read the inputs of a comparison.

    Args:
        run: the options.
        skeleton: the dense model.
        notice: called with a line about a value that was changed.

    Raises:
        AptError: a source cannot be read, or does not have what the model takes; or a metric is for
            another kind of models.
    """
    names = metrics_for(skeleton, run, registry())
    metrics = {name: registry().evaluators.get(name) for name in names}
    length = capped(run.seqlen, skeleton, notice)
    if skeleton.reads.windows:
        return Inputs(metrics, *_windows(run, skeleton, length))
    given = PruneRun(
        model=run.model, calibration=run.calibration, samples=run.samples, seqlen=length,
        seed=run.seed,
    )  # fmt: skip
    text = read_samples(
        given, skeleton, registry(), samples=run.samples, windows=None, measures=False
    )
    measured = {
        name: Measured(held_out_samples(name, given, skeleton, registry(), run.windows or SAMPLES))
        for name in run.data
    }
    return Inputs(metrics, text.tokenizer, text.tokens, measured, words=skeleton.reads.words)


def _windows(
    run: CompareRun, skeleton: Opened, length: int
) -> tuple[Any, Tensor, dict[str, Measured], Tensor]:
    """The tokenizer of a decoder of text, its calibration samples and windows, and other text."""
    tokenizer = load_tokenizer(skeleton.source)
    settings: dict[str, Any] = {"seqlen": length, "bos": run.bos}
    calibration, others = (
        draw(tokenizer, run.calibration, samples=run.samples, seed=run.seed, **settings)
        for draw in (calibration_tokens, other_tokens)
    )
    held_out = {
        name: evaluation_tokens(tokenizer, name, samples=run.windows, **settings)
        for name in run.data
    }
    for tokens in (calibration, others, *held_out.values()):
        check_vocabulary(tokens, skeleton.module, skeleton.source.reference)
    measured = {name: Measured(each) for name, each in held_out.items()}
    return tokenizer, calibration, measured, others
