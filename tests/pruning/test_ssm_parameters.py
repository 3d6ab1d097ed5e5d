"""Extras: the convolution, the decays and the skip of state-space mixers."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import apt as library
from apt.calibration.batches import Batch, OpenBlock
from apt.errors import AptError
from apt.evaluation.metrics import perplexity
from apt.events import SitePruned
from apt.planning.plan import Selection, make_plan
from apt.pruning.ssm_parameters import prune_extras
from apt.solver import NM, SolverOptions, Unstructured, meets
from tests.helpers.families import CONFIGS, adapter_of, random_model, random_tokens, zoo_model
from tests.helpers.releases import EXTRAS

VARIANTS = ["mamba", "falcon-mamba", "mamba2", "jamba", "falcon-h1"]
KINDS = ("conv1d", "A_log", "D")
TOKENS = random_tokens(3, 16)
pytestmark = EXTRAS


@torch.no_grad()
def first_block(model, adapter):
    """The first block with extras, its index, and the batch before it."""
    state, calls = adapter.enter(model, TOKENS)
    for index, (name, block) in enumerate(adapter.blocks(model)):
        if adapter.extras(block):
            return name, block, index, Batch(state, calls, TOKENS.numel())
        state = adapter.step(block, state, calls[index])
    raise AssertionError


@torch.no_grad()
def read_by_out_proj(adapter, block, index, batch):
    """The inputs of the mixer's last weight."""
    seen = []
    site = next(
        s for s in adapter.sites(block) if s.name.endswith(("mixer.out_proj", "mamba.out_proj"))
    )
    with adapter.capture(block, [site], lambda _, rows: seen.append(rows.double())):
        adapter.step(block, batch.state, batch.calls[index])
    return torch.cat(seen)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["A_log", "D"])
def test_effects_predict_the_change_by_a_removed_entry(variant, kind):
    model = random_model(variant)
    adapter = adapter_of(model)
    _, block, index, batch = first_block(model, adapter)
    extra = next(e for e in adapter.extras(block) if e.kind == kind)
    extra.weight(block).data.normal_(0.5, 0.5)  # as made, the first decay is what a zero stands for
    result = {}
    with adapter.effects(
        block, [extra], lambda e, gram, energy: result.update({e: (gram, energy)})
    ):
        adapter.step(block, batch.state, batch.calls[index])
    gram, energy = result[extra]
    dense = read_by_out_proj(adapter, block, index, batch)
    normed = variant == "mamba2"  # the norm's own size is taken as it is: a small change is needed
    gated = variant != "falcon-h1"
    weight = extra.weight(block)
    for channel, place in ((0, 0), (weight.shape[0] - 1, weight.shape[1] - 1)):
        changed = copy.deepcopy(block)
        entry = extra.weight(changed).data
        entry[channel, place] = 0
        change = read_by_out_proj(adapter, changed, index, batch) - dense
        told = float(gram[channel, place, place])
        if kind == "D":
            told *= float(weight[channel, 0]) ** 2
        if gated and not normed:
            assert told == pytest.approx(float(change.square().sum()), rel=1e-3)
            assert energy == pytest.approx(float(dense.square().sum()), rel=1e-4)
        else:
            assert told > 0


@torch.no_grad()
def test_gram_matrix_predicts_the_change_by_several_removed_entries():
    model = random_model("mamba")
    adapter = adapter_of(model)
    _, block, index, batch = first_block(model, adapter)
    extra = next(e for e in adapter.extras(block) if e.kind == "A_log")
    result = []
    with adapter.effects(block, [extra], lambda e, gram, energy: result.append(gram)):
        adapter.step(block, batch.state, batch.calls[index])
    dense = read_by_out_proj(adapter, block, index, batch)
    removed = torch.tensor([1, 4, 6])
    changed = copy.deepcopy(block)
    extra.weight(changed).data[5, removed] = 0
    change = read_by_out_proj(adapter, changed, index, batch) - dense
    told = float(result[0][5][removed][:, removed].sum())
    assert told == pytest.approx(float(change.square().sum()), rel=1e-3)


@torch.no_grad()
def test_gram_matrix_of_the_convolution_is_that_of_its_windows():
    model = random_model("mamba")
    adapter = adapter_of(model)
    _, block, index, batch = first_block(model, adapter)
    extra = next(e for e in adapter.extras(block) if e.kind == "conv1d")
    result = []
    with adapter.effects(block, [extra], lambda e, gram, energy: result.append(gram)):
        adapter.step(block, batch.state, batch.calls[index])
    projected = block.mixer.in_proj(block.norm(batch.state)).transpose(1, 2)
    x = projected.chunk(2, 1)[0].double()
    width = block.mixer.conv1d.weight.shape[-1]
    rows = F.pad(x, (width - 1, 0)).unfold(2, width, 1)  # (batch, channels, length, width)
    rows = rows.transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(result[0], rows.mT @ rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_extras_are_pruned_and_reported(variant):
    model = random_model(variant)
    before = copy.deepcopy(model.state_dict())
    module = __import__(type(model).__module__, fromlist=["_"])
    functions = dict(vars(module))
    report = library.prune(
        model, TOKENS, pattern="0.5", also=KINDS, options=library.PruneOptions(effort="fast")
    )
    assert all(vars(module)[name] is value for name, value in functions.items())
    extras = [
        site
        for site in report.sites
        if not site.name.endswith("_proj") and "experts" not in site.name
    ]
    assert {site.kind.rpartition(".")[2] for site in extras} == set(KINDS)
    for site in extras:
        name = f"{site.name}.weight" if site.name.endswith("conv1d") else site.name
        parameter = model.get_parameter(name)
        assert meets(parameter.view(parameter.shape[0], -1), Unstructured(0.5))
        assert site.zeros == int((parameter == 0).sum()) >= parameter.numel() / 2
        assert site.relative_error >= 0
        assert not torch.equal(parameter, before[name])


def test_an_event_follows_each_batch_of_the_run_for_extras():
    events = []
    how = {"pattern": "0.5", "method": "wanda", "also": ["conv1d"], "observe": events.append}
    library.prune(random_model("mamba2"), TOKENS, **how)
    first = next(index for index, event in enumerate(events) if isinstance(event, SitePruned))
    assert events[first].kind.endswith("conv1d")
    assert [event.doing for event in events[1:first]] == ["running"]


def test_convolution_takes_n_m_and_misfits_are_refused():
    model = random_model("mamba")
    library.prune(model, TOKENS, pattern="2:4", also=["conv1d", "A_log"], method="sm")
    for _, parameter in model.named_parameters():
        if parameter.ndim == 3:
            assert meets(parameter.flatten(1), NM(2, 4))
    with pytest.raises(AptError, match=r"mixer\.D has 1 weights per channel"):
        library.prune(model, TOKENS, pattern="2:4", also=["D"], method="sm")
    with pytest.raises(AptError, match="this model has no 'conv2d' to prune") as error:
        library.prune(model, TOKENS, pattern="0.5", also=["conv2d"])
    assert "A_log, D, conv1d" in str(error.value)
    with pytest.raises(AptError, match="it has: nothing but its sites"):
        library.prune(random_model("llama"), TOKENS, pattern="0.5", also=["conv1d"])


def test_missing_effects_are_an_error():
    model = random_model("mamba")
    adapter = adapter_of(model)
    _, block, index, batch = first_block(model, adapter)
    plan = make_plan(model, adapter, Unstructured(0.5), also=["D"])
    adapter.effects = lambda block, extras, sink: torch.no_grad()
    with pytest.raises(AptError, match=r"mixer\.D cannot be pruned"):
        list(
            prune_extras(
                OpenBlock(adapter, block, index, [batch]), plan.blocks[0].extras, SolverOptions()
            )
        )


def test_pruning_half_of_the_decays_costs_less_than_1_percent():
    model, tokens, held_out = zoo_model("mamba", 12, 64)
    dense, pruned, naive = model.module, copy.deepcopy(model.module), copy.deepcopy(model.module)
    every = Selection(overrides=(("*_proj", Unstructured(1e-12)),))
    library.prune(pruned, tokens, pattern="0.5", also=["A_log"], selection=every, method="sm")
    for name, parameter in naive.named_parameters():
        if name.endswith("A_log"):
            smallest = parameter.abs().flatten().topk(parameter.numel() // 2, largest=False).indices
            parameter.data.view(-1)[smallest] = 0
    with model.adapter.running(dense):
        scores = [perplexity(m, held_out) for m in (dense, pruned, naive)]
    assert scores[1] < 1.01 * scores[0] < scores[2]


def test_command_prunes_extras_and_verify_accepts_them(apt, checkpoint):
    result = apt(
        "prune", checkpoint("mamba"), "--sparsity", "0.5", "--also", "A_log", "--also", "conv1d",
        "--samples", 2, "--seqlen", 32, "--output", "out", "--effort", "fast", "--override",
        "*.A_log=0.25",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "mixer.conv1d" in result.out
    report = json.loads(Path("out/apt_report.json").read_text())
    assert report["options"]["also"] == ["A_log", "conv1d"]
    assert {s["pattern"] for s in report["sites"] if s["name"].endswith("A_log")} == {"0.25"}
    checked = apt("verify", "out")
    assert checked.code == 0, checked.out
    assert "18 of 18 sites" in checked.out
    assert apt("prune", "zoo:llama", "--also", "conv1d", "--sparsity", "0.5").code == 2


def test_too_many_removal_sets_of_extras_are_refused():
    config = copy.deepcopy(CONFIGS["mamba"])
    config.state_size = 32
    model = AutoModelForCausalLM.from_config(config)
    every = Selection(overrides=(("*.A_log", NM(8, 32)),))
    with pytest.raises(AptError, match="A_log cannot be pruned to 8:32: a group has more than"):
        library.prune(model, random_tokens(), pattern="2:4", also=["A_log"], selection=every)
