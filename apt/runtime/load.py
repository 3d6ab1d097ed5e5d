"""Packed models as models of transformers."""

from pathlib import Path
from typing import Any

from torch import nn

from apt.errors import AptError, first_line
from apt.runtime.entries import read_entries
from apt.runtime.weights import with_weights


def load(directory: Path | str, **options: Any) -> nn.Module:
    """Open a directory that ``apt-prune pack`` wrote, as a model of transformers.

    The weights stay packed in memory. ``generate``, pipelines and tools work with the model as with
    any other model. It cannot be trained or saved.

    Args:
        directory: the directory.
        options: further arguments of ``from_pretrained``. The default dtype is the dtype of the
            checkpoint.

    Raises:
        AptError: the directory is not packed, has a newer version, or is damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import apt.runtime.quantizer  # noqa: F401  # registers the format with transformers

    read_entries(Path(directory))  # a clear error if the directory is not packed
    arguments = {"dtype": "auto", **options, "output_loading_info": True}
    try:
        if "config" not in arguments:
            remote = arguments.get("trust_remote_code", False)
            arguments["config"] = AutoConfig.from_pretrained(directory, trust_remote_code=remote)
        arguments["config"] = with_weights(arguments["config"])
        model, info = AutoModelForCausalLM.from_pretrained(str(directory), **arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise AptError(
            f"{directory} does not load: {first_line(error)}", "pack the model again"
        ) from error
    if missing := sorted(info["missing_keys"]):
        message = f"{directory} lacks {len(missing)} tensors of the model, such as {missing[0]}"
        raise AptError(message, "is the checkpoint complete?")
    loaded: nn.Module = model.eval()
    return loaded
