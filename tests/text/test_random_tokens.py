"""Copies of samples with random tokens: their number, their content, and the default runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apt as library
from apt.engine.recipes import augmentation_of
from apt.options import PruneOptions
from apt.plugin.registry import registry
from apt.text.augmentation import RandomTokens
from tests.helpers.families import FAMILIES, random_model, random_tokens

SEQLEN, VOCABULARY = 16, 1000


def samples(count):
    """Tokens from which the sample and the position follow."""
    return torch.arange(count * SEQLEN).view(count, SEQLEN) % VOCABULARY


@given(given=st.integers(1, 200), seqlen=st.integers(1, 9000))
def test_number_of_copies_is_a_fourth_up_to_4096_tokens(given, seqlen):
    count = RandomTokens().samples(given, seqlen)
    assert 1 <= count <= max(1, given / 4 + 1)
    assert count == 1 or count * seqlen <= 4096


def test_copies_have_a_share_of_random_tokens():
    tokens = samples(40)
    both = RandomTokens(share=0.5).beside(tokens, VOCABULARY)
    assert both.shape == (50, SEQLEN)
    assert both.dtype == tokens.dtype
    kept = (both[:, None] == tokens).sum(2).max(1).values
    assert (kept == SEQLEN).sum() == 40  # all that are given are still there, in another order
    copies = kept[kept < SEQLEN].float()
    assert len(copies) == 10
    assert 0.3 < float(copies.mean()) / SEQLEN < 0.75
    assert set(both[:, 0].tolist()) == set(tokens[:, 0].tolist())
    assert int(both.max()) < VOCABULARY


def test_equal_seeds_give_equal_copies():
    first, again = (RandomTokens().beside(samples(8), VOCABULARY) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, RandomTokens().beside(samples(8), VOCABULARY, seed=1))


def test_share_0_gives_unchanged_copies():
    both = RandomTokens(share=0.0).beside(samples(4), VOCABULARY)
    assert len(both) == 5
    assert len(both.unique(dim=0)) == 4


@pytest.mark.parametrize("variant", FAMILIES.values())
def test_default_run_without_own_text_uses_random_tokens(variant):
    options = library.PruneOptions(own_samples=0)
    model, tokens = random_model(variant), random_tokens(6, 32)
    report = library.prune(model, tokens, pattern="2:4", options=options)
    assert {site.tokens for site in report.sites if ".experts." not in site.name} == {8 * 32}
    assert report.options["random_tokens"] == 0.25
    assert report.calibration["shape"] == [6, 32]


@pytest.mark.parametrize(
    ("method", "effort", "aware", "expected"),
    [
        ("admm", "default", None, RandomTokens()),
        ("admm", "fast", None, None),
        ("admm", "best", None, None),
        ("admm", "default", False, None),
        ("ss", "default", True, None),
    ],
)
def test_random_tokens_are_the_default_of_error_aware_admm_runs(method, effort, aware, expected):
    spec, options = registry().methods.get(method), PruneOptions(effort=effort, error_aware=aware)
    assert augmentation_of(options, spec, 6, 32).random_tokens == expected
