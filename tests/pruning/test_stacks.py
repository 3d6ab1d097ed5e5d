"""Models of one or several stacks that do not read windows of text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apt
from apt import Samples
from apt.adapter.recording import eval_mode
from apt.calibration.batches import OpenBlock, enter, enter_next, walk
from apt.calibration.capture import Capture, grams_of
from tests.helpers.families import adapter_of
from tests.helpers.stacked import MODELS, samples_of, stacked_model


@pytest.mark.parametrize("name", MODELS)
def test_pattern_is_exact_and_all_else_is_untouched(name):
    model, samples = stacked_model(name), samples_of(name)
    before = {key: p.clone() for key, p in model.named_parameters()}
    report = apt.prune(model, samples, pattern="2:4")
    after = dict(model.named_parameters())
    pruned = {f"{site.name}.weight" for site in report.sites}
    assert {key for key, p in after.items() if not torch.equal(p, before[key])} == pruned
    for key in pruned:
        groups = (after[key] != 0).unflatten(1, (-1, 4)).sum(-1)
        assert torch.equal(groups, torch.full_like(groups, 2))
    adapter = adapter_of(model)
    linears = sum(
        isinstance(module, torch.nn.Linear) and path not in adapter.left_dense_of(block)
        for _, block in adapter.blocks(model)
        for path, module in block.named_modules()
    )
    assert len(pruned) == linears


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "clip"])
def test_walked_blocks_give_the_output_of_the_model(name):
    """A later stack reads what the model makes of the earlier stacks."""
    model, samples, adapter = stacked_model(name), samples_of(name, 4)[:1], None
    adapter = adapter_of(model)
    inputs, _ = next(iter(samples.batches(1000)))
    states = []
    with eval_mode(model), torch.no_grad():
        for _, blocks in adapter.stacks(model):
            last = blocks[-1][1]
            handle = last.register_forward_hook(lambda m, a, out: states.append(out))
            model(**inputs)
            handle.remove()
        (batch,) = enter(adapter, model, samples)
        ends = []
        for index, _, block in walk(adapter, model, [batch]):
            if index and len(batch.ends) > len(ends):
                ends.append(batch.ends[-1])
            batch.state = adapter.step(block, batch.state, batch.calls[index])
        ends.append(batch.state)
    assert len(ends) == 2
    for expected, found in zip(states, ends, strict=True):
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert torch.allclose(adapter.residual(found), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_stack_reads_the_pruned_stack_in_the_pruned_stream_and_the_dense_one_in_the_other(name):
    model, samples = stacked_model(name), samples_of(name)
    adapter = adapter_of(model)
    with eval_mode(model), torch.no_grad():
        (batch, *_) = batches = enter(adapter, model, samples, with_dense=True)
        for each in batches:
            each.state = adapter.residual(each.state) + 1  # as after a pruned stack
            each.dense.state = adapter.residual(each.dense.state)
        enter_next(adapter, model, batches)
    _, blocks = adapter.stacks(model)[0]
    index = len(blocks)  # of the first block of the decoder
    pruned, dense = batch.calls[index], batch.dense.calls[index]
    values = [[*call.args, *call.kwargs.values()] for call in (pruned, dense)]
    differ = [
        not torch.equal(one, other)
        for one, other in zip(*values, strict=True)
        if isinstance(one, torch.Tensor) and one.is_floating_point() and one.ndim == 3
    ]
    assert differ == [True]  # the states of the encoder
    assert batch.passed == [batch.inputs["input_ids"].numel()]
    assert batch.tokens == batch.inputs["decoder_input_ids"].numel()


def test_batches_of_several_texts_have_the_sums_of_single_texts():
    """No sample is padded, so no row of padding enters a sum."""
    model, samples = stacked_model("bert"), samples_of("bert")
    adapter = adapter_of(model)
    _, block = adapter.blocks(model)[0]
    sites, sums = adapter.sites(block), []
    with eval_mode(model), torch.no_grad():
        together = grams_of(adapter, block, 0, sites, enter(adapter, model, samples))
        for sample in samples:
            alone = enter(adapter, model, Samples([sample]))
            sums.append(grams_of(adapter, block, 0, sites, alone))
    for key, gram in together.items():
        expected = sum(each[key].matrix for each in sums)
        assert gram.tokens == sum(len(sample["input_ids"]) for sample in samples)
        assert torch.allclose(gram.matrix, expected, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 30))
def test_batches_hold_every_sample_once_and_have_equal_shapes(lengths, size):
    samples = Samples([{"input_ids": torch.full((n,), i)} for i, n in enumerate(lengths)])
    seen = []
    for inputs, indices in samples.batches(size):
        assert inputs["input_ids"].shape == (len(indices), lengths[indices[0]])
        assert inputs["input_ids"][:, 0].tolist() == indices.tolist()
        assert len(indices) == 1 or inputs["input_ids"].numel() <= size
        seen += indices.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_samples_are_chosen_by_slices_indices_and_masks():
    samples = samples_of("bert", 4)
    mask = torch.tensor([True, False, False, True])
    for chosen, expected in ((slice(1, 3), [1, 2]), (torch.tensor([3, 0]), [3, 0]), (mask, [0, 3])):
        part = samples[chosen]
        texts = [each["input_ids"] for each in part]
        assert all(text is samples[i]["input_ids"] for text, i in zip(texts, expected, strict=True))
        assert part.mask == 1
    assert samples.digest() != samples[:3].digest()


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("bert", torch.ones(2, 8, dtype=torch.long), "reads apt.Samples"),
        ("t5", torch.ones(2, 8, dtype=torch.long), "reads apt.Samples"),
    ],
)
def test_token_ids_for_an_encoder_are_an_error(name, tokens, message):
    with pytest.raises(apt.AptError, match=message):
        apt.prune(stacked_model(name), tokens, pattern="2:4")


def test_a_later_product_of_a_post_norm_block_compensates_for_the_drift_of_its_summand():
    """With weights that cannot change the error, the target moves by β times the drift."""
    adapter = adapter_of(stacked_model("bert"))
    _, block = adapter.blocks(stacked_model("bert"))[0]
    by_name = {site.name: site for site in adapter.sites(block)}
    assert by_name["output.dense"].added_to == by_name["intermediate.dense"].input
    assert not by_name["output.dense"].residual
    assert by_name["attention.output.dense"].residual


def test_the_loss_of_a_stack_is_that_of_its_calibration():
    """The same call with the samples in another order differs only by rounding."""
    results = []
    for order in (torch.arange(16), torch.arange(15, -1, -1)):
        model = stacked_model("bert")
        options = apt.PruneOptions(error_aware=False, tuning_epochs=0)
        samples = samples_of("bert")[order]
        report = apt.prune(model, samples, pattern="2:4", method="ss", options=options)
        results.append([site.relative_error for site in report.sites])
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_the_table_of_relative_positions_counts_once_for_each_batch():
    """DeBERTa multiplies it by the matrices of queries and keys, and not by those of values."""
    model, samples = stacked_model("deberta-v2"), samples_of("deberta-v2")
    adapter = adapter_of(model)
    block = adapter.blocks(model)[0][1]
    sites = [site for site in adapter.sites(block) if site.input in ("attention", "values")]
    expected = {site.name: torch.zeros(32, 32) for site in sites}

    def add(name):
        def hook(module, args):
            rows = args[0].flatten(0, -2)
            expected[name] += rows.T @ rows

        return hook

    with eval_mode(model), torch.no_grad():
        batches = enter(adapter, model, samples, 64)
        hooks = [
            block.get_submodule(site.name).register_forward_pre_hook(add(site.name))
            for site in sites
        ]
        capture = Capture(block, sites)
        capture.run(OpenBlock(adapter, block, 0, batches))
        for each in batches:  # the capture ends each run before the table
            for name, rows in adapter.tables(block, each.calls[0]).items():
                assert name == "attention"
                expected["attention.self.key_proj"] += rows.T @ rows
    for hook in hooks:
        hook.remove()
    assert len(batches) > 1
    grams = {name: sums.gram.matrix for name, sums in capture.sums.items()}
    assert torch.allclose(grams["attention"], expected["attention.self.key_proj"], rtol=1e-4)
    assert torch.allclose(grams["values"], expected["attention.self.value_proj"], rtol=1e-4)
    assert not torch.allclose(grams["attention"], grams["values"], rtol=1e-2)
    with eval_mode(model), torch.no_grad():
        others = grams_of(adapter, block, 0, sites, enter(adapter, model, samples, 64))
    assert all(torch.allclose(others[name].matrix, gram, rtol=1e-4) for name, gram in grams.items())


def test_deberta_multiplies_the_rows_of_its_table():
    """What the adapter names as the table is what the model multiplies."""
    model, samples = stacked_model("deberta-v2"), samples_of("deberta-v2")
    adapter, calls = adapter_of(model), []
    block = adapter.blocks(model)[0][1]
    with eval_mode(model), torch.no_grad():
        batch = enter(adapter, model, samples)[0]
        module = block.get_submodule("attention.self.key_proj")
        hook = module.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
        adapter.step(block, batch.state, batch.calls[0])
        hook.remove()
        table = adapter.tables(block, batch.calls[0])["attention"]
    assert len(calls) == 2
    assert torch.equal(calls[1][0], table)
