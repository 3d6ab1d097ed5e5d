"""Writes the folder ``files`` with the present version: ``python -m tests.stability.make_files``.

Add a folder for each version of a format, and never change the folders of former versions.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from apt.testing import embedded

FILES = Path(__file__).with_name("files")


def model(place: Path) -> None:
    """A random LLaMA in bf16, two thirds of whose weights in Linear modules are zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(place)
    embedded("llama")[1].save_pretrained(place)


def tensor_hashes(directory: Path) -> dict[str, str]:
    """The hash of the bytes of each tensor of a plain checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in sorted(tensors.items())
    }


def main() -> None:
    """Prune and pack the model; keep the packed directory, and hashes of the plain tensors."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model(place / "model")
        words = [
            "prune", "model", "--sparsity", "0.6", "--quantize", "int4", "--samples", "4",
            "--seqlen", "32", "--eval", "builtin", "--output", "pruned", "--pack", "packed",
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "apt", *words], cwd=place, check=True)
        version = FILES / "packed-2-report-1"
        left_out = shutil.ignore_patterns("token*", "apt_*.py", "README.md")
        shutil.copytree(place / "packed", version, ignore=left_out)
        hashes = json.dumps(tensor_hashes(place / "pruned"), indent=1)
        (version / "hashes.json").write_text(hashes, encoding="utf-8")


if __name__ == "__main__":
    main()
