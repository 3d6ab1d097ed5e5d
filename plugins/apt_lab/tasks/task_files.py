"""YAML files of tasks: reading without running code, and the search for code that would run.

A task file of lm-evaluation-harness can name functions of Python files beside it, metrics whose
code the library evaluate loads, and data sets with code. Its templates are expressions of Jinja.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from apt.errors import AptError, first_line

_OPTION = ("tasks",)
_SWITCHES = ("hf_evaluate", "trust_remote_code", "unsafe_code")
"""Entries that let the harness run code if they are true."""


def check_task_file(path: Path, *, trust_remote_code: bool) -> None:
    """Raise if a task file cannot be read, or would run code without consent.

    Args:
        path: the file.
        trust_remote_code: True if code that the file names may run.
    """
    for part in _with_included(path, set()):
        content, functions = _read(part)
        reason = next(chain(functions, _code_in(content)), None)
        if reason is not None and not trust_remote_code:
            raise AptError(
                f"{part} would run code: it has {reason}",
                "read that code, then allow it",
                ("trust_remote_code",),
            )


def names_tasks(path: Path) -> bool:
    """True if a task file is a group, which can name tasks of the harness."""
    contents = (_read(part)[0] for part in _with_included(path, set()))
    return any(isinstance(node.get("task"), list) for c in contents for node in _nodes(c))


def _with_included(path: Path, seen: set[Path]) -> Iterator[Path]:
    """A task file and the files that it includes."""
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    yield path
    for node in _nodes(_read(path)[0]):
        included = node.get("include") or []
        for name in included if isinstance(included, list) else [included]:
            yield from _with_included(path.parent / str(name), seen)


def _read(path: Path) -> tuple[Any, list[str]]:
    """The content of a file, with the names of functions in place of functions, and these names."""
    import yaml

    functions = list[str]()

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    def name_of(loader: Any, node: Any) -> str:
        functions.append(f"!function {node.value}")
        return str(node.value)

    Loader.add_constructor("!function", name_of)
    if not path.is_file():
        raise AptError(f"the task file {path} does not exist", "", _OPTION)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a safe loader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise AptError(f"{path} is not YAML: line {line}: {error.problem}", "", _OPTION) from error
    except (OSError, UnicodeError, RecursionError, yaml.YAMLError) as error:
        raise AptError(f"{path} cannot be read: {first_line(error)}", "", _OPTION) from error
    if not isinstance(content, dict):
        raise AptError(f"{path} is not a task: its content is not a mapping", "", _OPTION)
    return content, functions


def _code_in(content: Any) -> Iterator[str]:
    """The entries of a file that run code, beside its functions."""
    from lm_eval.api.registry import METRIC_REGISTRY, get_metric

    get_metric("acc")  # fills the registry
    for node in _nodes(content):
        yield from (f"{name}: true" for name in _SWITCHES if node.get(name))
        metric = node.get("metric")
        if isinstance(metric, str) and metric not in METRIC_REGISTRY:
            yield f"the metric {metric}, which is not one of lm-evaluation-harness"


def _nodes(content: Any) -> Iterator[dict[Any, Any]]:
    """All mappings within a value."""
    if isinstance(content, dict):
        yield content
        content = list(content.values())
    for item in content if isinstance(content, list) else ():
        yield from _nodes(item)
