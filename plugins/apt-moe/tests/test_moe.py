"""The adapter conforms; experts are pruned on their own tokens, also on few tokens."""

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
def test_all_kinds_of_runs_prune_every_expert(tmp_path, aware):
    model = example()
    report = apt.prune(model, TOKENS, pattern="2:4", options=apt.PruneOptions(error_aware=aware))
    assert len(report.sites) == 2 * (4 + 8) + 7
    experts = [site for site in report.sites if "experts.gate_up_proj" in site.name]
    seen = next(site.tokens for site in report.sites if "self_attn" in site.name)
    assert sum(site.tokens for site in experts) == 2 * 2 * seen  # blocks, top k
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.experts
    assert ((loaded.down_proj.view(4, 32, 4, 4) != 0).sum(-1) == 2).all()


@torch.no_grad()
def test_expert_is_solved_on_its_own_tokens():
    """The expected weights are solved by hand on the tokens that the router selects."""
    model = example().eval()
    block, given = model.model.layers[0], []
    block.mlp.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    dense = block.mlp.experts.gate_up_proj.clone()
    model(TOKENS)
    rows = given[0].reshape(-1, 32)
    chosen = (rows @ block.mlp.gate.weight.T).topk(2, dim=-1).indices
    only = apt.planning.plan.Selection(only=("*.0.mlp.experts.*",))
    report = apt.prune(model, TOKENS, pattern="2:4", method="ss", selection=only)
    for expert in range(4):
        mine = rows[(chosen == expert).any(-1)]
        expected = ss(dense[expert], Gram.of(mine), NM(2, 4), SolverOptions()).weight
        torch.testing.assert_close(block.mlp.experts.gate_up_proj[expert], expected)
        site = next(s for s in report.sites if s.name.endswith(f"gate_up_proj.{expert}"))
        assert site.tokens == len(mine)


def test_experts_with_few_tokens_are_reported_as_starved():
    """Three tokens go to two of eight experts each; experts without tokens use magnitude."""
    model = example(num_experts=8)
    dense = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    report = apt.prune(model, random_tokens(128, 1, 3), pattern="2:4")
    sites = {site.name: site for site in report.sites}
    empty = 0
    for expert in range(8):
        site = sites[f"model.layers.0.mlp.experts.down_proj.{expert}"]
        assert site.starved
        pruned = model.model.layers[0].mlp.experts.down_proj[expert]
        kept, own = pruned != 0, dense[expert][:, list(site.order)]
        if site.tokens == 0:
            empty += 1
            groups = own.abs().view(32, 4, 4)
            assert torch.equal(kept.view(32, 4, 4), groups >= groups.sort(-1).values[..., 2:3])
            torch.testing.assert_close(pruned[kept], own[kept])
        assert (pruned - own)[kept].norm() < 0.5 * own[kept].norm()
    assert empty
