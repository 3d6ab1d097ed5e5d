"""A model that a program passes: its checks, its adapter and its report."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Samples
from apt.adapter.recording import eval_mode
from apt.adapter.wrapped import check_in_memory, refuse_wrapped
from apt.checkpoints.architecture import reads_of
from apt.checkpoints.opened import Opened
from apt.distributed.ranks import Ranks
from apt.engine.machine import activation_store
from apt.engine.prune_model import Pruning, decide, prune_model
from apt.engine.recipes import record
from apt.engine.reports import model_entry
from apt.engine.store import ModelStore
from apt.engine.task import shared_settings
from apt.engine.text import Text
from apt.errors import AptError
from apt.events import with_site_observer
from apt.locations.model_source import Source
from apt.options import Activations, Compute, StreamOptions
from apt.output.report import Report
from apt.planning.plan import Plan
from apt.plugin.registry import Registry, registry
from apt.plugin.specs import AdapterSpec
from apt.text.ids import check_ids, check_vocabulary
from apt.text.language_model import language_model
from apt.text.special_tokens import bos_of, named_ids, special_ids


class CallerModel(ModelStore):
    """A model that a program passes, changed in place; the arguments are those of `apt.prune`.

    Raises:
        AptError: no adapter serves the model, it cannot be changed in place, or it cannot run on
            the tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor | Samples,
        adapter: str | Adapter | None,
        activations: Activations = "memory",
        ranks: Ranks | None = None,
        observe: Callable[[Any], None] = lambda event: None,
    ) -> None:
        self.registry, ranks = registry(), ranks or Ranks()
        StreamOptions(activations=activations).check()
        self._name, self.adapter = find_adapter(adapter, model, self.registry)
        _check_inputs(model, self.adapter, tokens)
        if ranks.first:
            observe = with_site_observer(observe, self.registry.site_pruned)
        super().__init__(ranks, observe)
        self.model, self.activations = model, activation_store(activations)
        self.device = str(next(model.parameters()).device)

    @property
    def opened(self) -> Opened:
        """The model, with its adapter."""
        spec = AdapterSpec(self._name, "the adapter of the caller", "")
        config = getattr(self.model, "config", None)
        return Opened(Source("", ""), self.model, config, spec, self.adapter)

    def prune(
        self,
        tokens: Tensor | Samples,
        job: Pruning,
        tokenizer: Any,
        options: dict[str, Any],
        compute: Compute = "auto",
        other_tokens: Tensor | None = None,
    ) -> tuple[Plan, Report]:
        """Prune the model, whose tensors keep their dtypes.

        Args:
            options: the options of the report, without `apt.PruneOptions`.
            compute: the dtype that the model computes in during the run.
            other_tokens: windows (windows, seqlen) of the same text as the samples.
        """
        if other_tokens is not None:
            _check_other_tokens(self.model, tokens, other_tokens)
        _, block = self.adapter.blocks(self.model)[0]
        stored = self.adapter.sites(block)[0].weight(block).dtype
        self.compute_in(compute, stored, self.device)
        try:
            text = self._text(tokens, other_tokens, tokenizer)
            plan, report = self._prune(text, job, options | {"compute": compute})
        finally:
            self.restore()
        return plan, report.timed(self.seconds)

    def _text(self, tokens: Tensor | Samples, other_tokens: Tensor | None, tokenizer: Any) -> Text:
        return Text(
            tokenizer,
            tokens,
            bos=bos_of(tokenizer) if tokenizer is not None else None,
            special=special_ids(tokenizer) if tokenizer is not None else named_ids(self.model),
            others=other_tokens,
        )

    def _prune(self, text: Text, job: Pruning, options: dict[str, Any]) -> tuple[Plan, Report]:
        name = getattr(getattr(self.model, "config", None), "_name_or_path", "")
        name = str(name or type(self.model).__name__)
        report = Report(
            options=options | record(job.recipe, job.augmentation, job.plan.grid),
            model=model_entry(name, _model_type(self.model), self._name)
            | {"sha256": self.weights} | self.precision.record()
            | self.precision.products(self.device, job.recipe.compute),
            calibration={
                "source": "", "own_samples": job.augmentation.own_samples, "bos": text.bos
            },
        )  # fmt: skip
        self.ranks.check_alike(
            lambda: shared_settings(report.options) | self.shared_inputs(text.tokens)
        )
        text, plan = decide(self, text, job)
        return plan, prune_model(self, text, replace(job, plan=plan), report)


def find_adapter(
    adapter: str | Adapter | None, model: nn.Module, registry: Registry
) -> tuple[str, Adapter]:
    """The name of the adapter for a model, and the adapter.

    Raises:
        AptError: there is no adapter for the model, or a module of the model is a wrapper.
    """
    refuse_wrapped(model)
    if adapter is not None and not isinstance(adapter, str):
        if isinstance(adapter, type) or not hasattr(adapter, "blocks"):
            raise AptError(f"adapter is {adapter!r}", "give its name, or an instance of its class")
        name, instance = type(adapter).__name__, adapter
    elif adapter is None and getattr(model, "config", None) is None:
        raise AptError(
            f"{type(model).__name__} has no config, so its family is not known",
            "choose an adapter",
            ("adapter",),
        )
    else:
        adapters, model_type = registry.adapters, _model_type(model)
        spec = registry.adapter_for(model_type) if adapter is None else adapters.get(adapter)
        name, instance = spec.name, spec.make()
    if (config := getattr(model, "config", None)) is not None:
        instance.check(config)
    return name, instance


def _model_type(model: nn.Module) -> str:
    """The ``model_type`` of a model's configuration; without one, the name of its class."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _check_inputs(model: nn.Module, adapter: Adapter, tokens: Tensor | Samples) -> None:
    """Raise `AptError` if the model cannot be changed in place, or cannot run on the tokens."""
    check_in_memory(model)
    _check_tunable(model)
    config = getattr(model, "config", None)
    windows = config is None or reads_of(type(model), config).windows
    if windows != isinstance(tokens, Tensor):
        given = "token ids" if isinstance(tokens, Tensor) else "samples"
        needed = "token ids (samples, seqlen)" if windows else "apt.Samples of its named inputs"
        message = f"tokens are {given}, and {type(model).__name__} reads {needed}"
        raise AptError(message, f"give {needed}", ("tokens",))
    if isinstance(tokens, Samples):
        return
    check_ids(tokens)
    check_vocabulary(tokens, model, "these tokens")
    _check_length(model, adapter, tokens)


def _check_other_tokens(model: nn.Module, tokens: Tensor | Samples, other_tokens: Tensor) -> None:
    """Raise if norms and biases cannot be trained on the tokens."""
    if isinstance(tokens, Samples):
        message = f"other tokens have no effect on {type(model).__name__}"
        hint = "leave them out: they are for decoders of text"
        raise AptError(message, hint, ("other_tokens",))
    if other_tokens.shape == tokens[:0].shape:  # a short text has no other windows
        return
    check_ids(other_tokens, name="other_tokens")
    check_vocabulary(other_tokens, model, "these other tokens")
    if other_tokens.shape[1] != tokens.shape[1]:
        raise AptError(
            f"other tokens have windows of {other_tokens.shape[1]} tokens, and samples have "
            f"{tokens.shape[1]}",
            "give windows as long as the samples",
            ("other_tokens",),
        )


def _check_length(model: nn.Module, adapter: Adapter, tokens: Tensor) -> None:
    """Raise if samples have more tokens than the model can run on.

    A table of positions ends; rotary positions do not.
    """
    positions = adapter.positions(getattr(model, "config", None))
    if positions is None or tokens.shape[1] <= positions:
        return
    try:
        with torch.no_grad(), eval_mode(model), adapter.running(model):
            language_model(model)(tokens[:1].to(next(model.parameters()).device))
    except (IndexError, RuntimeError) as error:
        raise AptError(
            f"samples have {tokens.shape[1]} tokens, and the model has {positions} positions",
            "give shorter samples",
        ) from error


def _check_tunable(model: nn.Module) -> None:
    """Raise if a parameter has values that cannot be written or differentiated."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise AptError(
                f"{name} is an inference tensor, which cannot be tuned",
                "load the model outside of torch.inference_mode",
            )
