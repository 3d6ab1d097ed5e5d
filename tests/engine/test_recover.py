"""``recover``, ``reapply`` and ``law`` on disk: formats, resumption, reports and errors."""

import json
import shutil
import time
from itertools import cycle
from pathlib import Path

import pytest
import torch
from apt_plugins.spp import SppConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apt.checkpoints.former_names import FORMER_NAMES
from apt.checkpoints.load import load, open_skeleton
from apt.checkpoints.masks import (
    MASKS,
    masks_of,
    permute_as_masked,
    read_masks,
    read_orders,
    write_masks,
)
from apt.errors import AptError
from apt.files.journal import Journal
from apt.locations.model_source import find
from apt.plugin.registry import registry
from tests.helpers import TEXT
from tests.helpers.families import FAMILIES, adapter_of
from tests.helpers.processes import on_ranks, start

TRAIN = ("--steps", 4, "--checks", 2, "--batch", 4, "--seqlen", 16, "--calibration", TEXT)


@pytest.fixture
def pruned(apt, checkpoint, output_of):
    """A function that writes a pruned random model of a family into the working directory."""

    def make(variant="llama", output="pruned", *more):
        made = output_of(
            "prune", checkpoint(variant), "--sparsity", 0.5, "--method", "wanda", "--samples", 4,
            "--seqlen", 16, "--calibration", TEXT, *more,
        )  # fmt: skip
        shutil.copytree(made, output)
        return output

    return make


def opened(directory):
    found = load(open_skeleton(find(str(directory), registry()), registry()))
    return found.module, masks_of(found.module, found.adapter)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# Of each family with each kind the weights are checked in recovery/test_recover.py.
@pytest.mark.parametrize(
    ("kind", "variant"), list(zip(cycle(["lora", "layers"]), FAMILIES.values(), strict=False))
)
def test_each_family_is_recovered_on_disk_with_its_zeros_and_report(apt, pruned, kind, variant):
    pruned(variant)
    done = apt(
        "recover", "pruned", *TRAIN, "--kind", kind, "--rate", 1e-2, "--blocks", 3, "--eval", TEXT,
        "-o", "out", "--json", "--save-masks",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    module, masks = opened("out")
    assert same(masks, opened("pruned")[1])
    assert same(masks, read_masks(Path("out") / MASKS))
    assert next(module.parameters()).dtype == torch.float32
    report = json.loads((Path("out") / "apt_report.json").read_text())
    training = report["recovery"]["training"]
    losses = dict(map(tuple, training["held_back"]))
    assert min(losses.values()) == losses[training["best"]] < losses[0]
    assert len(training["losses"]) == 4
    assert record["scores"]["after"]["perplexity"] > 0
    assert report["options"]["pattern"] == "0.5"
    assert report["recovery"]["zeros"] == sum(int(mask.sum()) for mask in masks.values())
    verified = apt("verify", "out")
    assert verified.code == 0, verified.err
    assert "sites meet" in verified.out
    assert "trained" in (Path("out") / "README.md").read_text()
    again = apt("recover", "pruned", *TRAIN, "--kind", kind, "-o", "out")
    assert again.code == 2
    assert "--overwrite" in again.err


def same_logits(base, adapter, merged, error):
    """True if an adapter of peft on a model has the logits of the merged model."""
    models = [AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32) for m in (base, merged)]
    tokens, tuned = torch.arange(12)[None], PeftModel.from_pretrained(models[0], adapter)
    with torch.no_grad():
        logits, expected = tuned(tokens).logits, models[1](tokens).logits
        with tuned.disable_adapter():
            changed = float((expected - tuned(tokens).logits).norm())
    return float((expected - logits).norm()) < error * changed


def test_peft_opens_the_adapter_of_a_smaller_model(apt, checkpoint):
    done = apt(
        "shrink", checkpoint("llama"), "--keep", 0.75, "--method", "flap", "--samples", 4,
        "--seqlen", 16, "--calibration", TEXT, "-o", "small",
    )  # fmt: skip
    assert done.code == 0, done.err
    options = (*TRAIN, "--kind", "lora", "--rate", 1e-2, "--save-adapter")
    done = apt("recover", "small", *options, "-o", "out")
    assert done.code == 0, done.err
    assert same_logits("small", "out/adapter", "out", 1e-4)
    kept = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == "small"
    assert "adapter/adapter_model.safetensors" in json.loads(
        Path("out/apt_report.json").read_text()
    )["files"]  # fmt: skip
    assert apt("verify", "out").code == 0
    again = apt("recover", "small", *TRAIN, "--kind", "layers", "--save-adapter", "-o", "other")
    assert again.code == 2
    assert "those that use it: spp, lora" in again.err


def test_merged_adapter_of_a_sparse_model_keeps_the_zeros(apt):
    words = ("--sparsity", 0.7, "--method", "magnitude", "--samples", 2, "--seqlen", 16)
    assert apt("prune", "zoo:llama", *words, "-o", "pruned").code == 0
    options = (*TRAIN, "--steps", 8, "--rate", 0.1, "--save-adapter")
    done = apt("recover", "pruned", *options, "--kind", "spp", "-o", "out")
    assert done.code == 0, done.err
    assert SppConfig.from_pretrained("out/adapter").r == 16  # registers the kind with peft
    assert same_logits("pruned", "out/adapter", "out", 0.1)
    refused = apt("recover", "pruned", *options, "--kind", "lora", "-o", "other")
    assert refused.code == 2
    assert "peft would fill them with an adapter of lora" in refused.err
    assert not Path("other").exists()


def test_distillation_uses_the_reported_dense_model_and_law_reads_the_report(
    apt, checkpoint, pruned
):
    pruned()
    lost = apt("recover", "pruned", *TRAIN, "-o", "out")
    assert lost.code == 2
    assert "the report names this dense model" in lost.err
    other = apt("recover", "pruned", *TRAIN, "--dense", "zoo:mamba", "-o", "out")
    assert other.code == 2
    assert "the dense model zoo:mamba is of the family mamba, and pruned of llama" in other.err
    missing = apt("recover", "pruned", *TRAIN, "--dense", "nowhere", "-o", "out")
    assert missing.code == 2
    assert "nowhere" in missing.err
    dense = checkpoint("llama")
    done = apt(
        "recover", "pruned", *TRAIN, "--checks", 4, "--dense", dense, "--hidden", 0, "--rate",
        1e-2, "-o", "out", "--plot", "loss.png",
    )  # fmt: skip
    if done.code:  # towards a random model the loss on text need not fall
        assert "did not lower the loss" in done.err
        done = apt("recover", "pruned", *TRAIN, "--checks", 4, "--kind", "layers", "--rate", 1e-2,
                   "-o", "out", "--plot", "loss.png")  # fmt: skip
    assert done.code == 0, done.err
    assert Path("loss.png").stat().st_size > 5000
    law = apt("law", "out", "--resamples", 0, "--tokens", 1e6, "--json", "--plot", "law.svg")
    assert law.code == 0, law.err
    fitted = json.loads(law.out)
    assert fitted["values"]["beta"] > 0
    assert fitted["runs"][0]["tokens"] == 4 * 4 * 16
    assert Path("law.svg").is_file()
    table = apt("law", "out", "--resamples", 5)
    assert "one model size" in table.out
    assert "average slope difference" in table.out


def test_smaller_model_is_recovered_by_its_last_layers(apt, checkpoint):
    small = apt(
        "shrink", checkpoint("llama"), "--depth-only", "--drop", 1, "--samples", 4, "--seqlen", 16,
        "--calibration", TEXT, "--effort", "fast", "-o", "small",
    )  # fmt: skip
    assert small.code == 0, small.err
    refused = apt("recover", "small", *TRAIN, "--kind", "spp", "-o", "out")
    assert refused.code == 2
    assert "serves models with zeros" in refused.err
    unused = apt("recover", "small", *TRAIN, "--kind", "lora", "--blocks", 2, "-o", "out")
    assert unused.code == 2
    assert "recovery lora does not use blocks" in unused.err
    assert "those that use it: layers (--blocks)" in unused.err
    dense = ("--dense", checkpoint("llama"), "--rate", 1e-2)
    usual = apt("recover", "small", *TRAIN, *dense, "-o", "usual")
    assert usual.code == 0, usual.err
    assert "kind: distill (default)" in usual.err
    done = apt("recover", "small", *TRAIN, "--kind", "layers", "--rate", 1e-2, "-o", "out")
    assert done.code == 0, done.err
    assert "no zeros to keep" in done.out
    assert apt("verify", "out").code == 0
    report = json.loads((Path("out") / "apt_report.json").read_text())
    assert 0.05 < report["recovery"]["rate"] < 0.5


COMMAND = ("recover", "pruned", *TRAIN[2:], "--kind", "layers", "--rate", 3e-3)
LONG = (*COMMAND, "--steps", 60, "--checks", 20, "--json")


def training(folder, output):
    report = json.loads((folder / output / "apt_report.json").read_text())
    return report["recovery"]["training"]


def test_resumed_training_has_the_same_losses(apt, pruned, tmp_path):
    pruned()
    assert apt(*LONG, "-o", "whole").code == 0
    journal = tmp_path / ".out.apt" / "journal.jsonl"
    process = start(tmp_path, *LONG, "-o", "out")
    while process.is_alive() and not (
        journal.is_file() and '"checkpoint": 6' in journal.read_text()
    ):
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (tmp_path / "out").exists()
    fresh = apt(*LONG, "-o", "out")
    assert fresh.code == 2
    assert "resume it" in fresh.err
    changed = apt(*LONG, "--rate", 1e-3, "-o", "out", "--resume")
    assert changed.code == 2
    assert "options.rate differ" in changed.err
    assert apt(*LONG, "-o", "out", "--resume").code == 0
    for key in ("losses", "held_back", "best"):
        assert training(tmp_path, "whole")[key] == training(tmp_path, "out")[key], key
    assert same(*(load_file(f"{name}/model.safetensors") for name in ("whole", "out")))
    assert not journal.parent.exists()


def test_checkpoints_are_flushed_before_their_line_in_the_journal(apt, pruned, monkeypatch):
    flushed, real = [], Journal.add

    def add(self, line, data=None):
        if "checkpoint" in line:
            flushed.append((line["checkpoint"], data))
            assert (data / "trainer_state.json").is_file()
        real(self, line, data)

    monkeypatch.setattr(Journal, "add", add)
    pruned()
    done = apt("recover", "pruned", *TRAIN, "--kind", "layers", "--rate", 1e-2, "-o", "out")
    assert done.code == 0, done.err
    assert [(step, data.name) for step, data in flushed] == [
        (2, "checkpoint-2"),
        (4, "checkpoint-4"),
    ]


def test_resuming_a_finished_recovery_changes_nothing(apt, pruned, tmp_path):
    pruned()
    before = load_file("pruned/model.safetensors")
    config = json.loads(Path("pruned/config.json").read_text())
    own = apt("recover", "pruned", *TRAIN, "-o", "pruned", "--overwrite", "--resume")
    assert own.code == 2
    assert "is an input of the run" in own.err
    command = ("recover", "pruned", *TRAIN[:4], *TRAIN[6:], "--kind", "layers", "--rate", 1e-2,
               "--blocks", 3, "-o", "out", "--resume")  # fmt: skip
    assert apt(*command).code == 0
    written = json.loads(Path("out/config.json").read_text())
    assert {name: value for name, value in written.items() if name in config} == config
    assert written.keys() - config.keys() <= set(FORMER_NAMES)
    changed = Path("out/apt_report.json").stat().st_mtime_ns
    again = apt(*command)
    assert again.code == 0, again.err
    assert "already complete" in again.out
    assert Path("out/apt_report.json").stat().st_mtime_ns == changed
    other = apt(*command, "--batch", 2)
    assert other.code == 2
    assert "is the result of another run: batch differ" in other.err
    assert same(load_file("pruned/model.safetensors"), before)
    assert not list(tmp_path.glob("out-*"))


@pytest.mark.parametrize("more", [(), ("--move-masks",)])
def test_two_processes_train_one_model(apt, pruned, tmp_path, more):
    """Each step has the samples of both processes, so the losses equal those of one process."""
    pruned()
    exact = ("--compute", "float32")  # moves of masks amplify roundings
    command = (*COMMAND, *exact, "--rate", 3e-2, "--steps", 8, "--checks", 2, *more)
    assert apt(*command, "-o", "alone").code == 0
    codes, text = on_ranks(2, tmp_path, *command, "-o", "out")
    assert codes == [0, 0], text
    alone, losses = (training(tmp_path, name)["losses"] for name in ("alone", "out"))
    assert losses == pytest.approx(alone, rel=1e-2)
    report = json.loads((tmp_path / "out" / "apt_report.json").read_text())
    assert report["recovery"]["ranks"] == 2
    before, after = (opened(tmp_path / name)[1] for name in ("pruned", "out"))
    assert same(before, after) == (not more)
    assert all(mask.sum() == after[name].sum() for name, mask in before.items())


def test_reapply_sets_the_zeros_of_a_fine_tuned_model(apt, pruned):
    pruned("llama", "pruned", "--save-masks")
    streamed = pruned("llama", "streamed", "--save-masks", "--stream")
    file, directory = Path("pruned") / MASKS, Path(streamed)
    expected = opened("pruned")[1]
    assert same(read_masks(file), expected)
    assert same(read_masks(directory / MASKS), opened(streamed)[1])
    tuned = AutoModelForCausalLM.from_pretrained("pruned")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01)
    tuned.save_pretrained("tuned")
    for number, masks in enumerate((file, "pruned")):
        done = apt("reapply", masks, "tuned", "-o", f"again{number}")
        assert done.code == 0, done.err
        assert "weights set to zero again" in done.out
        module, found = opened(f"again{number}")
        assert same(found, expected)
        for name, parameter in tuned.named_parameters():
            mask = expected.get(name, torch.zeros_like(parameter, dtype=torch.bool))
            assert torch.equal(module.get_parameter(name), parameter.masked_fill(mask, 0))


@pytest.mark.parametrize(
    ("family", "mode"), [("llama", ()), ("llama", ("--stream",)), ("mixtral", ("--stream",))]
)
def test_reapply_permutes_a_model_fine_tuned_from_the_dense_one(family, mode, apt, checkpoint):
    dense = checkpoint(family)
    command = ("--pattern", "2:4", "--effort", "fast", "--samples", 4, "--seqlen", 16)
    done = apt("prune", dense, *command, "--calibration", TEXT, "--save-masks", *mode, "-o", "p")
    assert done.code == 0, done.err
    expected, logits = opened("p")[1], []
    for number, (masks, model) in enumerate(((f"p/{MASKS}", dense), ("p", dense), ("p", "p"))):
        done = apt("reapply", masks, model, "-o", f"again{number}", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["permuted"] == (model == dense)
        assert apt("verify", f"again{number}").code == 0  # which needs the report of the pruning
        module, found = opened(f"again{number}")
        assert same(found, expected)
        logits.append(module(torch.arange(1, 17)[None]).logits)
    assert torch.equal(logits[0], logits[1])
    module, tokens = opened(dense)[0], torch.arange(1, 17)[None]
    whole, file = module(tokens).logits, Path("p") / MASKS
    assert permute_as_masked(read_masks(file), read_orders(file), module, adapter_of(module))
    torch.testing.assert_close(module(tokens).logits, whole, rtol=0, atol=1e-4)


def test_orders_of_another_model_are_refused(apt, checkpoint, tmp_path):
    dense, masks = checkpoint("llama"), tmp_path / MASKS
    name = "model.layers.0.mlp.down_proj"
    shape = opened(dense)[0].get_parameter(f"{name}.weight").shape
    mask = {f"{name}.weight": torch.ones(shape, dtype=torch.bool)}
    wrong = [([0, 0], "an order is no permutation"), ([1, 0], "has 2 inputs there")]
    wrong += [(order, "an order is no permutation") for order in ([False, True], [0.0, 1.0])]
    for order, text in wrong:
        write_masks(mask, masks, {name: order})
        done = apt("reapply", masks, dense, "-o", "out")
        assert done.code == 2
        assert text in done.err


def test_order_of_a_site_without_masks_is_ignored(checkpoint):
    model = opened(checkpoint("llama"))[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    orders = {"model.layers.0.mlp.down_proj": [*range(model.config.intermediate_size)][::-1]}
    masks = {"model.layers.0.mlp.up_proj.weight": before["model.layers.0.mlp.up_proj.weight"] > 0}
    assert not permute_as_masked(masks, orders, model, adapter_of(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_that_do_not_fit_the_model_are_refused(apt, checkpoint, pruned):
    pruned()
    other = apt("reapply", "pruned", checkpoint("opt"), "-o", "out")
    assert other.code == 2
    assert "masks of another model: model.layers.0" in other.err
    shape = apt("reapply", "pruned", checkpoint("mistral"), "-o", "out")
    assert shape.code == 2
    assert "there, and" in shape.err
    dense = apt("reapply", checkpoint("llama"), "pruned", "-o", "out")
    assert dense.code == 2
    assert "has no zeros" in dense.err
    missing = apt("reapply", "nothing", "pruned", "-o", "out")
    assert missing.code == 2
    assert "nothing does not exist; name a pruned model" in missing.err
    weights = apt("reapply", "pruned/model.safetensors", "pruned", "-o", "out")
    assert weights.code == 2
    assert "is not a file of masks" in weights.err


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=3),
       st.integers(0, 2**16))  # fmt: skip
def test_masks_survive_a_round_trip_through_their_file(tmp_path_factory, shapes, seed):
    draw = torch.Generator().manual_seed(seed)
    masks = {f"m{i}": torch.rand(shape, generator=draw) < 0.5 for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("masks") / MASKS
    write_masks(masks, path)
    assert same(read_masks(path), masks)
    packed = sum(-(-mask.numel() // 8) for mask in masks.values())
    assert path.stat().st_size < packed + 1000


@pytest.mark.parametrize(
    "shapes", ['{"m": [3, 9]}', '{"m": [0, 4]}', '{"m": "x"}', '{"n": [2, 4]}', "[", "{}"]
)
def test_damaged_masks_are_refused(tmp_path, shapes):
    save_file({"m": torch.zeros(1, dtype=torch.uint8)}, tmp_path / MASKS, {"shapes": shapes})
    with pytest.raises(AptError, match="is not a file of masks"):
        read_masks(tmp_path / MASKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 5, "--minutes", 1), "steps and minutes exclude each other"),
        (("--tokens", "many"), "tokens many is not a number of tokens"),
        (("--rate", "nan"), "rate is nan; it must be above 0"),
        (("--validation-share", 1), "validation share is 1; it must be above 0 and below 1"),
        (("--kind", "ssp"), "did you mean 'spp'?"),
        (("--optimizer", "adam", "--kind", "layers"), "optimizer 'adam' is unknown"),
        (("--samples", 1, "--kind", "layers"), "the text has 1 samples"),
        (("--kind", "layers", "--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_wrong_requests_are_one_line_errors_and_leave_no_files(
    apt, pruned, tmp_path, arguments, message
):
    pruned()
    train = () if "--steps" in arguments else TRAIN[2:]
    done = apt("recover", "pruned", *train, *arguments, "-o", "out")
    assert done.code == 2
    assert message in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"pruned"}


def test_recovery_of_a_dense_model_is_refused(apt, checkpoint, tmp_path):
    for kind in ("spp", "lora"):
        done = apt("recover", checkpoint("llama"), *TRAIN, "--kind", kind, "-o", "out")
        assert done.code == 2
        assert "has no zeros" in done.err
    assert not list(tmp_path.iterdir())
    named = apt("recover", checkpoint("llama"), *TRAIN, "-o", "out")
    assert named.code == 2
    assert "no report names it" in named.err


def test_law_without_recoveries_is_an_error(apt, pruned):
    pruned()
    assert "has no report of a recovery" in apt("law", "pruned").err
    assert "has no report of a recovery" in apt("law", "nothing").err
    assert "threshold is 0; it must be above 0" in apt("law", "pruned", "--threshold", 0).err


def test_kinds_of_recovery_are_listed(apt):
    found = json.loads(apt("methods", "--json").out)
    kinds = {entry["method"] for entry in found if entry["for"] == "recover"}
    assert kinds == {"spp", "lora", "layers", "distill", "norms"}
