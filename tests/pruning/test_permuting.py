"""Inputs of n:m sites change places before pruning; the function of the model stays the same."""

import copy

import pytest
import torch

import apt as library
from apt import PruneOptions, Selection
from apt.adapter.groups import tensors_of
from tests.helpers.families import STACKED, adapter_of, random_model, random_tokens, zoo_model

TOKENS = random_tokens()
UNCHANGED = PruneOptions(
    error_aware=True, permute=True, input_correction=0, drift_correction=0, tuning_epochs=0
)
"""With Wanda, kept weights keep their values; the target is the dense weight alone."""

FAMILIES = [
    "llama", "mistral", "opt", "opt-350m", "llama-grouped-tied",
    "mixtral", "qwen2-moe", *(["jamba"] if STACKED else []),
]  # fmt: skip


def permuted(model, report):
    """The dense model with the inputs in the order of a report."""
    model, adapter, count = copy.deepcopy(model), adapter_of(model), 0
    orders = {site.name: site.order for site in report.sites if site.order}
    for name, block in adapter.blocks(model):
        for permutable in adapter.permutable(block, model.config):
            columns = torch.tensor(orders[f"{name}.{permutable.reader}"])
            permutable.permute(tensors_of(block), permutable.order_of(columns))
            count += 1
    assert count == len(orders) > 0
    return model


@pytest.mark.parametrize("variant", FAMILIES)
def test_kept_weights_equal_the_dense_weights_in_the_reported_order(variant):
    model = random_model(variant)
    pruned, report = library.prune_copy(
        model, TOKENS, pattern="2:4", method="wanda", options=UNCHANGED
    )
    dense = permuted(model, report)
    for (name, result), expected in zip(pruned.named_parameters(), dense.parameters(), strict=True):
        kept = result != 0
        assert torch.equal(result[kept], expected[kept]), name
    with torch.no_grad():
        logits = dense(TOKENS).logits
        torch.testing.assert_close(logits, model(TOKENS).logits, rtol=0, atol=1e-4)


def test_permuted_layers_have_lower_errors():
    opened, tokens, _ = zoo_model("llama", 16, 128)
    errors = {}
    for permute in (False, True):
        options = PruneOptions(permute=permute, effort="fast")
        report = library.prune_copy(opened.module, tokens, pattern="2:4", options=options)[1]
        errors[permute] = [s.relative_error for s in report.sites if s.kind == "mlp.down_proj"]
    assert all(new < 0.95 * old for old, new in zip(errors[False], errors[True], strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"pattern": "0.5"},
        {"pattern": "2:4", "method": "wanda"},
        {"pattern": "2:4", "options": PruneOptions(permute=False)},
        {"pattern": "2:4", "options": PruneOptions(error_aware=False)},
    ],
    ids=["unstructured", "baseline", "off", "layer-wise"],
)
def test_runs_without_permutation_keep_the_order(arguments):
    report = library.prune(random_model("llama"), TOKENS, **arguments)
    assert {site.order for site in report.sites} == {None}


def test_site_that_stays_dense_is_not_permuted():
    model = random_model("llama")
    before = copy.deepcopy(model.state_dict())
    selection = Selection(skip=("*.1.mlp.up_proj",))
    report = library.prune(model, TOKENS, pattern="2:4", selection=selection)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], before[name])
    orders = {site.name: site.order for site in report.sites}
    assert orders["model.layers.1.mlp.down_proj"] is None
    assert orders["model.layers.0.mlp.down_proj"] is not None
    assert orders["model.layers.1.self_attn.o_proj"] is not None


def test_sites_of_mixed_n_m_are_permuted():
    report = library.prune(random_model("llama"), TOKENS, pattern="auto:4@0.5")
    assert any(site.order for site in report.sites)


@pytest.mark.parametrize(
    ("pattern", "aware", "message"),
    [
        ("2:4", False, "permute has no effect in a layer-wise run"),
        ("0.5", None, "permute has no effect: no n:m site has inputs that can change places"),
    ],
)
def test_permute_without_effect_is_refused(pattern, aware, message):
    options = PruneOptions(permute=True, error_aware=aware)
    with pytest.raises(library.AptError, match=message):
        library.prune(random_model("llama"), TOKENS, pattern=pattern, options=options)
