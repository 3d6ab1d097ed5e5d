"""Packed models as models of transformers."""

from pathlib import Path
from typing import Any

from torch import nn

from apt.errors import AptError, first_line
from apt.runtime.entries import read_entries
from apt.runtime.linear import kernels
from apt.runtime.quantizer import PackedConfig  # registers the format


def load(directory: Path | str, **options: Any) -> nn.Module:
    """Open a directory that ``apt-prune pack`` wrote, as a model of transformers.

    The weights stay packed in memory. ``generate``, pipelines and tools work with the model as with
    any other one. It cannot be trained or saved.

    Args:
        directory: the directory.
        options: further arguments of ``from_pretrained``. The dtype is by default that of the
            checkpoint.

    Raises:
        AptError: the directory is not packed, has a newer version, or is damaged.
    """
    from transformers import AutoModelForCausalLM

    read_entries(Path(directory))  # a clear error for what is not packed
    given = {"dtype": "auto", **options}
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(str(directory), **given)
    except (OSError, RuntimeError, ValueError) as error:
        raise AptError(
            f"{directory} does not load: {first_line(error)}", "pack the model again"
        ) from error
    return model.eval()


def describe_kernels() -> str:
    """What multiplies packed matrices on this machine."""
    native = kernels()
    if native is None:
        return "torch, which expands a matrix for each product: pip install apt-kernels"
    return f"apt-kernels {native.__version__} ({native.LEVEL})"


__all__ = ["PackedConfig", "describe_kernels", "load"]
