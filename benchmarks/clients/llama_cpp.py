"""GGUF files of APT in llama.cpp: their text, their perplexity, their metadata, their zeros.

Each directory is exported in each type, and opened by the server of llama.cpp, which comes from the
package xllamacpp in an environment of its own. transformers computes the same in fp32, from the
directory. A row says for how many of three prompts the next 32 tokens are the same text, what the
perplexity is in both, which entries of the metadata differ from those of the original file, and how
many zeros are left. llama.cpp rounds the inputs of a product to the type of the weights. Its attention
and its cache are in fp32 here, as in transformers, so that nothing else is rounded::

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
    "The capital of France is", "Once upon a time there was a", "Water boils in a kettle because",
)  # fmt: skip
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

    def text(self, prompt: str) -> str:
        """The text of the most probable tokens after a prompt."""
        answer = self.ask("completion", prompt=prompt, n_predict=LENGTH, temperature=0)
        return str(answer["content"])

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


def by_transformers(directory: Path, options: argparse.Namespace) -> tuple[list[str], Tensor, Row]:
    """The texts, the tokens of the windows, and what transformers finds."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    count = options.windows * options.seqlen
    text = list(documents(options.text, "evaluation", registry()))
    tokens = windows(tokenize(tokenizer, text, count), options.windows, options.seqlen, "the text")
    tokens = tokens[: options.windows]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return texts, tokens, {"perplexity": apt.perplexity(model, tokens), "prompts": prompts}


def rows(directory: Path, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each type."""
    texts, tokens, ours = by_transformers(directory, options)
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    for kind in options.types:
        with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
            path = Path(folder) / f"{directory.name}.gguf"
            run = ExportRun(model=str(directory), output=path, type=kind, source=options.source)
            done = export_model(run, registry())
            with serving(options.python, path, options.threads) as server:
                made = [server.text(prompt) for prompt in PROMPTS]
                yield {
                    "model": directory.name,
                    "type": kind,
                    "bytes": done.size,
                    "same tokens": [server.tokens(p) for p in PROMPTS] == ours["prompts"],
                    "same text": sum(a == b for a, b in zip(texts, made, strict=True)),
                    "texts": list(zip(PROMPTS, texts, made, strict=True)),
                    "perplexity": server.perplexity(tokens, vocabulary),
                    "perplexity in transformers": ours["perplexity"],
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
    parser.add_argument("--types", nargs="+", default=["f16", "bf16", "q8_0"])
    parser.add_argument("--text", default="builtin", help="a data source of APT")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    found = []
    for directory in options.directories:
        for row in rows(directory, options):
            found.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "texts"}), flush=True)
            if options.json:
                save(options.json, found)


if __name__ == "__main__":
    main()
