"""A forward that waits before each product: the same as running the block anew for every input."""

import sys
from contextlib import contextmanager
from contextvars import ContextVar

import pytest
import torch

import apt.pruning.paused_forward
import apt.pruning.pipeline
from apt.adapter.weight_tap import WeightTap
from apt.calibration.batches import OpenBlock, enter
from apt.calibration.capture import Capture
from apt.calibration.targets import Targets
from apt.errors import AptError
from apt.planning.plan import Selection, make_plan
from apt.pruning import suspended
from apt.pruning.layer import Recipe
from apt.pruning.paused_forward import CannotPause, PausedForwards
from apt.pruning.suspended import Suspended, can_preserve_handler
from apt.solver import NM, ss
from tests.helpers.families import CONFIGS, adapter_of, random_model, random_tokens
from tests.helpers.pruning import prune_blocks


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
    assert unwound == [True]


@pytest.mark.skipif(sys.platform == "win32", reason="its compiler names functions otherwise")
def test_torch_still_lets_its_warning_handler_be_kept():
    assert can_preserve_handler()


@pytest.mark.skipif(not can_preserve_handler(), reason="needs torch's handler of warnings")
def test_what_waits_within_a_function_of_torch_leaves_the_others_their_warning_handler():
    handler, _ = suspended._functions()
    before, weight, own = handler(), torch.ones(4, 4), []

    def work(wait):
        def sink(key, rows):
            mine = handler()
            wait(key)
            own.append(handler() == mine != before)

        with WeightTap({"weight": weight}, sink):
            for _ in range(2):
                torch.nn.functional.linear(torch.ones(2, 4), weight)
                own.append(handler() == before)

    waiting = [Suspended(work) for _ in range(3)]
    for _ in range(3):
        for one in waiting:
            next(one, None)
            assert handler() == before
    assert own == [True] * 12


def test_a_context_variable_is_a_waiting_functions_own():
    variable = ContextVar("variable", default=0)
    variable.set(1)

    def work(wait):
        wait(variable.get())
        variable.set(2)
        wait(variable.get())

    waiting = Suspended(work)
    assert (next(waiting), next(waiting), variable.get()) == (1, 2, 1)
    waiting.close()


def test_a_forward_with_settings_of_its_own_is_run_again():
    model, seen = random_model("llama"), []
    module = model.model.layers[0].mlp
    module.forward = torch.autocast("cpu", torch.bfloat16)(module.forward)

    def solve(*args, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return ss(*args, **options)

    plan = make_plan(model, adapter_of(model), NM(2, 4))
    prune_blocks(
        model, adapter_of(model), plan, random_tokens(samples=8), solve, Recipe(ordered=True)
    )
    assert set(seen) == {False}


def test_no_forward_pauses_if_the_handler_cannot_be_preserved(monkeypatch):
    monkeypatch.setattr(apt.pruning.paused_forward, "can_preserve_handler", lambda: False)
    model = random_model("llama")
    plan = make_plan(model, adapter_of(model), NM(2, 4))
    started = []
    monkeypatch.setattr(PausedForwards, "finish", lambda forwards, **_: started.append(forwards))
    prune_blocks(model, adapter_of(model), plan, random_tokens(), ss, Recipe(ordered=True))
    assert not started


# Without targets less is summed.
@pytest.mark.parametrize(
    ("variant", "aware"),
    [*((name, True) for name in CONFIGS), ("llama-grouped-tied", False), ("qwen2-moe", False)],
)
def test_paused_forwards_give_the_result_of_separate_runs(variant, aware, monkeypatch):
    models = []
    for pauses in (True, False):
        model = random_model(variant)
        adapter = adapter_of(model)
        if not pauses:
            monkeypatch.setattr(PausedForwards, "next_input", raise_cannot_pause)
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
    for name, value in models[1].items():
        torch.testing.assert_close(models[0][name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("variant", "pauses"), [("bloom", False), ("llama", True), ("mamba", True)]
)
def test_matrices_of_attention_are_not_held_for_all_batches(variant, pauses, monkeypatch):
    model, began = random_model(variant), []
    adapter = adapter_of(model)
    monkeypatch.setattr(apt.pruning.paused_forward, "_MAX_VALUES", 1)
    monkeypatch.setattr(
        PausedForwards, "__enter__", lambda forwards: began.append(forwards) or forwards
    )
    plan = make_plan(model, adapter, NM(2, 4))
    prune_blocks(model, adapter, plan, random_tokens(samples=2), ss, Recipe(ordered=True))
    assert bool(began) == pauses


def test_how_much_a_forward_holds():
    for variant, matrices in (("bloom", 3), ("llama", 0), ("opt", 0), ("mamba", 0)):
        model = random_model(variant)
        held = adapter_of(model).held(model.config, 50)
        assert held == matrices * 50 * getattr(model.config, "num_attention_heads", 0)
    model = random_model("llama")
    model.set_attn_implementation("eager")
    heads = model.config.num_attention_heads
    assert adapter_of(model).held(model.config, 50) == heads * 50


def raise_cannot_pause(forwards):
    raise CannotPause


@torch.no_grad()
def test_paused_forwards_run_the_block_once():
    model, tokens = random_model("opt"), random_tokens(samples=2)
    adapter, count = adapter_of(model), []
    block = model.model.decoder.layers[0]
    batches = enter(adapter, model, tokens, 1)
    handle = block.register_forward_pre_hook(lambda module, args: count.append(1))
    sites = adapter.sites(block)
    with PausedForwards(OpenBlock(adapter, block, 0, batches), sites, sites, {}) as forwards:
        names = []
        while (name := forwards.next_input()) is not None:
            names.append(name)
            alone = Capture(block, [site for site in sites if site.input == name])
            sums = forwards.capture(name)[name]
            seen = len(count)
            alone.run(OpenBlock(adapter, block, 0, batches))
            del count[seen:]
            torch.testing.assert_close(sums.gram.matrix, alone.sums[name].gram.matrix)
            for site in sites:
                if site.input == name:
                    site.weight(block).mul_(0.5)
        states = [adapter.step(block, b.state, b.calls[0]) for b in batches]
        del count[-len(states) :]
        forwards.finish(update_states=True)
    handle.remove()
    assert len(count) == len(batches) == 2
    assert names == list(dict.fromkeys(site.input for site in sites))
    for batch, state in zip(batches, states, strict=True):
        torch.testing.assert_close(batch.state, state)


def test_what_shares_no_input_and_what_is_never_reached_are_named():
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


def test_a_block_that_is_left_dense_is_only_run():
    model = random_model("llama")
    plan = make_plan(model, adapter_of(model), NM(2, 4), Selection(skip=("model.layers.1.*",)))
    done = prune_blocks(
        model, adapter_of(model), plan, random_tokens(), ss, Recipe(targets=Targets(), ordered=True)
    )
    assert len(done) == 14
