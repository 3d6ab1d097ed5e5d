"""Block tuning: zeros stay, and the error on batches held back never rises, in any dtype."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import apt as library
from apt.adapter import Call, Site
from apt.calibration.batches import Batch, DenseActivations, OpenBlock, enter
from apt.calibration.dense_activations import advance_dense
from apt.engine.recipes import recipe_of
from apt.events import BlockTuned
from apt.options import PruneOptions
from apt.plugin.registry import registry
from apt.solver import NM, meets
from apt.tuning import block_forward
from apt.tuning.block_tuning import BlockTuning, tune_block
from tests.helpers.families import FAMILIES, adapter_of, random_model, random_tokens, zoo_model
from tests.helpers.releases import needs

BEST = PruneOptions(effort="best", own_samples=0)


def pruned_block(adapter, model, batches):
    """The first block with zeros in every fourth column, behind the dense stream, and its sites."""
    block = adapter.blocks(model)[0][1]
    sites = adapter.sites(block)
    with torch.no_grad():
        advance_dense(OpenBlock(adapter, block, 0, batches), sites)
        for site in sites:
            site.weight(block)[:, ::4] = 0
    return block, sites


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float32), *((name, torch.bfloat16) for name in FAMILIES)],
    ids=str,
)
def test_tuning_lowers_the_error_on_batches_held_back(name, dtype):
    loaded, tokens, _ = zoo_model(name, samples=12, seqlen=48)
    model, adapter = loaded.module.to(dtype), loaded.adapter
    batches = enter(adapter, model, tokens, 48, with_dense=True)
    block, sites = pruned_block(adapter, model, batches)
    before = {name: value.clone() for name, value in block.named_parameters()}
    tuned = tune_block(
        OpenBlock(adapter, block, 0, batches), sites, BlockTuning(rate=0.1, epochs=3)
    )
    assert tuned is not None
    assert tuned.after < tuned.before
    names = {site.parameter for site in sites}
    for name, value in block.named_parameters():
        if name in names:
            assert not value[before[name] == 0].any()
            assert not torch.equal(value, before[name])
            assert value.dtype == dtype
        else:
            assert torch.equal(value, before[name])


def test_outlier_token_does_not_outweigh_other_tokens():
    """A dense block that removes a massive activation leaves a small stream with large errors."""
    loaded, tokens, _ = zoo_model("llama", samples=12, seqlen=48)
    model, adapter = loaded.module, loaded.adapter
    batches = enter(adapter, model, tokens, 48, with_dense=True)
    block, sites = pruned_block(adapter, model, batches)
    opened = OpenBlock(adapter, block, 0, batches)

    @torch.no_grad()
    def error():
        """The mean relative error of all tokens except the first."""
        result = [
            (adapter.residual(opened.step(batch, batch.state)) - dense).square().sum(-1)
            / dense.square().sum(-1)
            for batch in batches
            for dense in [adapter.residual(batch.dense.state)]
        ]
        return float(torch.cat(result)[:, 1:].mean())

    for batch in batches:
        state = batch.state.clone()
        state[:, 0] *= 1e4
        batch.state = state
    before = error()
    tuned = tune_block(opened, sites, BlockTuning(rate=0.1, epochs=3))
    assert tuned is not None
    assert error() < 0.9 * before


def test_weights_stay_if_no_step_lowers_the_error():
    model = random_model("llama")
    adapter = adapter_of(model)
    batches = enter(adapter, model, random_tokens(samples=6), 24, with_dense=True)
    block, sites = pruned_block(adapter, model, batches)
    before = copy.deepcopy(block.state_dict())
    tuned = tune_block(OpenBlock(adapter, block, 0, batches), sites, BlockTuning(1e4, 8))
    assert tuned is not None
    assert tuned.after == tuned.before
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


def test_single_batch_is_not_tuned():
    model = random_model("llama")
    adapter = adapter_of(model)
    batches = enter(adapter, model, random_tokens(), with_dense=True)
    block, sites = pruned_block(adapter, model, batches)
    assert tune_block(OpenBlock(adapter, block, 0, batches), sites, BlockTuning(0.025, 8)) is None


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_two_samples_are_enough_for_tuning(samples):
    events = []
    tokens = random_tokens(samples)
    options = replace(BEST, random_tokens=0)
    library.prune(random_model("llama"), tokens, pattern="2:4", options=options,
                  observe=events.append)  # fmt: skip
    assert sum(isinstance(event, BlockTuned) for event in events) == (3 if samples > 1 else 0)


class Experts(nn.Module):
    """Two experts that are modules; no token is sent to the second one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, stream):
        return stream + self.experts[0](stream)


def test_expert_without_tokens_is_not_changed():
    block = Experts()
    sites = [Site(f"experts.{i}", f"experts.{i}.weight", f"{i}", routed=True) for i in (0, 1)]
    before = copy.deepcopy(block.state_dict())
    streams = [torch.randn(1, 16, 8) for _ in range(3)]
    batches = [Batch(x, [Call((), {})], 16, DenseActivations(2 * x)) for x in streams]
    adapter = adapter_of(random_model("llama"))
    with torch.no_grad():
        tuned = tune_block(OpenBlock(adapter, block, 0, batches), sites, BlockTuning(0.025, 1))
    assert tuned.after < tuned.before
    same = [torch.equal(block.state_dict()[name], before[name]) for name in before]
    assert same == [False, True]


class Stack(nn.Module):
    """Three experts that receive all tokens; an expert's index is a number or a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, state):
        experts = [self.weight[0], self.weight[torch.tensor(1)], self.weight[2]]
        return state + sum(state @ expert.T for expert in experts)


def test_slices_of_a_stack_share_one_gradient(monkeypatch):
    """A gradient of each slice would be as large as the stack."""
    block, state = Stack(), torch.randn(1, 16, 8)
    batch = Batch(state, [Call((), {})], 16)
    opened = OpenBlock(adapter_of(random_model("llama")), block, 0, [batch])
    result = []
    for index in (block_forward._is_one, lambda index: False):
        monkeypatch.setattr(block_forward, "_is_one", index)
        stream = block_forward.stream_after(opened, {"weight": block.weight}, state, batch.calls[0])
        steps, names = [stream.grad_fn], set()
        while steps:
            step = steps.pop()
            names.add(step.name())
            steps += [before for before, _ in step.next_functions if before]
        result.append((torch.autograd.grad(stream.square().sum(), block.weight)[0], names))
    assert torch.equal(result[0][0], result[1][0])
    assert "UnbindBackward0" in result[0][1]
    assert not {"SelectBackward0", "IndexBackward0"} & result[0][1]
    assert {"SelectBackward0", "IndexBackward0"} & result[1][1]


def test_effort_best_tunes_every_block_and_keeps_the_pattern():
    model, events = random_model("llama"), []
    report = library.prune(
        model, random_tokens(samples=64), pattern="2:4", options=BEST, observe=events.append
    )
    tuned = [event for event in events if isinstance(event, BlockTuned)]
    assert len(tuned) == 3
    assert all(event.after <= event.before for event in tuned)
    assert report.options["tuning_epochs"] == 8
    for site in report.sites:
        assert meets(model.get_parameter(f"{site.name}.weight"), NM(2, 4))


def test_chosen_samples_are_evenly_spaced():
    chosen = BlockTuning(0.025, 8, tokens=24 * 5).chosen(20, 24)
    assert chosen.nonzero().flatten().tolist() == [0, 4, 8, 12, 16]
    assert BlockTuning(0.025, 8, tokens=24 * 20).chosen(20, 24).all()
    assert BlockTuning(0.025, 8, tokens=None).chosen(20, 24).all()
    assert BlockTuning(0.025, 8, tokens=10).chosen(20, 24).sum() == 2
    assert BlockTuning(0.025, 8, tokens=10).chosen(1, 24).sum() == 1


def test_run_tunes_on_chosen_samples_and_prunes_on_all(monkeypatch):
    seen = []

    def spy(block, *rest):
        seen.append(sum(batch.tokens for batch in block.batches))
        return tune_block(block, *rest)

    monkeypatch.setattr("apt.pruning.current_block.tune_block", spy)
    small_steps = partial(BlockTuning, tokens_per_batch=48)
    monkeypatch.setattr("apt.engine.recipes.BlockTuning", small_steps)
    options = replace(BEST, tuning_tokens=24 * 10)
    report = library.prune(
        random_model("llama"), random_tokens(samples=32), pattern="2:4", options=options
    )
    assert set(seen) == {24 * 10}
    assert {site.tokens for site in report.sites} == {24 * 32}


@pytest.mark.parametrize("name", ["llama", "mamba", "moe"])
def test_mixed_precision_reaches_the_error_of_full_precision(name):
    loaded, tokens, _ = zoo_model(name, samples=8, seqlen=48)
    after = []
    for native in (False, True):
        model, adapter = copy.deepcopy(loaded.module).float(), loaded.adapter
        batches = enter(adapter, model, tokens, 48, with_dense=True)
        block, sites = pruned_block(adapter, model, batches)
        mixed = torch.autocast("cpu", torch.bfloat16, native)
        opened = OpenBlock(adapter, block, 0, batches, autocast=mixed)
        tuned = tune_block(opened, sites, BlockTuning(rate=0.1, epochs=3))
        assert tuned is not None
        after.append(tuned.after / tuned.before)
    assert after[0] < 1
    assert after[1] == pytest.approx(after[0], rel=0.02)


@pytest.mark.parametrize(
    ("effort", "aware", "epochs"),
    [
        ("fast", True, None),
        ("default", True, 1),
        ("best", True, 8),
        ("default", False, None),
        ("best", False, None),
    ],
)
def test_effort_sets_the_number_of_tuning_epochs(effort, aware, epochs):
    options = PruneOptions(effort=effort, error_aware=aware)
    recipe = recipe_of(options, registry().methods.get("admm"))
    assert (recipe.tuning.epochs if recipe.tuning else None) == epochs
    assert recipe_of(options, registry().methods.get("ss")).tuning is None


@needs("transformers", "5.20", "tiny models of any type")
def test_block_without_mixed_precision_is_tuned_in_fp32(tiny, monkeypatch):
    """X-MOD writes products, which autocast makes bf16, into a tensor of fp32."""
    monkeypatch.setattr("apt.compute.multiplies_bf16", lambda device: True)
    events = []
    report = library.prune(tiny.model("xmod"), tiny.tokens(), pattern="2:4", observe=events.append)
    assert report.sparsity == 0.5
    assert [event for event in events if isinstance(event, BlockTuned)]


def test_zero_weight_stays_zero_and_others_are_tuned():
    loaded, tokens, _ = zoo_model("llama", samples=12, seqlen=48)
    model, adapter = loaded.module.float(), loaded.adapter
    torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    batches = enter(adapter, model, tokens, 48, with_dense=True)
    block, sites = pruned_block(adapter, model, batches)
    tuned = tune_block(
        OpenBlock(adapter, block, 0, batches), sites, BlockTuning(rate=0.1, epochs=3)
    )
    assert tuned.after < tuned.before
    assert not block.mlp.down_proj.weight.any()
