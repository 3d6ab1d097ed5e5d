"""The run of tasks of lm-evaluation-harness on a loaded model.

The harness (Gao et al., 10.5281/zenodo.10256836) finds the tasks, makes the prompts and scores the
answers. Its tasks, the question sets of `apt_lab.tasks.question_sets` and YAML files can be named.
"""

import io
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

from torch import nn

from apt.errors import AptError, first_line
from apt.extending import eval_mode
from apt_lab.tasks.answers import Answers
from apt_lab.tasks.question_sets import GROUP, SETS, task_config
from apt_lab.tasks.task_files import check_task_file, names_tasks

_BATCH = 16
_RESAMPLES = 10_000  # for the standard error of a metric that is not a mean


def check_tasks(names: Sequence[str], *, trust_remote_code: bool = False) -> list[str]:
    """The names of tasks, with ``local`` replaced by the question sets.

    Args:
        names: the names of tasks, or YAML files.
        trust_remote_code: True if code that a YAML file names may run.

    Raises:
        AptError: lm-evaluation-harness or a question set is not installed, a task is unknown, or a
            file cannot be read or would run code.
    """
    if find_spec("lm_eval") is None:
        raise AptError(
            "tasks need lm-evaluation-harness", "pip install 'apt-prune[eval]'", ("tasks",)
        )
    expanded = [n for name in names for n in (SETS if name == GROUP else [name])]
    for name in expanded:
        if name in SETS:
            task_config(name)
    for name in expanded:
        if _is_file(name):
            check_task_file(Path(name), trust_remote_code=trust_remote_code)
    others = [name for name in expanded if name not in SETS and not _is_file(name)]
    if others:
        _check_known(others)
    return list(dict.fromkeys(expanded))


@cache
def _index(*, with_defaults: bool) -> Any:
    """The harness's index of tasks; an index with its own tasks takes seconds to build."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_defaults=with_defaults)


def _check_known(names: Sequence[str]) -> None:
    existing = _index(with_defaults=True).match_tasks(list(names))
    for name in names:
        if name not in existing:
            raise AptError(
                f"task '{name}' is not known",
                f"choose one of lm-evaluation-harness, or {GROUP} for {', '.join(SETS)}",
                ("tasks",),
            )


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _may_name_others(name: str) -> bool:
    """True for a task of the harness, and for a file that can name some."""
    return not _is_file(name) or names_tasks(Path(name))


def task_setting(names: Sequence[str], limit: int | None) -> dict[str, Any]:
    """The inputs of the answers beside the model, for a record."""
    return {"tasks": list(names), "limit": limit, "lm_eval": version("lm_eval")}


def answer(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    limit: int | None = None,
    *,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> list[Answers]:
    """Answer tasks without examples in the prompt and without a chat template.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        names: the names of tasks, see `check_tasks`.
        limit: the number of questions of each task; None for all. Question sets are shuffled, other
            tasks begin with their first question.
        progress: True if the harness may show its progress on standard error.
        trust_remote_code: True if templates of tasks may run any code. Otherwise templates run in a
            sandbox, without access to Python's internals.

    Raises:
        AptError: a task cannot be read or answered.
    """
    from lm_eval import simple_evaluate

    from apt_lab.tasks.shared_contexts import SharedContexts

    foreign = any(name not in SETS and _may_name_others(name) for name in names)
    tasks = [task_config(name) if name in SETS else name for name in names]
    sandbox = nullcontext() if trust_remote_code else _sandboxed_templates()
    with eval_mode(model), _quiet(progress=progress), _no_environment(), _one_process(), sandbox:
        runner = SharedContexts(
            model, backend="causal", tokenizer=tokenizer, batch_size=_BATCH,
            device=str(next(model.parameters()).device),
        )  # fmt: skip
        try:
            results = simple_evaluate(
                runner, tasks=tasks, limit=limit, verbosity="ERROR",
                task_manager=_index(with_defaults=foreign),
                bootstrap_iters=_RESAMPLES,
            )  # fmt: skip
        except Exception as error:  # the harness raises many types for tasks of users
            raise AptError(
                f"the tasks {', '.join(names)} cannot be answered: {_reason(error)}",
                f"without a network, use {GROUP}" if isinstance(error, OSError) else "",
                ("tasks",),
            ) from error
    assert results is not None  # None only in the other processes of a distributed run
    return [_answers(name, results) for name in results["samples"]]


@contextmanager
def _quiet(*, progress: bool = False) -> Iterator[None]:
    """While entered, the harness prints nothing, or only its progress."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(sys.stderr if progress else io.StringIO()),
        ):
            yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    if isinstance(error, StopIteration):
        return "there are no questions"
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """While entered, the templates of tasks run in the sandbox of Jinja."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    original = utils.env
    sandbox = SandboxedEnvironment(
        loader=original.loader, undefined=original.undefined, keep_trailing_newline=True
    )
    sandbox.filters.update(original.filters)
    with patch.object(utils, "env", sandbox):
        yield


@contextmanager
def _no_environment() -> Iterator[None]:
    """While entered, the harness does not describe the machine: it would run git and pip."""
    with patch.multiple(
        "lm_eval.evaluator",
        create=True,
        get_git_commit_hash=lambda: None,
        add_env_info=lambda results: None,
    ):
        yield


@contextmanager
def _one_process() -> Iterator[None]:
    """While entered, the harness resamples in this process.

    Otherwise it would fork a pool, and the fork of a process with threads can deadlock.
    """
    with patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}):
        yield


def _answers(name: str, results: Mapping[str, Any]) -> Answers:
    """The answers in the results of the harness, whose metrics are named ``acc,none``."""
    task_result, samples = results["results"][name], results["samples"][name]
    metrics: dict[str, tuple[float, float]] = {}
    for key, value in task_result.items():
        metric, comma, kind = str(key).partition(",")
        if comma and not metric.endswith("_stderr") and metric not in metrics:
            error = task_result.get(f"{metric}_stderr,{kind}", "N/A")
            spread = float(error) if isinstance(error, int | float) else float("nan")
            metrics[metric] = float(value), spread
    first = samples[0]["filter"] if samples else ""
    ordered = sorted((s for s in samples if s["filter"] == first), key=lambda s: int(s["doc_id"]))
    scores = {
        metric: values
        for metric, (value, _) in metrics.items()
        if all(isinstance(s.get(metric), int | float) for s in ordered)
        and _is_mean(value, values := [float(s[metric]) for s in ordered])
    }
    chosen = [_chosen(s["filtered_resps"]) for s in ordered]
    choices = [] if None in chosen else [choice for choice in chosen if choice is not None]
    version = str(results["versions"].get(name, ""))
    return Answers(name, version, len(ordered), metrics, scores, choices)


def _is_mean(value: float, values: Sequence[float]) -> bool:
    """True if a metric is the mean of its values for single questions; a perplexity is not."""
    return bool(values) and math.isclose(value, fmean(values), rel_tol=1e-6, abs_tol=1e-9)


def _chosen(responses: Sequence[Any]) -> int | str | None:
    """The most likely choice of a multiple-choice question, or the text of another answer.

    None if the model gives no answer, but the likelihood of a single text.
    """
    if all(isinstance(r, tuple | list) and len(r) == 2 for r in responses):
        likely = [float(r[0]) for r in responses]
        return likely.index(max(likely)) if len(likely) > 1 else None
    return responses[0] if responses and isinstance(responses[0], str) else None
