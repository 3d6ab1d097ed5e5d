"""Further cases of `hostile.py`: damaged reports, and what a command cannot do as it was asked."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_cases import QUICK, Case
from hostile_outputs import results

_WRONG = [None, 0, -1, 1e308, 10**400, float("nan"), float("inf"), "x", [], {}, True, 2**70, [[1]]]
_READERS = {
    "report": ["report", "r", "-o", "page.html"],
    "verify": ["verify", "r"],
    "law": ["law", "r"],
    "pack": ["pack", "r", "-o", "out"],
    "reapply": ["reapply", "r", "m", "-o", "out"],
}


def reports() -> Iterator[Case]:
    """Reports with one wrong value, before each command that reads them."""
    for seed in range(90):
        name = list(_READERS)[seed % len(_READERS)]
        yield Case("reports", f"{name} {seed}", _READERS[name], _damaged(seed), may=(1,),
                   keeps=("r",))  # fmt: skip
    for text in ('{"schema": 99}', "[]", '{"schema": 1}', "null", '{"schema": ' + "9" * 5000 + "}"):
        yield Case("reports", f"verify {text[:20]}", _READERS["verify"], _written(text),
                   refused=True)  # fmt: skip


def _damaged(seed: int) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        results(folder)
        path, draw = folder / "r/apt_report.json", random.Random(seed)
        record = json.loads(path.read_text())
        place = draw.choice([place for place in _places(record) if place])
        path.write_text(json.dumps(_changed(record, place, draw.choice(_WRONG))))

    return prepare


def _written(text: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        results(folder)
        (folder / "r/apt_report.json").write_text(text)

    return prepare


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all entries of a record; of lists those of the first item."""
    yield path
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _places(item, (*path, name))
    elif isinstance(value, list) and value:
        yield from _places(value[0], (*path, 0))


def _changed(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    record = copy.deepcopy(record)
    place = record
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return record


def requests() -> Iterator[Case]:
    """Requests that cannot be met, which are refused before the work."""
    few = ["--samples", "2", "--seqlen", "32"]
    prune, recover = ["prune", "m", *QUICK], ["recover", "m", "--kind", "layers", "-o", "out"]
    refused = {
        "an endless time": [*prune, "--minutes", "1e308"],
        "an endless training": [*recover, "--minutes", "1e308"],
        "every weight": [*prune, "--sparsity", "0.9999999"],
        "every weight of a row": [*prune, "--sparsity", "0.9999", "--per", "row"],
        "a directory named like a file": [*prune, "-o", "fd.gguf", "--export", "b.gguf"],
        "a packed model in an input": [*prune, "--pack", "m"],
        "no such group": ["shrink", "m", *few, "--size", "heads=99", "-o", "out"],
        "nothing removed": ["shrink", "m", *few, "--size", "channels=0.99999", "-o", "out"],
        "a wide pattern": [*prune, "--pattern", "1:1000000"],
        "weights for masks": ["reapply", "m/model.safetensors", "m", "-o", "out"],
        "another family": ["recover", "r", "--dense", "zoo:opt", "-o", "out"],
    }
    for name, command in refused.items():
        yield Case("requests", name, command, results, refused=True)
    for seed in ("-1", str(-(2**63)), str(2**64 - 1)):
        yield Case("requests", f"seed {seed}", [*prune, "--seed", seed], results)
    for command in (prune, ["inspect", "m"], ["methods"]):
        yield Case("requests", f"{command[0]} without an output", command, results, shell=">&-",
                   may=(1,), keeps=("out",))  # fmt: skip
