"""Fine-tuning of a pruned model by other tools: the zeros on disk afterwards, and the loss.

The embedded LLaMA is pruned to 50 %, and trained by transformers' Trainer and by trl's SFTTrainer,
each with `apt.KeepZeros` and without. It needs trl, which APT does not install::

    pip install trl
    python benchmarks/clients/fine_tuning.py
"""

import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import apt
from apt.plugin.registry import registry
from apt.text.datasets import documents

ARGUMENTS: dict[str, Any] = {
    "max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 10,
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "bf16": False,
}  # fmt: skip
LENGTH = 128


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    paragraphs = (p for t in documents("builtin", "calibration", registry()) for p in t.split("\n"))
    data = Dataset.from_dict({"text": [p for p in paragraphs if len(p) > 200][:800]})
    print(f"transformers {version('transformers')}, trl {version('trl')}")
    with tempfile.TemporaryDirectory() as folder:
        pruned = Path(folder) / "pruned"
        apt.run(apt.PruneRun(
            model="zoo:llama", sparsity=0.5, samples=16, seqlen=LENGTH, output=pruned,
        ))  # fmt: skip
        print(f"before: {zeros(pruned):.2%} zeros")
        for kind in ("Trainer", "SFTTrainer"):
            for keeps in (False, True):
                losses = trained(kind, pruned, data, Path(folder) / "out", keeps=keeps)
                share = zeros(Path(folder) / "out")
                print(f"{kind}, {'KeepZeros' if keeps else 'plain'}: {share:.2%} zeros, {losses}")


def trained(kind: str, pruned: Path, data: Dataset, out: Path, *, keeps: bool) -> list[float]:
    """Train a copy of the model, save it, and return the mean losses of ten steps each."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(pruned)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    own = {"output_dir": str(out), **ARGUMENTS}
    more: dict[str, Any] = {"callbacks": [apt.KeepZeros()] if keeps else []}
    trainer: Any
    if kind == "Trainer":
        rows = data.map(
            lambda row: tokenizer(row["text"], truncation=True, max_length=LENGTH),
            remove_columns=["text"],
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(
            model, TrainingArguments(**own), train_dataset=rows, data_collator=collator, **more
        )
    else:
        trainer = trl.SFTTrainer(
            model, args=trl.SFTConfig(max_length=LENGTH, **own), train_dataset=data,
            processing_class=tokenizer, **more,
        )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out))
    return [round(float(log["loss"]), 3) for log in trainer.state.log_history if "loss" in log]


def zeros(directory: Path) -> float:
    """The share of zeros in the matrices of the blocks of a model on disk."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    blocks = registry().adapters.get("llama").make().blocks(model)
    weights = [p for _, block in blocks for p in block.parameters() if p.ndim == 2]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


if __name__ == "__main__":
    main()
