"""Groups of every family: a model without groups equals the model that does not read them."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from apt.adapter.groups import disconnect, without
from apt.checkpoints.smaller import shrunk
from apt.errors import AptError
from tests.helpers.families import CONFIGS, STACKED, adapter_of, random_model, random_tokens
from tests.helpers.releases import needs

WITH_GROUPS = {
    "llama": ("channels", "heads"),
    "mistral": ("channels", "heads"),
    "opt": ("channels",),
    "mamba": ("channels", "states"),
    "mamba2": ("states",),
    "falcon-mamba": ("channels",),
    "qwen2-moe": ("heads",) if STACKED else (),
}


def family(variant):
    return variant if variant in WITH_GROUPS else variant.partition("-")[0]


CASES = [
    pytest.param(variant, kind, id=f"{variant} {kind}")
    for variant in CONFIGS
    for kind in WITH_GROUPS.get(family(variant), ())
    if variant == "llama-grouped-tied" or (variant, kind) == ("qwen2-moe", "heads")
]


def removed_groups(model, adapter, kind):
    """Half of the groups of each block, the same number from each bin, different in each block."""
    found = {}
    for index, (name, block) in enumerate(adapter.blocks(model)):
        groups = next(g for g in adapter.groups(block, model.config) if g.kind == kind)
        each = groups.count // groups.bins
        gone = each // 2
        found[name] = {
            kind: [b * each + (index + i) % each for b in range(groups.bins) for i in range(gone)]
        }
    return found


@torch.no_grad()
def silence(model, adapter, removed):
    """Set the columns of the readers to zero for the removed groups."""
    for name, block in adapter.blocks(model):
        for groups in adapter.groups(block, model.config):
            for site in adapter.sites(block):
                if site.name in groups.readers:
                    weight = site.oriented(site.weight(block))
                    parts = weight.unflatten(1, (groups.count, -1))
                    parts[:, removed[name].get(groups.kind, [])] = 0
            parameters = dict(block.named_parameters())
            disconnect(parameters, groups, removed[name].get(groups.kind, []))


@pytest.mark.parametrize(("variant", "kind"), CASES)
@torch.no_grad()
def test_smaller_model_equals_the_model_with_unread_groups(variant, kind, tmp_path):
    model = random_model(variant)
    adapter = adapter_of(model)
    removed = removed_groups(model, adapter, kind)
    silenced = copy.deepcopy(model)
    silence(silenced, adapter, removed)
    smaller, tokens = shrunk(model, adapter, removed), random_tokens(2, 12)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    expected = silenced(tokens).logits
    assert float((model(tokens).logits - expected).abs().max()) > 1e-4
    torch.testing.assert_close(smaller(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    smaller.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(opened(tokens).logits, smaller(tokens).logits)


def test_groups_of_two_kinds_are_removed_together():
    """A query head, and the key/value head that it belongs to."""
    model = random_model("llama-grouped-tied")
    adapter = adapter_of(model)
    _, block = adapter.blocks(model)[0]
    known = {groups.kind: groups for groups in adapter.groups(block, model.config)}
    heads, shared = known["heads"], known["key-value-heads"]
    smaller = without(dict(block.named_parameters()), [(heads, [0]), (shared, [0])])
    lost = model.config.num_attention_heads // model.config.num_key_value_heads
    expected = (model.config.num_attention_heads - lost) * model.config.head_dim
    assert smaller["self_attn.q_proj.weight"].shape[0] == expected


def test_different_numbers_of_groups_per_block_are_refused():
    model = random_model("llama-grouped-tied")
    adapter = adapter_of(model)
    first = adapter.blocks(model)[0][0]
    with pytest.raises(AptError, match=r"loses 0 channels, and a block before it 1"):
        shrunk(model, adapter, {first: {"channels": [0]}})


@pytest.mark.parametrize("variant", ["bloom"])
def test_family_without_fields_for_widths_has_no_groups(variant):
    model = random_model(variant)
    adapter = adapter_of(model)
    assert adapter.groups(adapter.blocks(model)[0][1], model.config) == []


@needs("transformers", "5", "LlamaConfig refuses some numbers of heads")
def test_inexpressible_widths_are_refused():
    """transformers opens a LLaMA only if the hidden size is a multiple of the number of heads."""
    model = random_model("llama")
    adapter = adapter_of(model)
    removed = {name: {"heads": [0]} for name, _ in adapter.blocks(model)}
    with pytest.raises(AptError, match="LlamaConfig cannot express these sizes"):
        shrunk(model, adapter, removed)
