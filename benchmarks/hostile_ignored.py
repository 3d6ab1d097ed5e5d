"""Further cases of `hostile.py`: what would be ignored without a word, and names of others."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_cases import Case, damaged_config, sparse

from apt.events import SitePruned
from apt.output.report import Report

_TEXT = ["--calibration", "t.txt", "--samples", "2", "--seqlen", "32"]
_IGNORED = {
    "prune": [
        ["--scale-group", "64"], ["--scale-group", "row"], ["--metric", "accuracy"],
        ["--method", "wanda", "--tuning-rate", "0.1"], ["--method", "ss", "--tuning-tokens", "64"],
        ["--method", "wanda", "--input-correction", "0.5"], ["--layer-wise", "--permute"],
        ["--effort", "fast", "--tuning-rate", "0.1"], ["--pattern", "2:4", "--row-importance", "1"],
        ["--sparsity", "0", "--quantize", "int8", "--tuning-rate", "0.1"],
    ],
    "pack": [["--scale-group", "64"], ["--scale-group", "row", "--format", "apt"]],
    "shrink": [
        ["--minutes", "5"], ["--evaluations", "7"], ["--width-only", "--minutes", "5"],
        ["--size", "channels=128", "--size", "channels=64"], ["--keep", "0.5", "--blocks", "2"],
        ["--size", "channels=128", "--keep", "0.5"],
        ["--depth-only", "--method", "joint"], ["--metric", "accuracy"],
        ["--size", "channels=128", "--multiple-of", "64"],
    ],
    "recover": [
        ["--kind", "spp", "--dense", "nowhere"], ["--kind", "lora", "--dense", "zoo:llama"],
        ["--kind", "layers", "--rank", "4"], ["--kind", "spp", "--blocks", "2"],
        ["--steps", "2", "--metric", "accuracy"],
    ],
}  # fmt: skip
_CONTROL = "\x1b[2J\x1b]0;owned\x07\r\nverified on disk \u202e\x9b1A [red]name[/red]"
_ACTIVATIONS = ("gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "mish")


def ignored() -> Iterator[Case]:
    """Options that have no effect with the others, names that act on the terminal, other functions.

    Each is refused in one line, or printed as text.
    """
    for command, groups in _IGNORED.items():
        text = [] if command == "pack" else _TEXT
        for words in groups:
            asked = [command, "m", *words, *text, "-o", "out"]
            yield Case("ignored", f"{command} {' '.join(words)}", asked, sparse, refused=True)
    sizes = ["--size", "experts=4"]
    for method in ("group-wanda", "joint", "group-magnitude"):
        yield Case("ignored", f"experts by {method}",
                   ["shrink", "zoo:moe", *sizes, "--method", method, *_TEXT, "-o", "out"],
                   refused=True)  # fmt: skip
    for activation in _ACTIVATIONS:
        yield Case("ignored", f"GGUF of {activation}", ["export", "m", "-o", "m.gguf"],
                   damaged_config(_with(hidden_act=activation)), refused=True)  # fmt: skip
    for place, prepare in _named().items():
        for command in (["verify", "m"], ["inspect", "m"], ["report", "m", "-o", "page.html"]):
            yield Case("ignored", f"{command[0]} with control characters in {place}",
                       command, prepare, may=(1,))  # fmt: skip


def _with(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(fields)


def _named() -> dict[str, Callable[[Path], None]]:
    """Functions that write a name with control characters to a file of the model."""
    return {
        "the type": damaged_config(_with(model_type=_CONTROL)),
        "the class": damaged_config(_with(architectures=[_CONTROL])),
        "a site": _report(sites=[_site(_CONTROL)]),
        "the name of the model": _report(model={"reference": _CONTROL, "adapter": "llama"}),
        "the adapter": _report(model={"reference": "m", "adapter": _CONTROL}),
        "the pattern": _report(options={"pattern": _CONTROL}),
        "a file": _report(files={_CONTROL: "0" * 64}),
        "a skipped site": _report(skipped=[_CONTROL]),
        "a problem": _report(problems=[_CONTROL]),
    }


def _site(name: str) -> SitePruned:
    return SitePruned(name, name, (4, 4), "2:4", 8, 0.1, 0.01, None, 1, 0.1)


def _report(**entries: Any) -> Callable[[Path], None]:
    usual = {"options": {"pattern": "2:4"}, "model": {"reference": "m"}, "calibration": {}}
    text = json.dumps(Report(**usual | entries).to_dict())
    return lambda folder: sparse(folder, text)
