"""The time of questions with a pass for each choice, as the harness has it, and for each question.

The default is SmolLM2-135M-Instruct and the six local sets of `apt-prune eval --tasks local`::

    python benchmarks/tasks.py --limit 50
"""

import argparse
import time
from statistics import median
from unittest.mock import patch

from apt_lab.tasks.answers import Answers
from apt_lab.tasks.harness import answer, check_tasks
from common import open_model
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

RUNNERS = ("choices", "questions")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model reference; SmolLM2 by default")
    parser.add_argument("--tasks", nargs="+", default=["local"])
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options, console = arguments(), Console()
    model, tokenizer = open_model(options.model)
    tasks = check_tasks(options.tasks)
    answer(model.module, tokenizer, tasks, 1)  # what is imported and read once
    table = Table("task", *(f"{runner}, s" for runner in RUNNERS), "ratio", "answers that differ")
    for names in [*([name] for name in tasks), tasks]:
        seconds: dict[str, list[float]] = {runner: [] for runner in RUNNERS}
        found: dict[str, list[Answers]] = {}
        for runner in RUNNERS * options.rounds:
            started = time.perf_counter()
            if runner == "choices":
                with patch("apt_lab.tasks.shared_contexts.SharedContexts", HFLM):
                    found[runner] = answer(model.module, tokenizer, names, options.limit)
            else:
                found[runner] = answer(model.module, tokenizer, names, options.limit)
            seconds[runner].append(time.perf_counter() - started)
        slow, fast = (median(seconds[runner]) for runner in RUNNERS)
        pairs = zip(*(found[runner] for runner in RUNNERS), strict=True)
        other = sum(
            a != b for one, two in pairs for a, b in zip(one.chosen, two.chosen, strict=True)
        )
        name = names[0] if len(names) == 1 else "all"
        table.add_row(name, f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.2f}", str(other))
    console.print(table)


if __name__ == "__main__":
    main()
