"""``apt-prune eval``."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from apt.cli.opening import find_model
from apt.errors import AptError
from apt.options import PrintingOptions
from apt_lab.options import EvalRun

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

    from apt.checkpoints.opened import Opened
    from apt.plugin.specs import EvaluatorSpec
    from apt_lab.windows import Score


def evaluate(run: EvalRun, printing: PrintingOptions) -> None:
    """Measure a model over consecutive windows of text, or let it answer tasks.

    With --tasks, text is measured only if --metric or --data is given. The exit status is 1 if a
    measure is not a finite number.
    """
    from apt.cli.output import notice
    from apt.cli.progress import Progress
    from apt.plugin.registry import registry

    plain = () if run.tasks and run.data is None else ("perplexity",)
    measures = [registry().evaluators.get(name) for name in run.metrics or plain]
    _check_dense([spec.name for spec in measures if spec.dense], run.dense)
    questions = run.known_tasks(trust_remote_code=run.trust_remote_code)
    source = find_model(run.model, run)

    from apt.checkpoints.load import load_tokenizer, open_shell
    from apt.checkpoints.stored import open_stored
    from apt.engine.machine import choose_device, read_dtype
    from apt.engine.prepare import capped
    from apt.engine.text import check_same_vocabulary

    dense = None if run.dense is None else find_model(run.dense, run)
    beside = None if dense is None else open_shell(dense, registry(), packed=True)
    shell = open_shell(source, registry(), run.adapter, packed=not run.stream)
    if run.adapter is not None:
        for _, block in shell.adapter.blocks(shell.module):
            shell.adapter.sites(block)  # raises if the adapter is for another family
    if run.stream:
        open_stored(shell)
    notices: list[str] = []
    reader = load_tokenizer(source, run.tokenizer)
    text = None
    if measures:
        text = _read_text(run, reader, capped(run.seqlen, shell, notices.append))
        text.check(shell)
    if beside is not None:
        check_same_vocabulary(shell, beside)
    for line in notices:
        notice(line)
    with Progress("loading the model") as progress, ExitStack() as stack:
        given = text, read_dtype(run.dtype), choose_device(run.device)
        models = [stack.enter_context(_runnable(shell, *given, run.stream))]
        if beside is not None:
            models.append(stack.enter_context(_runnable(beside, *given, stream=False)))
        scores = {} if text is None else _measured(models, text, measures, progress.status)
        progress.status("answering tasks" if questions else "done")
        trust = run.trust_remote_code
        answered = _answered(models, reader, questions, run.limit, trust=trust)
    _show(run.model, text, scores, answered, as_json=printing.as_json)
    if text is not None:
        _check_finite(scores, run.model, text.name)


@dataclass(frozen=True)
class _Text:
    """Text to measure on: its source, the windows (windows, seqlen), and their first token."""

    name: str
    tokens: "Tensor"
    bos: int | None
    first: str

    def check(self, model: "Opened") -> None:
        """Raise if a token has no embedding in the model."""
        from apt.engine.text import check_vocabulary

        check_vocabulary(self.tokens, model.module, model.source.reference)

    def record(self, scores: "Mapping[str, Score]") -> dict[str, Any]:
        """What was measured on the text, for JSON."""
        from apt.text.datasets import digest

        windows, seqlen = self.tokens.shape
        dense = {name: one.dense for name, one in scores.items() if one.dense is not None}
        spreads = {name: asdict(one.spread) for name, one in scores.items() if one.spread}
        return {
            "data": self.name, **{name: one.value for name, one in scores.items()},
            **({"dense": dense} if dense else {}), **({"spread": spreads} if spreads else {}),
            "windows": windows, "seqlen": seqlen, "bos": self.bos,
            "tokens_sha256": digest(self.tokens),
        }  # fmt: skip


def _read_text(run: EvalRun, reader: Any, seqlen: int) -> _Text:
    from apt.plugin.registry import registry
    from apt.text.datasets import documents, evaluation_tokens
    from apt.text.special_tokens import bos_of

    source = run.data or "builtin"
    found = documents(source, "evaluation", registry())
    bos = bos_of(reader) if run.bos else None
    tokens = evaluation_tokens(reader, found, run.samples, seqlen, source, bos)
    return _Text(source, tokens, bos, "" if bos is None else str(reader.bos_token))


def _measured(
    models: "Sequence[nn.Module]",
    text: _Text,
    measures: "Sequence[EvaluatorSpec]",
    status: Callable[[str], None],
) -> "dict[str, Score]":
    """The metrics of the first model, beside those of the dense model if it is given."""
    from apt.evaluation import kept_states
    from apt_lab.windows import Score, score_beside

    scores = {}
    with ExitStack() as stack:
        for model in models if len(measures) > 1 else ():
            stack.enter_context(kept_states(model))
        for spec in measures:
            status(f"measuring {spec.name} on {text.tokens.numel():,} tokens")
            if len(models) > 1:
                scores[spec.name] = score_beside(spec, models[0], text.tokens, models[1])
            else:
                scores[spec.name] = Score(spec.measure(models[0], text.tokens))
    return scores


def _answered(
    models: "Sequence[nn.Module]",
    reader: Any,
    tasks: Sequence[str],
    limit: int | None,
    *,
    trust: bool,
) -> dict[str, Any]:
    """The summary of each task, with the differences from the dense model if it is given."""
    if not tasks:
        return {}
    from apt.cli.output import has_live_display
    from apt_lab.tasks.answers import summary
    from apt_lab.tasks.harness import answer

    given: dict[str, Any] = {"progress": has_live_display(), "trust_remote_code": trust}
    found = [answer(m, reader, tasks, limit, **given) for m in models]
    return {own.task: summary(own, *others) for own, *others in zip(*found, strict=True)}


def _show(
    model: str,
    text: _Text | None,
    scores: "Mapping[str, Score]",
    answered: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    from apt.cli.output import out, show, show_json
    from apt_lab.commands.score_tables import score_table, task_table

    if as_json:
        record = {} if text is None else text.record(scores)
        show_json({"model": model, **record, **({"tasks": answered} if answered else {})})
        return
    if text is not None:
        windows, seqlen = text.tokens.shape
        figures = ", ".join(f"{name} {one.value:.3f}" for name, one in scores.items())
        begin = f", each with {text.first} first" if text.first else ""
        out.print(
            f"{model}: {figures} on {text.name}, {windows} × {seqlen} tokens{begin}", markup=False
        )
        if any(one.dense is not None or one.spread is not None for one in scores.values()):
            show(score_table(scores))
    if answered:
        show(task_table(answered))


def _check_dense(metrics: Sequence[str], dense: str | None) -> None:
    """Raise if a metric needs a dense model that is not given."""
    if metrics and dense is None:
        raise AptError(
            f"the metric {metrics[0]} compares with the dense model", "name it", ("dense",)
        )


def _check_finite(scores: "Mapping[str, Score]", model: str, data: str) -> None:
    """Exit with status 1 if a measure is not a finite number."""
    from apt.cli.output import show_error

    wrong = [name for name, one in scores.items() if not math.isfinite(one.value)]
    if wrong:
        show_error(f"{model} has no {wrong[0]} on {data}: its outputs there are not finite")
        raise typer.Exit(1)


@contextmanager
def _runnable(
    shell: "Opened", text: _Text | None, dtype: "torch.dtype | None", device: str, stream: bool
) -> "Iterator[nn.Module]":
    """The model, ready to run; with ``stream`` block by block on the tokens of ``text``."""
    from apt.checkpoints.load import load
    from apt.evaluation.blockwise import streamed

    if stream and text is not None:
        with streamed(shell, text.tokens, device) as module:
            yield module
    else:
        loaded = load(shell, dtype, device)
        with loaded.adapter.running(loaded.module):
            yield loaded.module
