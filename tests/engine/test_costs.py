"""The work of a run by step, compared with torch's count of operations, and the time of a run."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apt.adapter.text_config import hidden_size
from apt.checkpoints.load import load, open_skeleton
from apt.engine.costs import MACHINES, Machine, PlannedRun, Work, measure_machine
from apt.locations.model_source import find
from apt.options import PruneRun
from apt.planning.plan import Selection, make_plan, read_pattern
from apt.plugin.registry import registry
from apt.solver import Gram, SolverOptions, Unstructured
from apt.solver.admm_search import admm
from tests.helpers.families import STACKED

LLAMA = "zoo:llama"


def work(effort="fast", samples=4, seqlen=128, model=LLAMA, *, allocated=False, **options):
    skeleton = open_skeleton(find(model, registry()), registry())
    plan = make_plan(skeleton.module, skeleton.adapter, read_pattern("0.5"), Selection(), "layer")
    run = PruneRun(effort=effort, samples=samples, seqlen=seqlen, **options)
    return PlannedRun(skeleton, plan, run, allocated=allocated)


def operations(step):
    return step.fp32 + step.bf16


def test_work_of_forwards_equals_the_count_of_torch():
    planned = work(samples=2, seqlen=64)
    model = load(planned.skeleton).module
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(2, 64, dtype=torch.long), logits_to_keep=1)
    head = 2 * 2 * hidden_size(model.config) * model.config.vocab_size
    passes = 3  # of the effort fast
    rotary = 0.01
    assert operations(planned.steps("fast")["forwards"]) / passes == pytest.approx(
        counter.get_total_flops() - head, rel=rotary
    )


def test_work_of_the_search_equals_the_count_of_torch():
    """The products of a search, its factorisations and its joint solves, for one site."""
    planned = work("default")
    site = max(planned.plan.sites, key=lambda site: site.size)
    gram = Gram.of(torch.randn(600, site.shape[1]))
    with FlopCounterMode(display=False) as counter:
        admm(torch.randn(site.shape), gram, Unstructured(0.5, "layer"), SolverOptions())
    product = 2 * site.size * site.shape[1]
    steps = planned.steps("default")
    whole = sum(2 * s.size * s.shape[1] for s in planned.plan.sites)
    predicted = product / whole * (operations(steps["search"]) + operations(steps["joint solves"]))
    # torch counts neither factorisations nor triangular solves.
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.35)


def test_more_effort_has_more_work_and_more_steps():
    found = {effort: work().steps(effort) for effort in ("fast", "default", "best")}
    assert "tuning" not in found["fast"]
    assert "own text" in found["best"]
    assert "allocation" in work(allocated=True).steps("fast")
    sums = [sum(operations(step) for step in steps.values()) for steps in found.values()]
    assert sums == sorted(sums)


def test_forward_counts_the_picked_experts_only():
    planned = work(model="zoo:moe")
    every = sum(2 * site.size for site in planned.plan.sites) * 3 * planned.tokens
    assert operations(planned.steps("fast")["forwards"]) < every


def test_machine_adds_the_seconds_of_all_work():
    assert Machine(2.0, 4.0, 8.0).seconds(Work(2.0, 4.0, 8.0)) == 3.0


def test_speeds_of_this_machine_are_measured():
    machine = measure_machine("cpu")
    assert machine.measured
    assert min(machine.fp32, machine.bf16, machine.bandwidth) > 1e7


def test_inspect_prints_the_time_on_another_machine(apt):
    run = apt("inspect", LLAMA, "--sparsity", 0.5, "--on", "4090", "--json")
    assert run.code == 0, run.err
    seconds = json.loads(run.out)["seconds"]
    assert list(seconds) == ["fast", "default", "best"]
    planned = work("fast", samples=128, seqlen=512, allocated=True)
    assert seconds["fast"] == pytest.approx(
        {step: MACHINES["4090"].seconds(part) for step, part in planned.steps("fast").items()}
    )


SHAPE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "dtype": "bfloat16",
         "max_position_embeddings": 4096, "architectures": ["LlamaForCausalLM"],
         "model_type": "llama", "vocab_size": 32000}  # fmt: skip


EXPERTS = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "architectures": ["MixtralForCausalLM"],
           "model_type": "mixtral"}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "words", "message"),
    [
        ({}, ("--on", "mi300x"), "with --activations cpu"),
        ({}, ("--on", "h100"), "with --stream --activations cpu"),
        pytest.param(
            EXPERTS, ("--on", "4090"), "; 17.8 GiB with --stream --activations cpu --effort fast",
            marks=pytest.mark.skipif(not STACKED, reason="its experts are modules, each a site"),
        ),
        ({}, ("--on", "4090", "--samples", 512),
         "; even with --stream --activations cpu --effort fast"),
    ],
)  # fmt: skip
def test_inspect_prints_the_flags_with_which_a_model_fits(apt, tmp_path, shape, words, message):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | shape))
    run = apt("inspect", tmp_path, "--sparsity", 0.5, *words)
    assert run.code == 0, run.err
    assert message in " ".join(run.out.split())


def test_unknown_machine_is_refused(apt):
    run = apt("inspect", LLAMA, "--on", "h1")
    assert run.code == 2
    assert "on 'h1' is not one of h100, h200, a100, 4090, mi300x (--on)" in run.err


def test_dry_run_counts_the_memory_of_its_options(apt):
    needs = {}
    for words in ((), ("--effort", "fast"), ("--layer-wise",)):
        how = ("prune", LLAMA, "--sparsity", 0.5, "--samples", 8, "--dry-run", "--json", *words)
        run = apt(*how)
        assert run.code == 0, run.err
        needs[words] = json.loads(run.out)["needs"]
    usual, fast, layer_wise = needs.values()
    assert fast["working"] < usual["working"]
    # One stream of 192, in place of two, the inputs, the stored products and the drift.
    assert layer_wise["activations"] < fast["activations"] / 2
    assert {each["weights"] for each in needs.values()} == {usual["weights"]}


def test_dry_run_counts_no_solve_if_only_blocks_are_dropped(apt):
    run = apt("shrink", LLAMA, "--depth-only", "--layer-wise", "--dry-run", "--json")
    assert run.code == 0, run.err
    needs = json.loads(run.out)["needs"]
    assert needs["grams"] == 0
    assert needs["memory"] > needs["process"]


def test_work_depends_on_tuning_epochs_and_own_samples():
    steps = work(tuning_epochs=0, own_samples=8).steps("default")
    assert "tuning" not in steps
    assert "own text" in steps
    longer = work(tuning_epochs=4).steps("default")["tuning"]
    usual = work().steps("default")["tuning"]
    assert operations(longer) == pytest.approx(4 * operations(usual))
