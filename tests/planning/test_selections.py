"""Random selections of sites in every kind of run: only the selected sites change."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.calibration.storage import DiskStore
from apt.engine.recipes import recipe_of
from apt.options import PruneOptions
from apt.planning.plan import Selection, make_plan
from apt.plugin.registry import registry
from apt.solver import NM, meets
from tests.helpers.families import CONFIGS, adapter_of, random_model, random_tokens
from tests.helpers.pruning import prune_blocks

PATTERN, TOKENS = NM(2, 4), random_tokens(samples=3, seqlen=12)
few = settings(max_examples=5, deadline=None)  # of each of many variants


@cache
def dense_model(variant):
    return random_model(variant)


@st.composite
def selections(draw, variant):
    """The full names of random sites; sites with a shared input are often separated."""
    model = dense_model(variant)
    names = [site.name for site in make_plan(model, adapter_of(model), PATTERN).sites]
    kept = draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)).filter(any))
    return [name for name, keep in zip(names, kept, strict=True) if keep]


def prune(model, only, folder, *, aware, ordered, effort, on_disk):
    method, adapter = registry().default_method(), adapter_of(model)
    plan = make_plan(model, adapter, PATTERN, Selection(only=tuple(only)))
    options = PruneOptions(effort=effort, error_aware=aware, ordered=ordered)
    store = DiskStore(folder) if on_disk else None
    return plan, prune_blocks(
        model, adapter, plan, TOKENS, method.load(), recipe_of(options, method), store=store
    )


VARIANTS = ("llama", "opt-350m", "bloom", "mamba", "qwen2-moe", "jamba", "falcon-h1")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name in CONFIGS])
def test_only_selected_sites_change(variant, tmp_path):
    @few
    @given(
        only=selections(variant),
        aware=st.booleans(),
        ordered=st.booleans(),
        effort=st.sampled_from(["fast", "default"]),
        on_disk=st.booleans(),
    )
    def holds(only, **how):
        dense = dense_model(variant)
        model = copy.deepcopy(dense)
        plan, done = prune(model, only, tmp_path, **how)
        assert sorted(site.name for site in done) == sorted(only)
        untouched = copy.deepcopy(model)
        for block in plan.blocks:
            for entry in block.pruned:
                pruned, before, whole = (
                    entry.site.weight(m.get_submodule(block.name)).data
                    for m in (model, dense, untouched)
                )
                assert meets(entry.site.oriented(pruned), PATTERN)
                whole.copy_(before)
        for name, value in untouched.state_dict().items():
            assert torch.equal(value, dense.state_dict()[name]), name

    holds()


@pytest.mark.parametrize(
    "options", [{}, {"method": "sm", "options": PruneOptions(error_aware=True)}], ids=str
)
@pytest.mark.parametrize("dense", ["q_proj", "k_proj", "v_proj", "gate_proj"])
def test_skipped_site_of_a_shared_input_stays_dense(dense, options):
    import apt

    model = copy.deepcopy(dense_model("llama"))
    selection = Selection(skip=(f"*.{dense}",))
    report = apt.prune(model, TOKENS, pattern="2:4", selection=selection, **options)
    assert len(report.skipped) == len(model.model.layers)
