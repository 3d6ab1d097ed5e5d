"""Cancelled runs: events after each step, the state of blocks, and complete cleanup."""

import copy
import signal
import threading
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import apt as library
import apt.tuning.block_tuning
from apt.engine.recipes import recipe_of
from apt.events import BlockStarted, SitePruned, Working
from apt.options import PruneOptions
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.solver import NM, Unstructured, meets
from apt.tuning.block_tuning import BlockTuning
from tests.helpers.families import CONFIGS, random_model, random_tokens
from tests.helpers.pruning import prune_blocks

TOKENS, PATTERN = random_tokens(6, 12), NM(2, 4)
VARIANTS = [name for name in ("llama", "opt", "mamba", "jamba") if name in CONFIGS]


class Cancelled(Exception):
    pass


@pytest.fixture(autouse=True)
def small_tuning_steps(monkeypatch):
    """Tune in steps of two samples, so that a run has several steps."""
    small_steps = partial(BlockTuning, tokens_per_batch=24)
    monkeypatch.setattr("apt.engine.recipes.BlockTuning", small_steps)


@pytest.fixture(autouse=True)
def high_precision_setting():
    """Set a precision of products that differs from the one within a run."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@cache
def dense_model(variant):
    return random_model(variant).train()


@cache
def events_of(variant, ordered):
    events = []
    run(variant, ordered, events.append)
    return events


def run(variant, ordered, observe):
    model = copy.deepcopy(dense_model(variant))
    library.prune(
        model,
        TOKENS,
        pattern=PATTERN,
        options=library.PruneOptions(ordered=ordered),
        observe=observe,
    )
    return model


def side_effects(model):
    """The state of the model and the process, except the weights."""
    return {
        "threads": set(threading.enumerate()),
        "hooks": [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks],
        "forwards": [m for m in model.modules() if "forward" in vars(m)],
        "eval": [m for m in model.modules() if not m.training],
        "gradients": [p for p in model.parameters() if p.grad is not None or not p.requires_grad],
        "modes": torch._C._len_torch_function_stack(),
        "grad": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize(
    ("variant", "ordered"),
    [
        (variant, ordered)
        for variant in VARIANTS
        for ordered in {"opt": [True], "mamba": [False]}.get(variant, [True, False])
    ],
)
def test_exception_of_observer_leaves_blocks_dense_or_pruned(variant, ordered):
    adapter = registry().adapter_for(dense_model(variant).config.model_type).load()()

    @settings(max_examples=4, deadline=None)
    @given(turn=st.integers(0, len(events_of(variant, ordered)) - 1))
    def holds(turn):
        seen, dense = [], dense_model(variant)
        model = copy.deepcopy(dense)
        before = side_effects(model)

        def observe(event):
            seen.append(event)
            if len(seen) > turn:
                raise Cancelled

        with pytest.raises(Cancelled):
            library.prune(
                model,
                TOKENS,
                pattern=PATTERN,
                options=library.PruneOptions(ordered=ordered),
                observe=observe,
            )
        assert side_effects(model) == before
        at = max(event.index for event in seen if isinstance(event, BlockStarted))
        blocks = zip(adapter.blocks(model), adapter.blocks(dense), strict=True)
        for index, ((_, block), (_, original)) in enumerate(blocks):
            for site in adapter.sites(block):
                weight = site.oriented(site.weight(block).data)
                dense_weight = site.oriented(site.weight(original).data)
                states = (torch.equal(weight, dense_weight), meets(weight, PATTERN))
                if index != at:
                    assert states == (index > at, index < at)
                else:  # a weight that is still dense may have another order
                    values = (w.flatten().sort().values for w in (weight, dense_weight))
                    assert states[1] or torch.equal(*values)

    holds()


@pytest.mark.parametrize("pattern", [PATTERN, Unstructured(0.5)], ids=str)
@pytest.mark.parametrize(("ordered", "effort"), [(True, "default"), (False, "fast")])
def test_an_event_follows_each_step(pattern, ordered, effort, monkeypatch):
    """Steps are solves, steps of tuning, and runs of a block on a batch."""
    monkeypatch.setattr("apt.pruning.pipeline.TOKENS_PER_BATCH", 24)
    model, happened = random_model("llama"), []
    adapter, method = registry().adapter_for("llama").load()(), registry().default_method()

    def counted(what, function):
        def called(*args, **kwargs):
            happened.append(what)
            return function(*args, **kwargs)

        return called

    descend = apt.tuning.block_tuning._Descent.descend
    monkeypatch.setattr("apt.tuning.block_tuning._Descent.descend", counted("tuning", descend))
    monkeypatch.setattr(adapter, "step", counted("running", adapter.step))
    options = PruneOptions(effort=effort, error_aware=True, ordered=ordered)
    recipe = recipe_of(options, method)
    plan = make_plan(model, adapter, pattern)
    solve = counted("solving", method.load())
    prune_blocks(model, adapter, plan, TOKENS, solve, recipe, observe=happened.append)
    steps = [index for index, what in enumerate(happened) if isinstance(what, str)]
    assert {happened[index] for index in steps} >= {"solving", "running"}
    for index, after in pairwise(steps):
        one_and_the_same = happened[index] == "tuning" and happened[after] == "running"
        assert after > index + 1 or one_and_the_same, happened[index : after + 1]
    told = [event.doing for event in happened if isinstance(event, Working)]
    assert told.count("solving") == 3 * 7
    assert ("tuning" in told) == (effort == "default")


@pytest.mark.parametrize("doing", ["running", "solving", "tuning"])
def test_ctrl_c_between_steps_ends_the_run_and_cleans_up(doing):
    model = copy.deepcopy(dense_model("llama"))
    before = side_effects(model)

    def observe(event):
        if isinstance(event, Working) and event.doing == doing:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        library.prune(model, TOKENS, pattern=PATTERN, observe=observe)
    assert side_effects(model) == before


def test_ctrl_c_within_a_forward_ends_the_run_and_cleans_up():
    model = copy.deepcopy(dense_model("llama"))
    handle = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: signal.raise_signal(signal.SIGINT)
    )
    before = side_effects(model)
    with pytest.raises(KeyboardInterrupt):
        library.prune(model, TOKENS, pattern=PATTERN)
    assert side_effects(model) == before
    handle.remove()


def test_run_after_a_cancelled_run_gives_the_same_weights():
    expected = run("llama", True, lambda event: None).state_dict()

    def observe(event):
        if isinstance(event, SitePruned):
            raise Cancelled

    with pytest.raises(Cancelled):
        run("llama", True, observe)
    again = run("llama", True, lambda event: None).state_dict()
    assert all(torch.equal(again[name], value) for name, value in expected.items())
