"""Allocations: the total sparsity is exact, and important sites lose fewer weights."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from apt_plugins import level_search, site_losses
from apt_plugins.allocations import MOST
from apt_plugins.spectra import tail_from_middle, tail_from_peak
from hypothesis import given, settings
from hypothesis import strategies as st

import apt as library
from apt.errors import AptError
from apt.patterns import TargetForm
from apt.planning.allocation import Unallocated, with_shares
from apt.planning.plan import Plan, PlannedBlock, PlannedSite, Selection, make_plan
from apt.plugin.registry import registry
from apt.solver import NM, MixedNM, Unstructured, lowest_k
from tests.helpers.families import FAMILIES, adapter_of, random_model, random_tokens, zoo_model

TOKENS = random_tokens(samples=6)


def allocation(name):
    return registry().allocations.get(name).load()


# The neurons of random experts have outliers of their own.
@pytest.mark.parametrize("variant", [name for name in FAMILIES.values() if name != "qwen2-moe"])
def test_owl_keeps_the_total_and_prunes_blocks_with_outliers_less(variant):
    model = random_model(variant)
    adapter = adapter_of(model)
    blocks = adapter.blocks(model)
    with torch.no_grad():  # one weight in forty of block 1 is far larger than the others
        for site in adapter.sites(blocks[1][1]):
            site.weight(blocks[1][1]).view(-1)[::40] *= 30
    report = library.prune(model, TOKENS, pattern="0.6", method="magnitude", allocation="owl")
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert report.options["allocation"] == "owl"
    shares = {name: [] for name, _ in blocks}
    for site in report.sites:
        block = next(name for name in shares if site.name.startswith(f"{name}."))
        shares[block].append(site.zeros / site.size)
    means = [sum(values) / len(values) for values in shares.values()]
    assert means[1] == min(means) < 0.55
    assert max(means) - min(means) <= 0.161


def test_outlier_shares_follow_the_definition_of_the_paper():
    """By hand, for a LLaMA: scores |w|·‖x‖ of a block's Linears, five times their mean."""
    model = random_model("llama")
    adapter, inputs, expected = adapter_of(model), {}, []
    names = [f"{n}.{s.name}" for n, b in adapter.blocks(model) for s in adapter.sites(b)]
    with torch.no_grad():
        for name in names[::3]:
            model.get_submodule(name).weight.view(-1)[::50] *= 9
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, args, n=name: inputs.update({n: args[0].flatten(0, 1)})
            )
        model(TOKENS)
        for block, _ in adapter.blocks(model):
            scores = torch.cat([
                (model.get_submodule(n).weight.abs() * inputs[n].norm(dim=0)).flatten()
                for n in names if n.startswith(f"{block}.")
            ])  # fmt: skip
            expected.append(float((scores > 5 * scores.mean()).float().mean()))
    plan = make_plan(model, adapter, Unstructured(0.5))
    shares = allocation("owl")(Unallocated(model, adapter, plan, TOKENS))
    found = [shares[f"{name}.mlp.up_proj"] for name, _ in adapter.blocks(model)]
    steps = [(a - b) / (max(expected) - min(expected)) * 0.16 for a, b in pairwise(expected)]
    assert [b - a for a, b in pairwise(found)] == pytest.approx(steps, abs=1e-3)


def test_allocation_keeps_nm_and_dense_sites():
    model = random_model("opt")
    selection = Selection(skip=("*.fc1",), overrides=(("*.fc2", NM(2, 4)),))
    report = library.prune(
        model, TOKENS, pattern="0.6", method="magnitude", allocation="owl", selection=selection
    )
    patterns = {site.name: site.pattern for site in report.sites}
    assert {patterns[f"model.decoder.layers.{i}.fc2"] for i in range(3)} == {"2:4"}
    assert not any(name.endswith("fc1") for name in patterns)


def test_allocation_of_nm_is_refused():
    with pytest.raises(AptError, match="cannot be used: n:m"):
        library.prune(random_model("opt"), TOKENS, pattern="2:4", allocation="owl")
    with pytest.raises(AptError, match="did you mean 'owl'"):
        library.prune(random_model("opt"), TOKENS, pattern="0.5", allocation="owll")


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (lambda name: 0.1, r"changes the overall sparsity by \+(10|9\.9)"),
        (lambda name: -0.5, r"gives 0 as the sparsity of model\.layers\.0\.self_attn\.q_proj"),
        (lambda name: None, r"gives no value as the sparsity of .*q_proj"),
    ],
)
def test_invalid_shares_of_an_allocation_are_errors(shift, message):
    model = random_model("llama")
    plan = make_plan(model, adapter_of(model), Unstructured(0.5))
    shares = {s.name: 0.5 + d for s in plan.sites if (d := shift(s.name)) is not None}
    with pytest.raises(AptError, match=message):
        with_shares(plan, "mine", shares)


def test_too_high_sparsity_for_an_allocation_is_an_error_with_a_remedy():
    how = {"pattern": "0.97", "method": "wanda", "allocation": "owl"}
    with pytest.raises(AptError, match=r"owl gives 1\..*; choose another allocation") as error:
        library.prune(random_model("llama"), TOKENS, **how)
    assert error.value.options == ("allocation",)


TAILS = ["alphapruning", "alphapruning-matrix", "alphapruning-mid"]
NAMES = ["owl", *TAILS, "atp", "auto", "auto-block", "auto-search"]


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "magnitude") for name in NAMES), ("owl", "wanda")]
)
def test_allocations_keep_the_total_exact(name, method):
    model = random_model("llama")
    report = library.prune(model, TOKENS, pattern="0.613", method=method, allocation=name)
    zeros = sum(site.zeros for site in report.sites)
    if method == "magnitude":
        assert zeros == sum(Unstructured(0.613).count(s.size) for s in report.sites)
    else:
        wanted = sum(Unstructured(0.613).count(s.size) for s in report.sites)
        assert abs(zeros - wanted) <= min(s.shape[0] for s in report.sites) / 2
    assert len({site.pattern for site in report.sites}) > 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_with_shares_keeps_the_total_exact_for_any_shares(data):
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(5, 40)), min_size=1))
    per = data.draw(st.sampled_from(["row", "layer"]))
    sites = tuple(
        PlannedSite(str(i), None, shape, TargetForm(Unstructured(0.5, per)))
        for i, shape in enumerate(sizes)
    )
    plan = Plan((PlannedBlock("block", sites),))
    shift = data.draw(st.lists(st.floats(-0.3, 0.3), min_size=len(sizes), max_size=len(sizes)))
    mean = sum(x * s.size for x, s in zip(shift, sites, strict=True)) / sum(s.size for s in sites)
    shares = {s.name: 0.5 + (x - mean) / 2 for x, s in zip(shift, sites, strict=True)}
    found = with_shares(plan, "any", shares).sites
    unit = {s.name: s.shape[0] if per == "row" else 1 for s in found}
    zeros = {s.name: unit[s.name] * s.pattern.count(s.size // unit[s.name]) for s in found}
    wanted = sum(s.pattern.count(s.size) for s in sites)
    assert abs(sum(zeros.values()) - wanted) <= (0 if per == "layer" else max(unit.values()))


def with_spectrum(eigenvalues):
    """A square weight whose product with its transpose has these eigenvalues."""
    rotation = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues))).Q
    return rotation * torch.as_tensor(eigenvalues, dtype=torch.float32).sqrt()


@pytest.mark.parametrize("exponent_of", [tail_from_peak, tail_from_middle])
def test_exponent_of_a_tail_equals_that_of_its_distribution(exponent_of):
    """Eigenvalues of a Pareto distribution, of density λ^-α."""
    for exponent in (1.8, 2.5, 4.0):
        places = (torch.arange(500) + 0.5) / 500
        weight = with_spectrum((1 - places) ** (-1 / (exponent - 1)))
        assert exponent_of(weight) == pytest.approx(exponent, rel=0.03)
        assert exponent_of(weight) == pytest.approx(exponent_of(weight.T), rel=1e-3)
    assert exponent_of(torch.eye(8)) == float("inf")
    assert exponent_of(torch.zeros(8, 8)) == float("inf")
    assert exponent_of(torch.ones(8, 1)) == float("inf")


def peak_tail(spectrum):
    """The exponent of the best tail by the definition, and the number of highest bins."""
    values = np.sort(spectrum)
    counts, edges = np.histogram(np.log10(values), 100)
    edge, best = 10 ** edges[counts.argmax()], (np.inf, np.inf)
    for start, least in enumerate(values[:-1]):
        if np.log10(0.95 * edge) <= least <= 1.5 * edge:
            tail = values[start:]
            alpha = 1 + len(tail) / np.log(tail / least).sum()
            expected = 1 - (tail / least) ** (1 - alpha)
            best = min(best, (np.abs(expected - np.arange(len(tail)) / len(tail)).max(), alpha))
    return best[1], int((counts == counts.max()).sum())


def test_tail_from_peak_equals_an_independent_computation():
    """The spectra include ones with several highest bins and with λ above 1."""
    draw, ties = np.random.default_rng(0), []
    for scale in (1e-6, 0.01, 1, 300):
        for count in (40, 200):
            spectrum = scale * np.exp(draw.normal(size=count))
            expected, tied = peak_tail(spectrum)
            ties.append(tied)
            assert tail_from_peak(with_spectrum(spectrum)) == pytest.approx(expected, rel=1e-3)
            upper = np.sort(spectrum)[count // 2 :]
            expected = 1 + len(upper) / np.log(upper / upper[0]).sum()
            assert tail_from_middle(with_spectrum(spectrum)) == pytest.approx(expected, rel=1e-3)
    assert max(ties) > 1


@torch.no_grad()
def test_alphapruning_prunes_blocks_with_heavy_tails_less():
    model = random_model("llama")
    adapter = adapter_of(model)
    blocks = adapter.blocks(model)
    for site in adapter.sites(blocks[1][1]):
        weight = site.weight(blocks[1][1])
        scale = torch.linspace(0, 4, weight.shape[1]).exp()
        weight.copy_(torch.linalg.qr(torch.randn(max(weight.shape), max(weight.shape))).Q[
            : weight.shape[0], : weight.shape[1]] * scale)  # fmt: skip
    plan = make_plan(model, adapter, Unstructured(0.7))
    shares = allocation("alphapruning")(Unallocated(model, adapter, plan, TOKENS))
    values = [
        {round(share, 9) for name, share in shares.items() if name.startswith(f"{block}.")}
        for block, _ in blocks
    ]
    assert all(len(own) == 1 for own in values)
    shared = [own.pop() for own in values]
    assert min(shared) == shared[1]
    assert max(shared) / min(shared) == pytest.approx(1.3 / 0.7, rel=1e-3)
    plan = make_plan(model, adapter, Unstructured(0.9))
    assert (
        max(allocation("alphapruning")(Unallocated(model, adapter, plan, TOKENS)).values()) == MOST
    )


@torch.no_grad()
def test_atp_gives_an_arithmetic_progression():
    model = random_model("opt")
    adapter = adapter_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = make_plan(model, adapter, Unstructured(0.7))
    shares = allocation("atp")(Unallocated(model, adapter, plan, TOKENS))
    steps = [b - a for a, b in pairwise(shares[f"{n}.fc1"] for n, _ in adapter.blocks(model))]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert steps[0] >= 0
    assert steps[0] / 0.002 == pytest.approx(round(steps[0] / 0.002), abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_interrupted_atp_restores_the_model(monkeypatch):
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return lowest_k(*args)

    monkeypatch.setattr("apt_plugins.allocations.lowest_k", interrupted)
    model = random_model("llama")
    with pytest.raises(KeyboardInterrupt):
        library.prune(model, TOKENS, pattern="0.5", allocation="atp")
    dense = random_model("llama").state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["owl", "alphapruning", "atp", "auto", "auto-block"])
@pytest.mark.parametrize("selection", [
    Selection(skip=("model.layers.0.*",)), Selection(only=("model.layers.1.*",)),
])  # fmt: skip
def test_allocations_ignore_blocks_without_unstructured_sites(name, selection, monkeypatch):
    losses = []
    monkeypatch.setattr("apt_plugins.allocations.perplexity", lambda *args: losses.append(1) or 9.0)
    how = {"pattern": "0.6", "method": "wanda", "allocation": name, "selection": selection}
    report = library.prune(random_model("llama"), TOKENS, **how)
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert bool(losses) == (name == "atp" and not selection.only)


def mean_of(shares, plan, block):
    """The sparsity of a block."""
    sites = [site for site in plan.sites if site.name.startswith(f"{block}.")]
    return sum(shares[s.name] * s.size for s in sites) / sum(s.size for s in sites)


@torch.no_grad()
@pytest.mark.parametrize("variant", FAMILIES.values())
def test_auto_prunes_a_block_of_small_effect_most(variant):
    """The output of one block is scaled by 0.03, so that its weights matter less."""
    model = random_model(variant)
    adapter = adapter_of(model)
    blocks = adapter.blocks(model)
    for site in adapter.sites(blocks[1][1]):
        if site.residual:
            site.weight(blocks[1][1]).mul_(0.03)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = make_plan(model, adapter, Unstructured(0.5))
    shares = allocation("auto")(Unallocated(model, adapter, plan, TOKENS))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = [mean_of(shares, plan, name) for name, _ in blocks]
    assert found[1] == max(found) > 0.5
    assert mean_of(shares, plan, blocks[0][0].split(".")[0]) == pytest.approx(0.5, abs=1e-3)
    inner = allocation("auto-block")(Unallocated(model, adapter, plan, TOKENS))
    assert [mean_of(inner, plan, n) for n, _ in blocks] == pytest.approx([0.5] * 3, abs=1e-3)


ONE = ("*.layers.0.*.q_proj",)


@pytest.mark.parametrize(("name", "aware"), [("auto", True), ("auto-block", False)])
@pytest.mark.parametrize(
    ("pattern", "only"),
    [(MixedNM(0.2, m=8), ()), (MixedNM(0.3, m=8), ()), (MixedNM(0.2, m=8), ONE),
     (Unstructured(0.7), ONE)],
    ids=str,
)  # fmt: skip
def test_auto_keeps_the_total_if_the_loss_is_linear(pattern, only, name, aware):
    """Every weight has the same cost, so that one threshold removes many weights at once."""
    model = random_model("opt")
    plan = make_plan(model, adapter_of(model), pattern, Selection(only=only))
    shares = allocation(name)(
        Unallocated(model, adapter_of(model), plan, TOKENS, error_aware=aware)
    )
    sites = [site for site in plan.sites if site.pattern]
    total = sum(shares[site.name] * site.size for site in sites)
    assert total == pytest.approx(pattern.sparsity * sum(site.size for site in sites), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("family", "seqlen"), [("llama", 64), ("mamba", 32)])
def test_auto_search_finds_a_lower_loss_and_restores_the_model(family, seqlen, monkeypatch):
    monkeypatch.setattr(level_search, "GENERATIONS", 8)
    model, tokens, _ = zoo_model(family, 4, seqlen)
    plan = make_plan(model.module, model.adapter, Unstructured(0.7))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    given = Unallocated(model.module, model.adapter, plan, tokens)
    first = allocation("auto")(given)
    monkeypatch.setattr(level_search, "auto", lambda _: first)
    shares = allocation("auto-search")(given)
    assert all(torch.equal(v, before[name]) for name, v in model.module.state_dict().items())
    losses = [fitness(given, found) for found in (first, shares)]
    assert losses[1] < losses[0]
    total = sum((shares[s.name] - 0.7) * s.size for s in plan.sites)
    assert abs(total) < 1e-6 * sum(s.size for s in plan.sites)


@torch.no_grad()
def test_auto_search_is_reproducible(monkeypatch):
    monkeypatch.setattr(level_search, "GENERATIONS", 3)
    model = random_model("llama")
    plan = make_plan(model, adapter_of(model), Unstructured(0.7))
    given = Unallocated(model, adapter_of(model), plan, TOKENS)
    first, again = (allocation("auto-search")(given) for _ in range(2))
    assert first == again != allocation("auto")(given)


def fitness(given, shares):
    """The loss of the search, for other sparsities."""
    groups = level_search._groups(given)
    with level_search._pruned(given, groups) as apply:
        apply([shares[group.sites[0].name] for group in groups])
        count = level_search.MORE // given.tokens.shape[1]
        return library.perplexity(given.model, given.tokens[:count])


@torch.no_grad()
def test_auto_has_a_lower_loss_than_uniform():
    losses = {}
    for name in ("uniform", "auto"):
        model = random_model("llama")
        block = adapter_of(model).blocks(model)[2][1]
        for site in adapter_of(model).sites(block):
            if site.residual:
                site.weight(block).mul_(0.1)
        dense = model(TOKENS).logits
        library.prune(model, TOKENS, pattern="0.6", method="ss", allocation=name)
        losses[name] = float((model(TOKENS).logits - dense).square().mean())
    assert losses["auto"] < 0.9 * losses["uniform"]


@torch.no_grad()
def test_error_aware_auto_prunes_early_blocks_more():
    model = random_model("llama")
    adapter = adapter_of(model)
    plan = make_plan(model, adapter, Unstructured(0.5))
    first, last = (adapter.blocks(model)[place][0] for place in (0, -1))
    gaps = []
    for aware in (False, True):
        given = Unallocated(model, adapter, plan, TOKENS, error_aware=aware)
        shares = allocation("auto")(given)
        spread = max(shares.values()) - min(shares.values())
        gaps.append((mean_of(shares, plan, first) - mean_of(shares, plan, last)) / spread)
    assert gaps[1] > gaps[0]


def test_plain_losses_of_a_large_site_use_evenly_spaced_scores():
    """The columns differ, so that every column must be among them."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(1000, 768, generator=draw) * torch.rand(768, generator=draw).pow(4)
    levels = torch.linspace(0, 1, 33, dtype=torch.float64)
    losses = site_losses._plain_losses([scores], Unstructured(0.5), levels)
    ordered = scores.flatten().double().sort().values
    exact = [float(ordered[: int(level * len(ordered))].sum()) for level in levels]
    assert len(site_losses._spaced(scores, 5)) == -(-scores.numel() // 5)
    assert len(site_losses._spaced(scores, 6)) == -(-scores.numel() // 7)
    torch.testing.assert_close(losses[1:], torch.tensor(exact[1:]).double(), rtol=0.02, atol=0)
