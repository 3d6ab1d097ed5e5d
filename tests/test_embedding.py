"""APT inside another program: quiet, undoable, alongside other runs."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import apt as library
from apt.events import SitePruned
from tests.families import random_model, random_tokens

DOCS = Path(__file__).parents[1] / "docs"
TOKENS = random_tokens(samples=6)


def test_the_documents_examples_run():
    text = (DOCS / "embedding.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert code.count("import apt\n") == 1
    exec(compile(code, "embedding.md", "exec"), {"__name__": "example"})


def test_a_copy_is_pruned_as_the_model_would_be():
    model, twin = random_model("llama"), random_model("llama")
    pruned, report = library.prune_copy(model, TOKENS, pattern="2:4")
    library.prune(twin, TOKENS, pattern="2:4")
    assert report.sparsity == 0.5
    for name, value in random_model("llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(pruned.state_dict()[name], twin.state_dict()[name])


def test_nothing_is_printed_and_no_random_state_is_drawn_from(capfd):
    model, state = random_model("opt"), torch.get_rng_state()
    library.prune(model, TOKENS, pattern="0.5")
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


class Enough(Exception):
    pass


@pytest.mark.parametrize("variant", ["llama", "mamba"])
def test_an_observer_cancels_and_leaves_the_model_usable(variant):
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


def test_two_threads_give_what_one_gives_and_restore_what_was_allowed():
    variants = ["llama", "opt", "mamba", "bloom"]

    def run(variant):
        model = random_model_of[variant]
        library.prune(model, TOKENS, pattern="2:4")
        return model.state_dict()

    random_model_of = {variant: random_model(variant) for variant in variants}
    expected = {variant: run(variant) for variant in variants}
    random_model_of = {variant: random_model(variant) for variant in variants}
    torch.set_float32_matmul_precision("medium")
    try:
        with ThreadPoolExecutor(2) as pool:
            found = dict(zip(variants, pool.map(run, variants), strict=True))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for variant in variants:
        for name, value in expected[variant].items():
            torch.testing.assert_close(found[variant][name], value, rtol=1e-4, atol=1e-4)
