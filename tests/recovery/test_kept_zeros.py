"""`apt.keep_zeros` and `apt.KeepZeros`: other code trains a pruned model, and every zero stays."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import apt
from apt.checkpoints.masks import masks_of
from apt.recovery.objective import next_token_loss
from tests.helpers.families import adapter_of, random_model, random_tokens


@pytest.fixture
def pruned():
    model = random_model("llama")
    apt.prune(model, random_tokens(), pattern="2:4", method="magnitude")
    return model


def zeros(model):
    return masks_of(model, adapter_of(model))


def lost(before, model):
    """The number of zeros of ``before`` that are no longer zero."""
    return sum(int((mask & (model.get_parameter(n) != 0)).sum()) for n, mask in before.items())


def train(model, optimizer, steps=3):
    for _ in range(steps):
        next_token_loss(model, {"input_ids": random_tokens()}).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.SGD, {"momentum": 0.9})],
)
def test_keep_zeros_keeps_zeros_and_trains_other_weights(pruned, kind, options):
    before, start = zeros(pruned), pruned.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    kept = apt.keep_zeros(pruned)
    train(pruned, kind(pruned.parameters(), lr=1e-2, **options))
    assert lost(before, pruned) == 0
    moved = [name for name, value in pruned.state_dict().items() if not value.equal(start[name])]
    assert set(before) < set(moved)
    kept.remove()
    train(pruned, kind(pruned.parameters(), lr=1e-2, **options))
    assert lost(before, pruned) > 0.9 * sum(int(mask.sum()) for mask in before.values())


class Noisy(torch.optim.SGD):
    """An optimizer that moves weights without a gradient."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1e-3)


def test_optimizer_that_moves_all_weights_must_be_given(pruned):
    before, noisy = zeros(pruned), Noisy(pruned.parameters(), lr=1e-2)
    kept = apt.keep_zeros(pruned, noisy)
    train(pruned, noisy)
    assert lost(before, pruned) == 0
    kept.remove()
    apt.keep_zeros(pruned)
    train(pruned, noisy)
    assert lost(before, pruned) > 0


def test_frozen_parameter_keeps_its_zeros_when_trained_later(pruned):
    before = zeros(pruned)
    pruned.requires_grad_(False)
    kept = apt.keep_zeros(pruned)
    assert not any(parameter.requires_grad for parameter in pruned.parameters())
    pruned.requires_grad_(True)
    train(pruned, torch.optim.AdamW(pruned.parameters(), lr=1e-2))
    assert lost(before, pruned) == 0
    kept.remove()
    train(pruned, torch.optim.AdamW(pruned.parameters(), lr=1e-2))
    assert lost(before, pruned) > 0


def test_exception_in_a_with_statement_removes_the_hooks(pruned):
    before = zeros(pruned)
    with pytest.raises(KeyError), apt.keep_zeros(pruned):
        raise KeyError
    train(pruned, torch.optim.SGD(pruned.parameters(), lr=1e-2))
    assert lost(before, pruned) > 0


class Samples(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": random_tokens()[index], "labels": random_tokens()[index]}


@pytest.mark.parametrize("keeps", [True, False])
def test_callback_keeps_zeros_during_training_only(pruned, tmp_path, keeps):
    before = zeros(pruned)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callbacks = [apt.KeepZeros()] if keeps else []
    Trainer(pruned, arguments, train_dataset=Samples(), callbacks=callbacks).train()
    assert (lost(before, pruned) == 0) is keeps
    train(pruned, torch.optim.SGD(pruned.parameters(), lr=1e-2))  # as any other model
    assert lost(before, pruned) > 0


class Full(TrainerCallback):
    """A callback that fails after a step as if the disk were full."""

    def on_step_end(self, *given, **named):
        raise OSError("disk is full")


def hooks(model):
    """The number of hooks on the gradients of a model."""
    return sum(len(p._backward_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("how", ["with", "again", "collected"])
def test_callback_removes_its_hooks_after_an_exception(pruned, tmp_path, how):
    before, keep = zeros(pruned), apt.KeepZeros()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(pruned, arguments, train_dataset=Samples(), callbacks=[keep, Full()])
    with pytest.raises(OSError, match="disk is full"), keep if how == "with" else nullcontext():
        trainer.train()
    trainer.remove_callback(Full)
    if how == "again":
        assert hooks(pruned) == len(before)
        trainer.train()
    elif how == "collected":
        del trainer, keep
        gc.collect()
    assert hooks(pruned) == 0
    train(pruned, torch.optim.SGD(pruned.parameters(), lr=1e-2))
    assert lost(before, pruned) > 0


def test_keep_zeros_refuses_a_dense_model():
    with pytest.raises(apt.AptError, match="the model has no zeros"):
        apt.keep_zeros(random_model("llama"))
