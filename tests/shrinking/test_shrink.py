"""Smaller models: from a program and from the command line, in memory and streamed."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import apt as apt_package
import apt.output.staging as apt_staging
from apt import AptError, PruneOptions, ShrinkOptions
from apt.adapter.groups import without
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.smaller import smaller
from apt.planning.structure import Structure, make_structured_plan
from apt.pruning.layer import Recipe
from apt.shrinking.skipping import loss_without
from apt.solver import GroupRemoval, joint_removal
from tests.helpers import TEXT
from tests.helpers.families import CONFIGS, STACKED, adapter_of, random_model, random_tokens
from tests.helpers.interrupted import PLACES, KilledError, cut, weights
from tests.helpers.processes import on_ranks
from tests.helpers.pruning import prune_blocks
from tests.helpers.releases import needs

SMALL = ("--samples", 4, "--seqlen", 48, "--calibration", TEXT)
TOKENS = random_tokens(6, 24)
LAYER_WISE = PruneOptions(error_aware=False)


def parameters(model, adapter):
    return sum(p.numel() for _, block in adapter.blocks(model) for p in block.parameters())


SIZES = {
    "llama-grouped-tied": {"channels": 40, "heads": 2},
    "mistral": {"key-value-heads": 1},
    "opt": {"channels": 24},
    "mamba": {"channels": 48, "states": 4},
    "falcon-mamba": {"channels": 32},
    "mamba2": {"states": 4},
    "bloom": {},
    **({"jamba": {"experts": 2}} if "jamba" in CONFIGS else {}),
    "qwen2-moe": {"channels": 40} | ({"experts": 3} if STACKED else {}),
}


@pytest.mark.parametrize("variant", SIZES)
def test_smaller_model_opens_in_plain_transformers(variant, tmp_path):
    model = random_model(variant)
    before = copy.deepcopy(model.state_dict())
    blocks = None if variant in {"jamba", "qwen2-moe"} else 2
    wish = ShrinkOptions(sizes=SIZES[variant], blocks=blocks)
    small, report = apt_package.shrink(model, TOKENS, size=wish)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    adapter, structure = adapter_of(model), report.structure
    share = parameters(small, adapter) / parameters(model, adapter)
    assert structure["share"] == pytest.approx(share)
    assert share < 1
    kept = {kind: entry["kept"] for kind, entry in structure["groups"].items()}
    assert kept | SIZES[variant] == kept
    assert len(adapter.blocks(small)) == structure["blocks"]["kept"] == (blocks or 3)
    small.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(opened(TOKENS).logits, small(TOKENS).logits)


@pytest.mark.parametrize(
    ("variant", "kept", "dropped"),
    [
        ("llama-grouped-tied", {"channels": 32, "heads": 2}, [1]),
        ("llama", {"channels": 48}, [0]),
        ("opt", {"channels": 16}, [2]),
        ("mamba", {"channels": 40, "states": 5}, [0, 1]),
        ("mamba2", {"states": 4}, []),
        ("bloom", {}, [0, 2]),
        ("qwen2-moe", {}, [0]),
    ],
)
@torch.no_grad()
def test_model_with_removed_groups_equals_the_smaller_model(variant, kept, dropped):
    """The loop over blocks leaves zeros in removed groups; dropped blocks are skipped."""
    model = random_model(variant)
    adapter = adapter_of(model)
    names = [name for name, _ in adapter.blocks(model)]
    structure = Structure(kept, frozenset(names[index] for index in dropped))
    plan = make_structured_plan(model, adapter, model.config, structure)
    prune_blocks(model, adapter, plan, TOKENS, GroupRemoval(joint_removal), Recipe())
    small = smaller(model, adapter, plan)
    expected = loss_without(model, adapter, TOKENS, structure.dropped)
    assert loss_without(small, adapter, TOKENS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_compensation_and_targets_reduce_the_distance_to_the_dense_model(effort):
    model = random_model("llama")
    wish = {"sizes": {"channels": 32}}

    def distance(options, **size):
        small, _ = apt_package.shrink(model, TOKENS, size=ShrinkOptions(**wish, **size),
                                      options=options)  # fmt: skip
        return float((small(TOKENS).logits - model(TOKENS).logits).square().mean())

    with torch.no_grad():
        plain = distance(LAYER_WISE, compensate=False)
        exact = distance(LAYER_WISE)
        aware = distance(PruneOptions(error_aware=True, effort=effort, random_tokens=0))
    assert exact < 0.9 * plain
    assert aware < plain


@torch.no_grad()
def test_fit_of_the_block_before_a_gap_reduces_the_distance():
    model = random_model("llama")
    names = [name for name, _ in adapter_of(model).blocks(model)]
    wish = ShrinkOptions(blocks=2, mode="depth")

    def distance(**options):
        small, report = apt_package.shrink(
            model, random_tokens(160, 24), size=wish, method="last",
            options=PruneOptions(random_tokens=0, **options),
        )  # fmt: skip
        assert report.structure["blocks"]["dropped"] == names[-1:]
        return float((small(TOKENS).logits - model(TOKENS).logits).square().mean())

    untouched, fitted = distance(error_aware=False), distance(tuning_epochs=0)
    assert fitted < 0.95 * untouched
    assert distance(tuning_epochs=20, tuning_rate=0.05) < 0.98 * fitted


@pytest.mark.parametrize("method", ["block-influence", "angular"])
def test_block_without_effect_is_dropped(method):
    model = random_model("llama")
    adapter = adapter_of(model)
    _, block = adapter.blocks(model)[1]
    with torch.no_grad():
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            block.get_submodule(path).weight.zero_()
    wish = ShrinkOptions(mode="depth", blocks=2)
    small, report = apt_package.shrink(model, TOKENS, size=wish, method=method, options=LAYER_WISE)
    assert report.structure["blocks"]["dropped"] == [adapter.blocks(model)[1][0]]
    torch.testing.assert_close(small(TOKENS).logits, model(TOKENS).logits)


def test_method_loss_drops_the_block_with_the_lowest_loss_without_it():
    model = random_model("llama")
    names = [name for name, _ in adapter_of(model).blocks(model)]
    losses = {name: loss_without(model, adapter_of(model), TOKENS, [name]) for name in names}
    wish = ShrinkOptions(mode="depth", blocks=2)
    _, report = apt_package.shrink(model, TOKENS, size=wish, method="loss", options=LAYER_WISE)
    assert report.structure["blocks"]["dropped"] == [min(losses, key=losses.get)]


def test_blocks_of_option_drop_are_dropped():
    wish = ShrinkOptions(drop=(2, 0), sizes={"channels": 48})
    small, report = apt_package.shrink(random_model("llama"), TOKENS, size=wish)
    dropped = report.structure["blocks"]["dropped"]
    assert [name.rpartition(".")[2] for name in dropped] == ["0", "2"]
    assert (small.config.num_hidden_layers, small.config.intermediate_size) == (1, 48)


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba", "mamba2", "moe"])
def test_zoo_models_shrink_generate_and_are_pruned_after(apt, family):
    result = apt("shrink", "--adapter", family, *SMALL, "-o", "small", "--eval", TEXT)
    assert result.code == 0, result.err
    assert f"model: zoo:{family} (default)" in result.err
    report = json.loads(Path("small/apt_report.json").read_text())
    assert report["structure"]["share"] == pytest.approx(0.75, abs=0.005 if STACKED else 0.01)
    assert report["scores"]["after"]["perplexity"] < 3 * report["scores"]["before"]["perplexity"]
    model = AutoModelForCausalLM.from_pretrained("small", dtype="auto")
    tokens = AutoTokenizer.from_pretrained("small")("The", return_tensors="pt").input_ids
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] == 3 + len(tokens[0])
    assert apt("verify", "small").code == 0
    result = apt("prune", "small", "--pattern", "2:4", "--effort", "fast", *SMALL, "-o", "sparse")
    assert result.code == 0, result.err
    after = json.loads(Path("sparse/apt_report.json").read_text())
    assert after["earlier"]["structure"] == report["structure"]
    assert apt("verify", "sparse").code == 0


def test_verify_of_a_smaller_model_takes_an_adapter_but_no_selection(apt, checkpoint):
    given = (checkpoint("llama"), *SMALL, "--drop", 1, "--layer-wise", "--effort", "fast")
    assert apt("shrink", *given, "-o", "small").code == 0
    assert apt("verify", "small", "--adapter", "llama").code == 0
    assert "no adapter 'lama'" in apt("verify", "small", "--adapter", "lama").err
    for option in ("--only", "--skip"):
        run = apt("verify", "small", option, "*")
        assert run.code == 2
        assert "its sites have no pattern; leave these options out" in run.err


def test_shrink_works_with_own_text_alone(apt, checkpoint):
    given = ("--samples", 0, "--own-samples", 4, "--seqlen", 16, "--drop", 1, "--effort", "fast")
    run = apt("shrink", checkpoint("llama"), *given, "-o", "small")
    assert run.code == 0, run.err
    assert apt("verify", "small").code == 0


STREAMED = {
    "llama-grouped-tied": ["--size", "channels=32", "--size", "heads=2"],
    "mamba": ["--size", "channels=32", "--size", "states=4"],
    "mamba2": ["--size", "states=4"],
    "opt": ["--size", "channels=32"],
    "bloom": ["--blocks", 1, "--depth-only", "--method", "block-influence"],
}


@pytest.mark.parametrize("variant", STREAMED)
def test_streamed_run_gives_the_model_of_a_run_in_memory(variant, checkpoint, apt):
    for name, options in (("memory", []), ("disk", ["--stream"])):
        given = (checkpoint(variant), *SMALL, *STREAMED[variant], "--eval", TEXT)
        result = apt("shrink", *given, "-o", name, *options)
        assert result.code == 0, result.err
    memory, disk = (Shards(Path(name)) for name in ("memory", "disk"))
    assert memory.entries.keys() == disk.entries.keys()
    for name in memory.entries:
        torch.testing.assert_close(memory.read(name), disk.read(name), rtol=1e-3, atol=1e-5)
    records = [json.loads(Path(n, "apt_report.json").read_text()) for n in ("memory", "disk")]
    assert records[0]["structure"] == records[1]["structure"]
    assert records[0]["scores"]["after"] == pytest.approx(records[1]["scores"]["after"], rel=1e-3)
    assert not list(Path().glob(".disk*"))


def test_streamed_run_writes_the_blocks_behind_a_dropped_block(tokenizer, apt):
    model = random_model("llama")
    with torch.no_grad():
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[1].get_submodule(path).weight.mul_(0.05)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, more in (("memory", []), ("disk", ["--stream"])):
        sizes = ("--blocks", 2, "--size", "channels=32")
        run = apt("shrink", "model", *SMALL, *sizes, *more, "-o", name)
        assert run.code == 0, run.err
    report = json.loads(Path("memory/apt_report.json").read_text())
    assert report["structure"]["blocks"]["dropped"] == ["model.layers.1"]
    memory, disk = (Shards(Path(name)) for name in ("memory", "disk"))
    for name in memory.entries:
        torch.testing.assert_close(memory.read(name), disk.read(name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "count"), [("write", 2), ("journal", 5), ("small", 1), ("appear", 1)]
)
def test_interrupted_streamed_run_resumes_to_the_same_bytes(
    place, count, checkpoint, apt, output_of, monkeypatch
):
    sizes = ("--size", "channels=32", "--size", "heads=2", "--blocks", 2)
    command = ("shrink", checkpoint("llama-grouped-tied"), *SMALL, *sizes, "--stream")
    whole = output_of(*command)
    places = PLACES | {"small": (apt_staging.Staging, "replace_out")}
    with monkeypatch.context() as patch:
        cut(patch, places[place], count, KilledError())
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
    assert not Path("out").exists()
    result = apt(*command, "-o", "out", "--resume")
    assert result.code == 0, result.err
    assert weights("out") == weights(whole)
    assert not list(Path().glob(".out*"))


@pytest.mark.parametrize("variant", ["llama-grouped-tied", "mamba"])
def test_two_ranks_give_about_the_model_of_one_process(variant, checkpoint, tmp_path, apt):
    sizes = {"llama-grouped-tied": ("heads=2", "channels=32"), "mamba": ("channels=32", "states=4")}
    given = [word for size in sizes[variant] for word in ("--size", size)]
    command = ("shrink", checkpoint(variant), *SMALL, *given, "--effort", "fast", "--blocks", 2)
    codes, output = on_ranks(2, tmp_path, *command, "-o", "together")
    assert codes == [0, 0], output
    assert apt(*command, "-o", "alone").code == 0
    together, alone = Shards(tmp_path / "together"), Shards(tmp_path / "alone")
    shapes = [{n: e.shape for n, e in shards.entries.items()} for shards in (together, alone)]
    assert shapes[0] == shapes[1]
    opened = [AutoModelForCausalLM.from_pretrained(n).eval() for n in ("together", "alone")]
    left, right, dense = (
        model(TOKENS).logits for model in (*opened, random_model(variant).eval())
    )  # the sums differ in their last digits, so another group may go
    assert float((left - right).norm()) < 0.25 * float((right - dense).norm())


BAD = {
    "keep is 2; it must be above 0 and below 1": ("--keep", "2"),
    "keep is nan; it must be above 0 and below 1": ("--keep", "nan"),
    "no model keeps 1.00%: the smallest, 1 block, 2 heads, 1 channel, keeps": ("--keep", "0.01"),
    "no model keeps 99.00%: the largest, 3 blocks, keeps 75.00%": ("--keep", "0.99",
                                                                   "--depth-only"),
    "heads can be 2 to 6, in steps of 2, not 5": ("--size", "heads=5"),
    "the model has no states to remove; it has: channels": ("--size", "states=5"),
    "there is no block 4: they are 0 to 3": ("--drop", "4"),
    "without the dropped blocks there are 2 of 4, not 3": ("--drop", "1", "--drop", "2",
                                                           "--blocks", "3"),
    "nothing would be removed": ("--size", "channels=512"),
    "number of blocks can be 1 to 4, not 0": ("--blocks", "0"),
    "size channels is not KIND=N": ("--size", "channels"),
    "exclude each other": ("--width-only", "--search"),
    "method last chooses blocks": ("--method", "last", "--width-only"),
    "method flap chooses groups": ("--method", "flap", "--depth-only"),
    "no shrink method 'jiont'; did you mean 'joint'?": ("--method", "jiont"),
    "multiple of is 0; it must be at least 1": ("--multiple-of", "0"),
    "a search needs the whole model in memory": ("--search", "--stream"),
    "method llm-pruner needs the whole model in memory": ("--method", "llm-pruner", "--stream"),
    "budget 'time' is not one of parameters, latency": ("--budget", "time"),
    "evaluations is 0; it must be at least 1": ("--search", "--evaluations", "0"),
    "mode 'search' is for a share to keep": ("--search", "--blocks", "3"),
    "mode 'depth' is for a share to keep": ("--depth-only", "--size", "channels=64"),
    "leave it out (--width-only, --blocks-first, --depth-only, --search)": ("--width-only",
                                                                            "--blocks", "2"),
    "budget 'latency' is for a share to keep": ("--budget", "latency", "--drop", "1"),
    "a multiple of 64 is for a share to keep": ("--multiple-of", "64", "--blocks", "2"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_one_line(message, apt):
    result = apt("shrink", "--adapter", "llama", *BAD[message], *SMALL, "-o", "out")
    assert result.code == 2
    assert message in result.err.splitlines()[-1]
    assert not Path("out").exists()


@pytest.mark.parametrize("method", ["group-wanda", "joint"])
def test_method_for_columns_is_refused_if_only_experts_are_removed(method, apt):
    sizes = ("--size", "experts=4", "--method", method)
    result = apt("shrink", "--adapter", "moe", *sizes, *SMALL, "-o", "out")
    assert result.code == 2
    assert f"method {method} chooses columns of weights, and only experts are removed" in result.err
    assert "(--method, --size)" in result.err
    result = apt("shrink", "--adapter", "moe", *sizes, "--size", "channels=64", "--dry-run")
    assert result.code == 0, result.err


def test_scores_without_the_removed_kinds_are_refused():
    def unscored(model, adapter, tokens):
        return {name: {} for name, _ in adapter.blocks(model)}

    wish = ShrinkOptions(sizes={"experts": 2})
    with pytest.raises(AptError, match="method unscored has no scores for experts"):
        apt_package.shrink(random_model("qwen2-moe"), TOKENS, size=wish, method=unscored)


def test_width_mode_is_refused_for_families_without_widths(apt):
    result = apt("shrink", "--adapter", "bloom", "--width-only", *SMALL, "-o", "out")
    assert result.code == 2
    assert "no widths that could be smaller; drop blocks instead (--depth-only)" in result.err


def test_search_among_groups_without_readers_is_refused(apt):
    result = apt("shrink", "--adapter", "mamba2", "--search", *SMALL, "-o", "out")
    assert result.code == 2
    assert "a search cannot compare numbers of states" in result.err
    assert "(--depth-only, --width-only)" in result.err


@needs("transformers", "5", "LlamaConfig refuses some numbers of heads")
def test_widths_that_the_configuration_cannot_express_are_refused():
    with pytest.raises(AptError, match="LlamaConfig cannot express these sizes: .*hidden size"):
        apt_package.shrink(random_model("llama"), TOKENS, size=ShrinkOptions(sizes={"heads": 3}))


def test_dry_run_shows_the_plan_and_writes_nothing(apt):
    result = apt("shrink", "--adapter", "llama", "--dry-run", *SMALL, "-o", "out")
    assert result.code == 0
    assert "4 of 6 groups" in result.out
    assert not Path("out").exists()


@pytest.mark.skipif("jamba" not in CONFIGS, reason="its experts are modules there")
def test_drops_that_the_configuration_cannot_express_are_refused(apt, checkpoint, monkeypatch):
    """The kinds of Jamba's blocks follow from their indices."""
    monkeypatch.setattr("apt.engine.prune_model.prune_blocks", None)
    with pytest.raises(AptError, match="JambaForCausalLM cannot express these sizes"):
        apt_package.shrink(random_model("jamba"), TOKENS, size=ShrinkOptions(drop=(0,)))
    run = apt("shrink", checkpoint("jamba"), *SMALL, "--drop", 0, "--dry-run")
    assert run.code == 2
    assert "JambaForCausalLM cannot express these sizes" in run.err


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=str)
def test_streamed_run_names_its_width(options, apt):
    wish = ("--width-only", "--keep", "0.5", "--multiple-of", "8")
    result = apt("shrink", "--adapter", "llama", *wish, *SMALL, "--dry-run", *options)
    assert result.code == 0, result.err
    message = "size: 4 blocks, 168 channels; a streamed run does not compare the 4 possible widths"
    assert (message in result.err) == bool(options)


def test_parameter_of_two_kinds_loses_groups_of_both():
    model = random_model("mamba")
    adapter = adapter_of(model)
    _, block = adapter.blocks(model)[0]
    channels, states = adapter.groups(block, model.config)
    result = without(dict(block.named_parameters()), [(channels, [0]), (states, [1, 2])])
    whole = block.get_parameter("mixer.A_log").shape
    assert result["mixer.A_log"].shape == (whole[0] - 1, whole[1] - 2)


def test_site_with_groups_of_two_kinds_is_refused():
    model = random_model("llama-grouped-tied")
    structure = Structure({"heads": 2, "key-value-heads": 1})
    with pytest.raises(AptError, match="o_proj cannot lose groups of two kinds"):
        make_structured_plan(model, adapter_of(model), model.config, structure)
