"""Sharing out a sparsity: nothing is lost in all, and outliers are spared."""

from itertools import pairwise

import pytest
import torch

import apt as library
from apt.errors import AptError
from apt.planning.allocation import allocated
from apt.planning.plan import Selection, make_plan
from apt.plugin.registry import registry
from apt.solver import NM, Unstructured
from tests.families import FAMILIES, random_model, random_tokens

TOKENS = random_tokens(samples=6)


@pytest.mark.parametrize("variant", FAMILIES.values())
def test_owl_keeps_the_sparsity_in_all_and_spares_blocks_with_outliers(variant, adapter_of):
    model = random_model(variant)
    adapter = adapter_of(model)
    blocks = adapter.blocks(model)
    with torch.no_grad():  # one weight in forty of block 1 is far larger than the others
        for site in adapter.sites(blocks[1][1]):
            site.weight(blocks[1][1]).view(-1)[::40] *= 30
    report = library.prune(model, TOKENS, pattern="0.6", method="magnitude", allocation="owl")
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert report.options["allocation"] == "owl"
    shares = {name: [] for name, _ in blocks}
    for site in report.sites:
        block = next(name for name in shares if site.name.startswith(f"{name}."))
        shares[block].append(site.zeros / site.size)
    means = [sum(values) / len(values) for values in shares.values()]
    assert means[1] == min(means) < 0.55
    assert max(means) - min(means) <= 0.161


def test_owl_counts_outliers_as_its_paper_defines_them(adapter_of):
    """By hand, for a LLaMA: scores |w|·‖x‖ of a block's Linears, five times their mean."""
    model = random_model("llama")
    adapter, inputs, expected = adapter_of(model), {}, []
    names = [f"{n}.{s.name}" for n, b in adapter.blocks(model) for s in adapter.sites(b)]
    with torch.no_grad():
        for name in names[::3]:
            model.get_submodule(name).weight.view(-1)[::50] *= 9
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, args, n=name: inputs.update({n: args[0].flatten(0, 1)})
            )
        model(TOKENS)
        for block, _ in adapter.blocks(model):
            scores = torch.cat([
                (model.get_submodule(n).weight.abs() * inputs[n].norm(dim=0)).flatten()
                for n in names if n.startswith(f"{block}.")
            ])  # fmt: skip
            expected.append(float((scores > 5 * scores.mean()).float().mean()))
    plan = make_plan(model, adapter, Unstructured(0.5))
    shares = registry().allocations.get("owl").load()(model, adapter, plan, TOKENS)
    found = [shares[f"{name}.mlp.up_proj"] for name, _ in adapter.blocks(model)]
    steps = [(a - b) / (max(expected) - min(expected)) * 0.16 for a, b in pairwise(expected)]
    assert [b - a for a, b in pairwise(found)] == pytest.approx(steps, abs=1e-3)


def test_sites_with_nm_or_left_dense_are_left_as_they_are(adapter_of):
    model = random_model("opt")
    selection = Selection(skip=("*.fc1",), overrides=(("*.fc2", NM(2, 4)),))
    report = library.prune(
        model, TOKENS, pattern="0.6", method="magnitude", allocation="owl", selection=selection
    )
    patterns = {site.name: site.pattern for site in report.sites}
    assert {patterns[f"model.decoder.layers.{i}.fc2"] for i in range(3)} == {"2:4"}
    assert not any(name.endswith("fc1") for name in patterns)


def test_an_allocation_needs_an_unstructured_pattern():
    with pytest.raises(AptError, match="cannot be used: n:m"):
        library.prune(random_model("opt"), TOKENS, pattern="2:4", allocation="owl")
    with pytest.raises(AptError, match="did you mean 'owl'"):
        library.prune(random_model("opt"), TOKENS, pattern="0.5", allocation="owll")


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (lambda name: 0.1, r"changes the overall sparsity by \+(10|9\.9)"),
        (lambda name: -0.5, r"gives 0 as the sparsity of model\.layers\.0\.self_attn\.q_proj"),
        (lambda name: None, r"gives no value as the sparsity of .*q_proj"),
    ],
)
def test_an_allocation_that_breaks_its_promise_is_named(shift, message, adapter_of):
    model = random_model("llama")
    adapter = adapter_of(model)
    plan = make_plan(model, adapter, Unstructured(0.5))
    shares = {s.name: 0.5 + d for s in plan.sites if (d := shift(s.name)) is not None}
    with pytest.raises(AptError, match=message):
        allocated(plan, "mine", lambda *given: shares, model, adapter, TOKENS)
