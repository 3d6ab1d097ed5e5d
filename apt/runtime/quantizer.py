"""The packed format as a quantisation method of transformers."""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from apt.errors import AptError, first_line
from apt.layouts.conversions import Converted, converted
from apt.runtime.decoding import decode_by_kernels
from apt.runtime.dense import use_kernels
from apt.runtime.entries import METHOD, described_entries
from apt.runtime.experts import (
    PackedStack,
    StoredTensors,
    are_matrices,
    device_near,
    prepare_for_stacks,
    put_stack,
)
from apt.runtime.linear import PackedLinear, warn_if_slow
from apt.runtime.matrix import Entry
from apt.runtime.weights import check_packed_files, local_files


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a packed model.

    Args:
        version: the version of the format.
        weights: the name of the file of the weights, or of their index.
        matrices: the descriptions of the packed matrices by the name of their tensor.
    """

    def __init__(
        self, version: Any = None, weights: Any = None, matrices: Any = None, **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.version, self.weights, self.matrices = version, weights, matrices

    def entries(self) -> dict[str, Entry]:
        """The descriptions of the packed matrices.

        Raises:
            AptError: the version is newer, or a description is damaged.
        """
        return described_entries(vars(self), "the configuration")


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces Linear modules by packed ones, and checks the tensors that are loaded into them."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """The configuration with the name of the file of the weights.

        transformers calls this hook before it looks for the files.
        """
        if getattr(config, "transformers_weights", None) is None:
            config.transformers_weights = self.quantization_config.weights
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self._entries = self.quantization_config.entries()
        records = {name: entry.record() for name, entry in self._entries.items()}
        files = checkpoint_files or local_files(model.config)
        check_packed_files(files, records)
        self._stored = StoredTensors(files, self._entries)
        self._stacks = dict[str, PackedStack]()
        used = {
            key
            for name, conversion in converted(model, self._stored.shapes).items()
            for key in self._put(model, name, conversion)
        }
        base = getattr(model, "base_model_prefix", "")
        headless = bool(base) and not hasattr(model, base)
        for name in self._entries.keys() - used:
            if headless and not name.startswith(f"{base}."):
                continue  # a module of the head, which AutoModel does not build
            raise AptError(
                f"the configuration describes {name}, which the model does not have in this shape",
                "pack the model again",
            )
        if self._stacks:
            prepare_for_stacks(model)

    def _put(self, model: nn.Module, name: str, conversion: Converted) -> list[str]:
        """Replace a parameter by a packed module; returns the names of its packed matrices."""
        keys = [piece.key for piece in conversion.pieces if piece.key in self._entries]
        path, _, parameter_name = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter = dict(owner.named_parameters(recurse=False)).get(parameter_name)
        if not keys or parameter is None or parameter.shape != conversion.shape:
            return []
        if isinstance(owner, nn.Linear) and parameter_name == "weight":
            _replace(model, path, owner, self._entries[keys[0]])
        elif len(conversion.shape) == 3 and are_matrices(conversion.pieces):
            self._stacks[name] = put_stack(owner, parameter_name, conversion.pieces)
        else:
            return []
        return keys

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, stack in self._stacks.items():
            keys = dict.fromkeys(piece.key for piece in stack.pieces)
            device = device_near(model, name)
            stack.fill({key: self._stored.matrix(key, stack.dtype, device) for key in keys})
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                try:
                    module.prepare()
                except ValueError as error:
                    raise AptError(
                        f"{name}.weight is damaged: {first_line(error)}", "pack the model again"
                    ) from error
        if next(model.parameters()).is_cpu:
            warn_if_slow()
        use_kernels(model)
        decode_by_kernels(model)
        # The model cannot be trained, and products that record gradients do not use the kernels.
        return model.requires_grad_(False)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """False: copy the directory, or unpack it."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: train the model before it is packed."""
        return False


def _replace(model: nn.Module, path: str, linear: nn.Linear, entry: Entry) -> None:
    """Replace a Linear module by a packed one, on the same device."""
    parent, _, name = path.rpartition(".")
    with torch.device(linear.weight.device):
        packed = PackedLinear(entry, bias=linear.bias is not None, dtype=linear.weight.dtype)
    packed.train(linear.training)
    setattr(model.get_submodule(parent), name, packed)
