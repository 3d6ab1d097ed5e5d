"""It conforms; each expert is pruned on its own tokens, and one that starves is not ruined."""

import pytest
import torch
from apt_moe import Qwen3MoeAdapter, example
from transformers import AutoModelForCausalLM

import apt
from apt.solver import NM, Gram, SolverOptions, ss
from apt.testing import AdapterConformance, random_tokens

TOKENS = random_tokens(128)


class TestQwen3Moe(AdapterConformance):
    def adapter(self):
        return Qwen3MoeAdapter()

    def model(self):
        return example()


@pytest.mark.parametrize("aware", [False, True])
def test_every_kind_of_run_prunes_every_expert(tmp_path, aware):
    model = example()
    report = apt.prune(model, TOKENS, pattern="2:4", error_aware=aware)
    assert len(report.sites) == 2 * (4 + 8) + 7
    experts = [site for site in report.sites if "experts.gate_up_proj" in site.name]
    assert sum(site.tokens for site in experts) == 2 * 2 * TOKENS.numel()  # blocks, top k
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.experts
    assert ((loaded.down_proj.view(4, 32, 4, 4) != 0).sum(-1) == 2).all()


@torch.no_grad()
def test_an_expert_is_solved_on_the_tokens_that_it_gets():
    """The first block's experts, by hand: routed as the router says, solved by the plain solver."""
    model = example().eval()
    block, given = model.model.layers[0], []
    block.mlp.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    dense = block.mlp.experts.gate_up_proj.clone()
    model(TOKENS)
    rows = given[0].reshape(-1, 32)
    chosen = (rows @ block.mlp.gate.weight.T).topk(2, dim=-1).indices
    only = apt.plan.Selection(only=("*.0.mlp.experts.*",))
    report = apt.prune(model, TOKENS, pattern="2:4", method="ss", selection=only)
    for expert in range(4):
        mine = rows[(chosen == expert).any(-1)]
        expected = ss(dense[expert], Gram.of(mine), NM(2, 4), SolverOptions()).weight
        torch.testing.assert_close(block.mlp.experts.gate_up_proj[expert], expected)
        site = next(s for s in report.sites if s.name.endswith(f"gate_up_proj.{expert}"))
        assert site.tokens == len(mine)


def test_an_expert_that_sees_too_little_is_reported_and_not_ruined():
    model = example()
    with torch.no_grad():
        for index in (0, 2):  # the router never chooses the last expert, and rarely the third
            model.model.layers[index].mlp.gate.weight[3] = 0
            model.model.layers[index].mlp.gate.weight[3, 0] = -1e3
    dense = model.model.layers[0].mlp.experts.down_proj[3].clone()
    report = apt.prune(model, random_tokens(128, 2, 12), pattern="2:4")
    starved = [site for site in report.sites if site.starved]
    assert starved
    assert any(site.tokens < 3 for site in starved)
    pruned = model.model.layers[0].mlp.experts.down_proj[3]
    kept = pruned != 0
    assert (kept.view(32, 4, 4).sum(-1) == 2).all()
    assert (pruned - dense)[kept].norm() < 0.5 * dense[kept].norm()
