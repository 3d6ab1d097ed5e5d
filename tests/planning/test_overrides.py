"""Overrides with every allocation, and the checks of `verify` against the options of a run."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import apt as library
from apt.errors import AptError
from apt.planning.plan import Selection
from apt.solver import NM, Unstructured, parse_pattern
from tests.helpers import TEXT
from tests.helpers.families import random_model, random_tokens

ALLOCATIONS = ("uniform", "owl", "alphapruning", "alphapruning-matrix", "alphapruning-mid", "atp",
               "auto", "auto-block", "auto-search")  # fmt: skip
FAST = [name for name in ALLOCATIONS if name not in ("atp", "auto-search")]
TOKENS = random_tokens(samples=6)
QUICK = ("--samples", 2, "--seqlen", 32, "--calibration", TEXT, "--method", "magnitude")


def zeros(model, name):
    return int((model.get_submodule(name).weight == 0).sum())


@pytest.mark.parametrize(
    ("allocation", "own"),
    [(a, own) for a in ALLOCATIONS for own in ("0.3", "2:4", "0.9") if own == "2:4" or a in FAST],
)
def test_override_is_exact_and_other_sites_keep_their_total(allocation, own):
    model = random_model("llama")
    report = library.prune(
        model,
        TOKENS,
        pattern="0.6",
        method="magnitude",
        allocation=allocation,
        selection=Selection(overrides=(("*.down_proj", own),)),
    )
    fixed = [site for site in report.sites if site.kind == "mlp.down_proj"]
    rest = [site for site in report.sites if site.kind != "mlp.down_proj"]
    for site in fixed:
        pattern = parse_pattern(own)
        share = pattern.sparsity
        assert (site.pattern, site.zeros) == (str(pattern), round(share * site.size))
        assert zeros(model, site.name) == site.zeros
    assert sum(s.zeros for s in rest) == sum(Unstructured(0.6).count(s.size) for s in rest)


@pytest.mark.parametrize("allocation", ["alphapruning", "auto"])
def test_verify_finds_a_pattern_other_than_the_override(apt, checkpoint, allocation):
    run = ("prune", checkpoint("llama"), "--sparsity", 0.6, "--allocation", allocation, *QUICK,
           "--override", "*.down_proj=0.3", "-o", "out")  # fmt: skip
    assert apt(*run).code == 0
    assert apt("verify", "out").code == 0
    path = Path("out/apt_report.json")
    record = json.loads(path.read_text())
    site = next(s for s in record["sites"] if s["kind"] == "mlp.down_proj")
    site["pattern"] = "0.42"  # as of a run that ignored the override
    path.write_text(json.dumps(record))
    result = apt("verify", "out")
    assert result.code == 1
    assert f"{site['name']}: 0.3 was asked for, and the report has 0.42" in result.out


def test_verify_finds_an_allocation_with_too_few_zeros(apt, checkpoint):
    run = ("prune", checkpoint("llama"), "--sparsity", 0.6, "--allocation", "owl", *QUICK, "-o",
           "out")  # fmt: skip
    assert apt(*run).code == 0
    path = Path("out/apt_report.json")
    record = json.loads(path.read_text())
    record["options"]["pattern"] = "0.7"
    path.write_text(json.dumps(record))
    result = apt("verify", "out")
    assert result.code == 1
    assert "were asked for" in result.out


def test_verify_accepts_sites_that_an_allocation_left_dense(apt):
    run = ("prune", "zoo:llama", "--pattern", "auto:8", "--sparsity", 0.2, *QUICK, "-o", "out")
    assert apt(*run).code == 0
    record = json.loads(Path("out/apt_report.json").read_text())
    assert record["skipped"]  # else this test shows nothing
    assert apt("verify", "out").code == 0


@pytest.mark.parametrize("change", [
    {"overrides": [1]}, {"overrides": {"*": [2]}}, {"pattern": 7}, {"only": 3}, {"also": 3},
    {"skip": [None]},
], ids=str)  # fmt: skip
def test_report_with_wrong_types_is_refused_in_one_line(apt, checkpoint, output_of, change):
    shutil.copytree(output_of("prune", checkpoint("opt"), "--sparsity", 0.5, *QUICK), "out")
    path = Path("out/apt_report.json")
    record = json.loads(path.read_text())
    record["options"] |= change
    path.write_text(json.dumps(record))
    result = apt("verify", "out")
    assert result.code in (1, 2)
    assert "Traceback" not in result.err


def test_verify_refuses_too_many_zeros_unless_at_least(apt, checkpoint, output_of):
    shutil.copytree(output_of("prune", checkpoint("opt"), "--sparsity", 0.5, *QUICK), "out")
    tensors = load_file("out/model.safetensors")
    name = "model.decoder.layers.0.fc1"
    tensors[f"{name}.weight"][:40] = 0
    save_file(tensors, "out/model.safetensors", {"format": "pt"})
    for pattern in ((), ("--sparsity", 0.5)):
        result = apt("verify", "out", *pattern)
        assert result.code == 1
        assert f"{name}: " in result.out
        assert "expected" in result.out
    Path("out/apt_report.json").unlink()
    assert apt("verify", "out", "--sparsity", 0.5).code == 1
    assert apt("verify", "out", "--sparsity", 0.5, "--at-least").code == 0
    assert "at least needs a pattern" in apt("verify", "out", "--at-least").err


def test_override_is_counted_in_the_unit_of_the_run(apt):
    """Counted by row, 0.303 of 192 inputs are 58 in each row, fewer than 0.303 of the layer."""
    run = ("prune", "zoo:llama", *QUICK[:-1], "wanda", "--override", "*.q_proj=0.303", "-o", "out")
    assert apt(*run, "--pattern", "2:4").code == 0
    assert apt("verify", "out").code == 0
    run = ("prune", "zoo:llama", *QUICK, "--override", "*.q_proj=0.303", "-o", "rows")
    assert apt(*run, "--sparsity", 0.5, "--per", "row").code == 0
    weight = load_file("rows/model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert set((weight == 0).sum(1).tolist()) == {58}


def test_overrides_without_effect_are_refused():
    def prune(**selection):
        library.prune(random_model("llama"), TOKENS, pattern="0.6", method="magnitude",
                      selection=Selection(**selection))  # fmt: skip

    for selection in (
        {"overrides": (("*.nothing", "0.3"),)},
        {"only": ("*.nothing",)},
        {"skip": ("*.nothing",)},
    ):
        with pytest.raises(AptError, match=r"'\*\.nothing' matches no site"):
            prune(**selection)
    with pytest.raises(AptError, match="has no effect: the sites that it matches stay dense"):
        prune(skip=("*.q_proj",), overrides=(("*.q_proj", "0.3"),))
    with pytest.raises(AptError, match=r"'\*\.q_proj=0\.3' has no effect"):
        prune(overrides=(("*.q_proj", "0.3"), ("*_proj", NM(2, 4))))


def test_repeated_glob_has_its_last_position_in_the_report():
    given = (("*.q_proj", "0.3"), ("*_proj", "0.4"), ("*.q_proj", "0.5"))
    assert list(Selection(overrides=given).record()["overrides"].items()) == [
        ("*_proj", "0.4"),
        ("*.q_proj", "0.5"),
    ]


def test_allocation_without_free_sites_is_refused():
    with pytest.raises(AptError, match="n:m or overrides fix the sparsity of every site"):
        library.prune(random_model("llama"), TOKENS, pattern="0.5", allocation="owl",
                      selection=Selection(overrides=(("*", "0.3"),)))  # fmt: skip


def greedy(weight, gram, pattern, options):
    """A method that removes nine of ten weights for every pattern."""
    from apt.solver import Solution

    mask = weight.abs() < weight.abs().flatten().kthvalue(int(0.9 * weight.numel())).values
    return Solution(weight.masked_fill(mask, 0), mask)


def one_more(weight, gram, pattern, options):
    """A method that removes one weight more than its mask shows."""
    from apt.solver import ss

    result = ss(weight, gram, pattern, options)
    place = result.weight.flatten().nonzero()[0]
    result.weight.view(-1)[place] = 0
    return result


@pytest.mark.parametrize("method", [greedy, one_more])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_error_names_a_method_that_removes_too_much(method, pattern):
    with pytest.raises(AptError, match=rf"method {method.__name__} removes [\d,]+ weights more of"):
        library.prune(random_model("opt"), TOKENS, pattern=pattern, method=method)


def test_zeros_of_the_dense_model_count_as_pruned():
    model = random_model("opt")
    name = "model.decoder.layers.0.fc1"
    weight = model.get_submodule(name).weight
    weight.data[: len(weight) * 3 // 4] = 0
    report = library.prune(model, TOKENS, pattern="0.5", method="ss")
    site = next(s for s in report.sites if s.name == name)
    assert site.zeros >= weight.numel() // 2
    assert site.zeros == zeros(model, name)
