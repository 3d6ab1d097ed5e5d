"""Further cases of `hostile.py`: overrides in every allocation, and task files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile_cases import Case
from safetensors.torch import load_file

from apt.plugin.registry import registry
from apt.solver import meets, parse_pattern

_RUN = ["--samples", "2", "--seqlen", "32", "--method", "magnitude", "-o", "out"]


def overrides() -> Iterator[Case]:
    """Overrides in every allocation, compared with the zeros on disk."""
    for allocation in registry().allocations.specs:
        for glob in ("*.down_proj", "*layers.1.*"):
            for own in ("0.3", "0.9", "2:4"):
                command = ["prune", "m", "--sparsity", "0.6", "--allocation", allocation,
                           "--override", f"{glob}={own}", *_RUN]  # fmt: skip
                yield Case("overrides", f"{allocation} {glob}={own}", command,
                           check=counted(glob.strip("*"), own, 0.6))  # fmt: skip
        for option in ("--override", "--only", "--skip"):
            value = "*.nothing=0.5" if option == "--override" else "*.nothing"
            command = ["prune", "m", "--sparsity", "0.6", "--allocation", allocation, option,
                       value, *_RUN]  # fmt: skip
            yield Case("overrides", f"{allocation} {option} {value}", command, refused=True)


def counted(part: str, own: str, rest: float) -> Callable[[Path], str]:
    """A check of the zeros on disk: of the sites with an override, and of all others."""

    def check(folder: Path) -> str:
        pattern, zeros, size = parse_pattern(own), 0, 0
        for name, tensor in load_file(folder / "out/model.safetensors").items():
            if "_proj" not in name:
                continue
            found = int((tensor == 0).sum())
            if part in name:
                wanted = round(pattern.sparsity * tensor.numel())
                if found != wanted or not meets(tensor, pattern):
                    return f"{name} has {found} zeros, not {wanted}"
            else:
                zeros, size = zeros + found, size + tensor.numel()
        return "" if abs(zeros - rest * size) < 30 else f"the others have {zeros} of {size} zeros"

    return check


_TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: questions.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
_CHANGES = {
    "plain": ("", ""),
    "function": ('"{{q}}"', "!function evil.run"),
    "function of a metric": ("{metric: acc}", "{metric: !function evil.run}"),
    "aggregation": ("{metric: acc}", "{metric: acc, aggregation: !function evil.run}"),
    "metric of evaluate": ("{metric: acc}", "{metric: acc, hf_evaluate: true}"),
    "metric in a file": ("{metric: acc}", "{metric: ./evil.py}"),
    "internals of Python": ("{{q}}", "{{ q.__class__.__mro__[1].__subclasses__() }}"),
    "another field": ("{{q}}", "{{nothing}}"),
    "half a template": ("{{q}}", "{{ q"),
    "no such choice": ("target: 0", "target: 7"),
    "no questions": ("questions.jsonl", "empty.jsonl"),
    "no data": ("questions.jsonl", "none.jsonl"),
    "half YAML": ("metric_list:", "foo: [\nmetric_list:"),
    "a list": (_TASK, "[1, 2]"),
    "nothing": (_TASK, ""),
    "deep": (_TASK, "[" * 10_000),
    "another tag": ("target: 0", "target: !!python/object/apply:os.getcwd []"),
    "included": (_TASK, "include: evil.yaml\ntask: mine\n"),
    "included by itself": ("task: mine", "include: task.yaml\ntask: mine"),
    "included from nowhere": ("task: mine", "include: none.yaml\ntask: mine"),
}


def tasks() -> Iterator[Case]:
    """Task files that are damaged, or would run code."""
    for name, (old, new) in _CHANGES.items():

        def prepare(folder: Path, old: str = old, new: str = new) -> None:
            (folder / "task.yaml").write_text(_TASK.replace(old, new) if old else _TASK)
            (folder / "evil.yaml").write_text(_TASK.replace('"{{q}}"', "!function evil.run"))
            (folder / "evil.py").write_text("open('pwned', 'w')\n\ndef run(*args): return ''\n")
            line = json.dumps({"q": "One is", "choices": ["1", "2"]}) + "\n"
            (folder / "questions.jsonl").write_text(line * 4)
            (folder / "empty.jsonl").touch()

        yield Case("tasks", name, ["eval", "m", "--tasks", "task.yaml"], prepare,
                   refused=name != "plain")  # fmt: skip
