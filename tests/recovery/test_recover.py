"""Recovery: all kinds keep every zero, lower the loss, and can be undone and resumed."""

import copy
import itertools
import math
import random
import re
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from apt_plugins.masked_lora import masked_lora
from apt_plugins.recoveries import layers, spp
from apt_plugins.spp import SppConfig
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

import apt as library
from apt.adapter.recording import eval_mode
from apt.checkpoints.masks import masks_of
from apt.engine import api
from apt.engine.caller_model import find_adapter
from apt.errors import AptError
from apt.events import HeldBack, TrainingStep
from apt.options import RecoverOptions
from apt.plugin.registry import registry
from apt.plugin.specs import RecoverySpec
from apt.recovery import recorder
from apt.recovery import recover as recovery
from apt.recovery import training as recovery_training
from apt.recovery.job import RecoveryJob
from apt.recovery.objective import Objective, next_token_loss
from apt.recovery.recover import NotRecoveredError
from apt.recovery.teacher import divergence, relative_error
from apt.recovery.trainable import Trainable, Unrecovered, train_only
from apt.recovery.windows import BlockWindows
from tests.helpers import ROOT
from tests.helpers.families import FAMILIES, random_model, random_tokens

KINDS = ("spp", "lora", "layers", "distill", "norms")
FEW = RecoverOptions(steps=4, checks=2, batch=4, rate=1e-2)
LIGHT = {"distill": {"hidden": 0.1}}  # the options of a kind that no other one uses


@cache
def once_pruned(name, pattern, dtype):
    """A pruned random model and its dense original, which callers must not change."""
    model = random_model(name).to(dtype)
    dense = copy.deepcopy(model)
    library.prune(model, random_tokens(), pattern=pattern, method="wanda")
    return model, dense


def pruned(name="llama", pattern="0.6", dtype=torch.float32):
    """A pruned random model, its dense original, and tokens that it can learn."""
    model, dense = copy.deepcopy(once_pruned(name, pattern, dtype))
    tokens = torch.arange(24 * 16).reshape(24, 16) % 50
    return model, dense, tokens


def zeros(model):
    return masks_of(model, find_adapter(None, model, registry())[1])


def same_zeros(before, model):
    after = zeros(model)
    return before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def loss(model, tokens):
    with eval_mode(model), torch.no_grad():
        return float(next_token_loss(model, {"input_ids": tokens}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
def test_kinds_lower_the_loss_and_keep_every_zero(kind, pattern):
    model, dense, tokens = pruned(pattern=pattern)
    before, start = zeros(model), loss(model, tokens)
    if kind in ("distill", "norms"):  # towards a dense model that knows the text
        library.recover(dense, tokens, kind="layers", options=RecoverOptions(
            steps=40, batch=8, rate=1e-2, blocks=3))  # fmt: skip
    options = RecoverOptions(steps=8, checks=2, batch=4, rate=1e-2, **LIGHT.get(kind, {}))
    training = library.recover(model, tokens, kind=kind, options=options, dense=dense)
    assert same_zeros(before, model)
    assert loss(model, tokens) < start
    assert training.best in training.held_back
    assert len(training.losses) == training.steps == 8


def test_norms_change_no_matrix():
    model, dense, tokens = pruned(dtype=torch.bfloat16)
    model.model.norm.weight.data[::2] = 0  # an entry of 0 has a unit too
    before = copy.deepcopy(model.state_dict())
    options = RecoverOptions(steps=8, checks=2, batch=4, rate=1e-2)
    with suppress(NotRecoveredError):
        library.recover(model, tokens, kind="norms", options=options, dense=dense)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, tensor in before.items() if tensor.ndim == 1}
    assert (after["model.norm.weight"] != 0).all()


@pytest.mark.parametrize(
    ("kind", "family"), [*product(KINDS, FAMILIES.values()), ("lora", "falcon-h1")]
)
def test_families_are_recovered_with_unchanged_dtypes_and_flags(kind, family):
    model, dense, tokens = pruned(family, "0.5", torch.bfloat16)
    before = zeros(model)
    names = [name for name, _ in model.named_modules()]
    flags = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    model.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
    with suppress(NotRecoveredError):  # a few steps need not help a random model
        few = replace(FEW, **LIGHT.get(kind, {}))
        library.recover(model, tokens, kind=kind, options=few, dense=dense)
    assert same_zeros(before, model)
    assert [name for name, _ in model.named_modules()] == names
    assert {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()} == flags
    assert model.scale.dtype == torch.bfloat16


NORMS = {"llama": "model.norm", "opt": "model.decoder.final_layer_norm",
         "bloom": "transformer.ln_f", "mamba": "backbone.norm_f"}  # fmt: skip


@pytest.mark.parametrize("family", NORMS)
def test_layers_trains_last_blocks_final_norm_and_head(family):
    model = random_model(family).requires_grad_(False)
    adapter = find_adapter(None, model, registry())[1]
    layers(Unrecovered(model, adapter, {}, RecoverOptions(blocks=1)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    last = adapter.blocks(model)[-1][0]
    expected = {n for n, _ in model.named_parameters() if n.startswith((last, NORMS[family]))}
    head = model.get_output_embeddings().weight
    assert trained == expected | {n for n, p in model.named_parameters() if p is head}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_option_dropout_sets_the_dropout_of_spp():
    model, _, _ = pruned()
    given = Unrecovered(model, find_adapter(None, model, registry())[1], {}, RecoverOptions())
    for wish in (0.0, 0.05):
        tuned = spp(replace(given, options=RecoverOptions(dropout=wish)))
        assert tuned.module.peft_config["default"].dropout == wish
        tuned.undo()


@pytest.mark.parametrize("kind", KINDS)
def test_unsuccessful_training_restores_the_model(kind):
    model, dense, tokens = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = RecoverOptions(steps=6, checks=3, batch=4, rate=1e20)
    with pytest.raises(NotRecoveredError, match=r"diverged|did not lower") as caught:
        library.recover(model, tokens, kind=kind, options=options, dense=dense)
    assert "rate" in caught.value.options
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_kind_that_fills_zeros_is_refused():
    def filling(given):
        tuned = get_peft_model(given.model, LoraConfig(target_modules=given.linears(), r=2))
        return Trainable(tuned, merge=tuned.merge_and_unload)

    model, _, tokens = pruned()
    with pytest.raises(AptError, match="recovery filling filled zeros of model.layers.0"):
        library.recover(model, tokens, kind=filling, options=FEW)


def test_function_as_kind_chooses_the_trained_parameters():
    def norms(given):
        train_only(given.model, (p for n, p in given.model.named_parameters() if "norm" in n))
        return Trainable(given.model)

    model, _, tokens = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    library.recover(model, tokens, kind=norms, options=FEW)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed
    assert all("norm" in name for name in changed)


@pytest.mark.usefixtures("half_is_slow")
@pytest.mark.parametrize("pattern", ["0.6", "2:4", "4:8"])
def test_moving_masks_keep_all_counts(pattern):
    model, _, tokens = pruned(pattern=pattern)
    before = zeros(model)
    options = RecoverOptions(steps=12, checks=4, batch=8, rate=1e-2, blocks=3, move_masks=True)
    training = library.recover(model, tokens, kind="layers", options=options)
    after = zeros(model)
    assert training.exchanges > 100
    assert sum(not torch.equal(mask, after[name]) for name, mask in before.items()) > 5
    for name, mask in before.items():
        size = mask.numel() if pattern == "0.6" else int(pattern[-1])
        counts = [m.view(-1, size).sum(-1) for m in (mask, after[name])]
        assert torch.equal(*counts), name
    moving = RecoverOptions(steps=2, move_masks=True)
    with pytest.raises(AptError, match="recovery spp does not use move masks"):
        library.recover(model, tokens, kind="spp", options=moving)

    def adapters(given):
        tuned = get_peft_model(given.model, LoraConfig(target_modules=given.linears(), r=2))
        return Trainable(tuned, undo=tuned.unload)

    with pytest.raises(AptError, match="its masks cannot move"):
        library.recover(model, tokens, kind=adapters, options=moving)


def test_resumed_training_restores_moving_masks(tmp_path):
    options = RecoverOptions(steps=8, checks=4, batch=4, rate=3e-3, blocks=3, move_masks=True)
    given = {"kind": "layers", "options": options}
    model, _, tokens = pruned()
    whole = library.recover(model, tokens, **given)

    def kill(event):
        if isinstance(event, TrainingStep) and event.step == 6:
            raise Killed

    other, _, _ = pruned()
    with pytest.raises(Killed):
        library.recover(other, tokens, folder=tmp_path, observe=kill, **given)
    again = library.recover(other, tokens, folder=tmp_path, resume=True, **given)
    assert again.losses == whole.losses
    assert same_zeros(zeros(model), other)


@pytest.mark.parametrize("kind", KINDS)
def test_option_window_trains_blocks_in_turn(kind):
    model, dense, tokens = pruned()
    before, blocks, trained = zeros(model), model.model.layers, []
    start = copy.deepcopy(blocks.state_dict())

    def see(event):
        if isinstance(event, TrainingStep):
            trained.append([any(p.requires_grad for p in b.parameters()) for b in blocks])

    own = LIGHT.get(kind, {})
    options = RecoverOptions(steps=15, checks=15, patience=15, rate=1e-2, window=1, **own)
    best = library.recover(
        model, tokens, kind=kind, options=options, dense=dense, observe=see
    ).best  # the model is the one after this step
    turns = [[index == step // 5 for index in range(3)] for step in range(15)]
    assert trained == turns
    after = blocks.state_dict()
    ending = "input_layernorm.weight" if kind == "norms" else "gate_proj.weight"
    weights = [name for name in start if name.endswith(ending)]
    changed = [not torch.equal(start[name], after[name]) for name in weights]
    assert changed == [best > 5 * index for index in range(3)]
    assert same_zeros(before, model)
    assert all(p.requires_grad for p in model.parameters())


def test_only_the_current_window_has_moments():
    model, _, _ = pruned()
    _, adapter = find_adapter(None, model, registry())
    windows = BlockWindows(model, adapter, 2, steps=4)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, expected in enumerate(["01", "01", "2", "2"]):
        windows.on_step_begin(None, SimpleNamespace(global_step=step), None, optimizer=optimizer)
        loss_of = next_token_loss(model, {"input_ids": random_tokens()})
        loss_of.backward()
        optimizer.step()
        result = {n for n, p in model.model.layers.named_parameters() if p in optimizer.state}
        assert "".join(sorted({name.partition(".")[0] for name in result})) == expected


def test_resumed_training_of_windows_has_the_same_losses(tmp_path):
    options = RecoverOptions(steps=9, checks=9, batch=4, rate=1e-2, window=1, blocks=3)
    given = {"kind": "layers", "options": options}
    model, dense, tokens = pruned()
    whole = library.recover(model, tokens, dense=dense, **given)

    def kill(event):
        if isinstance(event, TrainingStep) and event.step == 6:
            raise Killed

    other, _, _ = pruned()
    with pytest.raises(Killed):
        library.recover(other, tokens, dense=dense, folder=tmp_path, observe=kill, **given)
    again = library.recover(other, tokens, dense=dense, folder=tmp_path, resume=True, **given)
    assert again.losses == whole.losses


class Killed(Exception):
    """A stand-in for the death of the process."""


@pytest.mark.parametrize("kind", ["spp", "lora", "distill"])
def test_resumed_training_has_the_same_losses_and_weights(kind, tmp_path):
    options = RecoverOptions(steps=6, checks=3, batch=4, rate=3e-3, **LIGHT.get(kind, {}))
    model, dense, tokens = pruned()
    whole = library.recover(model, tokens, kind=kind, options=options, dense=dense)

    def kill(event):
        if isinstance(event, TrainingStep) and event.step == 5:
            raise Killed

    other, dense, _ = pruned()
    given = {"kind": kind, "options": options, "dense": dense, "folder": tmp_path}
    with pytest.raises(Killed):
        library.recover(other, tokens, observe=kill, **given)
    events = []
    again = library.recover(other, tokens, resume=True, observe=events.append, **given)
    steps = [event.step for event in events if isinstance(event, TrainingStep)]
    assert steps == [5, 6]
    assert again.losses == whole.losses
    assert again.held_back == whole.held_back
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [False, True])
def test_recover_restores_model_state_and_random_state(kind, ends):
    """transformers' Trainer sets use_cache, the mode and the seeds."""
    model, dense, tokens = pruned()
    model.config.use_cache = True
    model.train()
    own, hooks = set(vars(model)), [bool(p._backward_hooks) for p in model.parameters()]

    def end(event):
        if ends and isinstance(event, TrainingStep):
            raise Killed

    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(3), random.random()
    torch.manual_seed(1)
    random.seed(1)
    given, options = {"dense": dense, "observe": end}, replace(FEW, checkpointing=True, rate=2e-3)
    if kind == "spp":  # a few of its steps help none of the samples held back
        options = replace(options, steps=12, rate=1e-2)
    with pytest.raises(Killed) if ends else nullcontext():
        library.recover(model, tokens, kind=kind, options=options, **given)
    assert model.config.use_cache is True
    assert model.training
    assert {name for name in vars(model) if not name.startswith("_require_grads")} == own
    assert not model.get_input_embeddings()._forward_hooks
    assert [bool(p._backward_hooks) for p in model.parameters()] == hooks
    assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_step_is_divided_into_equal_micro_batches():
    model, _, tokens = pruned()
    options = RecoverOptions(steps=2, checks=1, batch=6, micro_batch=4, rate=1e-2)
    seen = []

    def kind(given):
        def count(module, batch):
            seen.append(len(batch["input_ids"]))
            return next_token_loss(module, batch)

        train_only(given.model, given.model.parameters())
        return Trainable(given.model, count, masked=True)

    library.recover(model, tokens, kind=kind, options=options)
    assert seen == [3, 3, 3, 3]


def test_nan_loss_ends_the_training_and_is_recorded():
    model, _, tokens = pruned()
    events = []

    def kind(given):
        train_only(given.model, given.model.parameters())
        return Trainable(given.model, lambda m, b: next_token_loss(m, b) * math.nan, masked=True)

    with pytest.raises(NotRecoveredError, match="diverged after 1 steps"):
        library.recover(model, tokens, kind=kind, options=FEW, observe=events.append)
    assert math.isnan(next(event.loss for event in events if isinstance(event, TrainingStep)))


def test_training_of_an_earlier_version_is_not_resumed(tmp_path):
    model, dense, tokens = pruned()
    (tmp_path / "training.json").write_text('{"setting": {}}')
    given = {"options": FEW, "dense": dense, "folder": tmp_path}
    with pytest.raises(AptError, match="has a training of an earlier version"):
        library.recover(model, tokens, resume=True, **given)


def test_folder_of_another_training_is_refused_or_replaced(tmp_path):
    model, dense, tokens = pruned()
    given = {"options": FEW, "dense": dense, "folder": tmp_path}
    library.recover(model, tokens, **given)
    with pytest.raises(AptError, match="is another run: .*tokens differ"):
        library.recover(model, tokens.flip(0), resume=True, **given)
    other, more, _ = pruned()
    both = torch.cat([tokens, tokens])  # the outputs of the dense model have to be computed anew
    alone = library.recover(copy.deepcopy(other), both, options=FEW, dense=more)
    again = library.recover(other, both, **given)
    assert again.losses == alone.losses


@pytest.mark.parametrize("kind", ["spp", "lora", "layers"])
def test_early_stopping_takes_the_best_weights(kind):
    model, _, tokens = pruned()
    options = RecoverOptions(steps=60, checks=30, batch=8, rate=1e-1, patience=2, blocks=3)
    events = []
    training = library.recover(model, tokens, kind=kind, options=options, observe=events.append)
    losses = {event.step: event.loss for event in events if isinstance(event, HeldBack)}
    assert losses == training.held_back
    assert training.best == min(losses, key=losses.get) < max(losses)
    assert "no longer fell" in training.stopped
    assert loss(model, tokens[-1:]) == pytest.approx(
        losses[training.best], rel=0.01
    )  # bf16 in training


def test_automatic_tokens_are_at_most_one_epoch():
    model, _, tokens = pruned()
    options = RecoverOptions(tokens="auto", batch=2, checks=11, rate=1e-3, blocks=3)
    training = library.recover(model, tokens, kind="layers", options=options)
    assert training.steps == 23 // 2
    if len(training.losses) < training.steps:
        assert training.stopped
    many = RecoverOptions(tokens=100, batch=2, checks=1, rate=1e-3, blocks=3)
    assert library.recover(model, tokens, kind="layers", options=many).steps == 4  # of 32 tokens


def set_clock(monkeypatch, seconds):
    """Replace the clock of a training."""
    for module in (recovery, recovery_training, recorder):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=seconds))


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_minutes_determine_the_number_of_steps(kind, window, monkeypatch):
    """Of 8 samples a forward and backward pass, and a forward, take a second each.

    So does a step of the optimizer.
    """
    clock = itertools.count()
    monkeypatch.setattr(recovery, "_now", lambda device: next(clock))
    set_clock(monkeypatch, lambda: 0.0)
    model, dense, tokens = pruned()
    model.requires_grad_(False)
    own = LIGHT.get(kind, {})
    options = RecoverOptions(minutes=0.1, checks=1, batch=4, rate=1e-2, window=window, **own)
    events = []
    with suppress(NotRecoveredError):
        library.recover(
            model, tokens, kind=kind, options=options, dense=dense, observe=events.append
        )
    held_back = round(0.05 * len(tokens))
    step = (
        4 / 8 + 1 + (4 / 8 if kind in ("distill", "norms") else 0)
    )  # with the dense model's forward
    assert events[-1].step == int((6 - 2 * held_back / 8) / step)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["distill", "layers"])
def test_rate_decays_to_zero_within_the_time(kind, monkeypatch):
    """Steps take several seconds, far more than the measured pace."""
    monkeypatch.setattr(recovery, "_pace", lambda *_: recovery._Pace(0.1, 0.0, 0.1))
    clock = itertools.count()
    set_clock(monkeypatch, lambda: float(next(clock)))
    model, dense, tokens = pruned()
    options = RecoverOptions(minutes=1, checks=1, batch=2, rate=1e-3)
    events = []
    with suppress(NotRecoveredError):
        library.recover(
            model, tokens, kind=kind, options=options, dense=dense, observe=events.append
        )
    steps = [event for event in events if isinstance(event, TrainingStep)]
    rates = [event.rate for event in steps]
    assert 3 < len(rates) < steps[-1].steps
    assert max(rates) > 0.5e-3
    assert rates[-1] < 0.1e-3


@pytest.mark.parametrize("minutes", [None, 0.001])
def test_kind_with_a_teacher_gets_all_parameters_trainable(minutes, monkeypatch):
    model, dense, tokens = pruned()
    seen = []

    def own(given):
        seen.extend(parameter.requires_grad for parameter in given.model.parameters())
        return Trainable(given.model)

    spec = RecoverySpec("own", "", "", teacher=True)
    monkeypatch.setattr(api, "_recovery", lambda kind: (spec, own))
    steps = 1 if minutes is None else None
    with suppress(AptError):
        library.recover(
            model, tokens, kind=own, dense=dense,
            options=RecoverOptions(steps=steps, minutes=minutes, batch=4),
        )  # fmt: skip
    assert seen
    assert all(seen)


def test_timed_step_trains_the_parameters_of_the_kind():
    model, _, tokens = pruned()
    trained = []

    def head(given):
        def loss(model, batch):
            trained.append([n for n, p in model.named_parameters() if p.requires_grad])
            return next_token_loss(model, batch)

        train_only(given.model, [given.model.lm_head.weight])
        return Trainable(given.model, loss)

    options = RecoverOptions(minutes=0.001, checks=1, batch=4, rate=1e-3)
    with suppress(NotRecoveredError):
        library.recover(model, tokens, kind=head, options=options)
    assert trained[0] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("first", "sizes", "seconds"),
    [(0.5, [1, 8, 8], 2 / 8), (3.0, [1, 1, 1], 2.0), (30.0, [1, 1], 30.0)],
)
def test_pace_is_that_of_a_second_run(monkeypatch, tmp_path, first, sizes, seconds):
    """The first run warms up. If it is slow, one sample runs again; if very slow, none."""
    model, _, tokens = pruned()
    spec = registry().recoveries.get("spp")
    job = RecoveryJob(None, spec, None, RecoverOptions(minutes=1), tmp_path)
    gradients, seen = iter([first, 2.0, 1.0]), []
    times = iter(itertools.accumulate(
        part for taken in gradients for part in (0.0, taken, 0.25)
    ))  # fmt: skip
    monkeypatch.setattr(recovery, "_now", lambda device: next(times))

    def loss(model, batch):
        seen.append(len(batch["input_ids"]))
        return next_token_loss(model, batch)

    found = recovery._pace(Trainable(model), None, tokens[:8], job, Objective(loss))
    assert seen == sizes
    assert (found.sample, found.update) == (pytest.approx(seconds), 0.25)


def test_loss_of_the_next_token_is_the_cross_entropy():
    model, tokens = random_model("llama"), random_tokens()
    loss = next_token_loss(model, {"input_ids": tokens})
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_resumed_timed_training_has_the_same_steps(monkeypatch, tmp_path):
    """The pace and the remaining time differ after the resumption."""
    model, _, tokens = pruned()
    spec = registry().recoveries.get("distill")
    options = RecoverOptions(minutes=1, batch=2)
    adapter = find_adapter(None, model, registry())[1]
    job = RecoveryJob(adapter, spec, spec.load(), options, tmp_path)
    steps = []
    for pace in (recovery._Pace(0.2, 0.1, 0.1), recovery._Pace(0.1, 0.05, 0.1)):
        monkeypatch.setattr(recovery, "_pace", lambda *_, pace=pace: pace)
        given = Trainable(model), tokens, tokens[:3], job, time.perf_counter() - 10
        steps.append(recovery._amount(model, *given).steps)
    assert steps == 2 * [int((60 - 10 - 3 * 11 * 0.1) / (0.5 + 0.2))]


@pytest.mark.parametrize(
    ("minutes", "given", "processes", "batch"),
    [(60, None, 1, 8), (30, None, 1, 4), (10, None, 1, 1), (10, None, 2, 2), (10, 8, 1, 8)],
)
def test_short_time_gives_fewer_samples_per_step(tmp_path, minutes, given, processes, batch):
    """A sample takes one second on each process; the optimizer and the forward take none."""
    spec = registry().recoveries.get("lora")
    job = RecoveryJob(
        None, spec, None, RecoverOptions(minutes=minutes, batch=given), tmp_path,
        ranks=SimpleNamespace(size=processes),
    )  # fmt: skip
    pace = recovery._Pace(1.0, 0.0, 1e-9)
    steps, _, result = recovery._steps_in(60 * minutes, pace, 4, job)
    assert result == batch
    assert steps == pytest.approx(60 * minutes * processes / batch, abs=1.1)


@pytest.mark.parametrize(("least", "batch"), [(1, 1), (2, 2), (3, 4), (6, 8), (99, 8)])
def test_step_has_a_least_number_of_samples(tmp_path, least, batch):
    spec = registry().recoveries.get("distill").for_samples()
    job = RecoveryJob(None, spec, None, RecoverOptions(minutes=1), tmp_path)
    pace = recovery._Pace(1.0, 0.0, 1e-9, beside_dense=True)
    assert recovery._steps_in(60, pace, 4, job, least)[2] == batch


def test_timing_a_step_changes_no_weight(monkeypatch):
    """The gradients are not finite."""
    model, dense, tokens = pruned()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(recovery, "_teacher", lambda *_: (_ for _ in ()).throw(AptError("stop")))
    with pytest.raises(AptError, match="stop"):
        library.recover(model, tokens, dense=dense, options=RecoverOptions(minutes=0.001))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_spp_and_masked_lora_keep_zeros_that_plain_lora_fills():
    model, _, tokens = pruned()
    before = zeros(model)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    kept = {}
    for name, config in {
        "plain": LoraConfig(target_modules=linears, r=4),
        "masked": masked_lora(target_modules=linears, r=4),
        "spp": SppConfig(target_modules=linears, r=4),
    }.items():
        tuned = get_peft_model(copy.deepcopy(model), config)
        optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), 1.0)
        for _ in range(2):
            next_token_loss(tuned, {"input_ids": tokens}).backward()
            optimizer.step()
        kept[name] = same_zeros(before, tuned.merge_and_unload())
    assert kept == {"plain": False, "masked": True, "spp": True}


@pytest.mark.parametrize("option", ["lora_dropout", "use_dora", "lora_bias"])
def test_masked_lora_refuses_unmasked_options_and_modules(option):
    with pytest.raises(ValueError, match=f"does not serve {option}"):
        masked_lora(target_modules=["up_proj"], **{option: 0.5 if "dropout" in option else True})
    with pytest.raises(ValueError, match=r"serves torch\.nn\.Linear, not Embedding"):
        get_peft_model(random_model("llama"), masked_lora(target_modules=["embed_tokens"]))


def test_spp_adapter_is_saved_loaded_and_merged_by_peft(tmp_path):
    model, _, tokens = pruned()
    config = SppConfig(target_modules="all-linear", r=4, scale=0.5, task_type="CAUSAL_LM")
    dense_logits = model(tokens).logits
    tuned = get_peft_model(copy.deepcopy(model), config)
    assert torch.equal(tuned(tokens).logits, dense_logits)  # c begins with zeros
    layer = tuned.base_model.model.model.layers[0].mlp.up_proj
    weight = layer.get_base_layer().weight.detach().clone()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "spp_" in name:
                parameter.normal_()
    first, factors = layer.spp_A["default"], layer.spp_c["default"]
    rows = weight.shape[0] // 4
    by_hand = weight * (1 + 0.5 * first.repeat_interleave(rows, 0) * factors)
    torch.testing.assert_close(layer.weight, by_hand)
    changed = tuned(tokens).logits
    assert not torch.allclose(changed, dense_logits)
    with tuned.disable_adapter():
        assert torch.equal(tuned(tokens).logits, dense_logits)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, changed)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(tokens).logits, changed)
    loaded.unmerge_adapter()
    torch.testing.assert_close(loaded(tokens).logits, changed)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, changed)
    assert same_zeros(zeros(model), merged)
    assert type(merged) is type(model)


def test_example_for_peft_trains_and_keeps_every_zero(tmp_path):
    """The unchanged example of docs/recovery.md."""
    page = (ROOT / "docs/recovery.md").read_text()
    (source,) = re.findall(r"```python\n(from peft import get_peft_model.*?)```", page, re.DOTALL)
    model, _, tokens = pruned()
    before = zeros(model)
    scope = {
        "pruned": model,
        "arguments": TrainingArguments(
            str(tmp_path), max_steps=6, learning_rate=1e-2, use_cpu=True, report_to=[],
            disable_tqdm=True,
        ),
        "dataset": [{"input_ids": row, "labels": row} for row in tokens],
    }  # fmt: skip
    start = loss(model, tokens)
    exec(source, scope)
    assert same_zeros(before, scope["merged"])
    assert loss(scope["merged"], tokens) < start


def test_spp_merges_several_adapters_with_uneven_ranks():
    model, _, tokens = pruned()
    tuned = get_peft_model(model, SppConfig(target_modules=["up_proj"], r=7))
    tuned.add_adapter("other", SppConfig(target_modules=["up_proj"], r=100, dropout=0.5))
    tuned.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "spp_" in name:
                parameter.normal_(std=0.1)
    dropped = tuned.train()(tokens).logits
    expected = tuned.eval()(tokens).logits
    assert not torch.allclose(dropped, expected)
    torch.testing.assert_close(tuned.merge_and_unload()(tokens).logits, expected)
    with pytest.raises(ValueError, match="not a torch.nn.Linear"):
        get_peft_model(random_model("llama"), SppConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="must be at least 1"):
        get_peft_model(random_model("llama"), SppConfig(target_modules=["up_proj"], r=0))


def test_divergence_merges_all_tokens_without_a_logit():
    draw = torch.Generator().manual_seed(0)
    logits, dense = (torch.randn(2, 3, 20, generator=draw) for _ in range(2))
    logs = dense.log_softmax(-1)
    full = (
        torch.nn.functional.kl_div(logits.log_softmax(-1), logs, log_target=True, reduction="sum")
        / 6
    )
    values, tokens = logs.topk(20)
    torch.testing.assert_close(divergence(logits, tokens, values), full, atol=1e-4, rtol=1e-4)
    values, tokens = logs.topk(5)
    part = divergence(logits, tokens, values)
    assert 0 < part < full  # merging events lowers a divergence
    assert divergence(dense, tokens, values).abs() < 1e-5
    assert relative_error(dense, dense) == 0
    assert relative_error(2 * dense, dense) == pytest.approx(1)


def test_options_out_of_range_are_refused_by_name():
    wrong = {
        "steps": 0, "tokens": 0, "minutes": math.inf, "rate": 0, "batch": 0, "checks": 0,
        "validation_share": 1.0, "patience": 0, "rank": 0, "blocks": 0, "hidden": -1.0, "top": 0,
        "dropout": 1.0,
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(AptError, match=name.replace("_", " ")) as caught:
            RecoverOptions(**{name: value}).check()
        assert name in caught.value.options
    with pytest.raises(AptError, match="exclude each other"):
        RecoverOptions(steps=1, minutes=1).check()
    with pytest.raises(AptError, match="tokens is 'many'"):
        RecoverOptions(tokens="many").check()


def test_options_of_another_kind_are_refused_by_name():
    known = registry().recoveries.specs
    every = {"rank": 4, "dropout": 0.1, "blocks": 1, "move_masks": True, "hidden": 0.5, "top": 8}
    for kind in KINDS:
        RecoverOptions().check_used(known[kind], known.values(), "recovery")
        for name in every.keys() - {*known[kind].options}:
            with pytest.raises(
                AptError, match=f"{kind} does not use {name.replace('_', ' ')}"
            ) as caught:
                RecoverOptions(**{name: every[name]}).check_used(
                    known[kind], known.values(), "recovery"
                )
            assert caught.value.options == (name,)
    spec = replace(known["spp"], options=None)
    RecoverOptions(**every).check_used(spec, known.values(), "recovery")


def test_missing_inputs_of_a_recovery_are_refused():
    model, _, tokens = pruned()
    with pytest.raises(AptError, match="needs the dense model"):
        library.recover(model, tokens, kind="distill", options=FEW)
    with pytest.raises(AptError, match="the text has 1 samples"):
        library.recover(model, tokens[:1], kind="layers", options=FEW)
    with pytest.raises(AptError, match="the model has no zeros"):
        library.recover(random_model("llama"), tokens, kind="spp", options=FEW)
    with pytest.raises(AptError, match="no recovery 'sp'.*did you mean 'spp'"):
        library.recover(model, tokens, kind="sp", options=FEW)
    with pytest.raises(AptError, match="optimizer 'adam' is unknown"):
        library.recover(
            model, tokens, kind="layers", options=RecoverOptions(steps=2, optimizer="adam")
        )
