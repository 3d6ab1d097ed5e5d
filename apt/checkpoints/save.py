"""Writing of a model in the format of transformers or in that of its checkpoint."""

from pathlib import Path
from typing import Any

from apt.checkpoints.copies import copy_files, side_files
from apt.checkpoints.formats import Checkpoint

# transformers would write this file without the fields that it does not know.
_ALWAYS_COPIED = "generation_config.json"


def save_model(
    model: Any,
    tokenizer: Any,
    directory: Path,
    checkpoint: Checkpoint | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Write weights, configuration and tokenizer.

    Args:
        tokenizer: its tokenizer; None writes no tokenizer.
        checkpoint: the writer of another format; None writes safetensors as transformers does.
        max_shard_size: the largest size of a file of weights, such as ``"5GB"``; None leaves it to
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
    """Copy the files of a checkpoint that `save_model` does not write, such as LICENSE."""
    copy_files(
        (
            path
            for path in side_files(source)
            if path.name == _ALWAYS_COPIED or not (directory / path.relative_to(source)).exists()
        ),
        source,
        directory,
    )
