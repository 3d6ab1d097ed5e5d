"""Modes of torch that a program has set do not change the results of APT."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch

import apt as library
from tests.helpers.families import random_model, random_tokens

TOKENS = random_tokens(4, 24)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fp64 by default": lambda: default_dtype(torch.float64),
    "bf16 by default": lambda: default_dtype(torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
}


def pruned(**options):
    model = random_model("llama")
    chosen = library.PruneOptions(**options)
    return model, lambda: library.prune(model, TOKENS, pattern="0.5", options=chosen)


def sparse():
    model = random_model("llama")
    for block in model.model.layers:
        torch.nn.init.zeros_(block.mlp.up_proj.weight[::2].detach())
    return model


def trained():
    model = sparse()
    options = library.RecoverOptions(steps=2, batch=2)
    return model, lambda: library.recover(model, TOKENS, kind="layers", options=options)


def shrunk():
    model = random_model("llama")
    size = library.ShrinkOptions(sizes={"channels": 32})
    return model, lambda: library.shrink(model, TOKENS, size=size)[0]


def writing():
    model = random_model("llama")
    return model, lambda: library.own_text(model, 2, 8)


def measured():
    model = random_model("llama")
    return model, lambda: library.perplexity(model, TOKENS)


CALLS = {
    "prune": pruned,
    "prune with own text": lambda: pruned(own_samples=2),
    "prune to integers": lambda: pruned(quantize="int4", scale_group=32),
    "recover": trained,
    "shrink": shrunk,
    "own_text": writing,
    "perplexity": measured,
}


def result_of(model, call):
    """The changed model or the result of a call, as tensors by name."""
    returned = call()
    if isinstance(returned, torch.nn.Module):
        return dict(returned.state_dict())
    if isinstance(returned, torch.Tensor | float):
        return {"": torch.as_tensor(returned, dtype=torch.float64, device="cpu")}
    return dict(model.state_dict())


@cache
def usual_result(call):
    """The result of a call in the usual modes."""
    return result_of(*CALLS[call]())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_modes_of_the_caller_do_not_change_results(call, mode):
    expected, (model, again) = usual_result(call), CALLS[call]()
    with MODES[mode]():
        found = result_of(model, again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(found[name].dtype == value.dtype for name, value in expected.items())


def test_modes_of_the_caller_are_restored_after_an_error():
    with default_dtype(torch.float64), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with pytest.raises(library.AptError):
            library.prune(random_model("llama"), TOKENS, pattern="3:1000")
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
        assert torch.empty(0).device.type == "meta"
