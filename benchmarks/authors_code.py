"""The authors' code, run as it is in a checkout: functions and classes are taken out of its files.

Their modules import packages that are not needed here, or that current versions of transformers no
longer have. So each definition is compiled alone, with stand-ins for the names that its module
imports. Models are loops over blocks there too; a block is called as they call it (`_Layer`).
"""

import ast
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apt.adapter import Adapter
from apt.calibration.batches import Batch


def taken(path: Path, *names: str, **given: Any) -> SimpleNamespace:
    """The definitions of a file with these names.

    Args:
        path: the file.
        names: the names of functions and classes at its top level.
        given: the values of other names that they use.
    """
    if not path.is_file():
        raise SystemExit(f"{path} is not a file: give the authors' checkout")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = [node for node in tree.body if getattr(node, "name", None) in names]
    if missing := set(names) - {getattr(node, "name", None) for node in body}:
        raise SystemExit(f"{path} has no {', '.join(sorted(missing))}: it is another version")
    space = {"torch": torch, "nn": nn, "F": F, "np": np, "math": math, "time": time}
    space |= {"print": lambda *told: None, **given}
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names})


class _Layer(nn.Module):
    """A block that is called with one sample's states and returns a tuple."""

    def __init__(self, adapter: Adapter, block: nn.Module, call: Any) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.step = lambda hidden: adapter.step(block, hidden, call)

    def forward(self, hidden: Tensor, **unused: Any) -> tuple[Tensor]:
        return (self.step(hidden),)


def _model(
    adapter: Adapter, blocks: Sequence[nn.Module], batches: Sequence[Batch], first: int = 0
) -> tuple[Any, dict[str, Any]]:
    """A model with these blocks, and stand-ins that give it the states before them.

    Args:
        adapter: the adapter of the model.
        blocks: the blocks.
        batches: the states, one sample in each.
        first: the index of the first block in the model.
    """
    states = torch.cat([batch.state for batch in batches])
    calls = batches[0].calls[first:]
    layers = [_Layer(adapter, block, call) for block, call in zip(blocks, calls, strict=False)]
    inputs = (states.clone(), torch.zeros_like(states), None, None)
    model = SimpleNamespace(
        model=SimpleNamespace(layers=layers),
        config=SimpleNamespace(use_cache=False),
        hf_device_map={},
    )
    return model, {
        "get_loaders": lambda *args, **options: (None, None),
        "prepare_calibration_input": lambda *args: inputs,
    }


def alphas(checkout: Path, blocks: Sequence[nn.Module], kind: str) -> list[float]:
    """AlphaPruning's exponents of the Linears; ``kind`` is ``xmin_peak`` or ``xmin_mid``."""
    code = taken(checkout / "lib/esd_utils.py", "net_esd_estimator")
    exponents: list[float] = code.net_esd_estimator(nn.ModuleList(blocks), fix_fingers=kind)[
        "alpha"
    ]
    return exponents


def alpha_shares(
    checkout: Path,
    blocks: Sequence[nn.Module],
    found: Sequence[float],
    mapping: str,
    sparsity: float,
    spread: float,
) -> list[float]:
    """AlphaPruning's sparsities of the Linears; ``mapping`` is block_wise or layer_wise."""
    code = taken(checkout / "lib/prune.py", "find_layers", "ww_sparsity")
    model = SimpleNamespace(model=SimpleNamespace(layers=nn.ModuleList(blocks)))
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/alpha.npy", np.array(found))
        args = SimpleNamespace(
            model="llama", ww_metric_cache=folder, ww_metric="alpha",
            mapping_type=mapping, sparsity_ratio=sparsity,
        )  # fmt: skip
        shares: list[float] = code.ww_sparsity(args, model, s1=1 - spread, s2=1 + spread)
    return shares


class _Told(Exception):
    """OWL's function has the densities, which it prints before it prunes."""


@torch.no_grad()
def owl(
    checkout: Path,
    adapter: Adapter,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    sparsity: float,
    times: float,
    shift: float,
) -> tuple[list[float], list[float]]:
    """OWL's shares of outliers, and its sparsities, of the blocks."""
    ratios = list[float]()

    def told(*values: Any) -> None:
        if str(values[0]).startswith("layer outlier ratio"):
            ratios.append(values[2] / 100)
        if str(values[0]).startswith("after adjustment"):
            raise _Told(values[1])

    model, given = _model(adapter, blocks, batches)
    wrapped = taken(checkout / "lib/layerwrapper.py", "WrappedGPT").WrappedGPT
    code = taken(
        checkout / "lib/prune_all.py", "find_layers", "check_outlier_mean", "prune_wanda_outlier",
        WrappedGPT=wrapped, print=told, **given,
    )  # fmt: skip
    args = SimpleNamespace(
        model="llama", nsamples=len(batches), seed=0, sparsity_ratio=sparsity,
        Hyper_m=times, Lamda=shift,
    )  # fmt: skip
    try:
        code.prune_wanda_outlier(args, model, None)
    except _Told as end:
        return ratios, [1 - float(density) for density in end.args[0]]
    raise SystemExit(f"{checkout} no longer prints the densities")


def dsnot(
    checkout: Path,
    adapter: Adapter,
    block: nn.Module,
    index: int,
    batches: Sequence[Batch],
    nm: tuple[int, int] | None,
    sparsity: float,
    cycles: int,
) -> dict[str, Tensor]:
    """DSnoT's zeros (out, in) in the Linears of one block, from Wanda's mask, none skipped.

    Args:
        checkout: the checkout.
        adapter: the adapter of the model.
        block: the block; it remains as it is.
        index: its index.
        batches: the states before it, one sample in each.
        nm: the pattern, n kept of m; None prunes ``sparsity`` of each row.
        sparsity: the sparsity.
        cycles: the greatest number of exchanges in a row.
    """
    copy = deepcopy(block)
    model, given = _model(adapter, [copy], batches, index)
    wrapped = taken(checkout / "lib/layerwrapper.py", "WrappedGPT").WrappedGPT
    code = taken(
        checkout / "lib/prune.py", "find_layers", "return_reorder_indice", "prune_DSnoT",
        WrappedGPT=wrapped, **given,
    )  # fmt: skip
    args = SimpleNamespace(
        nsamples=len(batches), seed=0, sparsity_ratio=sparsity, initial_method="wanda",
        skip_layer="no_skip", skip_sub_layer="no_skip", without_DSnoT=False,
        without_same_sign=True, max_cycle_time=cycles, update_threshold=0.1, pow_of_var_regrowing=1,
        get_time_overhead=False,
    )  # fmt: skip
    kept, m = nm or (0, 0)
    code.prune_DSnoT(args, model, None, prune_n=m - kept, prune_m=m)
    linears = code.find_layers(model.model.layers[0])
    return {name: linear.weight.data == 0 for name, linear in linears.items()}


@torch.no_grad()
def sparsegpt(
    checkout: Path,
    weight: Tensor,
    samples: Sequence[Tensor],
    nm: tuple[int, int] | None,
    sparsity: float,
) -> Tensor:
    """SparseGPT's weight (out, in) for the inputs (tokens, in) of some samples."""
    transformers = SimpleNamespace(Conv1D=Conv1D)
    code = taken(checkout / "sparsegpt.py", "SparseGPT", transformers=transformers, DEBUG=False)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    solver = code.SparseGPT(linear)
    for inputs in samples:
        solver.add_batch(inputs, None)
    kept, m = nm or (0, 0)
    with patch.object(torch.cuda, "synchronize"):  # which fails where there is no GPU
        solver.fasterprune(sparsity, prunen=m - kept, prunem=m)
    return linear.weight.data


def taylor(
    checkout: Path, rows: Sequence[nn.Parameter], columns: Sequence[nn.Parameter], kind: str
) -> Tensor:
    """LLM-Pruner's importances (channels,) of channels that are removed together.

    Args:
        checkout: the checkout.
        rows: the weights whose rows belong to the channels, with ``grad`` and ``acc_grad``.
        columns: the weights whose columns do.
        kind: ``vectorize``, ``param_first``, ``param_second`` or ``param_mix``.
    """
    ends = {end: f"prune_{end}_channels" for end in ("out", "in")}
    linear = SimpleNamespace(**{name: name for name in ends.values()})
    other = SimpleNamespace(prune_out_channels="of another kind")
    library = SimpleNamespace(
        importance=SimpleNamespace(Importance=object),
        prune_linear_out_channels=ends["out"],
        prune_linear_in_channels=ends["in"],
        prune_embedding_out_channels="of an embedding",
    )
    code = taken(
        checkout / "LLMPruner/pruner/hf_llama_pruner.py", "TaylorImportance", tp=library,
        hf_linear_pruner=linear, hf_rmsnorm_pruner=other, hf_attention_pruner=other,
    )  # fmt: skip
    group = [
        (
            SimpleNamespace(target=SimpleNamespace(module=SimpleNamespace(weight=p)), handler=end),
            list(range(p.shape[dim])),
        )
        for parameters, dim, end in ((rows, 0, ends["out"]), (columns, 1, ends["in"]))
        for p in parameters
    ]
    importances: Tensor = code.TaylorImportance("sum", taylor=kind)(group)
    return importances


def spp(
    checkout: Path, weight: Tensor, inputs: Tensor, first: Tensor, factors: Tensor, scale: float
) -> Mapping[str, Tensor]:
    """SPP's layer: its outputs, the gradients of their mean square, and the merged weight.

    Args:
        checkout: the checkout.
        weight: the pruned weight (out, in).
        inputs: the inputs (samples, seqlen, in).
        first, factors: the adapter's ``A`` (16, in) and ``c`` (1, out).
        scale: the factor of the adapter.
    """
    code = taken(
        checkout / "asserts/lora.py", "LoraLayer", "DiagonalLinear", "Linear",
        transpose=lambda weight, swapped: weight.T if swapped else weight,
    )  # fmt: skip
    layer = code.Linear(weight.shape[1], weight.shape[0], r=1, lora_alpha=scale, bias=False)
    layer.weight.data = weight.clone()
    layer.lora_A.weight.data, layer.lora_A.weight_col.data = first.clone(), factors.clone()
    output = layer(inputs)
    (output.square().mean()).backward()
    layer.train(False)  # merges
    return {
        "outputs": output.detach(),
        "gradients of A": layer.lora_A.weight.grad,
        "gradients of c": layer.lora_A.weight_col.grad,
        "merged weights": layer.weight.data,
    }
