"""Sparsities that round to no weight."""

import pytest

from tests.helpers import TEXT

Q = ("--samples", 4, "--seqlen", 64, "--method", "wanda", "--calibration", TEXT)


@pytest.mark.parametrize("per", ["layer", "row"])
def test_sparsity_that_rounds_to_no_weight_is_refused(apt, per):
    run = apt("prune", "zoo:llama", *Q, "--sparsity", "0.000001", "--per", per)
    assert run.code == 2
    assert "nothing would be pruned: 1e-06 of the weights of model.layers.0" in run.err
    assert "rounds to none" in run.err


def test_inspect_counts_sites_that_lose_no_weight(apt):
    # k_proj and v_proj have a third of the weights of q_proj, and round to none.
    run = apt("inspect", "zoo:llama", "--sparsity", "0.00002", "--samples", 1, "--seqlen", 64)
    assert run.code == 0
    assert "sites lose no weight: 2e-05 of the weights of model.layers.0.self_attn." in run.err
