"""Recovery of models that do not read windows of text, beside the dense model."""

import copy
from contextlib import suppress
from functools import cache

import pytest
import torch
from apt_plugins.recoveries import layers
from torch.nn.functional import kl_div
from transformers import BertConfig, BertForSequenceClassification

import apt
from apt.adapter.recording import eval_mode
from apt.checkpoints.masks import masks_of
from apt.events import TrainingStep
from apt.options import RecoverOptions
from apt.plugin.registry import registry
from apt.recovery.beside_dense import beside_dense, divergence_from, hiding_tokens
from apt.recovery.recover import NotRecoveredError
from apt.recovery.trainable import Unrecovered
from tests.helpers.families import adapter_of
from tests.helpers.stacked import MODELS, samples_of, stacked_model

RATES = {"distill": 3e-3, "layers": 1e-3, "spp": 5e-2}  # of 6 steps; 1e-2 for all other kinds
KINDS = ("distill", "layers", "norms", "lora", "spp")


@cache
def once_pruned(name):
    """A pruned random model and its dense original, which callers must not change."""
    model = stacked_model(name)
    dense = copy.deepcopy(model)
    apt.prune(model, samples_of(name), pattern="2:4", method="wanda")
    return model, dense


def pruned(name, count=24):
    """A pruned random model, its dense original, and samples."""
    return *copy.deepcopy(once_pruned(name)), samples_of(name, count)


def few(kind="distill", **more):
    rate = RATES.get(kind, 1e-2)
    return RecoverOptions(**{"steps": 6, "checks": 2, "batch": 4, "rate": rate, **more})


def zeros(model):
    return masks_of(model, adapter_of(model))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_kinds_come_nearer_to_the_dense_model_and_keep_every_zero(name, kind):
    model, dense, samples = pruned(name)
    before, unchanged = zeros(model), copy.deepcopy(dense.state_dict())
    training = apt.recover(model, samples, kind=kind, dense=dense, options=few(kind))
    assert training.held_back[training.best] < 0.97 * training.held_back[0]
    assert same(zeros(model), before)
    assert same(dense.state_dict(), unchanged)
    assert not any(module._forward_hooks for module in model.modules())


OTHERS = [name for name in MODELS if name not in ("bert", "t5", "vit")]


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_come_nearer_to_the_dense_model(name):
    """Classifiers, taggers, answers, bodies, pairs of towers, speech, with bf16 weights."""
    model, dense, samples = pruned(name)
    model, dense = model.bfloat16(), dense.bfloat16()
    before = zeros(model)
    training = apt.recover(model, samples, dense=dense, options=few(rate=1e-4))
    assert training.held_back[training.best] < training.held_back[0]
    assert same(zeros(model), before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "products"), [("deberta", "float32"), ("bert", "bfloat16")])
def test_model_that_does_not_run_in_mixed_precision_trains_in_fp32(monkeypatch, name, products):
    """DeBERTa fills products in bf16 with the least number of fp32, which bf16 does not have."""
    monkeypatch.setattr("apt.compute.multiplies_bf16", lambda device: True)
    model, dense, samples = pruned(name)
    training = apt.recover(model, samples, dense=dense, options=few(rate=1e-4))
    assert training.held_back[training.best] < training.held_back[0]
    assert training.products == products


def test_what_a_decoder_reads_is_written_by_the_dense_model():
    model, dense, samples = pruned("t5", 12)
    names = [{"input_ids": each["input_ids"]} for each in samples]
    alone = samples.with_samples(names)
    objective = beside_dense(model, dense, alone, 1.0)
    (first, *_) = objective.collate([(0, alone[0])])["groups"]
    assert first["decoder_input_ids"].shape[0] == 1
    training = apt.recover(model, alone, dense=dense, options=few())
    assert training.best


@pytest.mark.parametrize("kind", ["distill", "lora"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_resumed_training_has_the_same_losses_and_weights(name, kind, tmp_path):
    class KilledError(Exception):
        pass

    def kill(event):
        if isinstance(event, TrainingStep) and event.step == 5:
            raise KilledError

    model, dense, samples = pruned(name)
    given = {"kind": kind, "dense": dense, "options": few(kind)}
    whole = apt.recover(model, samples, **given)
    other, _, _ = pruned(name)
    with pytest.raises(KilledError):
        apt.recover(other, samples, folder=tmp_path, observe=kill, **given)
    again = apt.recover(other, samples, folder=tmp_path, resume=True, **given)
    assert again.losses == whole.losses
    assert again.held_back == whole.held_back
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.usefixtures("half_is_slow")
def test_result_does_not_depend_on_the_samples_that_run_together():
    losses = []
    for size in (1, 2, 8):
        model, dense, samples = pruned("bert", 30)  # as many as the steps have, and more
        losses += [apt.recover(model, samples, dense=dense, options=few(micro_batch=size)).losses]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)


def test_loss_is_the_mean_over_samples_and_that_of_the_dense_model_is_zero():
    model, dense, samples = pruned("bert", 8)
    objective = beside_dense(model, dense, samples, 1.0)

    def loss(chosen, trained=model):
        return float(objective.loss(trained, objective.collate([(i, samples[i]) for i in chosen])))

    model.train()  # without dropout all the same
    assert model.config.hidden_dropout_prob > 0
    with torch.no_grad():
        singles = [loss([index]) for index in range(8)]
        assert loss(range(8)) == pytest.approx(sum(singles) / 8, rel=1e-4)
        assert model.training
        itself = beside_dense(dense, dense, samples, 1.0)
        assert itself.loss(dense, itself.collate([(0, samples[0])])) == 0


def test_divergence_is_that_of_all_logits_plus_that_of_the_states():
    model, dense, samples = pruned("bert", 1)
    inputs = {"input_ids": samples[0]["input_ids"][None]}
    with torch.no_grad(), eval_mode(model), eval_mode(dense):
        logs = [each(**inputs).logits.log_softmax(-1) for each in (model, dense)]
        states = [each.bert(**inputs)[0] for each in (model, dense)]
        found = [float(divergence_from(dense, model, inputs, hidden)) for hidden in (0.0, 0.5)]
    tokens = inputs["input_ids"].numel()
    logits = float(kl_div(*logs, reduction="sum", log_target=True)) / tokens
    errors = (states[0] - states[1]).square().sum(-1) / states[1].square().sum(-1)
    assert found[0] == pytest.approx(logits, rel=1e-4)
    assert found[1] == pytest.approx(logits + 0.5 * float(errors.mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "problem"), [(1, None), (1, "regression"), (3, "multi_label_classification")]
)
def test_labels_that_do_not_exclude_each_other_have_a_divergence_each(labels, problem):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=labels, problem_type=problem,
    )  # fmt: skip
    model, dense = (BertForSequenceClassification(config).eval() for _ in range(2))
    for each in (model, dense):
        each.classifier.weight.data *= 30
    inputs = {"input_ids": torch.arange(8)[None]}
    with torch.no_grad():
        found = float(divergence_from(dense, model, inputs, 0.0))
        mine, theirs = (each(**inputs).logits.double().sigmoid() for each in (model, dense))
    by_hand = theirs * (theirs / mine).log() + (1 - theirs) * ((1 - theirs) / (1 - mine)).log()
    assert found > 0
    assert found == pytest.approx(float(by_hand.sum()), rel=1e-3)


def test_hidden_tokens_are_a_share_and_never_special():
    samples = samples_of("bert", 200)
    hidden = hiding_tokens(samples, 0)
    pairs = [(a["input_ids"], b["input_ids"]) for a, b in zip(samples, hidden, strict=True)]
    assert all((after[before != after] == samples.mask).all() for before, after in pairs)
    share = sum(int((before != after).sum()) for before, after in pairs) / samples.numel()
    assert 0.1 < share < 0.2
    special = apt.Samples([{"input_ids": torch.zeros(9, dtype=torch.long)}], mask=1, special=(0,))
    assert hiding_tokens(special, 0)[0]["input_ids"].tolist() == [0] * 9


def test_layers_trains_the_last_blocks_and_what_follows():
    for name, last, expected in (
        ("bert", "bert.encoder.layer.1", {"cls.predictions.transform.dense.weight"}),
        ("vit", "vit.layers.1", {"classifier.weight", "vit.layernorm.weight"}),
        ("t5", "decoder.block.1", {"decoder.final_layer_norm.weight"}),
    ):
        model, samples = stacked_model(name).requires_grad_(False), samples_of(name, 1)
        sample = {key: value[None] for key, value in samples[0].items()}
        adapter = adapter_of(model)
        last = adapter.blocks(model)[-1][0]
        layers(Unrecovered(model, adapter, {}, RecoverOptions(blocks=1), sample=sample))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n, _ in model.named_parameters() if n.startswith(last)} <= trained
        assert expected <= trained
        first = adapter.blocks(model)[0][0]
        assert not any(n.startswith(first) for n in trained)


@pytest.mark.parametrize("kind", ["distill", "layers"])
def test_time_decides_the_steps(kind):
    model, dense, samples = pruned("t5")
    options = few(kind, steps=None, minutes=0.02, batch=2)
    with suppress(NotRecoveredError):
        training = apt.recover(model, samples, kind=kind, dense=dense, options=options)
        assert 1 < len(training.losses) <= training.steps
        assert training.seconds < 10


def test_masks_move_and_blocks_are_trained_in_turn():
    model, dense, samples = pruned("bert")
    before = zeros(model)
    training = apt.recover(
        model, samples, dense=dense, options=few(steps=8, batch=8, move_masks=True)
    )
    after = zeros(model)
    assert training.exchanges
    assert not same(before, after)
    groups = [m.unflatten(1, (-1, 4)).sum(-1) for m in after.values()]
    assert all((group == 2).all() for group in groups)
    assert apt.recover(model, samples, dense=dense, options=few(window=1)).losses


@pytest.mark.parametrize(
    ("kind", "more", "message", "option"),
    [
        ("distill", {"top": 8}, "recovery distill does not use top", "top"),
        ("spp", {"dropout": 0.1}, "recovery spp does not use dropout", "dropout"),
        ("distill", {"steps": None, "tokens": "auto"}, "tokens auto needs a model", "tokens"),
        ("lora", {"checkpointing": True}, "gradient checkpointing needs", "checkpointing"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(kind, more, message, option):
    model, dense, samples = pruned("bert", 4)
    with pytest.raises(apt.AptError, match=message) as caught:
        apt.recover(model, samples, kind=kind, dense=dense, options=few(kind, **more))
    assert caught.value.options == (option,)


def test_wrong_inputs_are_refused_in_one_line():
    model, dense, samples = pruned("bert")
    for kind in ("distill", "layers"):
        with pytest.raises(apt.AptError, match=f"recovery {kind} needs the dense model"):
            apt.recover(model, samples, kind=kind, options=few(kind))
    with pytest.raises(apt.AptError, match="of the family bert, and the pruned one of vit"):
        apt.recover(pruned("vit")[0], samples_of("vit"), dense=dense, options=few())
    body = type(dense.bert)(dense.config)
    with pytest.raises(apt.AptError, match="is a BertModel, and the pruned one a BertForMaskedLM"):
        apt.recover(model, samples, dense=body, options=few())
    config = MODELS["roberta"][1]()
    config.num_labels = 5
    with pytest.raises(apt.AptError, match="has 5 classes, and the pruned one has 2"):
        apt.recover(
            pruned("roberta")[0], samples, dense=MODELS["roberta"][0](config), options=few()
        )
    body, states, _ = pruned("mpnet")
    with pytest.raises(apt.AptError, match="MPNetModel has no head") as caught:
        apt.recover(body, samples, dense=states, options=few(hidden=0.0))
    assert caught.value.options == ("hidden",)
    with pytest.raises(apt.AptError, match="token ids"):
        apt.recover(model, torch.ones(4, 8, dtype=torch.long), dense=dense, options=few())


def test_kinds_for_samples_use_what_they_can():
    spec = registry().recoveries.get("lora").for_samples()
    assert spec.teacher
    assert {*spec.options} == {"rank", "save_adapter", "hidden"}
