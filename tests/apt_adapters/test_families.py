"""Every family: the chained blocks compute the model, and the input of every weight is captured."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForCausalLM

from apt import prune
from apt.adapter import DecoderAdapter, Input
from apt.calibration.batches import Batch, OpenBlock, enter
from apt.calibration.capture import Capture
from apt.errors import AptError
from apt.plugin.registry import registry
from tests.helpers.families import ATTENTION, CONFIGS, adapter_of, random_model, random_tokens

VARIANTS = [
    *[pytest.param(name, "sdpa", id=f"{name}-sdpa") for name in ATTENTION if name != "bloom"],
    *[pytest.param(name, "eager", id=f"{name}-eager") for name in ATTENTION],
    *[pytest.param(name, None, id=name) for name in CONFIGS if name not in ATTENTION],
]


@torch.no_grad()
def states_before_blocks(model, adapter, tokens):
    """The inputs of every block, recorded by hooks in a plain forward."""
    seen, blocks = [], [block for _, block in adapter.blocks(model)]

    def look(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handles = [b.register_forward_pre_hook(look, with_kwargs=True) for b in blocks]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@contextmanager
def linear_inputs(block):
    """The inputs of each Linear from an independent source: hooks, and `dt_proj` by hand."""
    seen, handles = {}, []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, name=name: seen.setdefault(name, args[0])
                )
            )
    place = next((name for name in ("mixer", "mamba") if hasattr(block, name)), None)
    mixer = getattr(block, place) if place else None
    if hasattr(mixer, "dt_layernorm"):  # Jamba's own

        def normed(module, args, output):
            seen[f"{place}.dt_proj"] = output

        handles.append(mixer.dt_layernorm.register_forward_hook(normed))
    elif hasattr(mixer, "dt_proj"):

        def time_step(module, args, output):
            rank_part = output[..., : mixer.time_step_rank]
            if hasattr(mixer, "rms_eps"):  # FalconMamba normalises it first
                square = rank_part.pow(2).mean(-1, keepdim=True)
                rank_part = rank_part * torch.rsqrt(square + mixer.rms_eps)
            seen[f"{place}.dt_proj"] = rank_part

        handles.append(mixer.x_proj.register_forward_hook(time_step))
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize(("variant", "attention"), VARIANTS)
def test_chained_blocks_compute_the_logits_of_the_model(variant, attention):
    model = random_model(variant, attention=attention)
    adapter, tokens = adapter_of(model), random_tokens()
    expected = states_before_blocks(model, adapter, tokens)
    state, calls = adapter.enter(model, tokens)
    assert len(calls) == len(expected) == 3
    for (_, block), call, reference in zip(adapter.blocks(model), calls, expected, strict=True):
        assert torch.equal(state, reference)
        state = adapter.step(block, state, call)


def captured_grams(adapter, block, sites, batch):
    capture = Capture(block, sites)
    capture.run(OpenBlock(adapter, block, 0, [batch]))
    return {name: sums.gram for name, sums in capture.sums.items()}


@torch.no_grad()
@pytest.mark.parametrize(("variant", "attention"), VARIANTS)
def test_captured_inputs_equal_those_of_forward_hooks(variant, attention):
    model = random_model(variant, attention=attention)
    adapter, tokens = adapter_of(model), random_tokens()
    state, calls = adapter.enter(model, tokens)
    block = adapter.blocks(model)[0][1]
    sites = [site for site in adapter.sites(block) if not site.routed]
    others = {site.name for site in adapter.sites(block) if site.routed}
    others.update(adapter.left_dense_of(block))
    linears = {n for n, m in block.named_modules() if isinstance(m, nn.Linear)} - others
    assert {site.name for site in sites} == linears
    with linear_inputs(block) as oracle:
        plain = adapter.step(block, state, calls[0])
    with adapter.capture(block, sites, lambda site, inputs: None):
        assert torch.equal(adapter.step(block, state, calls[0]), plain)
    grams = captured_grams(adapter, block, sites, Batch(state, calls, tokens.numel()))
    assert set(oracle) - others == linears
    for site in sites:
        rows = oracle[site.name].reshape(-1, oracle[site.name].shape[-1]).double()
        torch.testing.assert_close(
            grams[site.input].matrix.double(), rows.T @ rows, rtol=1e-4, atol=1e-3
        )
        assert grams[site.input].tokens == tokens.numel()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "variant", ["llama-grouped-tied", "opt-350m", "bloom", "mamba", "mamba-no-fp32-residual"]
)
def test_half_precision_blocks_keep_the_dtype_of_the_state(variant, dtype):
    model = random_model(variant, dtype)
    adapter, tokens = adapter_of(model), random_tokens()
    expected = states_before_blocks(model, adapter, tokens)
    state, calls = adapter.enter(model, tokens)
    for (_, block), call, reference in zip(adapter.blocks(model), calls, expected, strict=True):
        assert state.dtype == reference.dtype
        assert torch.equal(state, reference)
        state = adapter.step(block, state, call)
    if variant == "mamba":
        assert state.dtype == torch.float32


def test_forwards_are_restored_after_enter():
    model, tokens = random_model("opt"), random_tokens()
    before = model(tokens).logits
    adapter_of(model).enter(model, tokens)
    assert torch.equal(model(tokens).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_stubs_are_removed_after_an_exception():
    model = random_model("llama")
    with pytest.raises(IndexError):
        adapter_of(model).enter(model, torch.tensor([[10**6]]))
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_equal_masks_and_positions_are_stored_once():
    model = random_model("llama", attention="eager")
    batches = enter(adapter_of(model), model, random_tokens(samples=6), 48)
    assert [len(batch.state) for batch in batches] == [2, 2, 2]
    masks = {id(c.kwargs["attention_mask"]) for batch in batches for c in batch.calls}
    assert len(masks) == 1


def test_wrong_adapter_is_refused():
    with pytest.raises(AptError, match=r"LlamaAdapter does not fit .*no 'model\.layers'"):
        adapter_of(random_model("llama")).blocks(random_model("mamba"))


@pytest.mark.parametrize("name", ["bloom", "jamba", "mamba", "falcon-h1"])
def test_each_wrong_adapter_is_refused_with_a_hint(name):
    model, adapter = random_model("llama"), registry().adapters.get(name).make()
    with pytest.raises(AptError, match=r"Adapter does not fit Llama\w+: it has no "):
        prune(model, random_tokens(), pattern="2:4", adapter=adapter)


@pytest.mark.parametrize("name", ["llama", "auto"])
def test_repeated_block_is_refused(name):
    model = random_model("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    with pytest.raises(AptError, match=r"no site is left to prune: several blocks use the weight"):
        prune(model, random_tokens(), pattern="2:4", adapter=name)


class Forgetful(DecoderAdapter):
    blocks_path = "model.decoder.layers"
    inputs = (
        Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Input("mlp", ("fc1", "fc2")),
    )


def test_undeclared_linear_is_an_error_with_its_name():
    block = random_model("opt").model.decoder.layers[0]
    with pytest.raises(AptError, match="self_attn.out_proj, which is not declared"):
        Forgetful().sites(block)


class Mixed(DecoderAdapter):
    blocks_path = "model.decoder.layers"
    inputs = (
        Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Input("one", ("self_attn.out_proj", "fc1")),
        Input("neurons", ("fc2",)),
    )


def captured(adapter, model, capture=None):
    tokens = random_tokens()
    with torch.no_grad():
        state, calls = adapter.enter(model, tokens)
        block = adapter.blocks(model)[0][1]
        sites = adapter.sites(block)
        if capture:
            adapter.capture = lambda block, sites, sink: capture(block, sites, sink)
        return captured_grams(adapter, block, sites, Batch(state, calls, tokens.numel()))


def test_separate_inputs_declared_as_shared_are_an_error():
    with pytest.raises(AptError, match="fc1 is declared to share the input 'one'"):
        captured(Mixed(), random_model("opt"))


@contextmanager
def hooks_but(block, sites, sink, missed=None):
    """A capture by hooks only, which misses the products of some weights."""
    handles = [
        block.get_submodule(site.name).register_forward_pre_hook(
            lambda module, args, site=site: sink(site, args[0])
        )
        for site in sites
        if site.name != missed
    ]
    yield
    for handle in handles:
        handle.remove()


def test_uncaptured_weight_is_an_error_with_its_name():
    model = random_model("mamba")
    with pytest.raises(AptError, match="mixer.dt_proj saw 0 of 96 calibration tokens"):
        captured(adapter_of(model), model, partial(hooks_but, missed="mixer.dt_proj"))


def test_tokens_that_are_counted_twice_are_an_error():
    model = random_model("llama")

    @contextmanager
    def twice(block, sites, sink):
        def both(site, inputs):
            sink(site, inputs)
            sink(site, inputs)

        with hooks_but(block, sites, both):
            yield

    with pytest.raises(AptError, match="saw 192 of 96"):
        captured(adapter_of(model), model, twice)


def test_bloom_with_sliced_weights_is_refused():
    model = random_model("bloom")
    model.config.slow_but_exact, model.config.pretraining_tp = True, 2
    with pytest.raises(AptError, match="slow_but_exact"):
        adapter_of(model).check(model.config)


def test_cross_attention_of_a_decoder_without_an_encoder_stays_dense():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=40,
    )  # fmt: skip
    model = BartForCausalLM(config).eval()
    report = prune(model, torch.randint(3, 64, (4, 16)), pattern="2:4")
    names = {site.name.removeprefix("model.decoder.layers.0.") for site in report.sites}
    attention = {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
    assert {name for name in names if not name.startswith("model.")} == attention | {"fc1", "fc2"}
    assert len(report.sites) == 2 * 6
