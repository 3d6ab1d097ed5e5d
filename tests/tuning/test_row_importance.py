"""Row importance: against exact derivatives, and its effect on masks."""

from dataclasses import replace

import pytest
import torch

from apt.calibration.batches import OpenBlock, enter
from apt.calibration.dense_activations import advance_dense
from apt.engine.recipes import recipe_of
from apt.options import PruneOptions
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.solver import NM, Unstructured, parse_pattern
from apt.tuning.block_forward import stream_after
from apt.tuning.row_importance import RowImportance
from tests.helpers.families import random_model, random_tokens
from tests.helpers.pruning import prune_blocks

TOKENS = random_tokens(samples=2, seqlen=8)


def prepared(variant):
    """Model, adapter, block, batches with their dense inputs, states before, sites."""
    model = random_model(variant)
    adapter = registry().adapter_for(model.config.model_type).load()()
    block = adapter.blocks(model)[1][1]
    with torch.no_grad(), adapter.running(model):
        batches = enter(adapter, model, TOKENS, with_dense=True)
        starts = [batch.dense.state for batch in batches]
        sites = [site for site in adapter.sites(block) if not site.routed]
        advance_dense(OpenBlock(adapter, block, 1, batches), sites)
    return model, adapter, block, batches, starts, sites


def exact(adapter, block, batches, starts, site):
    """``d`` from the whole Jacobian of the relative stream."""
    parameter = block.get_parameter(site.parameter).detach()
    opened, total = OpenBlock(adapter, block, 1, batches), 0
    for batch, start in zip(batches, starts, strict=True):

        def relative(weight, batch=batch, start=start):
            stream = stream_after(opened, {site.parameter: weight}, start, batch.calls[1])
            return stream / stream.detach().norm(dim=-1, keepdim=True)

        jacobian = torch.autograd.functional.jacobian(relative, parameter, vectorize=True)
        total = total + site.oriented(jacobian.flatten(0, -3).square().sum(0))
    inputs = torch.cat([rows for b in batches for rows in b.dense.inputs[site.input]])
    return (total / inputs.square().sum(0)).sum(1, keepdim=True)


@pytest.mark.parametrize("variant", ["llama-grouped-tied", "mamba2"])
def test_estimated_importance_equals_the_exact_jacobian(variant):
    model, adapter, block, batches, starts, sites = prepared(variant)
    draws, varied_sites = 300, 0
    with adapter.running(model):
        opened = OpenBlock(adapter, block, 1, batches * draws)
        result = RowImportance(power=2).scales(opened, starts * draws, sites)
        for site in sites:
            expected = exact(adapter, block, batches, starts, site)
            scale = (expected / expected.mean()).clamp_min(0.01)
            torch.testing.assert_close(result[site], scale, rtol=0.25, atol=0.05)
            if scale.std() > 0.1:
                varied_sites += 1
                assert torch.corrcoef(torch.cat([result[site], scale], 1).T)[0, 1] > 0.98
    assert varied_sites


def masks(variant, importance, pattern="0.5", unread=None):
    """The pruned weights of the first block, by site."""
    model = random_model(variant)
    adapter = registry().adapter_for(model.config.model_type).load()()
    if unread is not None:
        for _, block in adapter.blocks(model):
            block.mlp.down_proj.weight.data[:, unread] *= 1e-3
    spec = registry().methods.get("admm")
    recipe = replace(
        recipe_of(PruneOptions(effort="fast", compute="float32"), spec), row_importance=importance
    )
    plan = make_plan(model, adapter, parse_pattern(pattern), per="layer")
    prune_blocks(model, adapter, plan, TOKENS, spec.load(), recipe)
    block = adapter.blocks(model)[0][1]
    return {s.name: s.weight(block).detach() for s in adapter.sites(block)}


def test_rows_of_low_importance_are_pruned_more():
    unread = torch.arange(0, 64, 4)
    with_it, without = (masks("llama", how, unread=unread) for how in (RowImportance(), None))
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        for weights in (with_it, without):
            assert int((weights[name] == 0).sum()) == weights[name].numel() // 2
        pruned = (with_it[name] == 0).float().mean(1)
        read = torch.ones(64, dtype=torch.bool).index_fill(0, unread, False)
        assert pruned[unread].min() > pruned[read].mean() + 0.1
        assert abs(float((without[name] == 0).float()[unread].mean()) - 0.5) < 0.1


def test_row_importance_does_not_apply_to_patterns_by_row():
    for pattern in ("2:4",):
        with_it, without = (masks("llama", how, pattern) for how in (RowImportance(), None))
        assert all(torch.equal(with_it[name], without[name]) for name in with_it)
    site = prepared("llama")[-1][0]
    assert not RowImportance().serves(site, Unstructured(0.5, "row"))
    assert not RowImportance().serves(site, NM(2, 4))
    assert not RowImportance().serves(site, None)
    assert RowImportance().serves(site, Unstructured(0.5, "layer"))


def test_layer_wise_run_has_no_row_importance():
    spec = registry().methods.get("admm")
    assert recipe_of(PruneOptions(error_aware=False), spec).row_importance is None
    assert recipe_of(PruneOptions(), spec).row_importance == RowImportance()
