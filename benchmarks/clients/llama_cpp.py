"""GGUF files of APT in llama.cpp: their text, their perplexity, their metadata, their zeros.

Each directory is exported in each type, and opened by the server of llama.cpp, which comes from the
package xllamacpp in an environment of its own. transformers computes the same in fp32, from the
directory. A row has, for each of three prompts, null if the next 32 tokens are the same, else by
how much the first other token is less probable in transformers, as a logarithm. It has the
perplexity in both, the entries of the metadata that differ from those of the original file, and the
number of zeros that are left. llama.cpp rounds the inputs of a product to the type of the weights.
Its attention and its cache are in fp32 here, as in transformers, so that nothing else is rounded::

    python -m venv out/llama-cpp && out/llama-cpp/bin/pip install xllamacpp
    apt-prune prune SmolLM2-135M-Instruct.Q4_1.gguf --sparsity 0.5 --dtype bfloat16 -o out/half
    python benchmarks/clients/llama_cpp.py out/half --source SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import save

import apt
from apt.engine.export import export_model
from apt.options import ExportRun
from apt.plugin.registry import registry
from apt.text.datasets import documents, tokenize, windows

Row = dict[str, Any]
PROMPTS = (
    "The days of the week are Monday, Tuesday, Wednesday,",
    "Paris is the capital of France. Berlin is the capital of Germany. Rome is the capital of",
    "Water boils in a kettle because",
)
LENGTH = 32
FIRST = 100  # probabilities that are asked for at first
SERVER = """
import importlib.metadata, socket, sys, xllamacpp
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.n_parallel, given.warmup = sys.argv[1], 1024, 1, False
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = int(sys.argv[2])
given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    given.port = free.getsockname()[1]
server = xllamacpp.Server(given)
print(server.listening_address, importlib.metadata.version("xllamacpp"), flush=True)
sys.stdin.read()
"""


class Server:
    """A server of llama.cpp that has a model."""

    def __init__(self, address: str, version: str) -> None:
        self.address, self.version = address, version

    def ask(self, path: str, **body: Any) -> Any:
        """The answer to a request."""
        request = urllib.request.Request(
            f"{self.address}/{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def following(self, prompt: str) -> list[int]:
        """The most probable tokens after a prompt."""
        answer = self.ask(
            "completion", prompt=prompt, n_predict=LENGTH, temperature=0, return_tokens=True
        )
        found: list[int] = answer["tokens"]
        return found

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text."""
        found: list[int] = self.ask("tokenize", content=text, add_special=True)["tokens"]
        return found

    def perplexity(self, tokens: Tensor, vocabulary: int) -> float:
        """The perplexity of windows (windows, seqlen), one token after the other."""
        logs = [
            self._log_probability(window[:place], window[place], vocabulary)
            for window in tokens.tolist()
            for place in range(1, len(window))
        ]
        return math.exp(-sum(logs) / len(logs))

    def _log_probability(self, before: list[int], token: int, vocabulary: int) -> float:
        for count in (FIRST, vocabulary):
            answer = self.ask(
                "completion", prompt=before, n_predict=1, temperature=0, n_probs=count
            )
            known = answer["completion_probabilities"][0]["top_logprobs"]
            found = next((one["logprob"] for one in known if one["id"] == token), None)
            if found is not None:
                return float(found)
        raise RuntimeError(f"token {token} has no probability")


@contextmanager
def serving(python: Path, path: Path, threads: int) -> Iterator[Server]:
    """A server for a file, in another environment."""
    command = [str(python), "-c", SERVER, str(path), str(threads)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith("http")), None)
        if line is None:
            raise SystemExit(f"llama.cpp does not open {path}: {' '.join(command[:1])}")
        yield Server(*line.split())
    finally:
        process.kill()
        process.wait()


def differing(source: Path, path: Path) -> list[str]:
    """The entries of a file whose bytes are not those of another file."""
    before, after = entries(source), entries(path)
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def entries(path: Path) -> dict[str, bytes]:
    """The bytes of each entry of the metadata."""
    fields = gguf.GGUFReader(str(path)).fields
    return {
        key: b"".join(part.tobytes() for part in field.parts)
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }


class Reference:
    """What transformers makes of a directory, in fp32."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text."""
        found: list[int] = self.tokenizer(text)["input_ids"]
        return found

    def following(self, prompt: str) -> list[int]:
        """The most probable tokens after a prompt."""
        ids = torch.tensor([self.tokens(prompt)])
        made = self.model.generate(ids, max_new_tokens=LENGTH, do_sample=False)
        found: list[int] = made[0, ids.shape[1] :].tolist()
        return found

    @torch.no_grad()
    def gap(self, prompt: str, own: list[int], other: list[int]) -> float | None:
        """How much less probable, as a logarithm, the first other token is; None if none is."""
        pairs = zip(own, other, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if place is None:
            return None
        ids = torch.tensor([self.tokens(prompt) + own[:place]])
        logs = self.model(ids).logits[0, -1].log_softmax(-1)
        return float(logs[own[place]] - logs[other[place]])

    def windows(self, options: argparse.Namespace) -> Tensor:
        """The windows of the text."""
        count = options.windows * options.seqlen
        text = list(documents(options.text, "evaluation", registry()))
        tokens = tokenize(self.tokenizer, text, count)
        return windows(tokens, options.windows, options.seqlen, "the text")[: options.windows]


def rows(directory: Path, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each type."""
    reference = Reference(directory)
    tokens = reference.windows(options)
    perplexity = apt.perplexity(reference.model, tokens)
    texts = [reference.following(prompt) for prompt in PROMPTS]
    for kind in options.types:
        with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
            path = Path(folder) / f"{directory.name}.gguf"
            run = ExportRun(model=str(directory), output=path, type=kind, source=options.source)
            done = export_model(run, registry())
            with serving(options.python, path, options.threads) as server:
                made = [server.following(prompt) for prompt in PROMPTS]
                gaps = map(reference.gap, PROMPTS, texts, made)
                yield {
                    "model": directory.name,
                    "type": kind,
                    "bytes": done.size,
                    "same tokens": all(server.tokens(p) == reference.tokens(p) for p in PROMPTS),
                    "gaps": list(gaps),
                    "perplexity": server.perplexity(tokens, reference.model.config.vocab_size),
                    "perplexity in transformers": perplexity,
                    "zeros": done.zeros,
                    "kept": done.kept,
                    "differing": differing(options.source, path),
                    "xllamacpp": server.version,
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--source", type=Path, required=True, help="what they were made from")
    parser.add_argument("--python", type=Path, default=Path("out/llama-cpp/bin/python"))
    parser.add_argument("--types", nargs="+", default=["f32", "f16", "bf16", "q8_0"])
    parser.add_argument("--text", default="builtin", help="a data source of APT")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    found = []
    for directory in options.directories:
        for row in rows(directory, options):
            found.append(row)
            print(json.dumps(row), flush=True)
            if options.json:
                save(options.json, found)


if __name__ == "__main__":
    main()
