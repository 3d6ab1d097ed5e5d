"""Models of transformers with mamba_ssm installed: with its kernels, and without them."""

from contextlib import nullcontext

import pytest
import torch
from apt_adapters.mamba import MambaAdapter
from apt_adapters.processor import on_processor

import apt as library
from apt.events import BlockTuned
from apt.testing import CHECKS, Subject
from tests.helpers.families import adapter_of, random_model, random_tokens

TOKENS = random_tokens(2, 8)
# Those that need few forwards: Triton's interpreter, which Mamba 2 runs in, is slow.
FEW = ("sites", "capture", "residual", "blocks", "in_time")


def counted(monkeypatch, module, name):
    """Count the calls of a compiled function."""
    calls, original = [], getattr(module, name)

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.parametrize("variant", ["mamba", "falcon-mamba", "jamba", "mamba2"])
def test_adapters_conform_with_kernels(variant, monkeypatch):
    import causal_conv1d_cuda

    calls = counted(monkeypatch, causal_conv1d_cuda, "causal_conv1d_fwd")
    model = random_model(variant)
    few = variant == "mamba2"
    for name in FEW if few else CHECKS:
        CHECKS[name](Subject(adapter_of(model), model, TOKENS[:1] if few else TOKENS))
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mamba", "falcon-mamba", "jamba", "mamba2", "falcon-h1"])
def test_no_kernel_is_called_on_a_cpu(variant, monkeypatch):
    import causal_conv1d_cuda
    import selective_scan_cuda

    model, tokens, found = random_model(variant), TOKENS, []
    convolutions = counted(monkeypatch, causal_conv1d_cuda, "causal_conv1d_fwd")
    scans = counted(monkeypatch, selective_scan_cuda, "fwd")
    found.append(model(tokens, use_cache=False).logits)
    before = len(convolutions), len(scans)
    assert convolutions
    with on_processor(model):
        found.append(model(tokens, use_cache=False).logits)
    assert (len(convolutions), len(scans)) == before
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_tuning_uses_the_gradient_of_the_kernels(monkeypatch):
    import selective_scan_cuda

    calls, tuned = counted(monkeypatch, selective_scan_cuda, "bwd"), {True: [], False: []}
    for kept, events in tuned.items():
        model = random_model("mamba")
        with monkeypatch.context() as patch:
            if kept:
                patch.setattr(MambaAdapter, "running", lambda self, model: nullcontext())
            # So many tokens that a batch is held back.
            library.prune(model, random_tokens(20, 128), pattern="2:4", observe=events.append)
        assert bool(calls) == kept
        calls.clear()
        events[:] = [event for event in events if isinstance(event, BlockTuned)]
    assert any(event.after < event.before for event in tuned[True])
    for ours, theirs in zip(tuned[False], tuned[True], strict=True):
        assert theirs.before == pytest.approx(ours.before, rel=0.02)
        assert theirs.after == pytest.approx(ours.after, rel=0.02)
