"""Checkpoints in the format of mamba_ssm, for instance state-spaces/mamba-130m.

Such a checkpoint has a ``config.json`` without ``model_type``, and a ``pytorch_model.bin`` whose
names differ from those of transformers in one key. The package mamba_ssm is not needed to read or
write it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config, MambaConfig, PretrainedConfig

from apt.errors import AptError, first_line
from apt.extending import find_file

_WEIGHTS = "pytorch_model.bin"
_THEIRS, _TRANSFORMERS = "backbone.embedding.weight", "backbone.embeddings.weight"
# Options of mamba_ssm that models of transformers lack, with the only value that they support.
_FIXED: dict[str, Any] = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
_FIXED_MIXER: dict[str, Any] = {
    "d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False,
}  # fmt: skip


class NativeCheckpoint:
    """A checkpoint of mamba_ssm, see `apt.checkpoints.formats.Checkpoint`."""

    def __init__(self, location: str, native: dict[str, Any]) -> None:
        self._location, self._native = location, native
        try:
            self.config = _config(location, native)
        except AptError:
            raise
        except Exception as error:  # the checks of transformers raise many types
            raise AptError(
                f"the config.json of {location} is not a valid one of mamba_ssm: "
                f"{first_line(error)}",
                "get the checkpoint again",
            ) from error

    def read(self) -> dict[str, Tensor]:
        """Read the weights; pickled objects other than tensors are refused."""
        path = find_file(self._location, _WEIGHTS)
        if path is None:
            raise AptError(f"{self._location} has no {_WEIGHTS}", "is the checkpoint complete?")
        stored: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return {name.replace(_THEIRS, _TRANSFORMERS): tensor for name, tensor in stored.items()}

    def write(self, weights: Mapping[str, Tensor], directory: Path) -> None:
        """Write ``pytorch_model.bin`` and the ``config.json`` that was read."""
        native = {name.replace(_TRANSFORMERS, _THEIRS): x.cpu() for name, x in weights.items()}
        torch.save(native, directory / _WEIGHTS)
        text = json.dumps(self._native, indent=4)
        (directory / "config.json").write_text(text, encoding="utf-8")


def native_checkpoint(location: str, config: dict[str, Any]) -> NativeCheckpoint | None:
    """The checkpoint at ``location`` if its ``config`` is in the format of mamba_ssm, else None."""
    return NativeCheckpoint(location, config) if {"d_model", "n_layer"} <= config.keys() else None


def _config(location: str, native: dict[str, Any]) -> PretrainedConfig:
    """The configuration of the same model in transformers.

    Raises:
        AptError: transformers has no such model.
    """
    mixer: dict[str, Any] = native.get("ssm_cfg") or {}
    for values, fixed in ((native, _FIXED), (mixer, _FIXED_MIXER)):
        for name, value in fixed.items():
            if values.get(name, value) != value:
                raise AptError(
                    f"{location} is a model that transformers does not support: "
                    f"{name} is {values[name]!r}",
                    "load it with mamba_ssm and prune it from Python, see docs/mamba.md",
                )
    multiple = native.get("pad_vocab_size_multiple", 8)
    common = {
        "hidden_size": native["d_model"],
        "num_hidden_layers": native["n_layer"],
        "vocab_size": math.ceil(native.get("vocab_size", 50277) / multiple) * multiple,
        "residual_in_fp32": native.get("residual_in_fp32", True),
        "tie_word_embeddings": native.get("tie_embeddings", True),
        "expand": mixer.get("expand", 2),
        "conv_kernel": mixer.get("d_conv", 4),
        "use_bias": mixer.get("bias", False),
        "use_conv_bias": mixer.get("conv_bias", True),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if mixer.get("layer", "Mamba1") == "Mamba2":
        width = mixer.get("headdim", 64)
        return Mamba2Config(
            state_size=mixer.get("d_state", 128),
            head_dim=width,
            num_heads=common["expand"] * common["hidden_size"] // width,
            n_groups=mixer.get("ngroups", 1),
            chunk_size=mixer.get("chunk_size", 256),
            time_step_limit=tuple(mixer.get("dt_limit", (0.0, math.inf))),
            **common,
        )
    return MambaConfig(
        state_size=mixer.get("d_state", 16), time_step_rank=mixer.get("dt_rank", "auto"), **common
    )
