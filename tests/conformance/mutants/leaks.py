"""Adapters with side effects in the model or in the process."""

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as modules
from torch.overrides import BaseTorchFunctionMode

from apt.conformance.snapshot import preserved
from tests.conformance.mutants.models import LLAMA

_MODELING = "transformers.models.llama.modeling_llama"


def global_hook(model):
    modules.register_module_forward_hook(lambda module, args, output: None)


def parameter_hook(model):
    next(model.parameters()).register_hook(lambda gradient: None)


def new_buffer(model):
    model.register_buffer("seen", torch.zeros(1), persistent=False)


def changed_buffer(model):
    next(model.buffers()).mul_(1.5)


def written(model):
    with torch.no_grad():
        next(model.parameters()).mul_(1)


def torch_seed(model):
    torch.manual_seed(17)


def python_seed(model):
    random.seed(17)


def numpy_seed(model):
    np.random.seed(17)


def dtype(model):
    torch.set_default_dtype(torch.float64)


def filters(model):
    warnings.simplefilter("error", UserWarning)


def function_mode(model):
    BaseTorchFunctionMode().__enter__()


def gradients(model):
    torch.set_grad_enabled(not torch.is_grad_enabled())


def frozen(model):
    model.requires_grad_(False)


def configured(model):
    model.config.use_cache = False


def patched(model):
    module = sys.modules[type(model).__module__]
    plain = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = lambda *args, **kwargs: plain(*args, **kwargs)


def training(model):
    model.model.layers[0].train()


def remembered(model):
    model.model.layers[0].seen = 1


LEAKS: dict[Callable[[Any], None], str] = {
    global_hook: r"leaves a global forward hook \(\d+\) behind",
    parameter_hook: r"leaves a hook on the parameter model\.embed_tokens\.weight \(\d+\) behind",
    new_buffer: "leaves the buffer seen behind",
    changed_buffer: r"changes the buffer model\.rotary_emb\.inv_freq",
    written: r"changes the values of model\.embed_tokens\.weight",
    torch_seed: "changes torch's random state",
    python_seed: "changes the random state of Python",
    numpy_seed: "changes the random state of numpy",
    dtype: "changes torch's default dtype",
    filters: "changes the filters of warnings",
    function_mode: r"leaves a torch function mode \(0\) behind",
    gradients: "changes torch's gradient mode",
    frozen: r"changes requires_grad of model\.embed_tokens\.weight",
    configured: "changes use_cache of the model's configuration",
    patched: r"changes apply_rotary_pos_emb of transformers\.models\.llama\.modeling_llama",
    training: r"changes the training mode of model\.layers\.0",
    remembered: r"leaves the attribute seen of model\.layers\.0 behind",
}


def leaking(leak: Callable[[Any], None], where: str, on_error: bool) -> type:
    """An adapter that leaks at the end of ``where``, always or only where that raises."""

    @contextmanager
    def leaks(method: str, model: Any) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if method == where and on_error:
                leak(model)
            raise
        if method == where and not on_error:
            leak(model)

    class Leaking(LLAMA):
        def step(self, block, state, call):
            with leaks("step", self.model):
                return super().step(block, state, call)

        @contextmanager
        def running(self, model):
            with leaks("running", model):
                yield

        def enter(self, model, tokens):
            self.model = model
            with leaks("enter", model):
                return super().enter(model, tokens)

        @contextmanager
        def capture(self, block, sites, sink):
            with leaks("capture", self.model), super().capture(block, sites, sink):
                yield

    return Leaking


def several(model: Any) -> None:
    """Side effects that do not grow when they are repeated."""
    for leak in ONCE:
        leak(model)


ONCE = [
    new_buffer, torch_seed, python_seed, numpy_seed, dtype, filters, frozen, configured, training,
    remembered,
]  # fmt: skip


@contextmanager
def process_kept() -> Iterator[None]:
    """Restore the state of the process after a side effect."""
    rotary = sys.modules[_MODELING].apply_rotary_pos_emb
    with preserved():
        try:
            yield
        finally:
            sys.modules[_MODELING].apply_rotary_pos_emb = rotary
