"""``apt-prune fit --for packed``: a packed directory of a given size, with zeros and bits."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from apt_lab.reproduction import command_of
from transformers import AutoConfig, AutoModelForCausalLM

import apt.runtime
from apt import FitRun, Report, run
from apt.engine import fit_task
from apt.fit.table import LossTable
from apt.packing.directory import stored_tensors
from apt.runtime.entries import read_entries
from tests.helpers import TEXT

SMALL = ("--samples", 4, "--seqlen", 32, "--effort", "fast", "--calibration", TEXT)
MODEL = "zoo:llama"
SIZE = "1.2MB"

WIDTH = 64
ONE_BLOCK = {
    "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": WIDTH // 2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH, "mlp_only_layers": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def one_block(tmp_path_factory, tokenizer):
    """A function that writes a random model of one block, and returns its directory."""

    def write(kind="llama", *, tied=True, **fields):
        torch.manual_seed(0)
        given = {**ONE_BLOCK, **fields, "tie_word_embeddings": tied, "vocab_size": len(tokenizer)}
        config = AutoConfig.for_model(kind, **given)
        place = tmp_path_factory.mktemp(kind)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
        tokenizer.save_pretrained(place)
        return place

    return write


def weight_bytes(directory):
    """The bytes of the files of weights of a packed directory."""
    return sum(path.stat().st_size for path in stored_tensors(Path(directory)).files)


def content(directory):
    """The header and the data of the weights; safetensors writes metadata in any order."""
    raw = (directory / "apt_packed.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, two_blocks):
    """A model in 1.2 MB, the folder of its directory, and the report."""
    folder = tmp_path_factory.mktemp("packed")
    options = {
        "samples": 4,
        "seqlen": 32,
        "effort": "fast",
        "calibration": str(TEXT),
        "evaluation": str(TEXT),
    }
    return folder, run(FitRun(model=str(two_blocks), size=SIZE, output=folder / "a", **options))


def test_directory_is_at_most_the_promise_and_near_it(fitted):
    folder, report = fitted
    assert [path.name for path in folder.iterdir()] == ["a"]
    written = weight_bytes(folder / "a")
    assert 1_170_000 < written == report.fit["size"] <= report.fit["budget"] == 1_200_000
    assert abs(report.fit["expected"] - written) < 0.02 * written
    assert report.options["target"] == "packed"
    assert Report.read(folder / "a").fit == json.loads(json.dumps(report.fit))


def test_matrices_have_the_forms_of_their_levels(fitted):
    folder, report = fitted
    entries, levels = read_entries(folder / "a"), report.fit["levels"]
    assert len(levels) == 2 * 7
    assert len(set(levels.values())) > 1
    for name, level in levels.items():
        kind, _, share = level.partition(" ")
        if level == "bfloat16":
            assert name not in entries
            continue
        entry = entries[name]
        assert entry.values == kind
        assert entry.group == (0 if kind == "bfloat16" else 64)
        zeros = 1 - entry.kept / (entry.shape[0] * entry.shape[1])
        wanted = float(share.rstrip("%") or 0) / 100
        assert zeros > wanted - 1e-3  # whole weights
        assert zeros < wanted + 0.25  # integers round some weights to zero
    sites = {site.name: site for site in report.sites}
    for name, level in levels.items():
        if level != "bfloat16":
            share = level.partition(" ")[2].rstrip("%")
            assert float(sites[name.removesuffix(".weight")].pattern) == float(share or 0) / 100


def test_packed_model_opens_with_the_values_of_the_unpacked_one(fitted, apt, tmp_path):
    folder, report = fitted
    assert apt("unpack", folder / "a", "-o", "plain").code == 0
    plain = AutoModelForCausalLM.from_pretrained("plain", dtype=torch.float32)
    packed = apt_runtime(folder / "a")
    for name in report.fit["levels"]:
        weight = packed.get_submodule(name.removesuffix(".weight")).weight
        assert torch.equal(weight, plain.get_parameter(name)), name
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        difference = (packed(tokens).logits - plain(tokens).logits).abs().max()
    assert float(difference) < 0.1  # products with integers round their inputs
    assert report.scores["after"]["perplexity"] < 1.2 * report.scores["before"]["perplexity"]


def apt_runtime(directory, dtype=torch.float32):
    """A packed model in a dtype."""
    return apt.runtime.load(directory, dtype=dtype)


def test_unpacked_directory_packs_to_the_same_bytes(fitted, apt, tmp_path):
    folder, _ = fitted
    assert apt("unpack", folder / "a", "-o", "plain").code == 0
    assert apt("pack", "plain", "-o", "again").code == 0
    assert content(tmp_path / "again") == content(folder / "a")


def test_directory_is_verified_and_its_card_and_page_have_the_levels(fitted, apt):
    folder, report = fitted
    done = apt("verify", folder / "a")
    assert done.code == 0, done.out + done.err
    card = (folder / "a" / "README.md").read_text(encoding="utf-8")
    assert f"| size of the weights | {report.fit['size']:,} bytes |" in card
    assert "## A packed model" in card
    assert card.count("## A packed model") == 1
    assert apt("report", folder / "a", "-o", "page.html").code == 0
    assert f"{report.fit['size']:,} bytes" in Path("page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("means", "size"), [("bits", "292kB"), ("zeros", "300kB")])
def test_only_the_means_of_the_user_are_chosen(means, size, apt, tmp_path, one_block):
    options = ("--size", size, "--may", means, "--effort", "fast", "-o", "b")
    done = apt("fit", one_block(), *SMALL, *options)
    assert done.code == 0, done.err
    report = Report.read(tmp_path / "b")
    levels = set(report.fit["levels"].values())
    if means == "bits":
        assert levels <= {"bfloat16", "int8", "int4"}
        assert {site.pattern for site in report.sites} == {"0"}
    else:
        assert all(level.startswith("bfloat16") for level in levels)
        assert any(level.endswith("%") for level in levels)
    assert weight_bytes("b") <= report.fit["budget"]


def test_budget_of_memory_counts_plain_masks_and_the_cache(apt, tmp_path, one_block):
    options = ("--memory", "430kB", "--context", 512, "--may", "bits", "-o", "b")
    done = apt("fit", one_block(), *SMALL, *options)
    assert done.code == 0, done.err
    fit, model = Report.read(tmp_path / "b").fit, apt_runtime("b", torch.bfloat16)
    tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    with torch.no_grad():
        cache = model(torch.zeros(1, 512, dtype=torch.long), use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert fit["size"] == found + sum(tensors.values()) <= 430_000


def test_another_size_takes_the_table_of_an_earlier_run(fitted, apt, tmp_path, two_blocks):
    folder, report = fitted
    table = ("--from", folder / "a")
    assert apt("fit", two_blocks, *SMALL, "--size", "1.25MB", "-o", "b", *table).code == 0
    second = Report.read(tmp_path / "b")
    assert second.fit["table"] == report.fit["table"]
    assert report.fit["size"] < second.fit["size"] <= 1_250_000
    assert second.fit["loss"] < report.fit["loss"]


def test_command_of_the_report_writes_the_same_directory_after_an_interruption(
    fitted, apt, tmp_path, monkeypatch, two_blocks
):
    folder, report = fitted
    command = shlex.split(command_of(report.to_dict()))
    assert command[:3] == ["apt-prune", "fit", "blocks"]
    Path("blocks").symlink_to(two_blocks)
    shutil.copy(TEXT, "text.txt")
    given = {path.name for path in tmp_path.iterdir()}

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_task, "prune_model", interrupt)
        interrupted = apt(*command[1:-1], "again")
    assert interrupted.code == 130
    assert {path.name for path in tmp_path.iterdir()} - given == {".again.table.jsonl"}
    monkeypatch.setattr(fit_task, "sensitivities", interrupt)
    again = apt(*command[1:-1], "again")
    assert again.code == 0, again.err
    assert content(tmp_path / "again") == content(folder / "a")
    assert {path.name for path in tmp_path.iterdir()} - given == {"again"}


def test_sizes_fall_with_the_zeros_and_losses_with_the_bits(fitted):
    table = LossTable.read(fitted[1].fit["table"])
    for name, levels in table.tensors.items():
        losses = {level.name: level.loss for level in levels}
        sizes = {level.name: level.size for level in levels}
        assert losses["bfloat16"] == 0
        assert 0 < losses["int8"] < losses["int4"], name
        for kind in ("bfloat16", "int8", "int4"):
            shares = [each for each in losses if each.startswith(f"{kind} ")]
            assert len(shares) == 5
            bytes_ = [sizes[each] for each in shares]
            assert bytes_ == sorted(bytes_, reverse=True), name
        assert losses["int4 50%"] > losses["bfloat16 50%"] > 0


def test_experts_have_levels_of_their_stacks(apt, tmp_path, one_block):
    options = ("--size", "305kB", "--may", "zeros,bits", "-o", "b")
    done = apt("fit", one_block("qwen2_moe", **EXPERTS), *SMALL, *options)
    assert done.code == 0, done.err
    report = Report.read(tmp_path / "b")
    levels = {n: x for n, x in report.fit["levels"].items() if "experts" in n}
    assert levels
    assert any("%" in level for level in levels.values())
    assert weight_bytes("b") == report.fit["size"] <= report.fit["budget"]
    entries, model = read_entries(tmp_path / "b"), apt_runtime("b")
    assert any("experts" in name for name in entries)
    with torch.no_grad():
        assert model(torch.arange(8).view(1, 8)).logits.isfinite().all()


def test_untied_head_has_integers(apt, one_block, tmp_path):
    untied = one_block(tied=False)
    done = apt("fit", untied, *SMALL, "--size", "385kB", "--effort", "fast", "-o", "b")
    assert done.code == 0, done.err
    report = Report.read(tmp_path / "b")
    level = report.fit["levels"]["lm_head.weight"]
    assert level in ("int8", "int4")
    assert read_entries(tmp_path / "b")["lm_head.weight"].values == level
    assert weight_bytes("b") <= report.fit["budget"]
    weight = apt_runtime("b").lm_head.weight
    dense = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32).lm_head.weight
    assert 0 < float((weight - dense).norm() / dense.norm()) < 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--size", "10kB"),
            "does not fit into 10,000 bytes: its smallest packed directory may have 1,2",
        ),
        (("--size", "9MB"), "zoo:llama fits already: with dense weights it has at most 3,9"),
        (("--size", SIZE, "-o", "x.gguf"), "the output is a directory, and x.gguf is"),
        (("--size", SIZE, "--may", "bit"), "may 'bit' is not one of zeros, bits"),
        (("--size", SIZE, "--may", "depth"), "fit has no depth to choose for packed"),
        (("--size", SIZE, "--scale-group", 40), "scale group 40 is not a multiple of 32"),
    ],
)
def test_impossible_requests_are_errors_of_one_line(words, message, apt, tmp_path):
    options = {"-o": "x", "--for": "packed", "--samples": 4, "--seqlen": 32}
    given = [word for pair in options.items() if pair[0] not in words for word in pair]
    result = apt("fit", MODEL, *given, *words)
    assert result.code == 2
    assert message in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--may", "zeros,bits"), "fit has no zeros to choose for gguf; choose from bits"),
        (("--scale-group", 128), "scale group has no effect for gguf"),
    ],
)
def test_files_have_no_zeros_and_no_scale_groups(words, message, apt, tmp_path):
    result = apt("fit", MODEL, *SMALL, "--size", "1.2MB", "-o", "x.gguf", *words)
    assert result.code == 2
    assert message in result.err


def test_table_of_another_output_is_refused(fitted, apt, tmp_path, two_blocks):
    result = apt(
        "fit", two_blocks, *SMALL, "--size", "1.2MB", "-o", "b.gguf", "--from", fitted[0] / "a"
    )
    assert result.code == 2
    assert "was made from another model, or for another output" in result.err


def test_report_says_both_sizes(fitted):
    record = json.loads((fitted[0] / "a" / "apt_report.json").read_text())["fit"]
    assert record["expected"] <= record["budget"]
    assert record["size"] <= record["budget"]
