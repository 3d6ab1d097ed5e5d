"""``apt-prune eval``."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from apt.cli import arguments as args
from apt.engine.limits import check_dtype, check_windows
from apt.errors import AptError
from apt_lab.commands.arguments import LIMIT, TASKS, check_limit, read_tasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

    from apt.checkpoints.model import Model
    from apt.cli.progress import Progress
    from apt.evaluation.windows import Score
    from apt.locations.model_source import Source
    from apt.plugin.specs import EvaluatorSpec


def evaluate(
    model: str = typer.Argument(help="Directory, hub name, .gguf file or zoo:NAME."),
    data: str | None = typer.Option(
        None,
        "--data",
        metavar="SRC",
        help="Text, builtin by default; the same values as --calibration of apt-prune prune.",
    ),
    metric: list[str] | None = typer.Option(
        None,
        "--metric",
        metavar="NAME",
        help="perplexity (the default) or accuracy; with --dense also divergence or agreement; "
        "repeatable.",
    ),
    tasks: list[str] = TASKS,
    limit: int | None = LIMIT,
    dense: str | None = typer.Option(
        None,
        "--dense",
        metavar="MODEL",
        help="The dense model, to compare the metrics and the answers to --tasks with; the metrics "
        "divergence and agreement need it.",
    ),
    samples: int | None = typer.Option(
        None, "--samples", help="Number of windows; by default all."
    ),
    seqlen: int = typer.Option(
        2048, "--seqlen", help="Tokens of a window; at most the model's positions."
    ),
    adapter: str | None = args.ADAPTER,
    device: str = args.DEVICE,
    dtype: str = args.DTYPE,
    tokenizer: str | None = args.TOKENIZER,
    no_bos: bool = args.NO_BOS,
    stream: bool = typer.Option(
        False, "--stream", help="Read block by block, with one block in memory at a time."
    ),
    as_json: bool = args.JSON,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
) -> None:
    """Measure a model over consecutive windows of text, or let it answer tasks.

    With --tasks, text is measured only if --metric or --data is given. The exit status is 1 if a
    measure is not a finite number.
    """
    check_windows(samples, seqlen)
    check_dtype(dtype)
    check_limit(limit, tasks)
    if stream and (dtype != "auto" or tasks):
        whole = "--tasks" if tasks else "--dtype"
        raise AptError(f"{whole} needs the whole model in memory", f"leave out {whole} or --stream")
    from apt.cli.output import notice
    from apt.cli.progress import Progress
    from apt.plugin.registry import registry

    plain = [] if tasks and data is None else ["perplexity"]
    measures = [registry().evaluators.get(name) for name in metric or plain]
    _check_dense([spec.name for spec in measures if spec.dense], dense, stream=stream)
    questions = read_tasks(tasks, trust_remote_code=trust_remote_code)
    hub = args.read_hub(revision, token, cache_dir)

    def find(name: str) -> "Source":
        return args.find_model(name, registry(), hub, trust_remote_code=trust_remote_code)

    source = find(model)

    from apt.checkpoints.load import load_tokenizer, skeleton
    from apt.checkpoints.stored import open_stored
    from apt.engine.machine import choose_device, read_dtype
    from apt.engine.prepare import capped
    from apt.engine.text import check_same_vocabulary

    beside = None if dense is None else skeleton(find(dense), registry(), packed=True)
    shell = skeleton(source, registry(), adapter, packed=not stream)
    if adapter is not None:
        for _, block in shell.adapter.blocks(shell.module):
            shell.adapter.sites(block)  # raises if the adapter is for another family
    if stream:
        open_stored(shell)
    notices: list[str] = []
    reader = load_tokenizer(source, tokenizer)
    text = None
    if measures:
        seqlen = capped(seqlen, shell, notices.append)
        text = _read_text(data or "builtin", reader, samples, seqlen, token, no_bos=no_bos)
        text.check(shell)
    if beside is not None:
        check_same_vocabulary(shell, beside)
    for line in notices:
        notice(line)
    with Progress("loading the model") as progress, ExitStack() as stack:
        given = text, read_dtype(dtype), choose_device(device)
        models = [stack.enter_context(_runnable(shell, *given, stream))]
        if beside is not None:
            models.append(stack.enter_context(_runnable(beside, *given, stream=False)))
        scores = {} if text is None else _measured(models, text, measures, progress)
        progress.status("answering tasks" if questions else "done")
        answered = _answered(models, reader, questions, limit, trust=trust_remote_code)
    _show(model, text, scores, answered, as_json=as_json)
    if text is not None:
        _check_finite(scores, model, text.name)


@dataclass(frozen=True)
class _Text:
    """Text to measure on: its source, the windows (windows, seqlen), and their first token."""

    name: str
    tokens: "Tensor"
    bos: int | None
    first: str

    def check(self, model: "Model") -> None:
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


def _read_text(
    source: str, reader: Any, samples: int | None, seqlen: int, token: str | None, *, no_bos: bool
) -> _Text:
    from apt.plugin.registry import registry
    from apt.text.datasets import documents, evaluation_tokens
    from apt.text.special_tokens import bos_of

    found = documents(source, "evaluation", registry(), token)
    bos = None if no_bos else bos_of(reader)
    tokens = evaluation_tokens(reader, found, samples, seqlen, source, bos)
    return _Text(source, tokens, bos, "" if bos is None else str(reader.bos_token))


def _measured(
    models: "Sequence[nn.Module]",
    text: _Text,
    measures: "Sequence[EvaluatorSpec]",
    progress: "Progress",
) -> "dict[str, Score]":
    """The metrics of the first model, beside those of the dense model if it is given."""
    from apt.evaluation import kept_states
    from apt.evaluation.windows import Score, score_beside

    scores = {}
    with ExitStack() as stack:
        for model in models if len(measures) > 1 else ():
            stack.enter_context(kept_states(model))
        for spec in measures:
            progress.status(f"measuring {spec.name} on {text.tokens.numel():,} tokens")
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


def _check_dense(metrics: Sequence[str], dense: str | None, *, stream: bool) -> None:
    """Raise if a metric needs a dense model that is not given, or that cannot be streamed."""
    if metrics and dense is None:
        raise AptError(
            f"the metric {metrics[0]} compares with the dense model", "add --dense MODEL"
        )
    if dense is not None and stream:
        raise AptError("--dense needs both models in memory", "leave out --stream")


def _check_finite(scores: "Mapping[str, Score]", model: str, data: str) -> None:
    """Exit with status 1 if a measure is not a finite number."""
    from apt.cli.output import show_error

    wrong = [name for name, one in scores.items() if not math.isfinite(one.value)]
    if wrong:
        show_error(f"{model} has no {wrong[0]} on {data}: its outputs there are not finite")
        raise typer.Exit(1)


@contextmanager
def _runnable(
    shell: "Model", text: _Text | None, dtype: "torch.dtype | None", device: str, stream: bool
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
