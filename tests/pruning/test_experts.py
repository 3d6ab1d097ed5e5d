"""The choice of experts, against scores and losses that are computed token by token."""

import copy
import itertools
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from apt_adapters.auto import AutoAdapter
from apt_plugins import expert_choices

from apt.adapter import routings
from apt.calibration.batches import OpenBlock, enter
from apt.planning.plan import PlannedGroups
from apt.pruning import routed_experts
from apt.pruning.disconnecting import disconnect_groups
from apt.pruning.expert_choice import ExpertRemoval, joint_experts
from apt.pruning.expert_weights import compensate, dense_outputs
from apt.pruning.merging import matched
from apt.pruning.routed_experts import RoutedExperts
from apt.solver import ColumnGroups
from apt.tuning.block_forward import stream_after
from tests.helpers.mixtures import experts_of, mixture

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 has lists of experts")

FAMILIES = ["qwen2_moe", "deepseek_v3", "gpt_oss"]


@cache
def opened(family, samples, **sizes):
    """A model, its adapter, and calibration tokens before its last block."""
    model, adapter = mixture(family, **sizes), AutoAdapter()
    model.config._experts_implementation = "eager"
    tokens = torch.randint(0, 64, (samples, 16), generator=torch.Generator().manual_seed(1))
    batches = enter(adapter, model, tokens, 32)
    for batch in batches:
        _, block = adapter.blocks(model)[0]
        batch.state = adapter.step(block, batch.state, batch.calls[0])
    return model, adapter, batches


class Case:
    """The last block of a model, opened on calibration tokens."""

    def __init__(self, family, samples=4, **sizes):
        model, self.adapter, batches = opened(family, samples, **sizes)
        self.module = copy.deepcopy(self.adapter.blocks(model)[1][1])
        self.groups = self.adapter.groups(self.module, model.config)[0]
        self.block = OpenBlock(self.adapter, self.module, 1, batches)
        _, self.owner = experts_of(self.module)

    def pattern(self, kept):
        return ColumnGroups(8, kept, self.groups.bins)

    def picks(self):
        """The experts' inputs, each pick of each token, and the streams after the block."""
        result, after = [], []
        for batch in self.block.batches:
            with routings(self.owner, result.append):
                after.append(self.block.step(batch, batch.state).reshape(-1, 16))
        rows = torch.cat([routing.inputs for routing in result])
        index = torch.cat([routing.index for routing in result])
        weights = torch.cat([routing.weights for routing in result])
        return rows, index, weights, torch.cat(after)

    def output(self, expert, row):
        return self.owner(row[None], torch.tensor([[expert]]), torch.ones(1, 8))[0]


@pytest.fixture(params=FAMILIES)
def case(request):
    return Case(request.param)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def scores_by_hand(case):
    """Tokens, REAP's saliency and the effect of every expert, token by token."""
    rows, index, weights, after = case.picks()
    size = after.square().mean(1)
    size = size.clamp_min(size.median() / 16)
    tokens, saliency, effect = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    for token, pick in itertools.product(range(len(rows)), range(index.shape[1])):
        expert, weight = int(index[token, pick]), weights[token, pick]
        length = case.output(expert, rows[token]).norm()
        tokens[expert] += 1
        saliency[expert] += weight * length
        effect[expert] += (weight * length).square() / size[token]
    return tokens, saliency / tokens.clamp_min(1), effect


def test_scores_of_experts_equal_token_by_token_sums(case):
    experts = RoutedExperts(case.block, case.groups)
    choices = (expert_choices.by_frequency, expert_choices.reap, expert_choices.by_effect)
    for choose, expected in zip(choices, scores_by_hand(case), strict=True):
        given, pattern = [], case.pattern(4)
        choose(experts, SimpleNamespace(lowest=given.append))
        torch.testing.assert_close(given[0].float(), expected)
        assert torch.equal(choose(experts, pattern), pattern.lowest(expected))


def losses_by_hand(case, kept):
    """The loss of the rerouted block for each mask of experts that keeps ``kept`` of them."""
    experts = RoutedExperts(case.block, case.groups)
    dense = experts.output(experts.routing)
    result = {}
    for left in itertools.combinations(range(8), kept):
        mask = torch.ones(8, dtype=torch.bool)
        mask[list(left)] = False
        per_bin = mask.view(case.groups.bins, -1).sum(1)
        if len(set(per_bin.tolist())) == 1:
            lost = dense - experts.output(experts.rerouted(mask))
            result[tuple(mask.tolist())] = float((lost.square().sum(1) / experts.sizes).sum())
    return result


def test_joint_choice_is_among_the_best_5_percent(case):
    losses = losses_by_hand(case, 4)
    chosen = joint_experts(RoutedExperts(case.block, case.groups), case.pattern(4))
    ranked = sorted(losses.values())
    assert losses[tuple(chosen.tolist())] <= ranked[max(0, len(ranked) // 20)]


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_removal_of_one_expert_has_the_least_loss(family):
    case = Case(family)
    losses = losses_by_hand(case, 7)
    chosen = joint_experts(RoutedExperts(case.block, case.groups), case.pattern(7))
    assert losses[tuple(chosen.tolist())] == min(losses.values())


def test_outputs_of_experts_are_limited_to_the_tokens_that_fit(case, monkeypatch):
    monkeypatch.setattr(routed_experts, "_OUTPUTS", 8 * 16 * 20)
    experts = RoutedExperts(case.block, case.groups)
    assert experts.outputs.shape == (8, 20, 16)
    assert len(experts.sizes) == 64
    assert int(joint_experts(experts, case.pattern(6)).sum()) == 2
    how = ExpertRemoval(expert_choices.reap, merge=True)
    disconnect_groups(case.block, PlannedGroups(case.groups, 6, (0, 6)), how, 0.01)
    assert all(p.isfinite().all() for p in case.owner.parameters())


def test_outputs_of_experts_add_up_to_the_output_of_the_module(case):
    experts = RoutedExperts(case.block, case.groups)
    totals = torch.cat([target.total for target in dense_outputs(case.block, case.groups)])
    torch.testing.assert_close(experts.output(experts.routing), totals)


def inputs_by_hand(case, kept, targets):
    """The inputs (tokens, kept, 24) of the last weights times their factors, and the factors."""
    sites = {s.expert: s for s in case.adapter.sites(case.module) if "down" in s.parameter}
    rows, factors = [], []
    for target in targets:
        seen, result = {}, []

        def keep(site, values, seen=seen):
            seen[site.expert] = values

        watched = [sites[expert] for expert in kept]
        with case.adapter.capture(case.module, watched, keep), routings(case.owner, result.append):
            case.block.step(target.batch, target.batch.state)
        factor = torch.zeros(len(target.total), len(kept))
        row = torch.zeros(*factor.shape, 12)
        for place, expert in enumerate(kept):
            tokens, weights = result[0].tokens_of(expert)
            factor[tokens, place] = weights
            row[tokens, place] = seen[expert]
        factors.append(factor / target.scale)
        rows.append(row * factors[-1][:, :, None])
    return torch.cat(rows), torch.cat(factors)


def router(case):
    return getattr(case.module.mlp, "gate", None) or case.module.mlp.router


def test_compensation_of_experts_is_near_least_squares():
    case, kept = Case("gpt_oss", samples=8, intermediate_size=12), [1, 2, 4, 7]
    for parameter in router(case).parameters():  # about as many tokens for each expert
        parameter *= 0.01
    targets = dense_outputs(case.block, case.groups)
    disconnect_groups(
        case.block, PlannedGroups(case.groups, 4, (0, 3, 5, 6)), ExpertRemoval(), 0.01
    )
    rows, factors = inputs_by_hand(case, kept, targets)
    wanted = torch.cat([target.total / target.scale for target in targets])
    wanted -= factors @ case.owner.down_proj_bias[kept]
    least = torch.linalg.lstsq(rows.flatten(1), wanted, driver="gelsd").solution
    least = (wanted - rows.flatten(1) @ least).norm()
    errors = []
    for _ in range(2):
        errors.append((wanted - rows.flatten(1) @ case.owner.down_proj[kept].flatten(0, 1)).norm())
        compensate(case.block, case.groups, kept, targets, 1e-9)
    assert errors[1] < 1.02 * least < 0.9 * errors[0]
    assert not case.owner.down_proj[0].any()
    assert not case.owner.down_proj_bias[0].any()


def test_router_does_not_choose_removed_experts(case):
    planned = PlannedGroups(case.groups, 4, (0, 3, 5, 6))
    disconnect_groups(case.block, planned, ExpertRemoval(), 0.01)
    index = case.picks()[1]
    assert not torch.isin(index, torch.tensor([0, 3, 5, 6])).any()
    block = case.block.using(case.block.batches)
    assert block.unrouted
    batch = block.batches[0]
    after = case.adapter.residual(block.step(batch, batch.state))
    assert torch.equal(
        stream_after(block, {}, batch.state, batch.calls[0]), after
    )  # as it is tuned


def permuted(owner, name, values, order):
    """A parameter of an expert with its neurons in another order."""
    if name == "down_proj_bias":
        return values
    rows = torch.cat([order, len(order) + order])
    if not getattr(owner, "is_concatenated", True):
        rows = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    chosen = order if name == "down_proj" else rows
    return values.index_select(values.shape.index(len(chosen)), chosen)


def test_merging_equal_experts_changes_no_weight(case):
    """Each removed expert is a copy of a kept expert with permuted neurons."""
    pairs, order = {0: 1, 6: 5}, torch.randperm(case.owner.down_proj[0].numel() // 16)
    for name, tensor in case.owner.named_parameters():
        for twin, first in pairs.items():
            tensor[twin] = permuted(case.owner, name, tensor[first].clone(), order)
    before = {name: tensor.clone() for name, tensor in case.owner.named_parameters()}
    for parameter in router(case).parameters():
        parameter *= 0.01
    how = ExpertRemoval(expert_choices.reap, merge=True)
    disconnect_groups(case.block, PlannedGroups(case.groups, 6, tuple(pairs)), how, 0.01)
    for name, tensor in case.owner.named_parameters():
        for first in pairs.values():
            torch.testing.assert_close(tensor[first], before[name][first])


def test_matched_pairs_the_most_similar_neurons_first():
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.85, 0.2, 0.3], [0.0, 0.7, 0.6]])
    assert matched(similarity).tolist() == [0, 2, 1]
    assert matched(torch.zeros(4, 4)).sort().values.tolist() == [0, 1, 2, 3]
