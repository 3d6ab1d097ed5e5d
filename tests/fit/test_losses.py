"""The predicted losses of levels, against the divergence of the model with the rounded tensor."""

import copy

import pytest
import torch
from apt_plugins.texts import builtin
from transformers import AutoConfig, AutoModelForCausalLM

from apt.adapter.recording import eval_mode
from apt.calibration.batches import enter
from apt.calibration.capture import grams_of
from apt.evaluation.metrics import divergence
from apt.extending import open_skeleton
from apt.fit.levels import Level
from apt.fit.losses import measured_levels
from apt.fit.outer import outer_names
from apt.fit.sensitivities import forward_sums, sensitivities
from apt.locations.model_source import find
from apt.patterns import IntegerGrid, Unstructured
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.solver import SolverOptions, admm, rounded
from apt.text.datasets import calibration_tokens

TENSORS = ("model.embed_tokens", "model.layers.0.mlp.gate_proj", "model.layers.2.mlp.down_proj")


@pytest.fixture(scope="module")
def zoo(tokenizer):
    """The embedded LLaMA in fp32, its adapter, and calibration tokens."""
    opened = open_skeleton(find("zoo:llama", registry()), registry())
    model = AutoModelForCausalLM.from_pretrained(opened.source.location, dtype=torch.float32)
    tokens = calibration_tokens(tokenizer, builtin("calibration"), 16, 256, 0, "builtin", None)
    return model, opened.adapter, tokens


@pytest.mark.parametrize("name", [f"{name}.weight" for name in TENSORS])
def test_predicted_loss_is_near_the_divergence_of_the_rounded_model(name, zoo):
    model, adapter, tokens = zoo
    plan = make_plan(model, adapter, Unstructured(0.0))
    grids = {bits: IntegerGrid(bits, 32) for bits in (3, 4)}
    levels = {name: [Level(str(bits), 1, grid) for bits, grid in grids.items()]}
    steps = []
    given = sensitivities(model, adapter, plan, tokens, lambda *step: steps.append(step))
    assert steps == [(place, 16) for place in range(1, 17)]
    predicted = {x.name: x.loss for x in measured_levels(model, adapter, plan, given, levels)[name]}
    changed = copy.deepcopy(model)
    weight = changed.get_parameter(name).data
    width = weight.shape[1]
    for bits, grid in grids.items():
        dense = model.get_parameter(name).data
        weight.copy_(rounded(dense, torch.eye(width), grid, passes=1).weight)
        with eval_mode(changed):
            found = divergence(changed, tokens, model)
        assert predicted[str(bits)] == pytest.approx(found, rel=0.7)  # the rounding here is plain
    assert predicted["3"] > 3 * predicted["4"]


@pytest.mark.parametrize("name", [f"{name}.weight" for name in TENSORS[1:]])
def test_predicted_loss_of_zeros_is_near_the_divergence_of_the_pruned_model(name, zoo):
    model, adapter, tokens = zoo
    plan, options = make_plan(model, adapter, Unstructured(0.0)), SolverOptions(effort="fast")
    grid, shares = IntegerGrid(4, 64), (0.3, 0.5, 0.7)
    forms = [(f"{share}", None, Unstructured(share)) for share in shares]
    forms += [(f"{share} int4", grid, Unstructured(share)) for share in shares]
    levels = {name: [Level(text, 100, grid, pattern, at) for text, grid, pattern in forms]}
    solved = {}

    def prune(weight, gram, pattern):
        solved[pattern.sparsity] = weight.shape
        return admm(weight, gram, pattern, options).weight

    given = sensitivities(model, adapter, plan, tokens)
    found = measured_levels(model, adapter, plan, given, levels, prune=prune)[name]
    assert set(solved.values()) == {(64, model.get_parameter(name).shape[1])}
    losses = {level.name: level.loss for level in found}
    assert losses["0.3"] < losses["0.5"] < losses["0.7"]
    for share, level in zip((*shares, *shares), found, strict=True):
        assert losses[f"{share}"] <= level.loss
        assert 100 * (1 - share - 0.2) < level.size < 100 * (1 - share) + 2
    changed = copy.deepcopy(model)
    index = int(name.split(".")[2])
    sites = adapter.sites(list(adapter.blocks(model))[index][1])
    site = next(site for site in sites if name.endswith(site.parameter))
    batches = enter(adapter, model, given.tokens)
    with eval_mode(model), torch.no_grad():
        for place, (_, each) in enumerate(list(adapter.blocks(model))[: index + 1]):
            grams = grams_of(adapter, each, place, [site] if place == index else [], batches)
    pattern = Unstructured(0.5, "layer")
    weight = admm(model.get_parameter(name).data, grams[site.input], pattern, options).weight
    changed.get_parameter(name).data.copy_(weight)
    with eval_mode(changed):
        divergence_found = divergence(changed, tokens, model)
    assert 0.4 < losses["0.5"] / divergence_found < 2.5  # measured on other tokens than solved


def at(zeros):
    """The bytes of a level with a share of zeros."""
    return round(100 * (1 - zeros))


def test_weights_have_no_gradient_afterwards(zoo):
    model, adapter, tokens = zoo
    required = [parameter.requires_grad for parameter in model.parameters()]
    sensitivities(model, adapter, make_plan(model, adapter, Unstructured(0.0)), tokens[:1])
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())


SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields", "embedding", "logits"),
    [
        ("llama", {}, 1.0, 1.0),
        ("gemma3_text", {}, 8.0, 1.0),
        ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}, 1.0, 0.25),
    ],
)
def test_scales_of_the_embedding_and_of_the_logits_are_measured(kind, fields, embedding, logits):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **fields))
    adapter = registry().adapters.get("llama").load()()
    outer = forward_sums(model, adapter, torch.arange(40).view(2, 20), 0.5)
    assert outer.embedding_scale == pytest.approx(embedding, rel=1e-3)
    assert outer.logit_scale == pytest.approx(logits, rel=1e-3)
    assert outer.tokens == int(outer.counts.sum()) == 40
    assert outer.gradient == pytest.approx(0.5)
    assert set(outer_names(model)) == set(outer.names)
