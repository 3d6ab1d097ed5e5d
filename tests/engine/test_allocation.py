"""Allocations at the shell: streamed, resumed, mixed n:m, dry runs, plots, and bad input."""

import json
from pathlib import Path

import pytest
import torch

import apt as library
from apt.checkpoints.safetensors_io import Shards
from apt.planning.allocation import with_shares
from apt.planning.plan import make_plan
from apt.solver import NM, MixedNM, Unstructured, parse_pattern
from tests.helpers.families import adapter_of, random_model, random_tokens
from tests.helpers.interrupted import PLACES, KilledError, cut

SMALL = ("--samples", 4, "--seqlen", 32, "--effort", "fast")
AUTO = ("--sparsity", 0.6, "--allocation", "auto")


def report_of(path):
    return json.loads(Path(path, "apt_report.json").read_text())


def zeros_of(report):
    return {site["name"]: site["zeros"] for site in report["sites"]}


@pytest.mark.parametrize("name", ["owl", "alphapruning", "auto"])
def test_streamed_run_has_the_allocation_of_a_run_in_memory(name, checkpoint, apt):
    command = ("prune", checkpoint("llama"), "--sparsity", 0.6, "--allocation", name, *SMALL)
    for out, mode in (("memory", ()), ("disk", ("--stream",))):
        result = apt(*command, *mode, "-o", out)
        assert result.code == 0, result.err
        assert apt("verify", out).code == 0
    memory, disk = report_of("memory"), report_of("disk")
    assert zeros_of(memory) == zeros_of(disk)
    assert len(set(zeros_of(disk).values())) > 3
    for key in Shards(Path("memory")).entries:
        first, second = Shards(Path("memory")).read(key), Shards(Path("disk")).read(key)
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_resumed_run_keeps_its_allocation(checkpoint, apt, output_of, monkeypatch):
    command = ("prune", checkpoint("llama"), *AUTO, *SMALL, "--stream")
    whole = output_of(*command)
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 5, KilledError())
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
    lines = Path(".out.apt/journal.jsonl").read_text()
    assert lines.count('"shares"') == 1
    with monkeypatch.context() as patch:
        patch.setattr("apt_plugins.budget.auto", None)  # not computed again
        result = apt(*command, "-o", "out", "--resume")
    assert result.code == 0, result.err
    assert zeros_of(report_of("out")) == zeros_of(report_of(whole))


def test_mixed_nm_has_the_exact_total_and_is_verified(apt, checkpoint):
    result = apt("prune", checkpoint("llama"), "--pattern", "auto:8", "--sparsity", 0.5, *SMALL,
                 "-o", "out")  # fmt: skip
    assert result.code == 0, result.err
    report = report_of("out")
    patterns = {site["pattern"] for site in report["sites"]}
    assert len(patterns) > 1
    assert all(pattern.endswith(":8") for pattern in patterns)
    dense = {name: 0 for name in report["skipped"]}
    assert sum((zeros_of(report) | dense).values()) == 0.5 * total_size(str(checkpoint("llama")))
    assert report["options"]["pattern"] == "auto:8@0.5"
    assert report["options"]["allocation"] == "auto"
    assert apt("verify", "out").code == 0


def total_size(reference):
    from apt.checkpoints.load import open_skeleton
    from apt.locations.model_source import find
    from apt.plugin.registry import registry

    skeleton = open_skeleton(find(reference, registry()), registry())
    return sum(
        s.size for s in make_plan(skeleton.module, skeleton.adapter, Unstructured(0.5)).sites
    )


def test_allocation_of_levels_may_leave_a_site_dense():
    model = random_model("llama")
    plan = make_plan(model, adapter_of(model), MixedNM(0.25, m=8))
    first = plan.sites[0].name
    rest = 0.25 * sum(s.size for s in plan.sites) / sum(s.size for s in plan.sites[1:])
    shares = {site.name: 0.0 if site.name == first else rest for site in plan.sites}
    found = with_shares(plan, "mine", shares)
    assert found.dense == [first]
    assert {type(s.pattern) for s in found.sites} == {NM, type(None)}
    pruned = sum(s.size * s.pattern.sparsity for s in found.sites if s.pattern)
    assert pruned == 0.25 * sum(s.size for s in plan.sites)


@pytest.mark.parametrize("method", ["wanda", "ss", "mm", "admm"])
def test_every_method_prunes_mixed_nm(method):
    model = random_model("llama")
    report = library.prune(model, random_tokens(), pattern="auto:4@0.5", method=method)
    zeros = sum(site.zeros for site in report.sites)
    assert zeros == 0.5 * (sum(s.size for s in report.sites) + sum(
        model.get_submodule(name).weight.numel() for name in report.skipped
    ))  # fmt: skip
    assert parse_pattern("auto:4@50%") == MixedNM(0.5, m=4)


def test_dry_run_shows_the_levels_and_writes_nothing(apt, checkpoint, tmp_path):
    command = ("prune", checkpoint("llama"), *SMALL, "--dry-run", "--json")
    plain = apt(*command, "--sparsity", 0.6, "--allocation", "uniform")
    shared = apt(*command, *AUTO)
    assert shared.code == 0, shared.err
    levels = [{s["pattern"] for s in json.loads(run.out)["sites"]} for run in (plain, shared)]
    assert levels[0] == {"0.6"}
    assert len(levels[1]) > 5
    streamed = apt(*command, *AUTO, "--stream")
    assert streamed.code == 0, streamed.err
    assert json.loads(streamed.out)["sites"] == json.loads(shared.out)["sites"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("samples", [(4, 2), (0, 3)])
def test_dry_run_with_generated_text_shows_the_levels_of_the_run(samples, apt, checkpoint):
    given, own = samples
    command = ("prune", checkpoint("llama"), *AUTO, "--seqlen", 32, "--effort", "fast",
               "--samples", given, "--own-samples", own)  # fmt: skip
    plans = [apt(*command, "--dry-run", "--json", *mode) for mode in ((), ("--stream",))]
    assert [plan.code for plan in plans] == [0, 0], plans[0].err
    assert apt(*command, "-o", "out").code == 0
    written = {site["name"]: site["pattern"] for site in report_of("out")["sites"]}
    for plan in plans:
        assert {s["name"]: s["pattern"] for s in json.loads(plan.out)["sites"]} == written


def test_summary_counts_the_dense_sites_of_an_allocation(apt, checkpoint):
    command = ("prune", checkpoint("llama"), "--pattern", "auto:4", "--sparsity", 0.3, *SMALL[:4],
               "--method", "wanda", "--skip", "*.layers.0.*.q_proj")  # fmt: skip
    result = apt(*command, "-o", "out")
    assert result.code == 0, result.err
    dense = len(report_of("out")["skipped"]) - 1
    assert dense > 0
    assert f"zeros in the pruned sites ({dense} more left dense by auto), verified" in result.out
    uniform = apt(*command, "--allocation", "uniform", "--overwrite", "-o", "out")
    assert "zeros in the pruned sites, verified" in uniform.out, uniform.err


@pytest.mark.parametrize(("unit", "name"), [("block", "auto-block"), ("model", "auto")])
def test_per_block_and_per_model_equal_their_allocations(unit, name, apt, checkpoint):
    command = ("prune", checkpoint("opt"), "--sparsity", 0.6, *SMALL[:4], "--method", "wanda")
    assert apt(*command, "--per", unit, "-o", "unit").code == 0
    assert apt(*command, "--allocation", name, "-o", "name").code == 0
    assert zeros_of(report_of("unit")) == zeros_of(report_of("name"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pattern", "auto:8"), "pattern auto:8 needs a sparsity"),
        (("--pattern", "auto:x", "--sparsity", "0.5"), "is neither a sparsity"),
        (("--pattern", "auto:1", "--sparsity", "0.5"), "groups of 1 weights"),
        (("--pattern", "auto:8", "--sparsity", "1.5"), "is outside [0, 1)"),
        (("--pattern", "auto:8", "--sparsity", "0"), "no n:8 has a sparsity of 0"),
        (("--pattern", "auto:7", "--sparsity", "0.5"), "not a multiple of 7"),
        (("--pattern", "auto:8", "--sparsity", "0.95"), "no n:8 has a sparsity above 0.875"),
        (("--pattern", "2:4", "--per", "model"), "per model needs a sparsity"),
        (("--sparsity", "0.5", "--per", "model", "--allocation", "owl"), "exclude each other"),
        (("--sparsity", "0.5", "--per", "room"), "not one of row, layer, block, model"),
    ],
)
def test_bad_allocation_is_a_one_line_error(arguments, message, apt):
    result = apt("prune", "--adapter", "llama", *arguments, "-o", "out")
    assert result.code == 2
    assert message in result.err
    assert not Path("out").exists()


def test_default_allocation_distributes_the_sparsity_and_is_verified(apt, checkpoint):
    command = ("prune", checkpoint("llama"), *SMALL, "--sparsity", 0.6)
    result = apt(*command, "-o", "out")
    assert result.code == 0, result.err
    assert "allocation: auto (default)" in result.err
    sites = report_of("out")["sites"]
    assert len({site["pattern"] for site in sites}) > 5
    total = 0.6 * sum(site["shape"][0] * site["shape"][1] for site in sites)
    assert abs(sum(site["zeros"] for site in sites) - total) < len(sites)
    for given, code in (((), 0), ((0.6,), 0), ((0.6, "--per", "layer"), 1), ((0.7,), 1)):
        checked = apt("verify", "out", *(("--sparsity", *given) if given else ()))
        assert checked.code == code, checked.err


@pytest.mark.parametrize(
    "options",
    [("--allocation", "uniform"), ("--per", "layer"), ("--layer-wise",), ("--method", "alps")],
)
def test_sparsity_is_uniform_on_request_and_for_baselines(options, apt, checkpoint):
    command = ("prune", checkpoint("llama"), *SMALL[:4], "--sparsity", 0.6, *options)
    result = apt(*command, "-o", "out")
    assert result.code == 0, result.err
    assert {site["pattern"] for site in report_of("out")["sites"]} == {"0.6"}
