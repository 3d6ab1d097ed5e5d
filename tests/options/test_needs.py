"""Each option is used or refused; no option is ignored."""

from functools import cache
from pathlib import Path

import pytest
import torch

import apt as library
from apt.options import PruneOptions, RecoverOptions, RecoverRun, ShrinkOptions
from apt.plugin.registry import registry
from tests.helpers import TEXT
from tests.helpers.commands import declared, kinds_of, needed_values
from tests.helpers.families import random_model, random_tokens

KINDS = {kind for act in declared().values() for kind in kinds_of(act).values()}
KINDS |= {PruneOptions, RecoverOptions, ShrinkOptions}
NEEDY = [
    pytest.param(kind, one, id=f"{kind.__name__}-{one.name}")
    for kind in sorted(KINDS, key=lambda kind: kind.__name__)
    for one in kind.OPTIONS
    if one.option.needs
]
OTHER = {"scale_group": 64, "metrics": ("accuracy",), "evaluations": 7, "minutes": 2.0}
GIVEN = {"quantize": "int4", "evaluation": "builtin", "mode": "search"}


@pytest.mark.parametrize(("kind", "one"), NEEDY)
def test_option_without_the_needed_option_is_refused(kind, one):
    needed, given = (
        one.option.needs.partition("=")[0],
        needed_values(kind) | {one.name: OTHER[one.name]},
    )
    with pytest.raises(library.AptError, match=f"{one.words} has no effect without") as caught:
        kind(**given).check()
    assert caught.value.options == (one.name, needed)
    kind(**given, **{needed: GIVEN[needed]}).check()
    kind(**needed_values(kind), **{one.name: one.default}).check()


def test_each_condition_names_an_option():
    for kind in KINDS:
        names = {one.name for one in kind.OPTIONS}
        for one in kind.OPTIONS:
            for needed in (one.option.needs, one.option.needs_in_run):
                assert not needed or needed.partition("=")[0] in names


VALUES = {
    "own_samples": 2, "random_tokens": 0.5, "effort": "best", "error_aware": True,
    "input_correction": 0.5, "drift_correction": 0.5, "ordered": True, "tuning_epochs": 2,
    "tuning_rate": 0.1, "tuning_tokens": 48, "damping": 0.5, "row_importance": 1.0,
    "norm_epochs": 2, "permute": True, "block_size": 8, "quantize": "int4", "scale_group": 32,
    "compute": "bfloat16",
}  # fmt: skip
RUNS = {
    "magnitude": ("magnitude", "2:4", {}),
    "ss": ("ss", "0.5", {}),
    "wanda, by rows": ("wanda", "0.5", {"error_aware": True}),
    "wanda, integers": ("wanda", "2:4", {"quantize": "int8"}),
    "admm, layer-wise": ("admm", "0.5", {"error_aware": False}),
    "admm, fast": ("admm", "2:4", {"effort": "fast"}),
    "admm, layers": ("admm", "0.5", {"effort": "fast"}),
}
# Every method takes damping, since a Gram matrix may be factorised for other reasons; a training of
# norms that does not help changes nothing.
TAKEN = {("magnitude", "damping"), *((run, "norm_epochs") for run in RUNS)}


@cache
def result(run, **more):
    """The weights of a run, its errors, and its options with all defaults."""
    method, pattern, base = RUNS[run]
    model, options = random_model("llama"), PruneOptions(**base | more)
    tokens = random_tokens(samples=8)
    report = library.prune(model, tokens, pattern=pattern, method=method, options=options)
    weights = torch.cat([value.flatten() for value in model.state_dict().values()])
    return weights, [site.relative_error for site in report.sites], report.options


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", [one.name for one in PruneOptions.OPTIONS])
def test_each_option_of_pruning_changes_the_result_or_is_refused(run, name):
    weights, errors, options = result(run)
    value = not options[name] if VALUES[name] is True else VALUES[name]
    try:
        changed, after, _ = result(run, **{name: value})
        used = not torch.equal(weights, changed) or errors != after
    except library.AptError as error:
        used = name in error.options
    assert used or value is False or (run, name) in TAKEN


def test_options_of_sparse_models_are_refused_for_smaller_models():
    for options in (PruneOptions(row_importance=1.0), PruneOptions(permute=True)):
        with pytest.raises(library.AptError, match="method joint does not use .*; leave it out"):
            library.shrink(random_model("llama"), random_tokens(), options=options)


REFUSED = {
    "scale group has no effect without quantize": ("prune", "--scale-group", 64),
    "(--scale-group, --quantize)": ("pack", "--scale-group", 64),
    "minutes has no effect without search": ("shrink", "--minutes", 2),
    "evaluations has no effect without search": ("shrink", "--evaluations", 9),
    "the number of channels is given twice: 32 and 48": (
        "shrink", "--size", "channels=32", "--size", "channels=48",
    ),
    "a share of 0.5 is in place of the given blocks or groups": (
        "shrink", "--keep", 0.5, "--size", "channels=32",
    ),
    "recovery spp does not use dense; those that use it: distill, norms (--dense)": (
        "recover", "--kind", "spp", "--dense", "nowhere",
    ),
    "tuning rate has no effect without tuning": ("prune", "--method", "wanda", "--tuning-rate", 1),
    "tuning tokens has no effect without tuning": (
        "prune", "--method", "wanda", "--tuning-tokens", 9,
    ),
    "metrics has no effect without evaluation": ("prune", "--metric", "accuracy"),
    "(--metric, --eval)": ("recover", "--metric", "accuracy"),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_options_without_effect_are_one_line_errors(message, apt, checkpoint):
    command, *more = REFUSED[message]
    texts = () if command == "pack" else ("--calibration", TEXT)
    run = apt(command, checkpoint("llama"), *more, *texts, "-o", "out")
    assert run.code == 2
    assert message in run.err.splitlines()[-1]
    assert not Path("out").exists()


def test_size_given_twice_in_a_file_is_refused(apt, checkpoint):
    Path("o.toml").write_text('size = ["channels=32", "channels=32"]')
    run = apt("shrink", checkpoint("llama"), "--config", "o.toml", "-o", "out")
    assert run.code == 2
    assert "the number of channels is given twice" in run.err


def test_dense_model_is_accepted_by_recoveries_with_a_teacher_only():
    known = registry().recoveries.specs
    for spec in known.values():
        options = RecoverRun(model="m", dense="d")
        if spec.teacher:
            options.check_used(spec, known.values(), "recovery")
        else:
            with pytest.raises(library.AptError, match="does not use dense"):
                options.check_used(spec, known.values(), "recovery")


def test_resuming_a_training_without_its_folder_is_refused():
    with pytest.raises(library.AptError, match="no training to resume without its folder"):
        library.recover(random_model("llama"), random_tokens(), kind="layers", resume=True)
