"""The scan for a CPU: the results and gradients of transformers' scan, with less memory."""

import pytest
import torch
from apt_adapters import scan
from apt_adapters.processor import on_processor
from torch.autograd import gradcheck
from transformers.models.mamba import modeling_mamba

from tests.helpers.families import random_model, random_tokens

NAMES = ("hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias")
theirs = getattr(modeling_mamba, "mamba_selective_scan", None)
needs_theirs = pytest.mark.skipif(theirs is None, reason="transformers 4 has it in the mixer")


def arguments(batch=2, channels=6, length=11, state=4, dtype=torch.float64, grad=False):
    """Random arguments of a scan, by name."""
    torch.manual_seed(0)
    channel = (batch, channels, length)
    shapes = [channel, channel, (channels, state), (batch, state, length), (batch, state, length),
              (channels,), channel, (channels,)]  # fmt: skip
    made = {n: torch.randn(s, dtype=dtype) for n, s in zip(NAMES, shapes, strict=True)}
    made["A"] = -made["A"].exp()
    return {name: tensor.requires_grad_(grad) for name, tensor in made.items()}


@pytest.fixture(params=[1, 48 * 3, 2**20], ids=["step by step", "in parts", "at once"])
def chunked(request, monkeypatch):
    """Chunks of one step, of three, and of all."""
    monkeypatch.setattr(scan, "_CHUNK", request.param)


@needs_theirs
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("left_out", [(), ("D",), ("z",), ("delta_bias",)], ids=str)
def test_scan_equals_the_scan_of_transformers(dtype, left_out):
    given = {name: x for name, x in arguments(dtype=dtype).items() if name not in left_out}
    options = {"delta_softplus": True, "return_last_state": True}
    found, expected = scan.selective_scan(**given, **options), theirs(**given, **options)
    for ours, reference in zip(found, expected, strict=True):
        # Theirs rounds a part to fp32 in any case.
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert torch.equal(scan.selective_scan(**given, delta_softplus=True), found[0])


@pytest.mark.usefixtures("chunked")
def test_gradient_of_the_scan_passes_gradcheck():
    given = arguments(grad=True)

    def run(*tensors):
        return scan.selective_scan(**dict(zip(NAMES, tensors, strict=True)), delta_softplus=True)

    assert gradcheck(run, list(given.values()))


def test_half_precision_is_scanned_in_fp32():
    given = arguments(dtype=torch.float32, length=64)
    half = {name: x.bfloat16() for name, x in given.items()}
    whole = {name: x.float() for name, x in half.items()}
    found = scan.selective_scan(**half, delta_softplus=True)
    assert found.dtype == torch.bfloat16
    expected = scan.selective_scan(**whole, delta_softplus=True)
    assert torch.equal(found, expected.bfloat16())


def test_scan_needs_less_memory_than_all_states():
    given = arguments(batch=2, channels=64, length=512, state=16, dtype=torch.float32, grad=True)
    whole, sizes = 2 * 64 * 512 * 16, []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            results = result if isinstance(result, (tuple, list)) else [result]
            sizes.extend(x.numel() for x in results if isinstance(x, torch.Tensor))
            return result

    with pytest.MonkeyPatch.context() as patch, Sizes():
        patch.setattr(scan, "_CHUNK", 2**15)
        scan.selective_scan(**given, delta_softplus=True).sum().backward()
    assert max(sizes) <= whole / 8


@needs_theirs
@torch.no_grad()
@pytest.mark.parametrize("variant", ["mamba", "falcon-mamba", "jamba"])
def test_running_uses_the_scan_and_restores_the_module(variant):
    model, tokens = random_model(variant), random_tokens()
    module = __import__(type(model).__module__, fromlist=["_"])
    before, plain = module.mamba_selective_scan, model(tokens).logits
    with on_processor(model):
        with on_processor(model):
            assert module.mamba_selective_scan is scan.selective_scan
        assert module.mamba_selective_scan is scan.selective_scan
        found = model(tokens).logits
    assert module.mamba_selective_scan is before
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
