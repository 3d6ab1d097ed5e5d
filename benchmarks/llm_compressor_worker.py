"""Prunes or quantises a model with llm-compressor, in the environment of `llm_compressor.py`.

Arguments: the folder with ``dense`` and ``tokens.safetensors``, the output, the modifier, the
pattern (for GPTQModifier the group size of its int4), the number of threads. The last line of the
output has seconds and version as JSON.
"""

import json
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import pruning, quantization
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def pruned(modifier: str, pattern: str) -> Any:
    kept, _, group = pattern.partition(":")
    sparsity = 1 - int(kept) / int(group) if group else float(pattern)
    return getattr(pruning, modifier)(
        sparsity=sparsity, mask_structure=pattern if group else "0:0", ignore=["re:.*lm_head"]
    )


def gptq(group: int) -> Any:
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": group}
    scheme = {"int4": {"targets": ["Linear"], "weights": weights}}
    return quantization.GPTQModifier(config_groups=scheme, ignore=["re:.*lm_head"])


def main() -> None:
    work, output, modifier, pattern, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(Path(work) / "dense")
    tokens = load_file(Path(work) / "tokens.safetensors")["tokens"]
    samples = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    recipe = gptq(int(pattern)) if modifier == "GPTQModifier" else pruned(modifier, pattern)
    started = time.perf_counter()
    oneshot(
        model=model, dataset=Dataset.from_dict(samples), recipe=recipe,
        num_calibration_samples=len(tokens), max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False, pipeline="sequential",
    )  # fmt: skip
    seconds = time.perf_counter() - started
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output, save_compressed=False)
    print(json.dumps({"seconds": seconds, "version": version("llmcompressor")}))


if __name__ == "__main__":
    main()
