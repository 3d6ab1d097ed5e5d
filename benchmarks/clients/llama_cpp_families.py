"""Checkpoints that no GGUF file was, exported and opened by llama.cpp: tiny random models.

A row has the largest difference between the logarithms of the probabilities of all tokens after 200
random tokens, in llama.cpp and in transformers, both in fp32. The environment of llama.cpp is
that of ``llama_cpp.py``::

    python benchmarks/clients/llama_cpp_families.py --json FILE
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from llama_cpp import Row, serving
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from apt.engine.export import export_model
from apt.options import ExportRun
from apt.plugin.registry import registry

from common import save  # isort: skip  # llama_cpp adds its folder

SIZES = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "LLaMA": ("LlamaConfig", {}),
    "LLaMA, wide heads, tied": ("LlamaConfig", {"head_dim": 32, "tie_word_embeddings": True}),
    "LLaMA, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "LLaMA 3, scaled frequencies": ("LlamaConfig", {"rope_scaling": SCALED}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Qwen 2": ("Qwen2Config", {}),
    "Qwen 3": ("Qwen3Config", {"head_dim": 32}),
}


def random_model(kind: str, fields: dict[str, Any]) -> Any:
    """A model whose norms and biases are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | fields))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    return model.float().eval()


def exported(model: Any, tokenizer: Any, folder: str) -> Path:
    """The GGUF file of a model and its tokenizer, in a folder."""
    path = Path(folder) / "model.gguf"
    model.save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    export_model(ExportRun(model=f"{folder}/model", output=path), registry())
    return path


@torch.no_grad()
def difference(model: Any, python: Path, path: Path, tokens: Tensor) -> float:
    """The largest difference of a logarithm of a probability after tokens (seqlen)."""
    ours = model(tokens[None]).logits[0, -1].log_softmax(-1)
    with serving(python, path, 1) as server:
        answer = server.ask(
            "completion", prompt=tokens.tolist(), n_predict=1, temperature=0, n_probs=len(ours)
        )
    found = answer["completion_probabilities"][0]["top_logprobs"]
    theirs = {one["id"]: one["logprob"] for one in found}
    return max(abs(theirs[token] - float(value)) for token, value in enumerate(ours))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path("out/llama-cpp/bin/python"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(registry().adapters.get("llama").zoo_path())
    tokens = torch.randint(5, 2000, (200,), generator=torch.Generator().manual_seed(1))
    rows: list[Row] = []
    for name, (kind, fields) in MODELS.items():
        model = random_model(kind, fields)
        with tempfile.TemporaryDirectory() as folder:
            path = exported(model, tokenizer, folder)
            largest = difference(model, options.python, path, tokens)
        rows.append({"model": name, "difference": largest})
        print(rows[-1], flush=True)
    save(options.json, rows)


if __name__ == "__main__":
    main()
