"""A forward that waits before each product: the same as running the block anew for every input."""

import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import apt.pruning.paused_forward
import apt.pruning.pipeline
from apt.calibration.batches import enter
from apt.calibration.capture import Capture
from apt.calibration.targets import Targets
from apt.errors import AptError
from apt.planning.plan import Selection, make_plan
from apt.pruning.openmp import release_team
from apt.pruning.paused_forward import InParts, Walk
from apt.pruning.pipeline import prune_blocks
from apt.pruning.recipe import Recipe
from apt.pruning.suspended import Suspended
from apt.solver import NM, ss
from tests.families import CONFIGS, random_model, random_tokens


def test_what_waits_goes_on_when_it_is_asked_to():
    said = []

    def work(wait):
        for number in range(3):
            said.append(number)
            wait(number)
        return "done"

    counting = Suspended(work)
    assert not said
    assert next(counting) == 0
    assert said == [0]
    assert list(counting) == [1, 2]
    assert counting.result == "done"
    assert next(counting, None) is None
    counting.close()


def test_what_waits_can_fail_and_be_closed():
    before = set(threading.enumerate())

    def fail(wait):
        wait(1)
        raise KeyError("x")

    failing = Suspended(fail)
    next(failing)
    with pytest.raises(KeyError, match="x"):
        next(failing)

    unwound = []

    def endless(wait):
        try:
            while True:
                wait(1)
        finally:
            unwound.append(True)

    waiting = Suspended(endless)
    next(waiting)
    waiting.close()
    waiting.close()
    assert unwound == [True]
    assert next(waiting, None) is None
    Suspended(endless).close()
    assert not set(threading.enumerate()) - before


def test_what_waits_knows_its_own_thread():
    def work(wait):
        wait(first.here)

    first = Suspended(work)
    assert list(first) == [True]
    assert not first.here


@pytest.fixture
def two_threads():
    """OpenMP with a team, however many processors there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


TASKS = Path("/proc/self/task")  # the threads of this process, those of libraries as well


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads where Linux lists them")
@pytest.mark.usefixtures("two_threads")
def test_who_waits_keeps_no_openmp_threads():
    def work(wait):
        compute()
        wait(None)

    compute()
    release_team()
    at_rest = len(list(TASKS.iterdir()))
    waiting = [Suspended(work) for _ in range(3)]
    for one in waiting:
        next(one)
    deadline = time.monotonic() + 10  # a thread that was told to end takes a moment
    while len(list(TASKS.iterdir())) > at_rest + len(waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(TASKS.iterdir())) == at_rest + len(waiting)
    for one in waiting:
        one.close()


def compute():
    return torch.ones(500, 500) @ torch.ones(500, 500)


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("variant", CONFIGS)
def test_a_walk_gives_what_runs_anew_give(variant, aware, adapter_of, monkeypatch):
    models, threads = [], set(threading.enumerate())
    for walks in (True, False):
        model = random_model(variant)
        adapter = adapter_of(model)
        if not walks:
            monkeypatch.setattr(Walk, "next_input", raise_in_parts)
        monkeypatch.setattr(apt.pruning.pipeline, "TOKENS_PER_BATCH", 64)  # several batches at once
        name, block = adapter.blocks(model)[1]
        sites = adapter.sites(block)
        dense = next((site for site in sites if site.residual), sites[1])
        plan = make_plan(model, adapter, NM(2, 4), Selection(skip=(f"{name}.{dense.name}",)))
        targets = Targets() if aware else None
        prune_blocks(
            model,
            adapter,
            plan,
            random_tokens(samples=8),
            ss,
            Recipe(targets=targets, ordered=True),
        )
        models.append(model.state_dict())
    assert not set(threading.enumerate()) - threads
    for name, value in models[1].items():
        torch.testing.assert_close(models[0][name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize(("variant", "walks"), [("bloom", False), ("llama", True), ("mamba", True)])
def test_matrices_of_attention_are_not_held_for_all_batches(
    variant, walks, adapter_of, monkeypatch
):
    model, began = random_model(variant), []
    adapter = adapter_of(model)
    monkeypatch.setattr(apt.pruning.paused_forward, "_HELD", 1)
    monkeypatch.setattr(Walk, "__enter__", lambda walk: began.append(walk) or walk)
    plan = make_plan(model, adapter, NM(2, 4))
    prune_blocks(model, adapter, plan, random_tokens(samples=2), ss, Recipe(ordered=True))
    assert bool(began) == walks


def test_how_much_a_forward_holds(adapter_of):
    for variant, matrices in (("bloom", 3), ("llama", 0), ("opt", 0), ("mamba", 0)):
        model = random_model(variant)
        held = adapter_of(model).held(model.config, 50)
        assert held == matrices * 50 * getattr(model.config, "num_attention_heads", 0)
    model = random_model("llama")
    model.set_attn_implementation("eager")
    heads = model.config.num_attention_heads
    assert adapter_of(model).held(model.config, 50) == heads * 50


def raise_in_parts(walk):
    raise InParts


@torch.no_grad()
def test_a_walk_through_a_block_runs_it_once(adapter_of):
    model, tokens = random_model("opt"), random_tokens(samples=2)
    adapter, count = adapter_of(model), []
    block = model.model.decoder.layers[0]
    batches = enter(adapter, model, tokens, 1)
    handle = block.register_forward_pre_hook(lambda module, args: count.append(1))
    sites = adapter.sites(block)
    with Walk(adapter, block, 0, batches, sites, sites, {}) as walk:
        names = []
        while (name := walk.next_input()) is not None:
            names.append(name)
            alone = Capture(block, [site for site in sites if site.input == name])
            sums = walk.capture(name)
            seen = len(count)
            alone.run(adapter, block, 0, batches)
            del count[seen:]
            torch.testing.assert_close(sums.gram.matrix, alone.sums[name].gram.matrix)
            for site in sites:
                if site.input == name:
                    site.weight(block).mul_(0.5)
        states = [adapter.step(block, b.state, b.calls[0]) for b in batches]
        del count[-len(states) :]
        walk.finish(leave=True)
    handle.remove()
    assert len(count) == len(batches) == 2
    assert names == list(dict.fromkeys(site.input for site in sites))
    for batch, state in zip(batches, states, strict=True):
        torch.testing.assert_close(batch.state, state)


def test_what_shares_no_input_and_what_is_never_reached_are_named(adapter_of):
    model = random_model("llama")
    adapter, whole = adapter_of(model), type(adapter_of(model)).capture
    threads = set(threading.enumerate())

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
    assert not set(threading.enumerate()) - threads


def test_a_block_that_is_left_dense_is_only_run(adapter_of):
    model = random_model("llama")
    plan = make_plan(model, adapter_of(model), NM(2, 4), Selection(skip=("model.layers.1.*",)))
    done = prune_blocks(
        model, adapter_of(model), plan, random_tokens(), ss, Recipe(targets=Targets(), ordered=True)
    )
    assert len(done) == 14
