"""Mixtures of experts: the inputs of an expert are the tokens that the router sends to it."""

import pytest
import torch

from apt.calibration.batches import Batch, OpenBlock
from apt.calibration.capture import Capture
from tests.helpers.families import STACKED, adapter_of, random_model, random_tokens


@torch.no_grad()
@pytest.mark.skipif(not STACKED, reason="experts are modules in this transformers")
@pytest.mark.parametrize("variant", ["qwen2-moe", "mixtral", "olmoe"])
def test_experts_are_captured_on_their_own_tokens(variant):
    """The expected inputs are computed by hand from the input of the first mixture."""
    model, tokens = random_model(variant), random_tokens()
    adapter, given = adapter_of(model), []
    (_, block), *_ = adapter.blocks(model)
    handle = block.mlp.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    capture = Capture(block, adapter.sites(block))
    with adapter.running(model):
        state, calls = adapter.enter(model, tokens)
        capture.run(OpenBlock(adapter, block, 0, [Batch(state, calls, tokens.numel())]))
    handle.remove()
    rows, experts = given[0].flatten(0, 1), block.mlp.experts
    chosen = (rows @ block.mlp.gate.weight.T).topk(2).indices
    for expert in range(4):
        mine = rows[(chosen == expert).any(-1)]
        gate, up = (mine @ experts.gate_up_proj[expert].T).chunk(2, -1)
        neurons = torch.nn.functional.silu(gate) * up
        for name, expected in (("gate_up_proj", mine), ("down_proj", neurons)):
            gram = capture.sums[f"{name} of {expert}"].gram
            assert gram.tokens == len(mine)
            torch.testing.assert_close(gram.matrix, expected.T @ expected, rtol=1e-4, atol=1e-3)
