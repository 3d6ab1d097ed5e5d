"""The kinds of recovery that ship with APT."""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from apt.errors import AptError
from apt.extending import (
    Loss,
    Trainable,
    Unrecovered,
    divergence,
    language_model,
    relative_error,
    train_only,
)

_READ_BY_KERNELS = ("out_proj", "conv1d")  # peft refuses LoRA of weights that fused kernels read


def spp(given: Unrecovered) -> Trainable:
    """Adapters that multiply, of rank 16 by default (arXiv 2405.16057)."""
    from peft import get_peft_model

    from apt_plugins.spp import SppConfig

    rank = given.options.rank or 16
    dropout, names = given.options.dropout, _linears(given)
    config = SppConfig(r=rank, dropout=dropout, target_modules=names, task_type=_task(given))
    tuned = get_peft_model(given.model, config)
    return _adapter(tuned)


def lora(given: Unrecovered) -> Trainable:
    """LoRA with a masked update, of rank 16 and scale 2 by default (arXiv 2106.09685)."""
    from peft import get_peft_model

    from apt_plugins.masked_lora import masked_lora

    rank = given.options.rank or 16
    names = _linears(given)
    kind = str(getattr(getattr(given.model, "config", None), "model_type", ""))
    if "mamba" in kind or kind in ("falcon_h1", "nemotron_h"):
        names = [name for name in names if name.rpartition(".")[2] not in _READ_BY_KERNELS]
    config = masked_lora(
        target_modules=names, r=rank, lora_alpha=2 * rank, task_type=_task(given)
    )  # fmt: skip
    tuned = get_peft_model(given.model, config)
    return _adapter(tuned)


def _adapter(tuned: Any) -> Trainable:
    """The adapter of a model of peft."""
    return Trainable(
        tuned, merge=tuned.merge_and_unload, undo=tuned.unload, save=tuned.save_pretrained
    )


def _task(given: Unrecovered) -> str | None:
    """The kind of model for peft, which knows no kind for a model of any inputs."""
    return "CAUSAL_LM" if given.sample is None else None


def _linears(given: Unrecovered) -> list[str]:
    names = given.linears()
    if not names:
        raise AptError(
            "this kind of recovery needs torch.nn.Linear modules, and the model has none",
            "use the kind layers or distill",
        )
    return names


def layers(given: Unrecovered) -> Trainable:
    """All weights of the last blocks, the final norm and the head (arXiv 2411.15558).

    The blocks are those that run last.
    """
    model: Any = given.model
    head = model.get_output_embeddings()
    blocks = [block for _, block in given.adapter.blocks(given.model)][-given.options.blocks :]
    after = _run_after(given, blocks[-1])
    modules: list[nn.Module] = [*blocks, *after, *([] if head is None else [head])]
    train_only(given.model, (p for module in modules for p in module.parameters()))
    return Trainable(given.model, masked=True)


def _run_after(given: Unrecovered, block: nn.Module) -> list[nn.Module]:
    """The modules with parameters that a forward calls after the last block: its final norm.

    Families register these under different names and in different places, so one token, or one
    sample, is run.
    """
    model = given.model
    block_outputs, modules = list[bool](), list[nn.Module]()

    def record(module: nn.Module, _: Any) -> None:
        if block_outputs:
            modules.append(module)

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(record).remove)
        hooks.callback(block.register_forward_hook(lambda *_: block_outputs.append(True)).remove)
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        inputs: Mapping[str, Any] = {"input_ids": token, "use_cache": False}
        model(**(given.sample or inputs))
    return modules


def distill(given: Unrecovered) -> Trainable:
    """All weights of the blocks, towards the logits and the last states of the dense model."""
    blocks = [block for _, block in given.adapter.blocks(given.model)]
    train_only(given.model, (p for block in blocks for p in block.parameters()))
    return Trainable(given.model, _towards_dense(given, given.options.hidden), masked=True)


def norms(given: Unrecovered) -> Trainable:
    """All vectors, towards the logits of the dense model: no matrix changes.

    A vector is a norm or a bias. Its trained change is relative to its entries, so that one rate
    serves vectors of all sizes. A vector that several modules share does not change.
    """
    uses = Counter(
        parameter
        for module in given.model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    vectors = [
        (module, name)
        for module in given.model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 1 and uses[parameter] == 1
    ]
    if not vectors:
        raise AptError("the model has no norms or biases to train", "use the kind distill")
    given.model.requires_grad_(False)
    for module, name in vectors:
        start = getattr(module, name).detach().clone()
        register_parametrization(module, name, _RelativeChange(start))
        module.parametrizations[name].original.requires_grad_(True)  # type: ignore[index,union-attr]

    def merge() -> None:
        for module, name in vectors:
            remove_parametrizations(module, name, leave_parametrized=True)

    return Trainable(given.model, _towards_dense(given), merge=merge, undo=merge)


class _RelativeChange(nn.Module):
    """A vector at the start of a training plus its change, in units of its entries.

    The unit of an entry is its magnitude, but at least the root mean square of the vector.
    """

    start: Tensor
    unit: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("unit", start.abs().clamp_min(start.norm() / start.numel() ** 0.5),
                             persistent=False)  # fmt: skip

    def forward(self, change: Tensor) -> Tensor:
        """The vector."""
        return self.start + self.unit * change

    def right_inverse(self, vector: Tensor) -> Tensor:
        """The change at the start."""
        return torch.zeros_like(vector)


def _towards_dense(given: Unrecovered, hidden: float = 0.0) -> Loss | None:
    """The divergence of the logits from those of the dense model.

    For a model that does not read windows of text, it is the loss that is measured: None.

    Args:
        hidden: the weight of the relative error of the last hidden states.
    """
    teacher = given.teacher
    if teacher is None:
        return None

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        output = language_model(model)(
            input_ids=batch["input_ids"], use_cache=False, output_hidden_states=bool(hidden)
        )
        rows, device = batch["row"], output.logits.device
        tokens, logs = (value.to(device) for value in teacher.top(rows))
        value = divergence(output.logits, tokens, logs)
        if hidden:
            dense = teacher.hidden(rows).to(device)
            value = value + hidden * relative_error(output.hidden_states[-1], dense)
        return value

    return loss
