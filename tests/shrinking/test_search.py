"""Sizes, the search for a smaller model, and its baselines."""

import json
import math
import time
from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

import apt as library
from apt.calibration.batches import enter
from apt.checkpoints.load import open_skeleton
from apt.errors import AptError
from apt.files.journal import Journal
from apt.locations.model_source import find
from apt.options import ShrinkOptions
from apt.plugin.registry import registry
from apt.shrinking import latency
from apt.shrinking.gap_fits import GapFits
from apt.shrinking.proxy import Proxy
from apt.shrinking.search import Candidate, Scored, Search, SearchOptions, pareto_front
from apt.shrinking.sizes import TOLERANCE, Size, Sizes
from apt.shrinking.skipping import loss_without
from apt.shrinking.wanted_sizes import wanted_sizes
from apt.solver import ColumnGroups, Gram, SolverOptions
from tests.helpers.families import FAMILIES, adapter_of, random_model, random_tokens
from tests.helpers.releases import since

TOKENS = random_tokens(4, 24)
DAMPED = SolverOptions(damping=0.01)


@cache
def sizes_of(variant, multiple=8, seconds=None):
    model = random_model(variant)
    return Sizes(model, adapter_of(model), model.config, multiple, seconds)


@pytest.mark.parametrize("variant", ["llama-grouped-tied", "opt", "mamba"])
@settings(deadline=None, max_examples=15)
@given(keep=st.floats(0.3, 0.95))
def test_nearest_sizes_are_sorted_by_distance(variant, keep):
    sizes = sizes_of(variant, 1)
    result = sizes.nearest_sizes(keep, range(1, sizes.blocks + 1), width=True)
    assert [abs(s.cost - keep) for s in result] == pytest.approx(
        sorted(abs(s.cost - keep) for s in result), abs=1e-6
    )
    for size in result[:3]:
        assert sizes.size(size.kept, size.blocks).share == pytest.approx(size.share)
    costs = [size.cost for size in sizes.smaller_sizes(range(1, sizes.blocks + 1), width=True)]
    assert costs == sorted(costs)
    assert costs[0] <= result[0].cost <= costs[-1] < 1


def test_cost_of_a_latency_budget_is_time():
    times = {(): 4.0, (("channels", 32),): 3.0}

    def seconds(kept):
        return times.get(tuple(kept.items()), 4.0)

    sizes = sizes_of("opt", 32, seconds)
    result = sizes.nearest_sizes(0.75, [sizes.blocks], width=True)
    assert [dict(size.kept) for size in result] == [{"channels": 32}]
    assert result[0].cost == 0.75
    assert result[0].share != 0.75


def test_latencies_of_kinds_add_up_and_keep_the_random_state(monkeypatch):
    """The saved times of groups of two kinds add up."""
    made = []

    def timed(small, adapter, seqlen, device):
        made.append((small.config.num_attention_heads, small.config.intermediate_size))
        return 1.0 + made[-1][0] + made[-1][1] / 8

    monkeypatch.setattr(latency, "_seconds", timed)
    model, state = random_model("llama"), torch.get_rng_state()
    adapter = registry().adapters.get("llama").load()()
    seconds = latency.block_times(model, adapter, model.config, "cpu", 16)
    Sizes(model, adapter, model.config, 8, seconds).nearest_sizes(0.5, [1, 2, 3], width=True)
    heads = (1, 2) if since("transformers", "5") else (1, 2, 3)  # those that it can express
    assert sorted(made) == [(n, 64) for n in heads] + [(4, n) for n in range(1, 65)]
    assert seconds({"heads": 2, "channels": 16}) == 1 + 2 + 16 / 8
    monkeypatch.undo()
    assert latency.block_times(model, adapter, model.config, "cpu", 16)({"heads": 2}) > 0
    assert torch.equal(torch.get_rng_state(), state)


def llama_sizes(**fields):
    """The sizes of a LLaMA without values, as a function of the multiple."""
    config = LlamaConfig(vocab_size=64, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapter = registry().adapters.get("llama").load()()
    return lambda multiple: Sizes(model, adapter, config, multiple)


def test_smaller_multiple_is_used_only_if_needed():
    skeleton, messages = open_skeleton(find("zoo:opt", registry()), registry()), []

    def sizes(multiple):
        return Sizes(skeleton.module, skeleton.adapter, skeleton.config, multiple)

    wish = ShrinkOptions(keep=0.8)
    mode, result = wanted_sizes(sizes, wish, messages.append)
    assert mode == "width"
    assert abs(result[0].cost - 0.8) <= TOLERANCE
    assert "multiple of channels: 8, since no multiple of 64 comes near" in messages
    assert "mode: width (default)" in messages
    assert result[0].kept["channels"] % 8 == 0
    wanted_sizes(sizes, replace(wish, multiple_of=128, mode="width"), messages.append)
    assert messages[-1].startswith("keep: ")
    with pytest.raises(AptError, match="no model keeps 90.00%"):
        wanted_sizes(sizes, ShrinkOptions(keep=0.9, mode="depth"), messages.append)


@pytest.mark.parametrize(
    ("layers", "wish", "chooses", "mode", "blocks"),
    [
        (30, {"keep": 0.9}, None, "depth", 27),
        (30, {"keep": 0.75}, None, "blocks-first", 23),
        (30, {"keep": 0.75, "mode": "depth"}, None, "depth", 23),
        (12, {"keep": 0.815}, None, "blocks-first", 10),
        (30, {"keep": 0.98}, None, "width", 30),  # 29 blocks are .967
        (4, {"keep": 0.75}, None, "width", 4),  # not deep
        (4, {"keep": 0.7, "mode": "blocks-first"}, None, "blocks-first", 3),
        (4, {"keep": 0.05}, None, "blocks-first", 1),  # one head and 8 channels are .086
        (30, {"keep": 0.75}, "groups", "width", 30),
        (4, {"keep": 0.75}, "blocks", "depth", 3),
        (4, {"keep": 0.7}, "blocks", "blocks-first", 3),
    ],
)
def test_default_mode_depends_on_depth_share_and_method(layers, wish, chooses, mode, blocks):
    sizes = llama_sizes(hidden_size=64, intermediate_size=256, num_hidden_layers=layers,
                        num_attention_heads=4)  # fmt: skip
    wish = ShrinkOptions(multiple_of=8, **wish)
    result, near = wanted_sizes(sizes, wish, lambda line: None, chooses)
    assert result == mode
    assert {size.blocks for size in near} == {blocks}
    whole = {"width": False, "blocks-first": False, "depth": True}[mode]
    assert {not size.kept for size in near} == {whole}
    if mode == "blocks-first":
        assert all(abs(size.cost - wish.keep) <= TOLERANCE for size in near)


def test_sizes_of_smollm2_meet_the_share():
    """SmolLM2-135M: 22.5 blocks of 30 are three quarters."""
    sizes, messages = (
        llama_sizes(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                    num_attention_heads=9, num_key_value_heads=3),
        [],
    )  # fmt: skip
    mode, result = wanted_sizes(sizes, ShrinkOptions(keep=0.75), messages.append)
    assert mode == "blocks-first"
    kept = [(size.blocks, dict(size.kept), round(size.share, 4)) for size in result]
    assert kept == [(24, {"channels": 1408}, 0.75)]  # and not 6 heads, whose share is the same
    mode, result = wanted_sizes(sizes, ShrinkOptions(keep=0.75, mode="depth"), messages.append)
    assert [(size.blocks, dict(size.kept)) for size in result] == [(23, {})]
    assert messages[-1] == "keep: 76.67%, the nearest to 75.00%: 23 blocks"


def a_size(blocks, kept=()):
    return Size(dict(kept), blocks, blocks / 10, blocks / 10)


SIZES = [a_size(8), a_size(7, {"channels": 60}.items()), a_size(7, {"heads": 4}.items())]


def bowl(candidate):
    """A loss with its minimum at 7 blocks and 4 heads, without blocks 2 and 5."""
    missing = len({2, 5} - candidate.dropped)
    return 1 + missing + len(candidate.dropped - {2, 5, 9}) + (candidate.size.kept != {"heads": 4})


def test_search_finds_the_best_candidate_despite_the_ranking():
    best = min(
        bowl(Candidate(size, frozenset(dropped)))
        for size in SIZES
        for dropped in combinations(range(10), 10 - size.blocks)
    )
    search = Search(SIZES, range(10), bowl, SearchOptions(evaluations=150), seed=1)
    result = search.run()
    assert bowl(result[0].candidate) == best == 1
    assert [scored.loss for scored in result] == sorted(scored.loss for scored in result)
    keys = [scored.candidate.key for scored in result]
    assert len(set(keys)) == len(keys) <= 150
    for scored in result:
        assert len(scored.candidate.dropped) == 10 - scored.candidate.size.blocks
    first = [Candidate(size, frozenset(range(10 - size.blocks))).key for size in SIZES]
    assert set(first) <= set(keys)


def test_killed_search_resumes_with_the_same_result(tmp_path):
    path, options = tmp_path / "losses.jsonl", SearchOptions(evaluations=40)
    whole = Search(SIZES, range(10), bowl, options, seed=3).run()

    def killed_after(count):
        def loss(candidate):
            calls.append(candidate)
            if len(calls) > count:
                raise KeyboardInterrupt
            return bowl(candidate)

        calls = []
        return loss

    def recalling(loss):
        journal = Journal(path)
        journal.read()
        if not journal.serves({}):
            journal.begin({})
        return lambda candidate: journal.remember(candidate.key, lambda: loss(candidate))

    with pytest.raises(KeyboardInterrupt):
        Search(SIZES, range(10), recalling(killed_after(17)), options, 3).run()
    with path.open("a") as file:
        file.write('{"candidate": "torn')
    computed = []
    counted = recalling(lambda c: computed.append(c) or bowl(c))
    again = Search(SIZES, range(10), counted, options, 3).run()
    assert again == whole
    assert len(computed) == len(whole) - 17


def test_given_candidates_are_evaluated_first():
    first, seen = [Candidate(SIZES[0], frozenset(range(10 - SIZES[0].blocks, 0, -1)))], []
    options = SearchOptions(evaluations=5)
    Search(SIZES, range(10), lambda c: seen.append(c) or bowl(c), options, first=first).run()
    assert seen[: len(first)] == first


def test_exhausted_time_budget_allows_one_candidate():
    options = SearchOptions(evaluations=100, minutes=1e-9)
    assert len(Search(SIZES, range(10), bowl, options).run()) == 1


def test_time_budget_includes_the_time_before_the_search():
    options = SearchOptions(evaluations=100, minutes=1)
    late = Search(SIZES, range(10), bowl, options, started=time.monotonic() - 61)
    assert len(late.run()) == 1


def test_time_budget_includes_the_ranking_of_blocks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def slow(proxy, kept, dropped, tokens):
        now[0] += 30
        return 1.0

    monkeypatch.setattr(Proxy, "loss", slow)
    size = ShrinkOptions(mode="search", multiple_of=8, minutes=1)
    how = library.PruneOptions(effort="fast")
    _, report = library.shrink(random_model("llama"), TOKENS, size=size, options=how)
    assert len(report.structure["candidates"]) == 1


def test_search_reaches_the_last_block_of_the_ranking():
    """One of 24 blocks is dropped; the best one is the last block of the ranking."""
    for seed in range(6):
        search = Search([a_size(23)], range(24), lambda c: -sum(c.dropped), seed=seed)
        assert search.run()[0].candidate.dropped == {23}


@torch.no_grad()
def test_nan_loss_counts_as_infinite():
    model = random_model("llama")
    adapter = adapter_of(model)
    model.lm_head.weight.fill_(torch.nan)
    assert loss_without(model, adapter, TOKENS) == math.inf


def test_search_without_sizes_is_refused():
    with pytest.raises(AptError, match="no size meets the budget"):
        Search([], range(10), bowl).run()


def test_pareto_front_has_no_dominated_candidate():
    scored = [
        Scored(Candidate(Size({}, n, cost, cost), frozenset()), loss)
        for n, (cost, loss) in enumerate([(0.5, 3), (0.6, 2), (0.55, 4), (0.7, 2), (0.8, 1)])
    ]
    front = pareto_front(scored, lambda candidate: candidate.size.cost)
    assert [s.loss for s in front] == [3, 2, 1]


@torch.no_grad()
def test_proxy_restores_the_weights():
    model = random_model("llama-grouped-tied")
    adapter = adapter_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    proxy = Proxy(model, adapter, TOKENS, DAMPED, ("channels", "heads"))
    dense = loss_without(model, adapter, TOKENS)
    names = [name for name, _ in adapter.blocks(model)]
    assert proxy.loss({}, [], TOKENS) == dense
    narrow = proxy.loss({"channels": 40, "heads": 2}, [], TOKENS)
    assert narrow != dense
    assert proxy.loss({"channels": 40, "heads": 2}, names[:1], TOKENS) != narrow
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_gap_fit_is_the_weighted_least_squares_solution():
    """The weight of the writer is fitted to the sum that the dropped blocks add to the stream."""
    model = random_model("llama")
    adapter, tokens = adapter_of(model), random_tokens(40, 24)
    blocks = [block for _, block in adapter.blocks(model)]
    batches = enter(adapter, model, tokens)
    fits = GapFits(adapter, blocks, batches, SolverOptions(damping=1e-8))
    inputs, streams = [], [torch.cat([batch.state for batch in batches])]
    blocks[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for index, block in enumerate(blocks):
        fits.record()
        for batch in batches:
            batch.state = adapter.step(block, batch.state, batch.calls[index])
        streams.append(torch.cat([batch.state for batch in batches]))
    fits.record()
    assert fits.writer(0).name == "mlp.down_proj"
    weigh = streams[0].flatten(0, 1).square().mean(1, keepdim=True).rsqrt()
    assert float(weigh.max() / weigh.median()) < 4  # no token's weight is bounded
    rows, added = torch.cat(inputs).flatten(0, 1), (streams[-1] - streams[1]).flatten(0, 1)
    best = torch.linalg.lstsq((rows * weigh).double(), (added * weigh).double()).solution
    change = fits.change(0, len(blocks)).double()
    assert torch.allclose(change, best.T, rtol=1e-3, atol=1e-3 * float(best.abs().max()))

    plain, fitted = (
        Proxy(model, adapter, tokens, DAMPED, ("channels",), fit_gaps=fit) for fit in (False, True)
    )
    behind = [name for name, _ in adapter.blocks(model)][1:]
    assert fitted.loss({}, (), tokens) == plain.loss({}, (), tokens)
    assert fitted.loss({}, behind, tokens) != plain.loss({}, behind, tokens)
    assert fitted.loss({"channels": 40}, behind, tokens) != fitted.loss({}, behind, tokens)


def layer(seed=0):
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 12, generator=draw) * torch.linspace(0.5, 2, 12)
    return torch.randn(5, 12, generator=draw), inputs


def chosen(name, weight, inputs, kept=4):
    method = registry().shrink_methods.get(name).load()
    return (
        method(weight, Gram.of(inputs), ColumnGroups(6, kept), DAMPED).nonzero().flatten().tolist()
    )


def test_scores_of_columns_equal_their_definitions():
    weight, inputs = layer()
    squares = weight.square().sum(0).view(6, 2).sum(1)
    assert sorted(squares.argsort()[:2].tolist()) == chosen("group-magnitude", weight, inputs)
    energy = (weight.square() * inputs.square().mean(0)).sum(0).view(6, 2).sum(1)
    assert sorted(energy.argsort()[:2].tolist()) == chosen("group-wanda", weight, inputs)


def test_llm_pruner_scores_equal_the_formulas_of_its_paper():
    """The reference uses the gradients of one backward pass for each sample."""
    model = random_model("llama")
    adapter = adapter_of(model)
    name, block = adapter.blocks(model)[1]
    weights = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight]
    gradients = [
        torch.autograd.grad(model(sample, labels=sample).loss, weights)
        for sample in TOKENS[:10].split(1)
    ]
    expected = dict.fromkeys(("", "-vector", "-second", "-mix"), 0)
    for weight, *own in zip(weights, *gradients, strict=True):
        first = weight.detach() * torch.stack(own).mean(0)
        second = weight.detach() ** 2 * torch.stack(own).square().mean(0)
        across = 0 if weight is weights[2] else 1
        expected[""] += first.abs().sum(across)
        expected["-vector"] += first.sum(across).abs()
        expected["-second"] += second.sum(across)
        expected["-mix"] += (first - second / 2).abs().sum(across)
    for variant, scores in expected.items():
        choice = registry().shrink_methods.get(f"llm-pruner{variant}").load()
        result = choice(model, adapter, TOKENS)[name]["channels"]
        assert torch.allclose(result, scores, rtol=1e-4, atol=1e-8), variant
    assert len({tuple(scores.argsort().tolist()) for scores in expected.values()}) >= 3
    assert all(p.requires_grad for p in model.parameters())


def test_llm_pruner_ignores_unused_parameters():
    """An expert without tokens has such parameters."""
    model = random_model("llama")
    adapter = adapter_of(model)
    score = registry().shrink_methods.get("llm-pruner-mix").load()
    expected = score(model, adapter, TOKENS)
    name, block = adapter.blocks(model)[0]
    block.idle = torch.nn.Parameter(torch.ones(2))
    assert torch.equal(score(model, adapter, TOKENS)[name]["channels"], expected[name]["channels"])


@pytest.mark.parametrize("variant", FAMILIES.values())
def test_llm_pruner_scores_the_groups_of_every_family(variant):
    """The magnitude of a sum is at most the sum of the magnitudes."""
    model = random_model(variant)
    adapter = adapter_of(model)
    elements, vectors = (
        registry().shrink_methods.get(name).load()(model, adapter, TOKENS)
        for name in ("llm-pruner", "llm-pruner-vector")
    )
    for name, block in adapter.blocks(model):
        for groups in adapter.groups(block, model.config):
            for each in groups.readers if groups.apart else [groups.kind]:
                one, other = elements[name][each], vectors[name][each]
                assert one.shape == other.shape == (groups.count,)
                assert other.any() or groups.apart  # an expert may have no token
                assert (other <= one * (1 + 1e-5)).all()


@torch.no_grad()
def test_flap_scores_a_constant_input_as_zero():
    model = random_model("opt")
    adapter = adapter_of(model)
    _, block = adapter.blocks(model)[0]
    block.fc1.weight[3], block.fc1.bias[3] = 0, 2.0
    scores = registry().shrink_methods.get("flap").load()(model, adapter, TOKENS)
    first = scores[adapter.blocks(model)[0][0]]["channels"]
    assert float(first[3]) == pytest.approx(0, abs=1e-6)
    assert int(first.argmin()) in (3, *(first == first.min()).nonzero().flatten().tolist())
    assert math.isfinite(float(first.sum()))


def test_search_command_reports_and_plots_candidates(apt, checkpoint, tmp_path):
    text = ("--samples", 4, "--seqlen", 32)
    result = apt("shrink", checkpoint("llama"), "--search", "--evaluations", 6, *text,
                 "--plot", "search.png", "--effort", "fast", "-o", "out")  # fmt: skip
    assert result.code == 0, result.err
    assert "dropped blocks" in result.out
    report = json.loads((tmp_path / "out/apt_report.json").read_text())
    candidates = report["structure"]["candidates"]
    assert 1 <= len(candidates) <= 6
    assert min(c["loss"] for c in candidates) == candidates[0]["loss"]
    assert any(c["front"] for c in candidates)
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plot", "x.png"), "plot draws the candidates of a search"),
        (("--search", "--plot", "x.gif"), "is not a .png, .svg or .pdf file"),
        (("--search", "--plot", "none/x.png"), "its folder does not exist"),
    ],
)
def test_invalid_plot_options_are_refused(arguments, message, apt):
    result = apt("shrink", "--adapter", "llama", *arguments, "-o", "out")
    assert result.code == 2
    assert message in result.err
