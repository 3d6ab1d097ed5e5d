"""What a pruned or smaller model buys: its file, memory, speed and perplexity, by runtime.

Each model is measured as it would be used: plain and packed directories by ``apt-prune bench`` in
transformers, GGUF files by the server of llama.cpp, which comes from the package xllamacpp in an
environment of its own. Prompts have 64 tokens, and 32 are generated, one sequence at a time. The
runtimes take turns, and a figure is the median of the turns. Memory is the largest memory of the
process. The perplexities are those of the weights in fp32 in APT, on the texts of
``benchmarks/common.py``::

    python -m venv out/llama-cpp && out/llama-cpp/bin/pip install xllamacpp
    python benchmarks/clients/deployments.py --json out/deployments.json
    python benchmarks/clients/deployments.py --shape 1.5b --work out/deployments-1.5b \\
        --json out/deployments-1.5b.json

The models are made in ``--work``, where a model that is there already is used. With ``--shape``
they are random, without perplexities, and the smaller one lacks a fourth of the blocks. ``--only``
names the forms to measure; the others are not made.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import FORTUNES, calibration_and_texts, calibration_file, open_model, save, smollm2
from packed import SHAPES, dense_model, linears, removed

from apt.evaluation.metrics import perplexity

Row = dict[str, Any]
# The first request warms up. The second one is timed.
LLAMA = """
import json, re, socket, sys, urllib.request, xllamacpp
path, threads, prompt, generate = sys.argv[1], *map(int, sys.argv[2:])
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.n_parallel = path, 512, 1
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    given.port = free.getsockname()[1]
server = xllamacpp.Server(given)
for turn in range(2):
    tokens = [1 + (7 * turn + 13 * i) % 1000 for i in range(prompt)]
    body = {"prompt": tokens, "n_predict": generate, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(),
        {"content-type": "application/json"})
    answer = json.load(urllib.request.urlopen(request, timeout=600))
    assert answer["tokens_evaluated"] == prompt and answer["tokens_predicted"] == generate, answer
timings = answer["timings"]
status = open("/proc/self/status").read()
print("RESULT " + json.dumps({
    "decode": timings["predicted_per_second"], "prefill": timings["prompt_per_second"],
    "peak": 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1])}), flush=True)
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES], help="of a random model; SmolLM2 without it")
    parser.add_argument("--only", nargs="+", help="the names of the forms to measure")
    parser.add_argument("--minutes", type=float, default=5.0, help="for each model")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--skip", type=int, default=16, help="leading windows to leave out")
    parser.add_argument("--fortunes", type=Path, default=FORTUNES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--python", type=Path, default=Path("out/llama-cpp/bin/python"))
    parser.add_argument("--work", type=Path, default=Path("out/deployments"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.text = options.dictionary = None
    return options


def call(*words: Any) -> str:
    """What a command of APT prints."""
    command = [sys.executable, "-m", "apt", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


class Models:
    """The models of a folder: each is made once.

    Args:
        folder: the folder.
        only: the names in the table of the models to measure; None for all.

    Attributes:
        shown: the models that are measured, by their names in the table, each with a form of it
            that has the same values and whose perplexity is measured.
    """

    def __init__(self, folder: Path, only: Sequence[str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._only = folder, only
        self.shown: dict[str, tuple[Path, Path]] = {}

    def make(self, name: str, *words: Any) -> Path:
        """A model that a command of APT writes."""
        path = self.folder / name
        if not path.exists():
            call(*words, "--output", path)
        return path

    def show(self, label: str, path: Path, plain: Path | None = None) -> None:
        """Measure a model, and take its perplexity from another form of it."""
        if self._is_wanted(label):
            self.shown[label] = path, plain or path

    def _is_wanted(self, label: str) -> bool:
        return self._only is None or label in self._only

    def pack(self, label: str, plain: Path, *words: str) -> None:
        """A packed model. What is rounded while it is packed is unpacked for its perplexity."""
        if not self._is_wanted(label):
            return
        name = "-".join([plain.name, "packed", *words[1:]])
        path = self.make(name, "pack", plain, *words)
        self.show(label, path, self.folder / f"{name}-unpacked" if words else plain)

    def export(self, label: str, plain: Path, kind: str, *words: Any) -> None:
        """A GGUF file."""
        if not self._is_wanted(label):
            return
        path = self.make(f"{plain.name}-{kind}.gguf", "export", plain, "--type", kind, *words)
        self.show(label, path)


def forms(options: argparse.Namespace) -> Models:
    """SmolLM2 in all forms, each pruned and trained in ``--minutes``."""
    models, source = Models(options.work, options.only), smollm2()
    how = ("--calibration", calibration_file(options.work))
    timed = (*how, "--minutes", options.minutes)
    whole = models.make("whole", "convert", source)
    half = models.make("half-fp32", "prune", whole, "--sparsity", 0.5, *timed)
    two_four = models.make("two-four-fp32", "prune", whole, "--pattern", "2:4", *timed)
    size = ("--keep", 0.75, "--samples", options.samples, "--seqlen", options.seqlen)
    one_shot = models.make("small-one-shot", "shrink", whole, *size, *how)
    small = models.make("small-fp32", "recover", one_shot, "--dense", whole, *timed)
    to_integers = (
        "--sparsity", 0, "--quantize", "int4", "--dtype", "bfloat16", *size[2:], *how
    )  # fmt: skip
    integers = {
        (path, group): models.make(
            f"{path.name}-int4-{group}", "prune", path, *to_integers, "--scale-group", group
        )
        for path, group in ((whole, 32), (small, 32), (small, 64), (half, 64))
    }
    rounded = list(integers.values())
    dense, half, two_four, small = (
        models.make(name, "convert", path, "--dtype", "bfloat16")
        for name, path in (
            ("dense", whole), ("half", half), ("two-four", two_four), ("small", small)
        )
    )  # fmt: skip
    show_forms(models, dense, half, two_four, small, rounded, "--source", source)
    return models


def random_forms(options: argparse.Namespace) -> Models:
    """A model with random weights in all forms, with the tokenizer of SmolLM2."""
    models = Models(options.work, options.only)
    paths = [models.folder / name for name in ("dense", "half", "two-four", "small")]
    dense, half, two_four, small = paths
    if not all((path / "tokenizer.json").exists() for path in paths):
        model, (_, tokenizer) = dense_model(options), open_model()
        model.config.dtype = "bfloat16"
        model.save_pretrained(dense)
        for path, pattern in ((half, "0.5"), (two_four, "2:4")):
            pruned = copy.deepcopy(model)
            for module in linears(pruned).values():
                module.weight.data.masked_fill_(removed(module.weight.data, pattern), 0)
            pruned.save_pretrained(path)
        blocks = model.model.layers
        del blocks[3 * len(blocks) // 4 :]
        model.config.num_hidden_layers = len(blocks)
        model.save_pretrained(small)
        for path in paths:
            tokenizer.save_pretrained(path)
    show_forms(models, *paths, [])
    models.export("dense, `q3_K`", dense, "q3_K")
    return models


def show_forms(
    models: Models,
    dense: Path,
    half: Path,
    two_four: Path,
    small: Path,
    rounded: Sequence[Path],
    *source: Any,
) -> None:
    """Pack and export the models, and measure each form.

    Args:
        rounded: the dense and the smaller model as integers of 4 bits with the scales of ``q4_0``,
            and the smaller one and that with 50 % zeros with those of the packed format. Without
            them, the weights become the nearest integers.
    """
    models.show("dense, bf16", dense)
    models.pack("50 %, packed, bf16", half)
    models.pack("50 %, packed, int8", half, "--quantize", "int8")
    models.pack("2:4, packed, bf16", two_four)
    models.show("75 % of the size, bf16", small)
    if rounded:
        models.pack("75 % of the size, packed, int4", rounded[2])
        models.pack("50 %, packed, int4", rounded[3])
    else:
        models.pack("75 % of the size, packed, int4", small, "--quantize", "int4")
        models.pack("50 %, packed, int4", half, "--quantize", "int4")
    for kind in ("bf16", "q8_0", "q4_0"):
        models.export(f"dense, `{kind}`", dense, kind, *source)
    for kind in ("q8_0", "q4_0"):
        models.export(f"75 % of the size, `{kind}`", small, kind, *source)
    for name, path in zip(("dense", "75 % of the size"), rounded, strict=False):
        models.export(f"{name}, int4 as `q4_0`", path, "q4_0", *source)


def size(path: Path) -> int:
    """The bytes of the weights on disk."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def speeds(models: Models, threads: int, options: argparse.Namespace) -> dict[str, Row]:
    """Tokens per second and the largest memory of each model, in one turn after the other."""
    turns: dict[str, list[Row]] = {label: [] for label in models.shown}
    for _ in range(options.rounds):
        for label, (path, _) in models.shown.items():
            measure = in_llama_cpp if path.suffix == ".gguf" else in_transformers
            turns[label].append(measure(path, threads, options))
    return {
        label: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for label, rows in turns.items()
    }


def in_transformers(path: Path, threads: int, options: argparse.Namespace) -> Row:
    """A turn of ``apt-prune bench``."""
    out = call(
        "bench", path, "--json", "--batch", 1, "--prompt", options.prompt,
        "--generate", options.generate, "--rounds", 1, "--threads", threads,
    )  # fmt: skip
    (model,) = json.loads(out)["models"]
    found = model["speeds"][0]
    decode, prefill = (
        found[f"{name}_tokens_per_second"]["median"] for name in ("decode", "prefill")
    )
    return {"decode": decode, "prefill": prefill, "peak": model["peak_memory_bytes"]["cpu"]}


def in_llama_cpp(path: Path, threads: int, options: argparse.Namespace) -> Row:
    """A turn of llama.cpp's server."""
    given = [path, threads, options.prompt, options.generate]
    done = subprocess.run(
        [str(options.python), "-c", LLAMA, *map(str, given)],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: Row = json.loads(line.removeprefix("RESULT "))
    return found


def scores(path: Path, texts: dict[str, Tensor]) -> Row:
    """The perplexities of a model in fp32."""
    opened, _ = open_model(str(path))
    opened.module.float()
    with opened.adapter.running(opened.module):
        return {name: perplexity(opened.module, text) for name, text in texts.items()}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each model."""
    models = random_forms(options) if options.shape else forms(options)
    if unknown := {*(options.only or ())} - {*models.shown}:
        raise SystemExit(f"no such forms: {', '.join(sorted(unknown))}")
    texts = {} if options.shape else calibration_and_texts(options, open_model()[1])[1]
    by_threads = {threads: speeds(models, threads, options) for threads in options.threads}
    for label, (path, plain) in models.shown.items():
        yield {
            "model": label,
            "runtime": "llama.cpp" if path.suffix == ".gguf" else "transformers",
            "bytes": size(path),
            "threads": {str(threads): found[label] for threads, found in by_threads.items()},
            **(scores(models.make(plain.name, "unpack", path), texts) if texts else {}),
        }


def main() -> None:
    options = arguments()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(options.threads))
    rows = []
    for row in measure(options):
        rows.append(row)
        print(json.dumps(row), flush=True)
    save(options.json, rows)


if __name__ == "__main__":
    main()
