"""The embedded checkpoints are trained well enough to tell methods apart."""

import copy

import pytest

import apt as library
from apt.checkpoints.load import load, load_tokenizer, open_skeleton
from apt.evaluation.metrics import perplexity
from apt.locations.model_source import find
from apt.options import PruneOptions
from apt.plugin.registry import registry
from apt.text.datasets import calibration_tokens, evaluation_tokens
from tests.helpers.families import FAMILIES, builtin
from tests.helpers.releases import SCAN


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=SCAN if "mamba" in f else ()) for f in (*FAMILIES, "mamba2")]
)
def test_better_methods_give_lower_perplexity_on_zoo_models(family):
    source = find(f"zoo:{family}", registry())
    model, tokenizer = load(open_skeleton(source, registry())), load_tokenizer(source)
    tokens = calibration_tokens(tokenizer, [builtin("calibration")], 16, 64, 0, "builtin")
    held_out = evaluation_tokens(tokenizer, [builtin("evaluation")], 16, 64, "builtin")

    def score(module):
        with model.adapter.running(module):
            return perplexity(module, held_out)

    dense = score(model.module)
    assert dense < 80
    between = ["sm", "ss", "wanda"] if family == "llama" else []
    methods = ["admm", *between, "magnitude"]
    errors, scores = [], {}
    for method in methods:
        options = {"effort": "fast"} if method == "admm" else {}
        pruned = copy.deepcopy(model.module)
        report = library.prune(
            pruned,
            tokens,
            pattern="2:4",
            method=method,
            options=PruneOptions(error_aware=False, ordered=False, **options),
        )
        errors.append(report.relative_layer_error)
        if method in ("admm", "magnitude"):  # the least and the largest error
            scores[method] = score(pruned)
    assert errors == sorted(errors)
    pruned = copy.deepcopy(model.module)
    library.prune(pruned, tokens, pattern="2:4", options=PruneOptions(effort="fast"))
    assert score(pruned) < 1.01 * scores["admm"]  # in fp32 and in bf16
    assert scores["admm"] < scores["magnitude"]
    assert scores["magnitude"] > 1.05 * dense
