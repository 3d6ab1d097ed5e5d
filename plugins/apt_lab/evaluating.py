"""The metrics of a model on text and its answers to tasks, compared with the dense model if given.

The options are checked before torch is imported.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from apt.engine.opening import find_source
from apt.errors import AptError
from apt.extending import registry
from apt.hookspecs import EvaluatorSpec
from apt_lab.options import SAMPLES, EvalRun

if TYPE_CHECKING:
    from torch import Tensor, nn

    from apt.adapter import Samples
    from apt.extending import Opened, Source
    from apt_lab.windows import Score


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a model.

    Attributes:
        run: the options.
        tokens: the windows of the text (windows, seqlen), or other samples; None if no text was
            measured.
        bos: the token that begins each window, as an id and as text; None without such a token.
        scores: the metrics on the text by name.
        tasks: the summary of each task, see `apt_lab.tasks.answers.summary`.
    """

    run: EvalRun
    tokens: "Tensor | Samples | None"
    bos: tuple[int, str] | None
    scores: "Mapping[str, Score]"
    tasks: Mapping[str, Any]

    @property
    def of_windows(self) -> bool:
        """True if a decoder of text was measured, on windows of text."""
        return hasattr(self.tokens, "new_ones")

    @property
    def not_finite(self) -> str | None:
        """The first metric that is not a finite number."""
        return next((k for k, score in self.scores.items() if not math.isfinite(score.value)), None)

    def record(self) -> dict[str, Any]:
        """The measurements as values for JSON."""
        tasks = {"tasks": self.tasks} if self.tasks else {}
        if self.tokens is None:
            return {"model": self.run.model, **tasks}
        from apt.text.datasets import digest

        windows, seqlen = self.tokens.shape
        dense = {
            name: score.dense for name, score in self.scores.items() if score.dense is not None
        }
        spreads = {
            name: asdict(score.spread) for name, score in self.scores.items() if score.spread
        }
        return {
            "model": self.run.model, "data": self.run.data,
            **{name: score.value for name, score in self.scores.items()},
            **({"dense": dense} if dense else {}), **({"spread": spreads} if spreads else {}),
            "windows": windows, "seqlen": seqlen, "bos": self.bos and self.bos[0],
            "tokens_sha256": digest(self.tokens), **tasks,
        }  # fmt: skip


def evaluate(
    run: EvalRun,
    status: Callable[[str], None] = lambda text: None,
    notice: Callable[[str], None] = lambda line: None,
    *,
    progress: bool = False,
) -> Evaluation:
    """Measure a model, as ``apt-prune eval`` does.

    Args:
        run: the options.
        status: called with a text for each step.
        notice: called with a line about a value that was changed.
        progress: True if lm-evaluation-harness may show its progress on standard error.

    Raises:
        AptError: an option is wrong, or a model, the text or a task cannot be read.
    """
    run.check()
    measures = _metrics(run)
    tasks = run.known_tasks(trust_remote_code=run.trust_remote_code)
    sources = []
    for reference in (run.model, run.dense) if run.dense else (run.model,):
        status(f"looking for {reference}")
        sources.append(find_source(reference, run, registry()))
    run = replace(run, data=run.data or "builtin")

    from apt.engine.prepare import with_compute
    from apt.extending import choose_device, load_tokenizer
    from apt.modes import default_modes
    from apt.text.special_tokens import bos_of

    device = choose_device(run.device)
    skeletons = _skeletons(run, sources)
    if not skeletons[0].reads.windows:
        return _on_samples(run, skeletons, status, notice)
    tokenizer = load_tokenizer(sources[0], run.tokenizer)
    tokens = _windows(run, tokenizer, skeletons[0], notice) if measures else None
    for each in skeletons:
        with_compute(each, run, device, notice)  # for its notice about the compute dtype
    bos_id = bos_of(tokenizer) if run.bos else None
    status("loading the model")
    with default_modes(), ExitStack() as stack:
        models = [stack.enter_context(_runnable(skeleton, tokens, run)) for skeleton in skeletons]
        scores = {} if tokens is None else _scores(models, tokens, measures, status)
        if tasks:
            status("answering tasks")
        answered = _answers(models, tokenizer, tasks, run, progress=progress)
    bos = None if bos_id is None else (bos_id, str(tokenizer.bos_token))
    return Evaluation(run, tokens, bos, scores, answered)


def _on_samples(
    run: EvalRun,
    skeletons: "Sequence[Opened]",
    status: Callable[[str], None],
    notice: Callable[[str], None],
) -> Evaluation:
    """The measurements of a model that does not read windows of text.

    Raises:
        AptError: the model cannot answer tasks, or a metric needs the dense model.
    """
    from apt.engine.samples import held_out_samples, metrics_for
    from apt.evaluation.outputs import dense_outputs
    from apt.extending import capped
    from apt.modes import default_modes
    from apt_lab.windows import Score, score_beside

    for name in (name for name in ("tasks", "stream") if getattr(run, name)):
        skeletons[0].check_windows(name)
    names = metrics_for(skeletons[0], run, registry())
    specs = [registry().evaluators.get(name) for name in names]
    if run.dense is None and (dense_only := [spec.name for spec in specs if spec.dense]):
        message = f"the metric {dense_only[0]} compares with the dense model"
        raise AptError(message, "name it", ("dense",))
    run = replace(run, seqlen=capped(run.seqlen, skeletons[0], notice))
    samples = held_out_samples(str(run.data), run, skeletons[0], registry(), run.samples or SAMPLES)
    status("loading the model")
    with default_modes(), ExitStack() as stack:
        models = [stack.enter_context(_runnable(skeleton, None, run)) for skeleton in skeletons]
        scores, outputs = {}, None
        if any(spec.dense for spec in specs):
            status("running the dense model")
            outputs, samples = dense_outputs(models[1], samples)
        for spec in specs:
            status(f"measuring {spec.name} on {len(samples)} samples")
            if len(models) == 1:
                scores[spec.name] = Score(spec.measure(models[0], samples))
            else:
                scores[spec.name] = score_beside(spec, models[0], samples, models[1], outputs)
    return Evaluation(run, samples, None, scores, {})


def _metrics(run: EvalRun) -> list[EvaluatorSpec]:
    """The metrics on text; empty if only tasks are answered."""
    default = () if run.tasks and run.data is None else ("perplexity",)
    specs = [registry().evaluators.get(name) for name in run.metrics or default]
    if run.dense is None and (dense_only := [spec.name for spec in specs if spec.dense]):
        raise AptError(
            f"the metric {dense_only[0]} compares with the dense model", "name it", ("dense",)
        )
    return specs


def _skeletons(run: EvalRun, sources: "Sequence[Source]") -> "list[Opened]":
    """The model, and the dense one if it is given, without weights."""
    from apt.checkpoints.stored import open_stored
    from apt.engine.prepare import tower_in
    from apt.extending import check_same_vocabulary, open_skeleton

    whole = not run.stream
    model = open_skeleton(sources[0], registry(), run.adapter, packed=whole, expanded=run.stream)
    model = tower_in(model, run.stack, registry(), run.adapter)
    if run.adapter is not None:
        for _, block in model.adapter.blocks(model.module):
            model.adapter.sites(block)  # raises if the adapter is for another family
    if run.stream:
        open_stored(model)
    if run.dense is None:
        return [model]
    dense = open_skeleton(sources[1], registry(), packed=True)
    dense = tower_in(dense, run.stack, registry(), None)
    check_same_vocabulary(model, dense)
    return [model, dense]


def _windows(
    run: EvalRun, tokenizer: Any, model: "Opened", notice: Callable[[str], None]
) -> "Tensor":
    from apt import evaluation_tokens
    from apt.extending import capped, check_vocabulary

    notices: list[str] = []
    seqlen = capped(run.seqlen, model, notices.append)
    tokens = evaluation_tokens(
        tokenizer, str(run.data), samples=run.samples, seqlen=seqlen, bos=run.bos
    )
    check_vocabulary(tokens, model.module, model.source.reference)
    for line in notices:
        notice(line)
    return tokens


@contextmanager
def _runnable(skeleton: "Opened", tokens: "Tensor | None", run: EvalRun) -> "Iterator[nn.Module]":
    """A model, ready to run; a streamed one block by block on these tokens."""
    from apt.evaluation.blockwise import streamed
    from apt.extending import choose_device, load, read_dtype

    device = choose_device(run.device)
    if run.stream and tokens is not None:
        with streamed(skeleton, tokens, device, run.compute) as module:
            yield module
        return
    loaded = load(skeleton, read_dtype(run.dtype), device, run.compute)
    with loaded.adapter.running(loaded.module):
        yield loaded.module


def _scores(
    models: "Sequence[nn.Module]",
    tokens: "Tensor",
    measures: Sequence[EvaluatorSpec],
    status: Callable[[str], None],
) -> "dict[str, Score]":
    """The metrics of the first model, compared with the dense model if it is given."""
    from apt.evaluation import kept_states
    from apt_lab.windows import Score, score_beside

    scores = {}
    with ExitStack() as stack:
        for model in models if len(measures) > 1 else ():
            stack.enter_context(kept_states(model))
        for spec in measures:
            status(f"measuring {spec.name} on {tokens.numel():,} tokens")
            if len(models) > 1:
                scores[spec.name] = score_beside(spec, models[0], tokens, models[1])
            else:
                scores[spec.name] = Score(spec.measure(models[0], tokens))
    return scores


def _answers(
    models: "Sequence[nn.Module]",
    tokenizer: Any,
    tasks: Sequence[str],
    run: EvalRun,
    *,
    progress: bool,
) -> dict[str, Any]:
    """The summary of each task, with the differences from the dense model if it is given."""
    if not tasks:
        return {}
    from apt_lab.tasks.answers import summary
    from apt_lab.tasks.harness import answer

    arguments: dict[str, Any] = {"progress": progress, "trust_remote_code": run.trust_remote_code}
    answers = [answer(model, tokenizer, tasks, run.limit, **arguments) for model in models]
    return {task.task: summary(task, *others) for task, *others in zip(*answers, strict=True)}
