"""Writing a Hugging Face directory that appears only when it is whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from apt.errors import AptError, first_line
from apt.formats import Checkpoint


def check_output(directory: Path, overwrite: bool) -> None:
    """Raise where an output directory cannot be used, before any work is done."""
    if directory.is_file():
        raise AptError(f"{directory} is a file", "choose another --output")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise AptError(
            f"{directory} exists and is not empty", "pass --overwrite or another --output"
        )
    parent = _existing_parent(directory)
    if not parent.is_dir():
        raise AptError(f"{parent} is no directory", "choose another --output")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise AptError(
            f"cannot write in {parent}: {error.strerror}", "choose another --output"
        ) from error


def check_space(directory: Path, needed: int) -> None:
    """Raise where the disk of an output directory has no ``needed`` bytes left."""
    parent = _existing_parent(directory)
    needed, free = needed + needed // 100 + 2**20, shutil.disk_usage(parent).free
    if free < needed:
        raise AptError(
            f"{parent} has {free / 2**20:,.0f} MiB left, but the output needs "
            f"{needed / 2**20:,.0f} MiB",
            "choose another --output",
        )


def _existing_parent(directory: Path) -> Path:
    return next(parent for parent in directory.absolute().parents if parent.exists())


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into that takes the place of ``directory`` at the end, or vanishes.

    Raises:
        AptError: the disk is full or not writable.
    """
    directory = directory.absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise AptError(f"cannot write {directory}: {first_line(error)}") from error
    try:
        yield partial
        open_up(partial)
        replace_directory(partial, directory)
    except (OSError, SafetensorError) as error:
        raise AptError(f"cannot write {directory}: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_directory(partial: Path, directory: Path) -> None:
    """Move ``partial`` to ``directory``; what was there is gone only after that."""
    if not directory.exists():
        partial.rename(directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    directory.rename(old / "old")
    partial.rename(directory)
    shutil.rmtree(old)


def open_up(partial: Path) -> None:
    """Give the usual permissions: temporary directories and safetensors files are private."""
    mask = _umask()
    partial.chmod(0o777 & ~mask)
    for path in partial.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model(
    model: Any, tokenizer: Any, directory: Path, checkpoint: Checkpoint | None = None
) -> None:
    """Write weights, configuration and tokenizer.

    Args:
        model: the model.
        tokenizer: its tokenizer, if there is one.
        directory: where to.
        checkpoint: what it was read from, if not from transformers' own format, to write it so;
            None writes safetensors as transformers does.
    """
    if checkpoint is None:
        model.save_pretrained(directory)
    else:
        checkpoint.write(model.state_dict(), directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
