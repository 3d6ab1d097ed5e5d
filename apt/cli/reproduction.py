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
    "max_shard_size": "--max-shard-size",
}  # fmt: skip
_DEFAULTS = {"allocation": "uniform", "dtype": "auto", "activations": "memory", "seed": 0}
_LISTS = {"only": "--only", "skip": "--skip", "also": "--also"}


def command_of(report: dict[str, Any]) -> str:
    """The command of the run that wrote a report; empty if the report has no options of a run.

    Local paths have only their last part, as in the report.
    """
    options: dict[str, Any] = report.get("options") or {}
    if not options.get("pattern") or not options.get("model"):
        return ""
    words = ["apt-prune", "prune", str(options["model"]), *_pattern(options)]
    for name, flag in _FLAGS.items():
        value = options.get(name)
        if value is not None and value != _DEFAULTS.get(name):
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
    return f"{value:g}" if isinstance(value, float) else str(value)
