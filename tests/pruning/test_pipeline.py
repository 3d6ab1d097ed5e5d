"""The loop over blocks: pruned sites, unchanged parameters, and inputs of the next block."""

import copy
import weakref
from statistics import median

import pytest
import torch

import apt as library
from apt.errors import AptError
from apt.events import BlockStarted, BlockTuned, SitePruned, Working
from apt.planning.plan import Selection, make_plan, tell_shared
from apt.planning.structure import Structure, make_structured_plan
from apt.plugin.registry import registry
from apt.pruning.current_block import CurrentBlock
from apt.pruning.layer import Recipe
from apt.solver import NM, DampedGram, Gram, Solution, SolverOptions, Unstructured, meets, sm, ss
from tests.helpers.families import CONFIGS, FAMILIES, adapter_of, random_model, random_tokens
from tests.helpers.pruning import prune_blocks

METHODS = list(registry().methods.specs)
TOKENS = random_tokens(samples=6)
LAYER_WISE = library.PruneOptions(error_aware=False)


def site_parameters(model, adapter):
    return {
        f"{name}.{site.parameter}"
        for name, block in adapter.blocks(model)
        for site in adapter.sites(block)
    }


# A sparsity is for a model of each family: the others have the same kinds of weights.
@pytest.mark.parametrize(
    ("variant", "pattern"),
    [*((name, "2:4") for name in CONFIGS), *((name, "0.5") for name in FAMILIES.values())],
)
def test_only_sites_change_and_all_meet_the_pattern(variant, pattern):
    model = random_model(variant)
    before = copy.deepcopy(model.state_dict())
    report = library.prune(model, TOKENS, pattern=pattern, allocation="uniform")
    adapter = adapter_of(model)
    sites = site_parameters(model, adapter)
    assert len(report.sites) == sum(len(adapter.sites(b)) for _, b in adapter.blocks(model))
    for name, value in model.state_dict().items():
        if name in sites:  # experts are stacked
            assert meets(value.flatten(0, -2), NM(2, 4) if pattern == "2:4" else Unstructured(0.5))
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name
    assert report.sparsity == pytest.approx(0.5)
    errors = [site.relative_error for site in report.sites]
    assert min(errors) > 0  # one site's output may be next to nothing beside the stream it mends
    assert median(errors) < 0.3


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("llama-grouped-tied", torch.bfloat16), ("qwen2-moe", torch.float16)],
    ids=str,
)
def test_zeros_survive_the_cast_to_the_stored_dtype(variant, dtype):
    model = random_model(variant, dtype)
    report = library.prune(model, TOKENS, pattern="2:4")
    assert all(site.zeros >= site.size // 2 for site in report.sites)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("method", "pattern"), [*((m, "0.7") for m in METHODS), ("admm", "1:4"), ("admm", "3:4")]
)
def test_every_method_meets_every_pattern(method, pattern):
    model = random_model("llama")
    report = library.prune(model, TOKENS, pattern=pattern, method=method.upper())
    expected = {"1:4": 0.75, "3:4": 0.25, "0.7": 0.7}[pattern]
    # Where rows are counted one by one, 0.7 of 32 inputs is 22.4: one weight in a row is .03.
    per = registry().methods.get(method).per
    assert report.sparsity == pytest.approx(expected, abs=0.02 if per == "row" else 1e-3)
    for name, parameter in model.named_parameters():
        assert not parameter[parameter == 0].signbit().any(), name  # no negative zeros


def test_next_block_is_solved_on_outputs_of_the_pruned_block():
    model, tokens = random_model("llama"), random_tokens()
    adapter, seen, samples = adapter_of(model), [], []

    def spy(weight, gram, pattern, options):
        seen.append(gram.matrix.clone())
        samples.append((gram.sample, gram.variance))
        return ss(weight, gram, pattern, options)

    plan = make_plan(model, adapter, NM(2, 4), Selection(only=("*q_proj",)))
    prune_blocks(model, adapter, plan, tokens, spy)
    inputs = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    model(tokens)
    handle.remove()
    torch.testing.assert_close(seen[1], Gram.of(inputs[0]).matrix)
    length, variance = samples[1]
    assert length == tokens.shape[1]
    torch.testing.assert_close(variance, inputs[0].var(1, unbiased=False).mean(0))


def test_ordered_sites_are_solved_on_outputs_of_pruned_sites():
    tokens, result = random_tokens(), {}
    for ordered in (False, True):
        model = random_model("opt")
        adapter = adapter_of(model)
        model.model.decoder.layers = model.model.decoder.layers[:1]
        plan = make_plan(model, adapter, NM(2, 4))

        def spy(weight, gram, pattern, options, ordered=ordered):
            result.setdefault(ordered, []).append(gram.matrix.clone())
            return ss(weight, gram, pattern, options)

        prune_blocks(model, adapter, plan, tokens, spy, Recipe(ordered=ordered))
        inputs = []
        fc2 = model.model.decoder.layers[0].fc2
        handle = fc2.register_forward_pre_hook(
            lambda m, args, inputs=inputs: inputs.append(args[0])
        )
        model(tokens)
        handle.remove()
        same = torch.allclose(result[ordered][-1], Gram.of(inputs[0]).matrix, rtol=1e-4)
        assert same == ordered
    assert torch.equal(result[False][0], result[True][0])


def test_overrides_and_skip_set_the_pattern_of_sites():
    model = random_model("llama")
    selection = Selection(
        skip=("model.layers.0.*",),
        overrides=(("*.down_proj", Unstructured(0.25)), ("*.2.*.q_proj", NM(1, 4))),
    )
    report = library.prune(model, TOKENS, pattern="2:4", selection=selection)
    shares = {site.name: site.zeros / site.size for site in report.sites}
    assert len(report.skipped) == 7
    assert not any(name.startswith("model.layers.0.") for name in shares)
    assert shares["model.layers.1.mlp.down_proj"] == 0.25
    assert shares["model.layers.2.self_attn.q_proj"] == 0.75
    assert shares["model.layers.1.self_attn.q_proj"] == 0.5


def test_events_name_every_block_and_site():
    events = []
    library.prune(random_model("bloom"), TOKENS, pattern="2:4", observe=events.append)
    blocks = [event for event in events if isinstance(event, BlockStarted)]
    sites = [event for event in events if isinstance(event, SitePruned)]
    assert [(b.index, b.blocks) for b in blocks] == [(0, 3), (1, 3), (2, 3)]
    assert len(sites) == 12
    tokens = (6 + 2) * TOKENS.shape[1]  # two copies with tokens replaced beside the six
    assert all(site.tokens == tokens and site.damping == 0.05 for site in sites)


@pytest.mark.parametrize(
    ("aware", "given", "damping"), [(True, None, 0.05), (False, None, 0.01), (True, 0.02, 0.02)]
)
def test_default_damping_depends_on_error_aware(aware, given, damping):
    options = library.PruneOptions(error_aware=aware, damping=given)
    report = library.prune(random_model("opt"), TOKENS, pattern="2:4", options=options)
    assert {site.damping for site in report.sites} == {damping} == {report.options["damping"]}


def test_reported_layer_error_equals_the_measured_error():
    model = random_model("opt")
    dense = copy.deepcopy(model)
    selection = Selection(only=("model.decoder.layers.0.fc1",))
    how = {"pattern": "2:4", "selection": selection, "options": LAYER_WISE}
    report = library.prune(model, TOKENS, **how)
    inputs = []
    layer = dense.model.decoder.layers[0].fc1
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    with torch.no_grad():
        dense(TOKENS)
    pruned = model.model.decoder.layers[0].fc1
    whole = inputs[0] @ layer.weight.double().T
    lost = whole - inputs[0] @ pruned.weight.double().T
    expected = float((lost.square().sum() / whole.square().sum()).detach())
    assert report.relative_layer_error == pytest.approx(expected, rel=1e-4)


def test_equal_inputs_give_equal_bytes():
    results = [random_model("mamba") for _ in range(2)]
    for model in results:
        library.prune(model, TOKENS, pattern="0.6")
    first, second = (model.state_dict() for model in results)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_modes_of_modules_are_restored():
    model = random_model("opt").train()
    model.model.decoder.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    library.prune(model, TOKENS, pattern="2:4", method="magnitude")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert set(modes.values()) == {True, False}


def test_error_names_a_method_that_misses_the_pattern():
    model = random_model("llama")

    def lazy(weight, gram, pattern, options):
        return Solution(weight, torch.zeros_like(weight, dtype=torch.bool))

    plan = make_plan(model, adapter_of(model), NM(2, 4))
    with pytest.raises(AptError, match=r"method lazy removes fewer weights of .* than .* 2:4"):
        prune_blocks(model, adapter_of(model), plan, TOKENS, lazy)


def test_site_with_only_dead_inputs_is_named_in_the_error():
    model = random_model("opt")
    torch.nn.init.zeros_(model.model.decoder.layers[1].fc1.weight)
    torch.nn.init.constant_(model.model.decoder.layers[1].fc1.bias, -1)
    with pytest.raises(AptError, match=r"layers\.1\.fc2 cannot be pruned: .* zero") as error:
        library.prune(model, TOKENS, pattern="2:4", selection=Selection(only=("*.1.fc2",)))
    assert error.value.hint == "skip 'model.decoder.layers.1.fc2'"
    assert error.value.options == ("skip",)


def test_error_names_the_block_of_activations_that_are_not_finite():
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
    with pytest.raises(AptError, match="layers.0.*not finite"):
        library.prune(model, TOKENS, pattern="2:4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "4:2"}, "4:2"),
        ({"pattern": "1.5"}, "outside"),
        ({"pattern": "3:5"}, "not a multiple of 5"),
        ({"pattern": "2:4", "method": "wandaa"}, "did you mean 'wanda'"),
        ({"pattern": "2:4", "adapter": "lama"}, "did you mean 'llama'"),
        ({"pattern": "2:4", "adapter": "mamba"}, "does not fit"),
        ({"pattern": "2:4", "selection": Selection(only=("*.nothing",))}, "matches no site"),
        ({"pattern": "2:4", "selection": Selection(skip=("*",))}, "no site is left"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_options_are_refused_before_any_weight_changes(options, message):
    model = random_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AptError, match=message):
        library.prune(model, TOKENS, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 2, 2)], ids=str)
def test_tokens_of_another_shape_are_refused_by_prune(shape):
    with pytest.raises(AptError, match="give .samples, seqlen"):
        library.prune(random_model("opt"), torch.ones(shape, dtype=torch.long), pattern="2:4")


def test_sm_has_lower_errors_than_ss_in_the_first_block():
    errors = {}
    for method in (ss, sm):
        model = random_model("llama")
        plan = make_plan(model, adapter_of(model), NM(2, 4), Selection(only=("model.layers.0.*",)))
        sites = prune_blocks(
            model, adapter_of(model), plan, TOKENS, method, Recipe(SolverOptions(damping=1e-4))
        )
        errors[method] = [site.relative_error for site in sites]
    assert all(m < s for m, s in zip(errors[sm], errors[ss], strict=True))


def test_weight_shared_by_two_blocks_stays_dense():
    model, messages = random_model("llama"), []
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    names = tuple(f"model.layers.{index}.mlp.up_proj" for index in (0, 2))
    one = Selection(skip=("model.layers.0.*",)), Selection(only=("model.layers.0.*",))
    for selection in (None, *one):  # where one of the two is not selected, neither is pruned
        plan = make_plan(model, adapter_of(model), NM(2, 4), selection)
        assert plan.shared == names
        assert set(names) <= set(plan.dense)
    tell_shared(plan, messages.append)
    assert messages == [f"left dense: 2 sites, whose weights several blocks use ({names[0]}, …)"]
    before = layers[0].mlp.up_proj.weight.clone()
    report = library.prune(model, TOKENS, pattern="2:4")
    assert torch.equal(layers[0].mlp.up_proj.weight, before)
    assert not {site.name for site in report.sites} & set(names)
    assert len(report.sites) == 3 * 7 - 2
    with pytest.raises(AptError, match=r"several blocks use the weight of \S+0\.mlp"):
        make_plan(model, adapter_of(model), NM(2, 4), Selection(only=("*.0.mlp.up_proj",)))


def test_columns_of_a_shared_weight_are_not_removed():
    model, adapter = random_model("llama"), adapter_of(random_model("llama"))
    layers = model.model.layers
    layers[2].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    with pytest.raises(AptError, match=r"0\.mlp\.down_proj cannot become smaller: several blocks"):
        make_structured_plan(model, adapter, model.config, Structure({"channels": 32}))
    plan = make_structured_plan(model, adapter, model.config, Structure(dropped={"model.layers.1"}))
    assert {entry.name for entry in plan.sites if entry.pattern is None} == set(plan.shared)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_token_with_a_zero_stream_is_tolerated(pattern):
    """Padding has such a token in models without biases; errors are relative to its size."""
    model, tokens, events = random_model("llama"), random_tokens(samples=32), []
    model.model.embed_tokens.weight.data[5] = 0
    tokens[3, 0] = 5
    library.prune(model, tokens, pattern=pattern, allocation="uniform", observe=events.append)
    assert all(value.isfinite().all() for value in model.parameters())
    tuned = [event for event in events if isinstance(event, BlockTuned)]
    assert len(tuned) == 3
    assert all(event.after < event.before for event in tuned)


def test_solution_that_is_not_finite_is_not_written():
    model = random_model("llama")
    dense = copy.deepcopy(model.state_dict())

    def overflowing(weight, gram, pattern, options):
        result = ss(weight, gram, pattern, options)
        return Solution(result.weight / 0, result.mask)

    plan = make_plan(model, adapter_of(model), NM(2, 4))
    with pytest.raises(AptError, match="method overflowing .*q_proj that is not finite"):
        prune_blocks(model, adapter_of(model), plan, TOKENS, overflowing)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("ordered", [True, False])
def test_factors_are_freed_after_their_sites_are_solved(ordered, monkeypatch):
    made, alive = [], []
    original = DampedGram.__init__

    def watched(self, *args):
        original(self, *args)
        made.append(weakref.ref(self))

    def observe(event):
        if isinstance(event, Working) and event.doing == "solving":
            alive.append(sum(damped() is not None for damped in made))

    monkeypatch.setattr(DampedGram, "__init__", watched)
    options = library.PruneOptions(ordered=ordered)
    library.prune(random_model("llama"), TOKENS, pattern="2:4", options=options, observe=observe)
    assert alive == [1] * 3 * 7


@pytest.mark.parametrize("aware", [True, False])
def test_copies_of_dense_weights_are_freed_with_the_block(aware, monkeypatch):
    """A layer-wise run makes no copies: only the drift of the stream needs dense weights."""
    copies, alive = [], []

    class Watched(CurrentBlock):
        def __post_init__(self):
            alive.append(sum(copied() is not None for copied in copies))
            super().__post_init__()
            copies.extend(weakref.ref(weight) for weight in self.dense.values())

    monkeypatch.setattr("apt.pruning.pipeline.CurrentBlock", Watched)
    options = library.PruneOptions(error_aware=aware)
    library.prune(random_model("llama"), TOKENS, pattern="2:4", options=options)
    assert alive == [0, 0, 0]
    assert len(copies) == (3 * 2 if aware else 0)


@pytest.mark.parametrize(
    ("compute", "aware", "dtype"),
    [
        ("auto", True, torch.bfloat16),
        ("float32", True, torch.float32),
        ("auto", False, torch.float32),
    ],
)
def test_error_aware_runs_of_fp32_models_multiply_in_bf16(monkeypatch, compute, aware, dtype):
    """Where the machine multiplies bf16 faster; the residual stream stays in fp32."""
    monkeypatch.setattr("apt.compute.multiplies_bf16", lambda device: True)
    model = random_model("llama")
    products, streams = set(), set()
    block = model.model.layers[1]
    block.mlp.down_proj.register_forward_hook(lambda _, x, y: products.add(y.dtype))
    block.register_forward_pre_hook(lambda _, x: streams.add(x[0].dtype))
    options = library.PruneOptions(compute=compute, error_aware=aware)
    report = library.prune(model, random_tokens(), pattern="2:4", options=options)
    assert report.sparsity == 0.5
    assert dtype in products
    assert (torch.bfloat16 in products) == (dtype == torch.bfloat16)
    assert streams == {torch.float32}
