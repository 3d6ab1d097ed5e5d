"""Smaller models of quantised checkpoints: the stored bytes of what is kept, and nothing else."""

import json
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt.checkpoints.load import load, open_skeleton
from apt.checkpoints.smaller import shrunk
from apt.locations.model_source import find
from apt.output.report import Report
from apt.plugin import registry as registries
from apt.plugin.registry import load_registry
from tests.helpers import row_bytes
from tests.helpers.families import STACKED, random_model
from tests.helpers.mixtures import mixture
from tests.helpers.row_bytes import FILE, RowBytes, write_model

SMALL = ("--samples", 4, "--seqlen", 16)
USUAL = registries.registry


@pytest.fixture(autouse=True)
def _with_format(monkeypatch):
    """APT with the format of a third party."""
    entry = EntryPoint("row-bytes", row_bytes.__name__, "apt")
    registry = load_registry([*entry_points(group="apt"), entry])
    for module in list(sys.modules.values()):
        if getattr(module, "registry", None) is USUAL:
            monkeypatch.setattr(module, "registry", lambda: registry)


@pytest.fixture
def quantised(tmp_path, tokenizer):
    """A function that writes a random model of a family in the format."""

    def make(family, **sizes):
        folder = tmp_path / "model"
        tokenizer.save_pretrained(folder)
        (folder / "LICENSE").write_text("free")
        sizes = {"num_hidden_layers": 3, **sizes}
        known = family in ("llama",)
        model = random_model(family) if known else mixture(family, vocab_size=2048, **sizes)
        return write_model(model, folder)

    return make


def stored(directory):
    return load_file(directory / FILE)


def loaded(directory):
    """The expanded model."""
    registry = sys.modules["apt.engine.run"].registry()
    return load(open_skeleton(find(str(directory), registry), registry, expanded=True))


def by_hand(whole, structure):
    """The model without what a run has removed."""
    removed = {n: {"experts": each["removed"]} for n, each in structure["experts"].items()}
    return shrunk(whole.module, whole.adapter, removed, structure["blocks"]["dropped"])


def same_parameters(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_the_kept_experts_have_their_bytes(family, quantised, apt, tmp_path):
    model, small = quantised(family), tmp_path / "small"
    result = apt("shrink", model, "--size", "experts=4", *SMALL, "-o", small)
    assert result.code == 0, result.err
    structure = Report.read(small).structure
    assert structure["groups"]["experts"] == {"kept": 4, "of": 8}
    assert structure["rounded"] == {}
    assert {len(each["removed"]) for each in structure["experts"].values()} == {4}
    assert same_parameters(loaded(small).module, by_hand(loaded(model), structure))
    whole = {(t.shape, t.contiguous().view(-1).numpy().tobytes()) for t in rows(stored(model))}
    assert {(t.shape, t.numpy().tobytes()) for t in rows(stored(small))} <= whole
    assert (small / "LICENSE").read_text() == "free"
    assert not list(tmp_path.glob(".small*"))


def rows(tensors):
    """The rows of all tensors in the bytes of the file."""
    return (row.clone() for tensor in tensors.values() for row in tensor)


@pytest.mark.parametrize(
    ("options", "dropped"), [(["--drop", "0,2"], [0, 2]), (["--blocks", "2"], None)]
)
def test_blocks_of_a_dense_model_are_dropped(options, dropped, quantised, apt, tmp_path):
    model, small = quantised("llama"), tmp_path / "small"
    result = apt("shrink", model, *options, *SMALL, "-o", small)
    assert result.code == 0, result.err
    structure = Report.read(small).structure
    if dropped is not None:
        assert structure["blocks"]["dropped"] == [f"model.layers.{index}" for index in dropped]
    assert len(structure["blocks"]["dropped"]) == 3 - structure["blocks"]["kept"] > 0
    assert same_parameters(loaded(small).module, by_hand(loaded(model), structure))


def test_blocks_and_experts_are_removed_together(quantised, apt, tmp_path):
    model, small = quantised("deepseek_v3"), tmp_path / "small"
    options = ("--size", "experts=0.5", "--drop", 1)
    result = apt("shrink", model, *options, *SMALL, "-o", small)
    assert result.code == 0, result.err
    structure = Report.read(small).structure
    assert same_parameters(loaded(small).module, by_hand(loaded(model), structure))


def test_tensors_that_the_model_does_not_use_go_with_their_block(quantised, apt, tmp_path):
    model, small = quantised("llama"), tmp_path / "small"
    more = {n: torch.ones(2) for n in ("model.layers.2.unused", "model.layers.3.mtp", "beside.1.x")}
    save_file(stored(model) | more, model / FILE)
    assert apt("shrink", model, "--drop", 1, *SMALL, "-o", small).code == 0
    left = {name for name, tensor in stored(small).items() if tensor.shape == (2,)}
    assert left == {"model.layers.1.unused", "beside.1.x"}


def test_compensation_rounds_the_last_weights_of_experts_and_names_them(quantised, apt, tmp_path):
    model, small = quantised("gpt_oss"), tmp_path / "small"
    command = ("shrink", model, "--size", "experts=4", *SMALL, "--compensate", "-o", small)
    result = apt(*command)
    assert result.code == 0, result.err
    assert "3 tensors have new values, rounded again in their own kinds of numbers" in result.out
    rounded = Report.read(small).structure["rounded"]
    assert rounded == {f"model.layers.{i}.mlp.experts.down_proj": "int8" for i in range(3)}
    plain = by_hand(loaded(model), Report.read(small).structure).state_dict()
    for name, tensor in loaded(small).module.state_dict().items():
        assert torch.equal(tensor, plain[name]) == (name not in rounded)


def test_metrics_are_those_of_the_files(quantised, apt, tmp_path):
    model, small = quantised("qwen3_moe"), tmp_path / "small"
    command = ("shrink", model, "--size", "experts=4", *SMALL, "--eval", "builtin", "-o", small)
    assert apt(*command).code == 0
    scores = Report.read(small).scores
    for directory, when in ((model, "before"), (small, "after")):
        text = ("--data", "builtin", "--samples", 4, "--seqlen", 16)
        result = apt("eval", directory, "--stream", *text, "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["perplexity"] == pytest.approx(scores[when]["perplexity"])
    assert apt("report", small, "-o", "page.html").code == 0
    assert "Removed experts" in (tmp_path / "page.html").read_text()
    assert "8 experts" in (said := apt("inspect", model)).out + said.err or said.code == 0


def test_a_quantised_model_is_expanded_by_convert(quantised, apt, tmp_path):
    model = quantised("qwen3_moe")
    result = apt("convert", model, "-o", "plain")
    assert result.code == 0, result.err
    plain = open_skeleton(find(str(tmp_path / "plain"), USUAL()), USUAL())
    assert same_parameters(load(plain).module, loaded(model).module)


@pytest.mark.skipif(not STACKED, reason="before transformers 5, experts are modules")
def test_merging_needs_the_wish_to_round(quantised, apt, tmp_path):
    model = quantised("qwen3_moe")
    command = ("shrink", model, "--size", "experts=4", "--method", "expert-merge", *SMALL)
    assert apt(*command, "-o", "plain").code == 0
    assert apt(*command, "--compensate", "-o", "merged").code == 0
    structures = [Report.read(tmp_path / name).structure for name in ("plain", "merged")]
    assert [any(e["merged"] for e in s["experts"].values()) for s in structures] == [False, True]
    assert [bool(structure["rounded"]) for structure in structures] == [False, True]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "0.6"], "is quantised, and would lose expert-channels; remove only experts"),
        (["--size", "expert-channels=8"], "is quantised, and would lose expert-channels"),
        (["--size", "experts=4", "--resume"], "such a run cannot be resumed"),
        (["--size", "experts=4", "--max-shard-size", "1MB"], "the files stay as they are"),
        (["--size", "experts=4", "--search"], "mode 'search'"),
        (["--size", "experts=4", "--dtype", "float32"], "another dtype than the default"),
    ],
)
def test_what_is_not_cut_out_is_refused_before_the_run(options, said, quantised, apt, tmp_path):
    result = apt("shrink", quantised("qwen3_moe"), *options, *SMALL, "-o", "small")
    assert result.code == 2
    assert said in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_values_that_are_not_finite_are_one_line(quantised, apt, tmp_path):
    model = quantised("qwen3_moe")
    tensors = stored(model)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight.scale"][2] = torch.inf
    save_file(tensors, model / FILE)
    result = apt("shrink", model, "--size", "experts=4", *SMALL, "-o", "small")
    assert result.code == 2
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_that_ends_early_leaves_nothing(error, quantised, apt, tmp_path, monkeypatch):
    write = RowBytes.write_sliced

    def cut_short(self, slices, target):
        write(self, slices, target)
        raise error

    monkeypatch.setattr(RowBytes, "write_sliced", cut_short)
    model = quantised("qwen3_moe")
    result = apt("shrink", model, "--size", "experts=4", *SMALL, "-o", "small")
    assert result.code in (2, 130)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_earlier_result_is_replaced_only_if_asked(quantised, apt, tmp_path):
    command = ("shrink", quantised("llama"), *SMALL, "-o", "small")
    assert apt(*command, "--drop", "0").code == 0
    assert "small exists and is not empty" in apt(*command, "--drop", "1").err
    assert apt(*command, "--drop", "1", "--overwrite").code == 0
    assert Report.read(tmp_path / "small").structure["blocks"]["dropped"] == ["model.layers.1"]


def test_a_written_file_with_other_values_is_an_error(quantised, apt, monkeypatch):
    write = RowBytes.write_sliced

    def wrong(self, slices, target):
        write(self, slices, target)
        tensors = stored(target)
        tensors["model.layers.0.mlp.experts.0.up_proj.weight.bytes"][0, 0] += 1
        save_file(tensors, target / FILE)

    monkeypatch.setattr(RowBytes, "write_sliced", wrong)
    with pytest.raises(RuntimeError, match=r"experts\.0\.up_proj\.weight on disk differs"):
        apt("shrink", quantised("qwen3_moe"), "--size", "experts=4", *SMALL, "-o", "small")


def test_a_dry_run_predicts_one_expanded_block(quantised, apt):
    result = apt("shrink", quantised("qwen3_moe"), "--size", "experts=4", *SMALL, "--dry-run")
    assert result.code == 0, result.err
    assert "GiB of memory" in result.out + result.err
