"""State-space models with their fused kernels; skipped, with the reason, where there are none."""

import time

import pytest
import torch
from apt_adapters import kernels
from apt_adapters.processor import without_kernels

import apt as library
from apt.adapter import DecoderAdapter
from apt.conformance.oracle import Oracle
from apt.solver import NM, meets
from tests.helpers.families import adapter_of, random_model, random_tokens

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("mamba_ssm", reason="mamba_ssm does not import", exc_type=ImportError)
pytest.importorskip("causal_conv1d", reason="causal_conv1d does not import", exc_type=ImportError)

VARIANTS = ["mamba", "falcon-mamba", "mamba2"]
TOKENS = random_tokens(4, 64)


@pytest.fixture(params=VARIANTS)
def model(request):
    return random_model(request.param).cuda()


@torch.no_grad()
def test_kernels_equal_the_reference():
    assert kernels.scan_differs() < 1e-2
    assert kernels.chunk_scan_differs() < 1e-2
    assert kernels.convolution_differs() < 1e-2


@torch.no_grad()
def test_fused_and_plain_forwards_agree_on_a_gpu(model):
    tokens = TOKENS.cuda()
    fused = model(tokens, use_cache=False).logits
    with without_kernels(model):
        plain = model(tokens, use_cache=False).logits
    assert float((fused - plain).norm() / plain.norm()) < 5e-3


@torch.no_grad()
def test_capture_reports_every_weight_and_keeps_the_output(model):
    adapter: DecoderAdapter = adapter_of(model)
    with adapter.running(model):
        state, calls = adapter.enter(model, TOKENS.cuda())
        for (_, block), call in zip(adapter.blocks(model), calls, strict=True):
            sites = adapter.sites(block)
            grams = {}

            def take(site, rows, grams=grams):
                rows = rows.reshape(-1, rows.shape[-1]).double()
                grams[site] = grams.get(site, 0) + rows.T @ rows

            plain = adapter.step(block, state, call)
            with adapter.capture(block, sites, take):
                watched = adapter.step(block, state, call)
            with Oracle({site: site.weight(block).data for site in sites}) as oracle:
                adapter.step(block, state, call)
            assert torch.equal(plain, watched)
            assert grams.keys() == set(sites)
            for site, gram in grams.items():
                torch.testing.assert_close(gram, oracle.seen[site].gram, rtol=1e-5, atol=1e-5)
            state = plain


def test_model_is_pruned_with_its_kernels(model):
    report = library.prune(model, TOKENS, pattern="2:4")
    for site in report.sites:
        assert meets(model.get_parameter(f"{site.name}.weight"), NM(2, 4))


@torch.no_grad()
def test_time_of_capture_is_printed(model, record_property):
    adapter, tokens = adapter_of(model), random_tokens(16, 512).cuda()
    state, calls = adapter.enter(model, tokens)
    block = adapter.blocks(model)[0][1]
    times = {}
    for name in ("plain", "captured", "plain", "captured"):  # the first round warms up
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(20):
            if name == "plain":
                adapter.step(block, state, calls[0])
            else:
                with adapter.capture(block, adapter.sites(block), lambda site, rows: None):
                    adapter.step(block, state, calls[0])
        torch.cuda.synchronize()
        times[name] = time.perf_counter() - started
    record_property("capture_over_plain", times["captured"] / times["plain"])
    print(f"capture takes {times['captured'] / times['plain']:.2f} times the plain forward")
