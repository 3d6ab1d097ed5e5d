"""The text sources that ship with APT."""

from collections.abc import Iterator
from importlib.resources import as_file, files

from apt.extending import Document, Split, hub_documents, read_file


def builtin(split: Split) -> Iterator[Document]:
    """The embedded corpus; its two splits come from different articles."""
    with as_file(files("apt_plugins") / "data" / f"{split}.txt.gz") as path:
        yield from read_file(path)


def code(split: Split) -> Iterator[Document]:
    """Modules of the standard library of Python; its two splits are different modules."""
    with as_file(files("apt_plugins") / "data" / f"code-{split}.jsonl.gz") as path:
        yield from read_file(path)


def hub_chat(split: Split) -> Iterator[Document]:
    """UltraChat 200k: conversations, its splits for fine-tuning and for testing it."""
    parts: dict[Split, str] = {"calibration": "train_sft", "evaluation": "test_sft"}
    return hub_documents("HuggingFaceH4/ultrachat_200k", None, split, called="chat", parts=parts)


def hub_code(split: Split) -> Iterator[Document]:
    """Evol-CodeAlpaca: tasks of programming with their solutions. It has no test split."""
    return hub_documents("theblackcat102/evol-codealpaca-v1", None, split, called="code")


def hub_math(split: Split) -> Iterator[Document]:
    """GSM8K: word problems with their solutions, its train and test splits."""
    return hub_documents("openai/gsm8k", "main", split, called="math")


def hub_wiki(split: Split) -> Iterator[Document]:
    """WikiText-103, raw: its train and test splits."""
    return hub_documents("Salesforce/wikitext", "wikitext-103-raw-v1", split, called="wiki")


def wikitext2(split: Split) -> Iterator[Document]:
    """WikiText-2, raw: its train and test splits."""
    return hub_documents("Salesforce/wikitext", "wikitext-2-raw-v1", split, called="wikitext2")


def ptb(split: Split) -> Iterator[Document]:
    """Penn Treebank: its train and test splits, from the hub's Parquet export.

    The repository itself is a loading script, which `datasets` 4 no longer runs.
    """
    name, export = "ptb-text-only/ptb_text_only", "refs/convert/parquet"
    return hub_documents(name, None, split, revision=export, called="ptb")


def c4(split: Split) -> Iterator[Document]:
    """C4: the first shard of its train split and of its validation split."""
    shards = {
        "train": "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz",
        "validation": "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
    }
    return hub_documents("json", None, split, files=shards, called="c4")
