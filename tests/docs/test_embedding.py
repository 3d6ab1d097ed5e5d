"""APT inside another program: quiet, undoable, alongside other runs."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import apt as library
from apt.events import SitePruned
from apt.solver import NM, Unstructured
from tests.helpers import ROOT
from tests.helpers.families import random_model, random_tokens

TOKENS = random_tokens(samples=6)


def test_examples_of_the_page_run():
    text = (ROOT / "docs/embedding.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert code.count("import apt\n") == 1
    exec(compile(code, "embedding.md", "exec"), {"__name__": "example"})


def test_prune_copy_gives_the_pruned_model():
    model, twin = random_model("llama"), random_model("llama")
    pruned, report = library.prune_copy(model, TOKENS, pattern="2:4")
    library.prune(twin, TOKENS, pattern="2:4")
    assert report.sparsity == 0.5
    for name, value in random_model("llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(pruned.state_dict()[name], twin.state_dict()[name])


def test_prune_prints_nothing_and_keeps_the_random_state(capfd):
    model, state = random_model("opt"), torch.get_rng_state()
    library.prune(model, TOKENS, pattern="0.5")
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


class Enough(Exception):
    pass


@pytest.mark.parametrize("variant", ["llama", "mamba"])
def test_cancelling_observer_leaves_the_model_usable(variant):
    model = random_model(variant).train()
    seen = []

    def observe(event):
        seen.append(event)
        if isinstance(event, SitePruned) and len(seen) > 6:
            raise Enough

    with pytest.raises(Enough):
        library.prune(model, TOKENS, pattern="2:4", observe=observe)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    library.prune(model, TOKENS, pattern="2:4")


def pruned_weights(model):
    library.prune(model, TOKENS, pattern="2:4")
    return model.state_dict()


def in_two_threads(variants):
    models = [random_model(variant) for variant in variants]  # one at a time: they share a seed
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(pruned_weights, models))


def test_two_threads_give_the_results_of_one():
    variants = ["llama", "opt", "mamba", "bloom"]
    expected = [pruned_weights(random_model(variant)) for variant in variants]
    for alone, beside in zip(expected, in_two_threads(variants), strict=True):
        for name, value in alone.items():
            torch.testing.assert_close(beside[name], value, rtol=1e-4, atol=1e-4)


def test_two_threads_restore_the_modes_of_torch():
    # What the forwards compute then depends on when the other thread solves: docs/embedding.md.
    torch.set_float32_matmul_precision("medium")
    try:
        in_two_threads(["llama", "opt"])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 1e308}, "damping is 1e+308; it must be from 0 to 1e+06"),
        ({"damping": float("nan")}, "damping is nan; it must be"),
        ({"damping": -1.0}, "damping is -1; it must be"),
        ({"block_size": 0}, "block size is 0; it must be at least 1"),
        ({"effort": "most"}, "effort 'most' is not one of fast, default, best"),
        ({"input_correction": 1.5}, "input correction is 1.5; it must be from 0 to 1"),
        ({"tuning_epochs": -1}, "tuning epochs is -1; it must be"),
        (
            {"error_aware": False, "drift_correction": 0.5},
            "drift correction has no effect in a layer-wise run",
        ),
    ],
)
def test_wrong_options_are_refused_before_any_change(options, message):
    model = random_model("llama")
    with pytest.raises(library.AptError, match=re.escape(message)):
        library.prune(model, TOKENS, pattern="2:4", options=library.PruneOptions(**options))
    dense = random_model("llama").state_dict()
    assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())


def test_sparsity_may_be_a_number_and_pattern_a_text():
    model, twin = random_model("opt"), random_model("opt")
    for given, made in ((model, (0.5, "2:4", 0.3)), (twin, ("0.5", NM(2, 4), Unstructured(0.3)))):
        chosen = library.Selection(overrides=(("*.fc1", made[1]), ("*.fc2", made[2])))
        library.prune(given, TOKENS, pattern=made[0], method="wanda", selection=chosen)
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)


@pytest.mark.parametrize(
    ("pattern", "selection", "message"),
    [
        (None, {}, "pattern is None; give an object of the class Pattern"),
        (1.5, {}, "outside [0, 1)"),
        ("0.5", {"overrides": (("*.fc1", "5:4"),)}, "5:4"),
        ("0.5", {"skip": "*.fc1"}, "skip is one text, '*.fc1', and not a tuple of globs; give ('*"),
        ("0.000001", {}, "nothing would be pruned: 1e-06 of the weights of"),
    ],
)
def test_patterns_that_fit_no_site_are_refused(pattern, selection, message):
    def prune():
        chosen = library.Selection(**selection)
        library.prune(random_model("opt"), TOKENS, pattern=pattern, selection=chosen)

    with pytest.raises(library.AptError, match=re.escape(message)):
        prune()


@pytest.mark.parametrize("seed", [10**23, 2**64, -(2**63) - 1])
def test_invalid_seed_is_refused(seed):
    with pytest.raises(library.AptError, match="out of range; give a whole number"):
        library.own_text(random_model("llama"), 1, 8, seed=seed)


@pytest.mark.parametrize("bos", [None, 0])
def test_own_text_has_the_requested_shape(bos):
    model = random_model("llama")
    for shape in ((0, 4), (2, 2), (2, 3)):
        assert library.own_text(model, *shape, bos=bos).shape == shape
    for shape in ((-1, 4), (2, 1)):
        with pytest.raises(library.AptError, match="cannot be generated"):
            library.own_text(model, *shape, bos=bos)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_run_in_inference_mode_gives_the_same_weights(pattern):
    model, expected = random_model("llama"), random_model("llama")
    library.prune(expected, TOKENS, pattern=pattern)
    with torch.inference_mode():
        pruned, _ = library.prune_copy(model, TOKENS, pattern=pattern)
        library.prune(model, TOKENS, pattern=pattern)
        assert torch.is_inference_mode_enabled()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(pruned.state_dict()[name], value)


def made_in_inference_mode():
    with torch.inference_mode():
        return random_model("opt")


def partly_on_meta():
    model = random_model("opt")
    model.model.decoder.layers[1].to("meta")
    return model


@pytest.mark.parametrize(
    ("made", "tokens", "message"),
    [
        (random_model, TOKENS.float(), "tokens are torch.float32; give token ids"),
        (random_model, random_tokens(2, 129), "129 tokens, and the model has 128 positions; give"),
        (random_model, TOKENS + 2048, "but the model has 2048 embeddings; the tokenizer belongs"),
        (random_model, TOKENS - 2048, "the tokenizer of these tokens gives ids from -"),
        (partly_on_meta, TOKENS, "layers.1.self_attn.k_proj.weight has no values in memory; load"),
        (made_in_inference_mode, TOKENS, "is an inference tensor, which cannot be tuned; load"),
    ],
)
def test_invalid_models_and_tokens_are_refused(made, tokens, message):
    model = made("opt") if made is random_model else made()
    with pytest.raises(library.AptError, match=re.escape(message)):
        library.prune(model, tokens, pattern="2:4")


def test_rotary_positions_may_exceed_the_configuration():
    model = random_model("llama")
    model.config.max_position_embeddings = 8
    report = library.prune(model, random_tokens(4, 16), pattern="2:4", method="wanda")
    assert report.sparsity == 0.5
