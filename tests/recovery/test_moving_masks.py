"""Masks that move during a training, see also tests/recovery/test_recover.py."""

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from apt.checkpoints.masks import masks_of
from apt.recovery.moving_masks import MovingMasks
from apt.recovery.record import Training
from apt.recovery.training import _Patience
from tests.helpers.families import adapter_of, random_model

NAME = "model.layers.0.self_attn.q_proj.weight"
STEPS = 300  # of which the first one that moves masks is step 8


class Masked:
    """A random model with masks that move, and an optimizer that has made a step."""

    def __init__(self, optimizer=torch.optim.Adam, seed=0):
        torch.manual_seed(seed)
        self.model = random_model("llama")
        adapter = adapter_of(self.model)
        for name, block in adapter.blocks(self.model):
            for site in adapter.sites(block):
                weight = self.parameter(f"{name}.{site.parameter}").data
                weight.view(-1, 4)[:, :2] = 0
        self.masks = masks_of(self.model, adapter)
        self.moving = MovingMasks(self.model, adapter, self.masks, STEPS)
        self.optimizer = optimizer(self.model.parameters(), lr=0.0)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def parameter(self, name):
        return self.model.get_parameter(name)

    def after(self, step):
        return self.moving.after_step(step, self.optimizer)


def test_updates_of_a_pruned_weight_are_collected_until_it_replaces_a_smaller_one():
    masked = Masked()
    weight, mask = masked.parameter(NAME).data, masked.masks[NAME]
    weight[0, 2:4] = torch.tensor([0.5, 1.0])
    for step in range(1, 8):
        weight[0, 1] += 0.1
        assert masked.after(step) == 0
        assert weight[0, 1] == 0
        assert mask[0, :4].tolist() == [True, True, False, False]
    weight[0, 1] += 0.1
    assert masked.after(8) == 1
    assert mask[0, :4].tolist() == [True, False, True, False]
    assert weight[0, :4].tolist() == pytest.approx([0, 0.8, 0, 1.0])


def test_second_moment_of_adam_weighs_the_weights():
    masked = Masked()
    weight, mask = masked.parameter(NAME).data, masked.masks[NAME]
    weight[0, 2:4] = torch.tensor([0.5, 1.0])
    weight[0, 1] += 0.1
    moment = masked.optimizer.state[masked.parameter(NAME)]["exp_avg_sq"]
    moment[0, 3] /= 1000  # 1.0 has less effect than 0.1
    masked.after(8)
    assert mask[0, :4].tolist() == [True, False, False, True]


def test_weight_without_updates_stays_pruned():
    masked = Masked(torch.optim.SGD)
    weight, mask = masked.parameter(NAME).data, masked.masks[NAME]
    weight[0, 2:4] = torch.tensor([1e-30, 2e-30])
    assert masked.after(8) == 0
    assert mask[0, :4].tolist() == [True, True, False, False]


def test_masks_are_fixed_after_the_last_move():
    masked = Masked()
    last = int(0.75 * STEPS)
    assert masked.moving.moves(NAME, last)
    assert not masked.moving.moves(NAME, last + 1)
    assert not masked.moving.moves("model.embed_tokens.weight", 1)
    masked.after(last)
    state = masked.optimizer.state[masked.parameter(NAME)]
    assert not state["exp_avg_sq"][masked.masks[NAME]].any()
    before = masked.masks[NAME].clone()
    assert masked.after(last + 1) == 0
    assert torch.equal(masked.masks[NAME], before)


def test_latent_values_are_part_of_a_checkpoint(tmp_path):
    masked, other = Masked(), Masked()
    masked.parameter(NAME).data[0, 0] += 10.0
    masked.after(1)
    masked.moving.save(tmp_path)
    other.moving.restore(tmp_path)
    assert other.after(8) == 1
    assert float(other.parameter(NAME).data[0, 0]) == 10.0


def test_measurements_while_masks_move_do_not_end_a_training():
    """The loss may rise for a time after zeros have moved."""
    losses = {0: 3.0, 5: 2.0, 10: 2.1, 15: 2.2, 20: 2.1, 25: 2.3}
    training = Training(steps=40, tokens=64, held_back=losses)
    assert training.checks_since_best() == 4
    assert training.checks_since_best(15) == 2
    state, control = TrainerState(best_metric=2.0), TrainerControl()
    patience = _Patience(1, last_move=15)
    arguments = TrainingArguments(metric_for_best_model="eval_loss", greater_is_better=False)
    for step, ends in ((10, False), (20, True)):
        state.global_step = step
        given = {"metrics": {"eval_loss": losses[step]}}
        patience.on_evaluate(arguments, state, control, **given)
        assert control.should_training_stop == ends
