"""The text sources that ship with APT."""

from collections.abc import Iterator
from importlib.resources import as_file, files

from apt.extending import Split, hub_documents, read_file


def builtin(split: Split) -> Iterator[str]:
    """The embedded corpus; its two splits come from different articles."""
    with as_file(files("apt_plugins") / "data" / f"{split}.txt.gz") as path:
        yield from read_file(path)


def wikitext2(split: Split) -> Iterator[str]:
    """WikiText-2, raw: its train and test splits."""
    return hub_documents("Salesforce/wikitext", "wikitext-2-raw-v1", split, called="wikitext2")


def ptb(split: Split) -> Iterator[str]:
    """Penn Treebank: its train and test splits, from the hub's Parquet export.

    The repository itself is a loading script, which `datasets` 4 no longer runs.
    """
    name, export = "ptb-text-only/ptb_text_only", "refs/convert/parquet"
    return hub_documents(name, None, split, revision=export, called="ptb")


def c4(split: Split) -> Iterator[str]:
    """C4: the first shard of its train split and of its validation split."""
    shards = {
        "train": "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz",
        "validation": "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
    }
    return hub_documents("json", None, split, files=shards, called="c4")
