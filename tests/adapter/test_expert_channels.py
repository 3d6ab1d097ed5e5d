"""Channels inside experts: each expert loses other channels, and the function does not change."""

import copy
import warnings

import pytest
import torch
from apt_adapters.auto import AutoAdapter
from transformers import AutoModelForCausalLM

from apt.adapter import Experts
from apt.adapter.groups import gather, tensors_of
from apt.checkpoints.smaller import shrunk
from tests.helpers.families import CONFIGS, adapter_of, random_model, random_tokens
from tests.helpers.mixtures import mixture

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 has lists of experts")

TOKENS = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))
# The layouts: one after the other, in pairs with biases and transposed, beside a shared expert of
# one or of two widths, in blocks with an MLP of the same width.
FAMILIES = {
    "qwen3_moe": {}, "gpt_oss": {}, "llama4_text": {}, "deepseek_v3": {},
    "two shared": {"n_shared_experts": 2},
}  # fmt: skip


def model_of(name):
    return mixture("deepseek_v3" if name == "two shared" else name, **FAMILIES[name]).eval()


def channels_of(adapter, block, config):
    kinds = {groups.kind: groups for groups in adapter.groups(block, config)}
    return kinds.get("expert-channels")


@torch.no_grad()
def silence(adapter, block, groups):
    """Set half of the columns of every reader to zero: other columns in each, or the last ones."""
    draw = torch.Generator().manual_seed(0)
    for site in adapter.sites(block):
        if site.name in groups.readers:
            weight = site.oriented(site.weight(block))
            order, half = torch.randperm(weight.shape[1], generator=draw), weight.shape[1] // 2
            weight[:, order[half:] if groups.apart else slice(half, None)] = 0


@torch.no_grad()
def check_smaller(model, adapter, tokens, folder):
    """Check that a model without its zero channels computes the same, in memory and on disk."""
    before, removed = model(tokens).logits, {}
    for name, block in adapter.blocks(model):
        if groups := channels_of(adapter, block, model.config):
            silence(adapter, block, groups)
            removed[name] = {groups.kind: range(groups.count // 2, groups.count)}
    expected = model(tokens).logits
    assert float((expected - before).abs().max()) > 1e-3
    for _, block in adapter.blocks(model):
        if (groups := channels_of(adapter, block, model.config)) and groups.apart:
            readers = [site for site in adapter.sites(block) if site.name in groups.readers]
            gather(tensors_of(block), groups, readers)
    small = shrunk(model, adapter, removed)
    torch.testing.assert_close(small(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    small.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(opened(tokens).logits, small(tokens).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_without_expert_channels_equal_masked_models(name, tmp_path):
    check_smaller(model_of(name), AutoAdapter(), TOKENS, tmp_path)


@pytest.mark.parametrize("variant", [v for v in ("jamba", "qwen2-moe") if v in CONFIGS])
def test_adapters_with_declared_experts_have_expert_channels(variant, tmp_path):
    """The MLPs of Jamba have the width of its experts."""
    model = random_model(variant)
    check_smaller(model, adapter_of(model), random_tokens(2, 12), tmp_path)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "two shared", "gpt_oss"])
def test_auto_finds_the_declared_expert_channels(name):
    model, adapter = model_of(name), AutoAdapter()
    (_, block), *_ = reversed(adapter.blocks(model))
    shared = "mlp.shared_experts" if model.config.model_type == "deepseek_v3" else ""
    declared = Experts(
        "mlp.experts", router="mlp.router", shared=shared, transposed=name == "gpt_oss"
    )
    (found,) = (g for g in declared.groups(block, model.config) if g.kind == "expert-channels")
    other = channels_of(adapter, block, model.config)
    assert set(found.parts) == set(other.parts)
    assert (found.count, found.multiple, *found.fields) == (
        other.count, other.multiple, *other.fields,
    )  # fmt: skip
    assert len(found.readers) == len(other.readers) == 8 + bool(shared)


def test_width_shared_with_other_parameters_gives_no_groups():
    """A Linear outside the blocks has the width of the experts."""
    model = model_of("qwen3_moe")
    adapter = AutoAdapter()
    assert channels_of(adapter, adapter.blocks(model)[0][1], model.config)

    class Wider(type(model)):
        def __init__(self, config):
            super().__init__(config)
            self.beside = torch.nn.Linear(config.moe_intermediate_size, 4)

    wider = Wider(copy.deepcopy(model.config)).eval()
    adapter = AutoAdapter()
    assert channels_of(adapter, adapter.blocks(wider)[0][1], wider.config) is None


@pytest.mark.parametrize(("name", "each"), [("gpt_oss", 2), ("qwen3_moe", 1)])
def test_auto_detects_alternating_rows_by_a_run(name, each):
    """As in transformers 4, and in code beside a checkpoint."""
    model = model_of(name)
    model.config._experts_implementation = "eager"
    for layer in model.model.layers:
        del layer.mlp.experts.is_concatenated
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    adapter = AutoAdapter()
    groups = channels_of(adapter, adapter.blocks(model)[0][1], model.config)
    rows = [part for part in groups.parts if "gate_up" in part.parameter]
    assert {part.each for part in rows} == {each}
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())
