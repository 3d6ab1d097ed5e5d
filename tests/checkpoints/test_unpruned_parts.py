"""Outputs keep every file and every unpruned tensor of the checkpoint without a change."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apt.checkpoints.safetensors_io import INDEX, Shards
from apt.output.card import write_card
from apt.output.report import Report
from tests.helpers import TEXT
from tests.helpers.families import random_model

QUICK = ("--samples", 2, "--seqlen", 16, "--pattern", "2:4", "--calibration", TEXT)
WANDA = (*QUICK, "--method", "wanda")
MODES = {"memory": (), "stream": ("--stream",)}


@pytest.fixture(params=MODES)
def prune(request, apt):
    """Prune a directory to ``out``, in memory or streamed."""
    return lambda model, *options: apt("prune", model, "-o", "out", *MODES[request.param], *options)


def rewritten(folder, change):
    """Replace each tensor of a checkpoint by ``change(name, tensor)``."""
    path = folder / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def assert_only_sites_changed(before, after):
    """Check that all dtypes are the same, and all tensors except the sites."""
    old, new = Shards(before), Shards(after)
    assert old.entries.keys() == new.entries.keys()
    for name, entry in old.entries.items():
        assert new.entries[name].dtype == entry.dtype, name
        assert torch.equal(old.read(name), new.read(name)) != name.endswith("_proj.weight"), name


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_tensors_of_two_dtypes_keep_their_dtypes(checkpoint, prune, apt, effort):
    model = Path(shutil.copytree(checkpoint("llama"), "mixed"))
    exact = 1 + torch.arange(32) * 2**-12  # bf16 would round these values
    rewritten(model, lambda n, x: x.bfloat16() if x.ndim > 1 else exact.clone())
    run = prune(model, *QUICK, "--effort", effort, "--norm-epochs", 0)
    assert run.code == 0, run.err
    assert_only_sites_changed(model, Path("out"))
    assert apt("verify", "out").code == 0


def test_sites_of_two_dtypes_give_the_same_bytes_in_memory_and_streamed(checkpoint, apt):
    """The blocks after a pruned block see its stored weights, in memory and streamed."""
    model = Path(shutil.copytree(checkpoint("llama"), "mixed"))
    rewritten(model, lambda name, x: x.bfloat16() if "mlp" in name else x)
    for name, mode in MODES.items():
        run = apt("prune", model, "-o", name, *QUICK, "--effort", "fast", *mode)
        assert run.code == 0, run.err
        assert_only_sites_changed(model, Path(name))
        assert apt("verify", name).code == 0
    memory, stream = (Shards(Path(name)) for name in MODES)
    assert all(torch.equal(memory.read(name), stream.read(name)) for name in memory.entries)


@pytest.mark.parametrize(
    ("configured", "stored"), [("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_stored_dtype_is_kept_against_the_configuration(checkpoint, prune, apt, configured, stored):
    model = Path(shutil.copytree(checkpoint("llama"), "other"))
    rewritten(model, lambda name, x: x.to(getattr(torch, stored)))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": configured}))
    run = prune(model, *QUICK, "--norm-epochs", 0)
    assert run.code == 0, run.err
    assert_only_sites_changed(model, Path("out"))


def test_unknown_tensors_and_side_files_are_kept(checkpoint, prune):
    model = Path(shutil.copytree(checkpoint("llama"), "more"))
    path = model / "model.safetensors"
    save_file(load_file(path) | {"mtp.head": torch.ones(3)}, path, metadata={"format": "pt"})
    (model / "LICENSE").write_text("licence")
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: de\n---\n# Original\n\nwords\n")
    (model / "preprocessor_config.json").write_text("{}")
    (model / "generation_config.json").write_text('{"of_our_own": 1}')
    run = prune(model, *WANDA)
    assert run.code == 0, run.err
    assert_only_sites_changed(model, Path("out"))
    for name in ("LICENSE", "preprocessor_config.json", "generation_config.json", "config.json"):
        assert (Path("out") / name).read_bytes() == (model / name).read_bytes()
    card = Path("out/README.md").read_text()
    for part in ("license: mit", "- pruned", "language: de", "words", "| pattern | 2:4 |"):
        assert part in card


ODD_CARDS = {
    "no YAML": "license: [",
    "a key that is a number": "1: 2",
    "tags in a dictionary": "tags: [{a: 1}, [b]]",
    "a key that is a method": "to_dict: 5",
    "results that are none": "model-index: 5\neval_results: 7",
    "an object": "a: !!python/object:os.system 1",
}


@pytest.mark.parametrize("kind", ODD_CARDS)
def test_odd_card_of_the_original_still_gives_a_card(kind, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    (source / "README.md").write_text(f"---\n{ODD_CARDS[kind]}\n---\nwords\n")
    write_card(target, Report(options={}, model={"reference": "a/b"}, calibration={}), source)
    card = (target / "README.md").read_text()
    assert card.startswith("---\n")
    assert "base_model: a/b" in card
    assert "- pruned" in card


def test_checkpoint_of_pickled_weights_keeps_its_side_files(apt, tokenizer):
    random_model("llama").save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    model = Path("plain")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    (model / "LICENSE").write_text("licence")
    (model / "generation_config.json").write_text('{"of_our_own": 1}')
    run = apt("prune", model, *WANDA, "-o", "out")
    assert run.code == 0, run.err
    assert Path("out/LICENSE").read_text() == "licence"
    assert "of_our_own" in Path("out/generation_config.json").read_text()
    assert not Path("out/pytorch_model.bin").exists()
    assert apt("convert", model, "-o", "converted").code == 0
    assert Path("converted/LICENSE").read_text() == "licence"


def test_links_out_of_the_checkpoint_are_not_copied(checkpoint, prune, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "secret.txt").write_text("secret")
    model = Path(shutil.copytree(checkpoint("llama"), "linked"))
    (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (model / "folder").symlink_to(tmp_path / "folder")
    (model / "licence.txt").write_text("licence")
    (model / "LICENSE").symlink_to("licence.txt")
    run = prune(model, *WANDA)
    assert run.code == 0, run.err
    assert "notes.txt is a link to a file outside" in run.err
    assert "linked/folder is a link to a file outside" in run.err
    assert Path("out/LICENSE").read_text() == "licence"
    assert not Path("out/LICENSE").is_symlink()
    assert not any(b"secret" in p.read_bytes() for p in Path("out").rglob("*") if p.is_file())
    assert not Path("out/notes.txt").exists()


def test_links_of_a_hub_snapshot_are_copied_as_files(checkpoint, prune):
    blobs, snapshot = Path("models--o--n/blobs"), Path("models--o--n/snapshots/abc")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(checkpoint("llama").iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    run = prune(snapshot, *WANDA)
    assert run.code == 0, run.err
    assert not any(path.is_symlink() for path in Path("out").iterdir())
    assert Path("out/tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["../elsewhere/model.safetensors", "/ABSOLUTE", "a\\b"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
def test_index_with_a_path_outside_the_checkpoint_is_refused(checkpoint, prune, apt, name, pickled):
    model = Path(shutil.copytree(checkpoint("llama"), "model"))
    Path("elsewhere").mkdir()
    weights = Path(shutil.move(model / "model.safetensors", "elsewhere/model.safetensors"))
    name = name.replace("/ABSOLUTE", str(weights.absolute()))
    index = "pytorch_model.bin.index.json" if pickled else INDEX
    (model / index).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(weights), name)}))
    for run in (prune(model, *WANDA), apt("eval", model, "--data", TEXT, "--seqlen", 16)):
        assert run.code == 2, run.err
        assert "outside its directory" in run.err or "only safetensors can be" in run.err
    assert not Path("out").exists()


def header(path, change):
    """Change the header of a safetensors file, but not its length."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + size])
    change(entries)
    text = json.dumps(entries, separators=(",", ":")).encode()
    path.write_bytes(raw[:8] + text.ljust(size) + raw[8 + size :])


def test_damaged_headers_are_refused_in_memory_and_streamed(checkpoint, prune):
    norms = [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]

    def overlap(entries):
        entries[norms[0]]["data_offsets"] = entries[norms[1]]["data_offsets"]

    for damage, message in (
        (lambda path: header(path, overlap), "is damaged: ValueError"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "LFS"),
        (lambda path: header(path, lambda e: e[norms[0]].update(dtype="F8_E4M3")), "quantised"),
    ):
        model = Path(shutil.copytree(checkpoint("llama"), "model"))
        damage(model / "model.safetensors")
        run = prune(model, *WANDA)
        assert run.code == 2, run.err
        assert message in run.err
        shutil.rmtree(model)
    assert os.listdir() == []


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_nonfinite_values_outside_the_sites_are_refused(checkpoint, prune, name):
    model = Path(shutil.copytree(checkpoint("llama"), "model"))
    nan = torch.tensor(float("nan"))
    rewritten(model, lambda key, x: x * nan if key == name else x)
    run = prune(model, *WANDA)
    assert run.code == 2
    assert f"{name} " in run.err
    assert "not finite" in run.err
    assert os.listdir() == ["model"]


def test_max_shard_size_limits_the_files_of_weights(checkpoint, prune, apt):
    run = prune(checkpoint("llama"), *WANDA, "--max-shard-size", "60KB")
    assert run.code == 0, run.err
    assert len(list(Path("out").glob("*.safetensors"))) > 3
    assert all(path.stat().st_size < 300_000 for path in Path("out").glob("*.safetensors"))
    assert apt("verify", "out").code == 0
    assert_only_sites_changed(checkpoint("llama"), Path("out"))
    AutoModelForCausalLM.from_pretrained("out")


def test_report_has_no_absolute_paths(checkpoint, prune, tmp_path):
    text = Path(shutil.copyfile(TEXT, tmp_path / "mine.txt"))
    options = ("--samples", 2, "--seqlen", 16, "--pattern", "2:4", "--method", "wanda")
    run = prune(checkpoint("llama"), *options, "--calibration", text, "--eval", text)
    assert run.code == 0, run.err
    report = Path("out/apt_report.json").read_text()
    assert str(tmp_path) not in report
    assert str(checkpoint("llama").parent) not in report
    assert "mine.txt" in report


def test_site_of_zeros_gives_a_report_of_valid_json(checkpoint, prune, apt):
    model = Path(shutil.copytree(checkpoint("llama"), "zeros"))
    name = "model.layers.1.mlp.down_proj.weight"
    rewritten(model, lambda key, x: x * 0 if key == name else x)
    run = prune(model, *QUICK)
    assert run.code == 0, run.err
    text = Path("out/apt_report.json").read_text()
    report = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    site = next(site for site in report["sites"] if site["name"] == name.removesuffix(".weight"))
    assert float(site["relative_error"]) in (0, float("inf"))
    assert apt("verify", "out").code == 0


def test_failed_final_metric_keeps_the_written_model(checkpoint, prune, apt, monkeypatch):
    from apt.plugin.registry import registry

    spec, calls = registry().evaluators.get("perplexity"), []
    original = spec.load()

    def failing(module, tokens):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room for logits")
        return original(module, tokens)

    monkeypatch.setattr(type(spec), "load", lambda self: failing)
    run = prune(checkpoint("llama"), *WANDA, "--eval", TEXT)
    assert run.code == 2
    assert "out is written and verified, but measuring it failed: MemoryError: no room" in run.err
    report = json.loads(Path("out/apt_report.json").read_text())
    assert report["problems"] == ["measuring it failed: MemoryError: no room for logits"]
    assert report["scores"].keys() == {"source", "shape", "before"}
    assert not Path(".out.apt").exists()


def test_integer_weights_and_wrong_shapes_are_refused(checkpoint, prune):
    site, table = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    for name, change in ((site, lambda x: x.to(torch.int8)), (table, lambda x: x[:100].clone())):
        model = Path(shutil.copytree(checkpoint("llama"), "model"))
        rewritten(model, lambda key, x, n=name, c=change: c(x) if key == n else x)
        run = prune(model, *WANDA)
        assert run.code == 2, run.err
        assert name in run.err or "does not load" in run.err
        assert not Path("out").exists()
        shutil.rmtree(model)
