"""The tokens of exported tokenizers in llama.cpp, beside those in transformers.

Each tokenizer is exported with a tiny random model. Documents of Wikipedia and fortunes, and runs
of spaces, are cut into tokens one by one. The tokenizers of Mistral 7B are files of SentencePiece
in the package ``mistral-common``; transformers gets the merges that its own conversion makes of
their scores. The environment of llama.cpp is that of ``llama_cpp.py``::

    pip install --no-deps mistral-common sentencepiece
    python benchmarks/clients/llama_cpp_tokens.py --json FILE
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from llama_cpp import Row, serving
from llama_cpp_families import exported, random_model
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from apt.plugin.registry import registry

from common import FORTUNES, fortunes, package_file, save, wiki  # isort: skip  # of llama_cpp

DOCUMENTS = 500  # of each text


def zoo() -> Any:
    """The tokenizer of the zoo, which has the steps of GPT-2."""
    return AutoTokenizer.from_pretrained(registry().adapters.get("llama").zoo_path())


def mistral(name: str) -> Any:
    """A tokenizer of the package mistral-common, with the steps that the hub has for it."""
    pieces = SentencePieceProcessor(str(package_file("mistral_common", f"data/{name}")))
    numbers = range(pieces.get_piece_size())
    scores = {pieces.id_to_piece(number): pieces.get_score(number) for number in numbers}
    vocabulary = {piece: number for number, piece in enumerate(scores)}
    merges = generate_merges(vocabulary, scores)
    made = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(marks)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    control = [pieces.id_to_piece(number) for number in numbers if pieces.is_control(number)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(control, special_tokens=True)
    return tokenizer


TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "the zoo's (GPT-2's steps)": zoo,
    "Mistral 7B 0.1": lambda: mistral("tokenizer.model.v1"),
    "Mistral 7B 0.3": lambda: mistral("mistral_instruct_tokenizer_240323.model.v3"),
}


def texts(folder: Path) -> dict[str, list[str]]:
    """The documents."""
    draw = random.Random(0)
    runs = ["".join(draw.choice(["a", "the", "."]) + " " * draw.randint(1, 40) for _ in range(20))
            for _ in range(DOCUMENTS)]  # fmt: skip
    return {
        "wiki": wiki()[1][:DOCUMENTS], "fortunes": fortunes(folder)[:DOCUMENTS], "runs": runs
    }  # fmt: skip


def compared(tokenizer: Any, python: Path, path: Path, documents: dict[str, list[str]]) -> Row:
    """How many documents of each text have the same tokens in llama.cpp."""
    row: Row = {"documents": DOCUMENTS, "tokens": 0}
    with serving(python, path, 1) as server:
        for name, several in documents.items():
            for text in several:
                ours = tokenizer(text)["input_ids"]
                theirs = server.ask("tokenize", content=text, add_special=True)["tokens"]
                row[name] = row.get(name, 0) + (ours == theirs)
                row["tokens"] += len(ours)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path("out/llama-cpp/bin/python"))
    parser.add_argument("--fortunes", type=Path, default=FORTUNES, help="folder of the second text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    documents, rows = texts(options.fortunes), []
    for name, make in TOKENIZERS.items():
        tokenizer = make()
        model = random_model("LlamaConfig", {"vocab_size": len(tokenizer)})
        with tempfile.TemporaryDirectory() as folder:
            path = exported(model, tokenizer, folder)
            row = compared(tokenizer, options.python, path, documents)
        rows.append({"tokenizer": name} | row)
        print(rows[-1], flush=True)
    save(options.json, rows)


if __name__ == "__main__":
    main()
