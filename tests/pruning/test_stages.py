"""The stages of a block: each stage is a run with the stored products of earlier runs."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import apt.pruning.pipeline
from apt.calibration.storage import MemoryStore
from apt.calibration.stored_products import StoredProducts
from apt.calibration.targets import Targets
from apt.errors import AptError
from apt.planning.plan import Selection, make_plan
from apt.pruning.layer import Recipe
from apt.solver import NM, ss
from tests.helpers.families import CONFIGS, adapter_of, random_model, random_tokens
from tests.helpers.pruning import prune_blocks


class NoProducts(MemoryStore):
    """A store in memory with which a run computes all products of a block again."""

    with_model = False


def pruned(model, store=None, targets=None, selection=None, method=ss):
    """The weights of a model after an ordered run."""
    adapter = adapter_of(model)
    plan = make_plan(model, adapter, NM(2, 4), selection or Selection())
    recipe = Recipe(targets=targets, ordered=True)
    prune_blocks(model, adapter, plan, random_tokens(samples=8), method, recipe, store=store)
    return model.state_dict()


def one_dense(model):
    """A selection without one site of block 1, if possible one that writes to the stream."""
    adapter = adapter_of(model)
    name, block = adapter.blocks(model)[1]
    sites = adapter.sites(block)
    dense = next((site for site in sites if site.residual), sites[1])
    return Selection(skip=(f"{name}.{dense.name}",))


@pytest.mark.parametrize("variant", CONFIGS)
def test_stored_products_give_the_same_bytes(variant, monkeypatch):
    monkeypatch.setattr(apt.pruning.pipeline, "TOKENS_PER_BATCH", 64)  # several batches
    stored, computed = (
        pruned(model, store, selection=one_dense(model))
        for model, store in ((random_model(variant), None), (random_model(variant), NoProducts()))
    )
    for name, value in computed.items():
        assert torch.equal(stored[name], value), name


@pytest.mark.parametrize("variant", CONFIGS)
def test_stored_products_give_the_same_targets_up_to_rounding(variant, monkeypatch):
    monkeypatch.setattr(apt.pruning.pipeline, "TOKENS_PER_BATCH", 64)
    stored, computed = (
        pruned(model, store, Targets(), one_dense(model))
        for model, store in ((random_model(variant), None), (random_model(variant), NoProducts()))
    )
    for name, value in computed.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-2, atol=1e-3, msg=name)


def written_in_place(mlp, forward, state):
    product = mlp.up_proj(state).mul_(0.5)
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(state)).mul_(product))


def kept_in_an_attribute(mlp, forward, state):
    mlp.act_fn.remote = mlp.gate_proj(state)
    product = mlp.up_proj(state)
    return mlp.down_proj(torch.relu(mlp.act_fn.remote) * product)


def swallowed(mlp, forward, state):
    try:
        return forward(state)
    except Exception:
        return state


def swallowed_whatever_it_is(mlp, forward, state):
    try:
        return forward(state)
    except:  # noqa: E722
        return mlp.down_proj(mlp.up_proj(state))


def checkpointed(mlp, forward, state):
    return checkpoint(forward, state, use_reentrant=True)


def under_autocast(mlp, forward, state):
    with torch.autocast("cpu", torch.bfloat16):
        return forward(state)


def with_gradients(mlp, forward, state):
    with torch.enable_grad():
        return forward(state).detach()


def with_a_warning(mlp, forward, state):
    torch.ones(2, 3, 4).T.sum()  # torch warns of it
    warnings.warn("within a forward", stacklevel=1)
    return forward(state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "unusual",
    [
        written_in_place, kept_in_an_attribute, swallowed, swallowed_whatever_it_is, checkpointed,
        under_autocast, with_gradients, with_a_warning,
    ],
)  # fmt: skip
def test_unusual_forward_gives_the_same_bytes_with_stored_products(unusual, monkeypatch):
    monkeypatch.setattr(apt.pruning.pipeline, "TOKENS_PER_BATCH", 64)
    result, settings = [], []

    def solve(*args, **options):
        settings.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return ss(*args, **options)

    for store in (None, NoProducts()):
        model = random_model("llama")
        for layer in model.model.layers:
            mlp, own = layer.mlp, layer.mlp.forward
            mlp.forward = lambda state, mlp=mlp, own=own: unusual(mlp, own, state)
        result.append(pruned(model, store, method=solve))
    for name, value in result[1].items():
        assert torch.equal(result[0][name], value), name
    assert set(settings) == {(False, False)}


class Computed(TorchFunctionMode):
    """Counts the products that are computed, by the shape of their weight."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            self.weights.append(args[1].data_ptr())
        return func(*args, **(kwargs or {}))


def test_products_of_solved_weights_are_computed_once():
    counts = {}
    for store in (None, NoProducts()):
        model = random_model("llama")
        with Computed() as computed:
            pruned(model, store)
        layer = model.model.layers[1]
        counts[store is None] = [
            computed.weights.count(linear.weight.data_ptr())
            for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj)
        ]
    # Once before q is solved, since k and v come after it, and once with its pruned weight. Without
    # stored products the four runs before the last one are for the inputs of q, o, gate and down.
    assert counts[True] == [2, 1, 1]
    assert counts[False] == [5, 3, 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_products_and_outputs_of_attention_are_stored_without_its_matrices(attention):
    model, tokens = random_model("llama"), random_tokens(samples=2)
    model.set_attn_implementation(attention)
    adapter, block = adapter_of(model), model.model.layers[0]
    state, calls = adapter.enter(model, tokens)
    sites = adapter.sites(block)
    products = StoredProducts({site: site.weight(block) for site in sites})
    last = [site for site in sites if site.name == "mlp.down_proj"]
    with products.run(last):
        first = adapter.step(block, state, calls[0])
    with Computed() as computed, products.run(()):
        second = adapter.step(block, state, calls[0])
    assert torch.equal(first, second)
    assert computed.weights == [block.mlp.down_proj.weight.data_ptr()]
    widths = sum(site.weight(block).shape[0] for site in sites if site not in last)
    attended = model.config.hidden_size if attention == "sdpa" else 0
    stored = sum(product.numel() for _, product in products._stored)
    assert stored == tokens.numel() * (widths + attended)


def test_dense_inputs_are_freed_after_their_sites_are_solved(monkeypatch):
    model, kept = random_model("llama"), []

    def solve(*args, **options):
        kept.append(sorted(inputs._parts))
        return ss(*args, **options)

    from apt.calibration.batches import Inputs

    keep = Inputs.keep

    def watched(result, names):
        nonlocal inputs
        inputs = result
        keep(result, names)

    inputs = None
    monkeypatch.setattr(Inputs, "keep", watched)
    pruned(model, targets=Targets(), method=solve)
    assert [len(names) for names in kept[:7]] == [4, 4, 4, 3, 2, 2, 1]


def test_held_counts_the_elements_of_attention_matrices():
    for variant, matrices in (("bloom", 3), ("llama", 0), ("opt", 0), ("mamba", 0)):
        model = random_model(variant)
        held = adapter_of(model).held(model.config, 50)
        assert held == matrices * 50 * getattr(model.config, "num_attention_heads", 0)
    model = random_model("llama")
    model.set_attn_implementation("eager")
    heads = model.config.num_attention_heads
    assert adapter_of(model).held(model.config, 50) == heads * 50


def test_error_names_sites_with_another_input_or_no_tokens():
    model = random_model("llama")
    adapter, whole = adapter_of(model), type(adapter_of(model)).capture

    @contextmanager
    def altered(block, sites, sink):
        with whole(adapter, block, sites, lambda site, rows: alter(site, rows, sink)):
            yield

    adapter.capture = altered
    cases = {
        "k_proj is declared to share the input": lambda site, rows, sink: sink(
            site, rows * (2 if site.name.endswith("k_proj") else 1)
        ),
        "down_proj saw 0 of": lambda site, rows, sink: (
            None if site.name.endswith("down_proj") else sink(site, rows)
        ),
        "v_proj saw 0 of": lambda site, rows, sink: (
            None if site.name.endswith("v_proj") else sink(site, rows)
        ),
    }
    for message, alter in cases.items():  # noqa: B007
        plan = make_plan(model, adapter, NM(2, 4))
        with pytest.raises(AptError, match=message):
            prune_blocks(model, adapter, plan, random_tokens(), ss, Recipe(ordered=True))


def test_block_without_selected_sites_has_no_records():
    model = random_model("llama")
    plan = make_plan(model, adapter_of(model), NM(2, 4), Selection(skip=("model.layers.1.*",)))
    done = prune_blocks(
        model, adapter_of(model), plan, random_tokens(), ss, Recipe(targets=Targets(), ordered=True)
    )
    assert len(done) == 14
