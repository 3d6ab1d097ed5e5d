"""SPP as a tuner of peft: adapters that multiply, so that no zero changes (arXiv 2405.16057).

A linear layer of weight ``W`` (out, in) computes with ``W ∘ (1 + s · A ⊗ c)``: ``A`` (r, in) has a
row for each of ``r`` groups of consecutive outputs, and ``c`` (out, 1) has a factor for each
output. At the start the model is unchanged, since ``c`` is zero. Importing this module registers
the type ``"SPP"``, so that peft creates, saves, loads and merges such adapters::

    from peft import get_peft_model
    from apt_plugins.spp import SppConfig

    tuned = get_peft_model(pruned, SppConfig(target_modules="all-linear"))
    ...  # train with transformers' Trainer
    merged = tuned.merge_and_unload()
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

SPP = "SPP"


@dataclass
class SppConfig(PeftConfig):  # type: ignore[misc]
    """The configuration of SPP adapters.

    Args:
        r: the number of groups of outputs; by default the value of the authors' code.
        scale: the factor ``s``; by default the value of the authors' code.
        dropout: the dropout of the inputs of the adapters. The authors use 0.05. Without it, a
            layer needs one product instead of two.
        target_modules: the names of the linear layers, as in other configurations of peft.
        exclude_modules: the names of linear layers without adapters.
        modules_to_save: the names of other modules that are trained and saved as a whole.
    """

    r: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPP
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]


class SppLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with SPP adapters.

    Args:
        base_layer: the `torch.nn.Linear`.
        adapter_name: the name of the first adapter.
        config: its configuration.
    """

    adapter_layer_names = ("spp_A", "spp_c")
    other_param_names = ("spp_scale",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SppConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = self._linear.in_features, self._linear.out_features
        self.spp_A, self.spp_c = nn.ParameterDict(), nn.ParameterDict()
        self.spp_scale: dict[str, float] = {}
        self.spp_dropout: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._dense: Tensor | None = None  # the weight before a merge
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def _linear(self) -> nn.Linear:
        """The layer under all adapters."""
        layer: Any = self  # mypy does not see the attributes of the second base class
        linear: nn.Linear = layer.get_base_layer()
        return linear

    def update_layer(self, adapter_name: str, config: SppConfig) -> None:
        """Add an adapter."""
        groups = min(config.r, self.out_features)
        if groups < 1:
            raise ValueError(f"r is {config.r}; it must be at least 1")
        first = torch.empty(groups, self.in_features)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))
        self.spp_A[adapter_name] = nn.Parameter(first)
        self.spp_c[adapter_name] = nn.Parameter(torch.zeros(self.out_features, 1))
        self.spp_scale[adapter_name] = config.scale
        self.spp_dropout[adapter_name] = config.dropout
        layer: Any = self
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s · A ⊗ c`` (out, in), the relative change of the weight."""
        first, factors = self.spp_A[adapter], self.spp_c[adapter]
        rows = torch.arange(self.out_features, device=first.device)
        group = rows * len(first) // self.out_features
        change: Tensor = self.spp_scale[adapter] * first[group] * factors
        return change

    @property
    def weight(self) -> Tensor:
        """The weight with which the layer computes, for code that reads it (fused kernels)."""
        base = self._linear.weight
        if self.disable_adapters or self.merged:
            return base
        return base + base * self._change(self._used()).to(base.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply the weight; zeros stay zeros.

        Raises:
            ValueError: ``safe_merge`` is set, and a result is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.spp_A]
        if not names:
            return
        weight = self._linear.weight
        dense = weight.data if self._dense is None else self._dense
        with torch.no_grad():
            factor = self._change([*self.merged_adapters, *names])
            merged = (dense.float() + dense.float() * factor.float()).to(weight.dtype)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(f"the adapters {', '.join(names)} have values that are not finite")
        self._dense = dense.clone()
        weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the weight as it was before `merge`."""
        if self._dense is not None:
            self._linear.weight.data = self._dense
        self._dense = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer, with the adapters unless they are disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._used()
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        linear = self._linear
        dropout = max(self.spp_dropout[name] for name in names) if self.training else 0.0
        if not dropout:
            return F.linear(x, self.weight.to(x.dtype), linear.bias)
        change = (linear.weight * self._change(names)).to(x.dtype)
        return self.base_layer(x, *args, **kwargs) + F.linear(F.dropout(x, dropout), change)

    def _used(self) -> list[str]:
        active: Any = self.active_adapters
        return [name for name in active if name in self.spp_A]

    def _change(self, adapters: list[str]) -> Tensor:
        return torch.stack([self.get_delta_weight(name) for name in adapters]).sum(0)


class SppModel(BaseTuner):  # type: ignore[misc]
    """A model whose linear layers have SPP adapters."""

    prefix = "spp_"
    tuner_layer_cls = SppLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _create_and_replace(
        self,
        peft_config: SppConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, SppLinear):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):
            raise ValueError(f"{current_key} is a {type(base).__name__}, not a torch.nn.Linear")
        layer = SppLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register() -> None:
    """Register the type ``"SPP"`` in peft."""
    PEFT_TYPE_TO_CONFIG_MAPPING[SPP] = SppConfig
    PEFT_TYPE_TO_TUNER_MAPPING[SPP] = SppModel
    PEFT_TYPE_TO_PREFIX_MAPPING[SPP] = SppModel.prefix


register()
