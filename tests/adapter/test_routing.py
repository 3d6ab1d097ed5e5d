"""The choices of routers: their record at the experts, and their change without some experts."""

import pytest
import torch

from apt.adapter import Unrouted, WeightTap, one_by_one, routings
from apt.errors import AptError
from tests.helpers.mixtures import experts_of, mixture

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 has lists of experts")

FAMILIES = ["qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"]


@pytest.fixture(params=FAMILIES)
def block(request):
    """The last block of a model of a family."""
    return mixture(request.param).model.layers[-1]


@pytest.fixture
def stream():
    return torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


def routed(block, stream):
    """The routing of the feed-forward part of a block, and its output."""
    _, experts = experts_of(block)
    found = []
    with torch.no_grad(), one_by_one(block), routings(experts, found.append):
        output = block.mlp(stream)
    (routing,) = found
    return routing, output[0] if isinstance(output, tuple) else output


def test_routing_reproduces_the_output_of_the_experts(block, stream):
    routing, _ = routed(block, stream)
    _, experts = experts_of(block)
    with torch.no_grad(), one_by_one(block):
        whole = experts(routing.inputs, routing.index, routing.weights)
        by_hand = torch.zeros_like(whole)
        for expert in range(8):
            tokens, weights = routing.tokens_of(expert)
            index = torch.full((len(tokens), 1), expert)
            out = experts(routing.inputs[tokens], index, torch.ones(len(tokens), 1))
            by_hand[tokens] += out * weights[:, None]
    torch.testing.assert_close(by_hand, whole)


def test_tokens_of_returns_tokens_in_the_order_of_the_inputs(block, stream):
    _, experts = experts_of(block)
    seen, found = {}, []
    weights = {e: experts.gate_up_proj.data[e] for e in range(8)}
    tap = WeightTap(weights, lambda key, rows: seen.update({key: rows}))
    with torch.no_grad(), one_by_one(block), routings(experts, found.append), tap:
        block.mlp(stream)
    assert seen
    for expert, rows in seen.items():
        tokens, _ = found[0].tokens_of(expert)
        assert torch.equal(found[0].inputs[tokens], rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unrouted_router_equals_the_smaller_router(block, stream, dtype):
    block, stream = block.to(dtype), stream.to(dtype)
    removed = torch.tensor([True, False, False, False, True, False, False, False])
    router = getattr(block.mlp, "gate", None) or block.mlp.router
    with Unrouted({router.weight: removed}):
        masked, output = routed(block, stream)
    kept = (~removed).nonzero().squeeze(1)
    for module in block.mlp.modules():
        if hasattr(module, "num_experts"):
            module.num_experts = 6
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and len(tensor) == 8 and module in (router, experts_of(block)[1]):
                setattr(module, name, type(tensor)(tensor.data[kept]))
    small, expected = routed(block, stream)
    assert torch.equal(masked.index.sort().values, kept[small.index].sort().values)
    torch.testing.assert_close(output, expected)


def test_unrouted_accepts_a_mask_for_each_token(block, stream):
    router = getattr(block.mlp, "gate", None) or block.mlp.router
    before, _ = routed(block, stream)
    removed = torch.nn.functional.one_hot(before.index[:, 0], 8).bool()
    with Unrouted({router.weight: removed}):
        after, _ = routed(block, stream)
    assert not (after.index == before.index[:, :1]).any()
    if router.__class__.__name__ != "DeepseekV3TopkRouter":  # the other group may come first
        assert ((after.index[:, :, None] == before.index[:, None, 1:]).any(1)).all()


def test_routings_refuses_experts_without_indices(stream):
    _, experts = experts_of(mixture("llama4_text").model.layers[0])
    with pytest.raises(AptError, match="does not get the indices of"), routings(experts, print):
        experts(stream.view(-1, 16))
