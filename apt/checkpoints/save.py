"""Writing a model as transformers does, or in a format of its own."""

from pathlib import Path
from typing import Any

from apt.checkpoints.copies import copy_files, side_files
from apt.checkpoints.formats import Checkpoint

# Transformers writes it anew, without the fields that it does not know.
_AS_IT_WAS = "generation_config.json"


def save_model(
    model: Any,
    tokenizer: Any,
    directory: Path,
    checkpoint: Checkpoint | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Write weights, configuration and tokenizer.

    Args:
        model: the model.
        tokenizer: its tokenizer, if there is one.
        directory: where to.
        checkpoint: what it was read from, if not from transformers' own format, to write it so;
            None writes safetensors as transformers does.
        max_shard_size: how large a file of weights may become, as ``"5GB"``; None leaves that to
            transformers.
    """
    if checkpoint is None:
        largest = {"max_shard_size": max_shard_size} if max_shard_size else {}
        model.save_pretrained(directory, **largest)
    else:
        checkpoint.write(model.state_dict(), directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def keep_side_files(source: Path, directory: Path) -> None:
    """Copy the files of a checkpoint that were not written anew, as LICENSE and README.md."""
    copy_files(
        (
            path
            for path in side_files(source)
            if path.name == _AS_IT_WAS or not (directory / path.relative_to(source)).exists()
        ),
        source,
        directory,
    )
