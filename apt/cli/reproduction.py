"""The command that reproduces a run, from the options in its report."""

import shlex
from typing import Any

_FLAGS = {
    "adapter": "--adapter", "calibration": "--calibration", "samples": "--samples",
    "seqlen": "--seqlen", "seed": "--seed", "method": "--method", "allocation": "--allocation",
    "effort": "--effort", "alpha": "--alpha", "beta": "--beta", "damping": "--damping",
    "row_importance": "--row-importance", "tuning_epochs": "--tuning-epochs",
    "tuning_rate": "--tuning-rate", "tuning_tokens": "--tuning-tokens",
    "random_tokens": "--random-tokens", "own_samples": "--own-samples",
    "block_size": "--block-size", "evaluation": "--eval", "dtype": "--dtype",
    "activations": "--activations", "tokenizer": "--tokenizer", "revision": "--revision",
    "max_shard_size": "--max-shard-size", "quantize": "--quantize", "group": "--group",
}  # fmt: skip
_DEFAULTS = {"allocation": "uniform", "dtype": "auto", "activations": "memory", "seed": 0,
             "group": 128}  # fmt: skip
_NOT_OF_SHRINK = ("allocation", "row_importance", "block_size")
_MODES = {"width": "--width-only", "depth": "--depth-only", "search": "--search"}
_LISTS = {"only": "--only", "skip": "--skip", "also": "--also"}


def command_of(report: dict[str, Any]) -> str:
    """The command of the run that wrote a report; empty if the report has no options of a run.

    Local paths have only their last part, as in the report.
    """
    options: dict[str, Any] = report.get("options") or {}
    shrink = options.get("shrink")
    if not options.get("model") or not (options.get("pattern") or shrink):
        return ""
    words = ["apt-prune", "shrink" if shrink else "prune", str(options["model"])]
    words += _size(shrink) if shrink else _pattern(options)
    left_out = _NOT_OF_SHRINK if shrink else ()
    for name, flag in _FLAGS.items():
        value = options.get(name)
        if value is not None and value != _DEFAULTS.get(name) and name not in left_out:
            words += [flag, _text(value)]
    for name, flag in _LISTS.items():
        for value in options.get(name) or ():
            words += [flag, str(value)]
    for glob, pattern in (options.get("overrides") or {}).items():
        words += ["--override", f"{glob}={pattern}"]
    words += _switches(options)
    return shlex.join([*words, "--output", str(options.get("output") or "out")])


def _pattern(options: dict[str, Any]) -> list[str]:
    pattern = str(options["pattern"])
    if "@" in pattern:
        mixed, _, sparsity = pattern.partition("@")
        return ["--pattern", mixed, "--sparsity", sparsity]
    if ":" in pattern:
        return ["--pattern", pattern]
    per = ["--per", str(options["per"])] if options.get("per") else []
    return ["--sparsity", pattern, *per]


def _size(shrink: dict[str, Any]) -> list[str]:
    """The options of the size of a smaller model."""
    words = [word for kind, n in shrink["sizes"].items() for word in ("--size", f"{kind}={n}")]
    words += [word for index in shrink["drop"] for word in ("--drop", str(index))]
    words += [] if shrink["blocks"] is None else ["--blocks", str(shrink["blocks"])]
    words = words or ["--keep", _text(shrink["keep"]), "--budget", str(shrink["budget"])]
    words += [_MODES[shrink["mode"]]] if shrink["mode"] in _MODES else []
    if shrink["multiple_of"] is not None:
        words += ["--multiple-of", str(shrink["multiple_of"])]
    if shrink["compensate"] is not None:
        words.append("--compensate" if shrink["compensate"] else "--no-compensate")
    if shrink["mode"] == "search":
        words += ["--evaluations", str(shrink["search"]["evaluations"])]
    return words


def _switches(options: dict[str, Any]) -> list[str]:
    words = []
    for name, yes, no in (
        ("error_aware", "--error-aware", "--layer-wise"),
        ("ordered", "--ordered", "--at-once"),
    ):
        if options.get(name) is not None:
            words.append(yes if options[name] else no)
    words += ["--stream"] if options.get("stream") else []
    words += ["--trust-remote-code"] if options.get("trust_remote_code") else []
    return words + (["--no-bos"] if options.get("bos") is False else [])


def _text(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)
