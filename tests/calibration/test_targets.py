"""Error-aware targets: sums, normal equations, and their use in runs."""

import copy
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import apt as library
from apt.adapter import Site
from apt.calibration.batches import Batch, OpenBlock, enter
from apt.calibration.capture import Capture
from apt.calibration.dense_activations import advance_dense
from apt.calibration.passing import BlockPass
from apt.calibration.stored_products import StoredProducts
from apt.calibration.targets import Targets
from apt.errors import AptError
from apt.planning.plan import make_plan
from apt.pruning.layer import Recipe
from apt.solver import NM, Gram, ss
from tests.helpers.families import FAMILIES, adapter_of, random_model, random_tokens, zoo_model
from tests.helpers.pruning import prune_blocks


def inputs_of(model, names, tokens):
    """The inputs (tokens, in) of each module, by hooks on the whole model."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update(
                {name: args[0].detach().reshape(-1, args[0].shape[-1])}
            )
        )
        for name in names
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def disturbed(model, share=0.2):
    """A copy with noise in its first block, so that later streams have drifted."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in other.model.layers[0].parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += share * parameter.data.std(unbiased=False) * noise
    return other


@pytest.fixture
def behind():
    """Block 1 of a LLaMA behind a disturbed block 0: both models, the adapter, and its batches."""
    dense = random_model("llama")
    pruned, adapter = disturbed(dense), adapter_of(dense)
    batches = enter(adapter, dense, random_tokens(), with_dense=True)
    block = pruned.model.layers[1]
    with torch.no_grad():
        for batch in batches:
            batch.dense.state = adapter.step(dense.model.layers[0], batch.state, batch.calls[0])
            batch.state = adapter.step(pruned.model.layers[0], batch.state, batch.calls[0])
        advance_dense(OpenBlock(adapter, block, 1, batches), adapter.sites(block))
    return dense, pruned, adapter, batches


def by_order(sites):
    """Sites in groups, in the order of execution."""
    return [[s for s in sites if s.order == order] for order in sorted({s.order for s in sites})]


def test_sums_equal_the_sums_of_inputs_of_two_models(behind):
    """The references are the inputs of both whole models, recorded by hooks."""
    dense, pruned, adapter, batches = behind
    block, targets, sums = pruned.model.layers[1], Targets(0.3, 0.6), {}
    sites, earlier = adapter.sites(block), {}
    with torch.no_grad():
        for group in by_order(sites):
            capture = Capture(block, group, targets)
            capture.run(OpenBlock(adapter, block, 1, batches), earlier)
            sums |= capture.sums
            if group[0].name == "self_attn.o_proj":
                earlier = {group[0]: group[0].weight(block).clone()}
                group[0].weight(block).mul_(0.9)  # pruned by now, and down_proj must see it
    names = [f"model.layers.1.{site.name}" for site in sites]
    names += ["model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"]
    ours, theirs = (inputs_of(model, names, random_tokens()) for model in (pruned, dense))
    size = theirs["model.layers.1.input_layernorm"].square().mean(1)
    weights = (1 / size) / (1 / size).mean()
    streams = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    for site in sites:
        name = f"model.layers.1.{site.name}"
        weight = dense.get_submodule(name).weight
        x, error = ours[name], 0.3 * (theirs[name] - ours[name]) @ weight.T
        weighted = x * weights[:, None] if site.residual else x
        if site.residual:
            stream = f"model.layers.1.{streams[site.name]}"
            error += 0.6 * (theirs[stream] - ours[stream])
        own = sums[site.input]
        torch.testing.assert_close(own.gram.matrix, weighted.T @ x, rtol=1e-3, atol=1e-4)
        damped = own.gram.damped(0.01)
        expected = weight + damped.solve(error.T @ weighted / len(x))
        result = targets.weight(weight, site, own, damped)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    crossed = {name for name, own in sums.items() if own.cross is not None}
    assert crossed == {"attention", "mlp"}  # narrower than all that is made of them


def test_stored_products_give_the_same_sums_as_separate_runs(behind):
    _, pruned, adapter, batches = behind
    block, targets, earlier = pruned.model.layers[1], Targets(0.3, 0.6), {}
    sites, opened = adapter.sites(block), OpenBlock(adapter, block, 1, batches)
    dense = {site: site.weight(block).clone() for site in sites if site.residual}
    weights = {site: site.weight(block) for site in sites}
    passes = [BlockPass(batch, StoredProducts(weights)) for batch in batches]
    compared, left = [], list(sites)
    with torch.no_grad():
        for group in by_order(sites):
            name = group[0].input
            alone, kept = Capture(block, group, targets), Capture(block, group, targets)
            kept.run(opened, earlier, passes, left)
            alone.run(opened, earlier)
            sums = kept.sums[name]
            for site in group:
                for both in zip(
                    [sums.cross, sums.error_products.get(site)],
                    [alone.sums[name].cross, alone.sums[name].error_products.get(site)],
                    strict=True,
                ):
                    assert (both[0] is None) == (both[1] is None)
                    if both[0] is not None:
                        torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)
                        compared.append(site.name)
                site.weight(block).mul_(0.8)
                earlier |= {site: dense[site]} if site.residual else {}
                left.remove(site)
    assert set(compared) == {site.name for site in sites}


def test_target_solves_its_normal_equations():
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, pruned, dense, drift = draw(4, 10), draw(80, 10), draw(80, 10), draw(80, 4)
    from apt.adapter import Site
    from apt.calibration.targets import Sums

    site = Site("out", "out.weight", "x", residual=True)
    sums = Sums(Gram.of(pruned), (dense - pruned).T @ pruned, {site: 0.6 * drift.T @ pruned})
    damped = sums.gram.damped(0.01)
    result = Targets(0.3, 0.6).weight(weight, site, sums, damped)
    wanted = pruned @ weight.T + 0.3 * (dense - pruned) @ weight.T + 0.6 * drift
    ridge = damped.matrix - pruned.T @ pruned / 80
    expected = (wanted.T @ pruned / 80 + weight @ ridge) @ torch.linalg.inv(damped.matrix)
    torch.testing.assert_close(result, expected)
    nothing = Sums(sums.gram, sums.cross, {site: torch.zeros_like(weight)})
    assert Targets(0, 0).weight(weight, site, nothing, damped) is weight


@torch.no_grad()
@pytest.mark.parametrize("variant", FAMILIES.values())
def test_targets_with_zero_shares_change_no_inner_site(variant):
    """Sites that write to the stream may differ, by the weighting of tokens."""
    plain, aware = random_model(variant), random_model(variant)
    adapter, tokens = adapter_of(plain), random_tokens(samples=6)
    inner = [site for site in adapter.sites(adapter.blocks(plain)[0][1]) if not site.residual]
    for model, targets in ((plain, None), (aware, Targets(0, 0))):
        plan = make_plan(model, adapter, NM(2, 4))
        prune_blocks(model, adapter, plan, tokens, ss, Recipe(targets=targets))
    first, second = (adapter.blocks(model)[0][1] for model in (plain, aware))
    for site in inner:
        torch.testing.assert_close(site.weight(first), site.weight(second))


def drift_after(model, dense, adapter, tokens):
    """The relative squared error of the last hidden state, as the mean over tokens."""
    with torch.no_grad():
        ours, theirs = (
            m(tokens, output_hidden_states=True).hidden_states[-1].float() for m in (model, dense)
        )
    return float(((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean())


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_error_aware_pruning_reduces_the_drift_of_zoo_models(name):
    """The drift is measured on tokens that were not used in pruning."""
    dense, *parts = zoo_model(name, samples=8, seqlen=64)
    drifts = []
    for aware in (False, True):
        model = copy.deepcopy(dense.module)
        library.prune(
            model,
            parts[0],
            pattern="2:4",
            options=library.PruneOptions(effort="fast", error_aware=aware),
        )
        drifts.append(drift_after(model, dense.module, dense.adapter, parts[1]))
    assert drifts[1] < drifts[0]


def test_error_aware_run_reports_its_shares():
    model = random_model("llama")
    report = library.prune(model, random_tokens(samples=6), pattern="0.5", method="ss",
                           options=library.PruneOptions(error_aware=True))  # fmt: skip
    assert (report.options["alpha"], report.options["beta"]) == (0.25, 0.25)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@contextmanager
def in_halves(adapter, block, sites, sink, whole):
    """A capture that passes the tokens of each input in two halves."""

    def halves(site, rows):
        flat = rows.reshape(-1, rows.shape[-1])
        for part in flat.split(len(flat) // 2):
            sink(site, part)

    with whole(adapter, block, sites, halves):
        yield


def test_inputs_in_parts_give_the_same_weights():
    weights = []
    for halved in (False, True):
        model = random_model("llama")
        adapter = adapter_of(model)
        if halved:
            whole = type(adapter).capture
            adapter.capture = lambda *args, a=adapter, w=whole: in_halves(a, *args, w)
        plan = make_plan(model, adapter, NM(2, 4))
        prune_blocks(
            model, adapter, plan, random_tokens(), ss, Recipe(targets=Targets(), ordered=True)
        )
        weights.append(model.model.layers[-1].mlp.down_proj.weight)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_streams_with_different_parts_are_an_error():
    model = random_model("llama")
    adapter = adapter_of(model)
    calls, whole = [], type(adapter).capture

    def capture(block, sites, sink):
        calls.append(block)
        if len(calls) == 2:
            return in_halves(adapter, block, sites, sink, whole)
        return whole(adapter, block, sites, sink)

    adapter.capture = capture
    plan = make_plan(model, adapter, NM(2, 4))
    with pytest.raises(AptError, match=r"q_proj is multiplied by other tokens .*prune layer-wise"):
        prune_blocks(model, adapter, plan, random_tokens(), ss, Recipe(targets=Targets()))


def test_sites_that_do_not_write_to_the_stream_are_not_residual():
    post_norm = random_model("opt-350m")
    sites = adapter_of(post_norm).sites(post_norm.model.decoder.layers[0])
    assert [site.name for site in sites if site.residual] == ["self_attn.out_proj"]
    bloom = random_model("bloom")
    block = bloom.transformer.h[0]
    assert isinstance(block, nn.Module)
    block.apply_residual_connection_post_layernorm = True
    assert not any(site.residual for site in adapter_of(bloom).sites(block))


def test_input_is_kept_only_if_several_sites_share_it():
    """Inputs of experts cannot be freed earlier: their number of tokens is not known before."""
    block = nn.ParameterDict({name: torch.zeros(4, 8) for name in ("gate", "up", "down")})
    shared = [Site(name, name, "mlp", routed=True) for name in ("gate", "up")]
    alone = Site("down", "down", "neurons", routed=True)
    capture, passing = Capture(block, [*shared, alone]), BlockPass(Batch(torch.zeros(5), [], 5))
    for site, kept in ((shared[0], True), (alone, False)):
        rows = torch.ones(5, 8)
        capture.take(passing, site, rows)
        watched = weakref.ref(rows)
        del rows
        assert (watched() is not None) == kept
