"""The answers of a model to tasks, and their comparison with the dense model's answers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apt_lab.windows import Difference, mean_difference


@dataclass(frozen=True)
class Answers:
    """The answers of a model to one task.

    Attributes:
        task: the name of the task.
        version: the version of the task.
        questions: the number of questions.
        metrics: each metric with its value and its standard error (NaN if there is none).
        scores: the values of a metric for each question, in the order of the questions, if the
            metric is a mean over questions.
        chosen: the answer to each question: the index of the choice, or the text. Empty for tasks
            that measure the likelihood of single texts.
    """

    task: str
    version: str
    questions: int
    metrics: dict[str, tuple[float, float]]
    scores: dict[str, list[float]]
    chosen: list[int | str]

    @property
    def main(self) -> str:
        """The main metric of the task: ``acc_norm`` or ``acc``, or else the first one.

        Empty if the task has no metric.
        """
        preferred = [name for name in ("acc_norm", "acc") if name in self.metrics]
        return next(iter([*preferred, *self.metrics]), "")

    def record(self) -> dict[str, Any]:
        """The answers as values for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, record: dict[str, Any]) -> "Answers":
        """The answers of a record.

        Raises:
            TypeError, KeyError, ValueError, AttributeError: it is damaged.
        """
        pairs = {name: (float(v), float(e)) for name, (v, e) in record["metrics"].items()}
        scores = {name: [float(v) for v in values] for name, values in record["scores"].items()}
        return cls(**{**record, "metrics": pairs, "scores": scores})


def difference(pruned: Answers, dense: Answers, metric: str) -> Difference | None:
    """The paired difference of a metric.

    None if the metric is not a mean over the same questions, or if there is only one question.
    """
    values, dense_values = pruned.scores.get(metric, []), dense.scores.get(metric, [])
    return mean_difference(values, dense_values) if len(values) == len(dense_values) else None


def changed(pruned: Answers, dense: Answers) -> float | None:
    """The share of questions with another answer; None if the questions are not the same."""
    if not dense.chosen or len(pruned.chosen) != len(dense.chosen):
        return None
    pairs: Sequence[tuple[int | str, int | str]] = list(
        zip(pruned.chosen, dense.chosen, strict=True)
    )
    return sum(answer != dense_answer for answer, dense_answer in pairs) / len(pairs)


def summary(pruned: Answers, dense: Answers | None = None) -> dict[str, Any]:
    """The figures of a task for JSON, with the differences from the dense model."""
    metrics: dict[str, dict[str, float]] = {}
    for name, (value, error) in pruned.metrics.items():
        figures = metrics[name] = {"value": value, "stderr": error}
        if dense is not None and name in dense.metrics:
            figures["dense"] = dense.metrics[name][0]
            if (change := difference(pruned, dense, name)) is not None:
                figures |= {"difference": change.value, "low": change.low, "high": change.high}
    result: dict[str, Any] = {
        "version": pruned.version, "questions": pruned.questions, "metrics": metrics
    }  # fmt: skip
    return result if dense is None else {**result, "changed": changed(pruned, dense)}
