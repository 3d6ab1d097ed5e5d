"""The steps that runs in memory and streamed runs share: text, measures, the report."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.errors import AptError, first_line
from apt.output.report import Report, portable
from apt.runs.prepare import Prepared, RunOptions
from apt.text.datasets import calibration_tokens, digest, documents, evaluation_tokens
from apt.text.special_tokens import bos_of, special_ids


class Unmeasured(AptError):
    """A pruned model is written and verified, but a measure of it failed."""

    def __init__(self, output: Path, error: Exception) -> None:
        what = f"{type(error).__name__}: {first_line(error)}"
        super().__init__(
            f"{output} is written and verified, but measuring it failed: {what}",
            f"measure it with: apt-prune eval {output}",
        )
        self.__cause__ = error


def sparing(prepared: Prepared, tokenizer: Any) -> Prepared:
    """The run, in which no token drawn at random is a special one of the tokenizer."""
    return replace(prepared, mode=prepared.mode.sparing(special_ids(tokenizer)))


def chosen_bos(options: RunOptions, tokenizer: Any) -> int | None:
    """What every sample and window begins with; None where there is no such token, or by option."""
    return bos_of(tokenizer) if options.bos else None


def texts(prepared: Prepared, tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    """The tokens to calibrate on that are given, and those to measure on if any are asked for."""
    options, registry = prepared.options, prepared.registry
    seqlen, bos = options.seqlen, chosen_bos(options, tokenizer)
    token = options.hub.token
    found: Iterable[str] = ()
    if options.samples:
        found = documents(options.calibration, "calibration", registry, token)
    tokens = calibration_tokens(
        tokenizer, found, options.samples, seqlen, options.seed, options.calibration, bos
    )
    if options.evaluation is None:
        return tokens, None
    found = documents(options.evaluation, "evaluation", registry, token)
    most = options.samples or options.own_samples
    held_out = evaluation_tokens(
        tokenizer, found, most, seqlen, options.evaluation, bos, fewer=True
    )
    return tokens, held_out


def check_vocabulary(tokens: Tensor, module: nn.Module, reference: str) -> None:
    """Raise where a token has no embedding."""
    vocabulary = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise AptError(
            f"the tokenizer of {reference} gives ids up to {int(tokens.max())}, "
            f"but the model has {vocabulary} embeddings",
            "the tokenizer belongs to another model",
        )


def unfinished(prepared: Prepared, tokens: Tensor, sha256: str, bos: int | None) -> Report:
    """The report of a run that has not begun."""
    options, shell = prepared.options, prepared.shell
    return Report(
        options.record() | prepared.mode.record(),
        {
            "reference": portable(options.model),
            "type": shell.config.model_type,
            "adapter": shell.spec.name,
            "sha256": sha256,
        },
        {
            "source": portable(options.calibration),
            "own_samples": options.own_samples,
            "bos": bos,
            "shape": list(tokens.shape),
            "sha256": digest(tokens),
        },
        [],
        [site.name for site in prepared.plan.sites if site.pattern is None],
        0.0,
    )


def measure(
    prepared: Prepared,
    module: nn.Module,
    held_out: Tensor,
    when: str,
    status: Callable[[str], None],
) -> dict[str, float]:
    """Each of the run's metrics, of a model that is `Adapter.running`."""
    measured = {}
    for name in prepared.options.metrics:
        status(f"measuring {name} {when} pruning")
        measured[name] = float(prepared.registry.evaluators.get(name).load()(module, held_out))
    return measured


def scored(prepared: Prepared, held_out: Tensor | None, found: dict[str, Any]) -> dict[str, Any]:
    """What was measured before and after, if anything was, with the text, for the report."""
    if held_out is None or not found:
        return {}
    source = portable(str(prepared.options.evaluation))
    return {"source": source, "shape": list(held_out.shape), **found}
