"""``compare`` and ``bench`` of models that do not read windows of text."""

import json
import shutil
from pathlib import Path

import pytest

from tests.inputs.test_commands import pairs  # noqa: F401

GRID = ("--methods", "magnitude,wanda", "--patterns", "2:4", "--samples", 8, "--windows", 10)


def compared(apt, model, source, *more):
    done = apt("compare", model, "--calibration", source, "--data", source, *GRID, "-o", "cmp",
               "--json", *more)  # fmt: skip
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize(
    ("name", "inputs", "reads", "metrics"),
    [
        ("vit", "images", "images", ("similarity", "predictions")),
        ("clip", "images", "texts and images", ("similarity", "neighbours")),
        ("wav2vec2", "sounds", "sounds", ("similarity", "predictions")),
        ("t5", "pairs", "texts", ("token-changes", "predictions")),
    ],
)
def test_comparison_has_the_metrics_of_the_model(
    request, apt, model_of, name, inputs, reads, metrics
):
    source, model = request.getfixturevalue(inputs), model_of(name)
    chosen = [word for metric in metrics for word in ("--metric", metric)]
    result = compared(apt, model, source, *chosen)
    assert (result["reads"], result["metrics"]) == (reads, list(metrics))
    dense, *rows = result["rows"]
    assert [row["method"] for row in rows] == ["magnitude", "wanda"]
    best = {m: 0 if m == "token-changes" else pytest.approx(1, abs=1e-5) for m in metrics}
    assert dense["scores"][source.name] == best
    assert all(row["scores"][source.name] != best for row in rows)
    means = {"similarity", "predictions"}.intersection(metrics)
    for row in rows:
        intervals, scores = row["intervals"][source.name], row["scores"][source.name]
        assert set(intervals) == means
        assert all(low - 1e-6 <= scores[m] <= high + 1e-6 for m, (low, high) in intervals.items())
        assert any(low < high for low, high in intervals.values()) == bool(means)
    assert "8 samples" in Path("cmp/comparison.md").read_text()
    assert apt("report", "cmp", "-o", "page.html").code == 0
    assert f"{source.name}, 10 samples" in Path("page.html").read_text()


def test_row_equals_a_single_run_of_a_model_that_writes_its_targets(apt, model_of, pairs):  # noqa: F811
    """The dense model writes the outputs once, as every single run does."""
    texts = Path("texts.jsonl")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    texts.write_text("\n".join(json.dumps({"text": row["source"]}) for row in rows))
    result = compared(apt, model_of("t5"), texts)
    done = apt("prune", model_of("t5"), "--pattern", "2:4", "--method", "wanda", "--calibration",
               texts, "--samples", 8, "-o", "single")  # fmt: skip
    assert done.code == 0, done.err
    alone = apt("eval", "single", "--dense", model_of("t5"), "--data", texts, "--samples", 10,
                "--json")  # fmt: skip
    scores = result["rows"][2]["scores"]["texts.jsonl"]
    found = json.loads(alone.out)
    assert scores == pytest.approx({metric: found[metric] for metric in scores})
    assert list(scores) == ["token-changes", "predictions"]
    other = compared(apt, model_of("t5"), texts, "--with", "single")["rows"][-1]
    assert other["scores"]["texts.jsonl"] == pytest.approx(scores)
    assert other["sparsity"] == pytest.approx(0.5)


def test_pruned_image_model_is_compared_as_the_directory_of_another_tool(apt, model_of, images):
    shutil.copytree(model_of("vit"), "same")
    rows = compared(apt, model_of("vit"), images, "--metric", "predictions", "--with", "same")
    assert rows["rows"][-1]["scores"]["images"]["predictions"] == 1


def test_metric_of_text_is_refused(apt, model_of, images):
    done = apt("compare", model_of("vit"), "--calibration", images, "--data", images, *GRID, "-o",
               "cmp", "--metric", "perplexity", "--metric", "accuracy")  # fmt: skip
    assert done.code == 2
    assert "has no perplexity" in done.err
    assert not Path("cmp").exists()


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    ("name", "unit", "is_written"),
    [
        ("vit", "images", False), ("clip", "samples", False), ("wav2vec2", "sounds", False),
        ("whisper", "sounds", True), ("t5", "texts", True),
    ],
)  # fmt: skip
def test_speed_is_that_of_samples(apt, model_of, name, unit, is_written):
    words = ("--rounds", 1, "--batch", 2, "--prompt", 18, "--generate", 3, "--threads", 1)
    run = apt("bench", model_of(name), model_of(name), *words)
    assert run.code == 0, run.err
    assert f"{unit}/s" in run.out
    assert ("decode tokens/s" in run.out) == is_written
    assert ("3 tokens written" in run.out) == is_written
    run = apt("bench", model_of(name), *words, "--json")
    (speed,) = json.loads(run.out)["models"][0]["speeds"]
    keys = ["samples_per_second", *(["decode_tokens_per_second"] if is_written else [])]
    assert list(speed) == ["batch", *keys]
    assert all(speed[key]["median"] > 0 for key in keys)


@pytest.mark.usefixtures("forked_workers")
def test_other_kinds_of_models_are_not_measured_together(apt, model_of):
    run = apt("bench", model_of("t5"), "zoo:bert", "--rounds", 1, "--threads", 1)
    assert run.code == 2
    assert " reads texts and writes, and zoo:bert reads texts; measure them apart" in " ".join(
        run.err.split()
    )


@pytest.mark.usefixtures("forked_workers")
def test_packed_encoder_is_measured_beside_the_dense_one(apt):
    words = ("--pattern", "0.5", "--method", "magnitude", "--samples", 8, "--pack", "packed")
    assert apt("prune", "zoo:bert", *words, "-o", "pruned").code == 0
    run = apt("bench", "pruned", "packed", "--rounds", 1, "--threads", 1, "--prompt", 1000,
              "--batch", 1, "--json")  # fmt: skip
    assert run.code == 0, run.err
    assert "prompt: 256 tokens (not 1000: pruned has 256 positions)" in run.err
    record = json.loads(run.out)
    assert "packed_pays_from" not in record  # which is about one vector at a time
    sizes = [model["weight_bytes"] for model in record["models"]]
    assert sizes[1] < 0.75 * sizes[0]
