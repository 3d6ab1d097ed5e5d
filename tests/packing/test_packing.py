"""The packed format: exact round trips, hostile files, and models that run from it."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, OlmoConfig, pipeline

import apt.runtime as runtime
from apt.checkpoints.safetensors_io import INDEX, Shards
from apt.errors import AptError
from apt.packing.directory import PackedShards, Rounding, pack, unpack
from apt.runtime import remote_code
from apt.runtime.dense import DenseLinear, use_kernels
from apt.runtime.entries import KEY, read_config, read_entries
from apt.runtime.linear import PackedLinear, kernels
from apt.runtime.matrix import MASK, SCALES, VALUES, Entry, bitmask, bound, decode, encode, places
from apt.runtime.packed_file import CHECKSUMS, checksums
from apt.runtime.rounding import KINDS, encode_rounded
from tests.helpers import TEXT
from tests.helpers.releases import needs

PLAIN = needs("transformers", "5.20", "plain from_pretrained of a packed model")

FLOATS = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def same_bytes(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    pair = (x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(*pair)


@settings(deadline=None)
@given(
    rows=st.integers(0, 40), columns=st.integers(0, 70), share=st.floats(0, 1), dtype=FLOATS,
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_decode_restores_a_matrix_byte_for_byte(rows, columns, share, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    bits = torch.randint(0, 256, (rows, columns * size), dtype=torch.uint8, generator=draw)
    matrix = bits.view(dtype) if bits.numel() else torch.empty(rows, columns, dtype=dtype)
    matrix = matrix.clone().masked_fill_(torch.rand(rows, columns, generator=draw) < share, 0)
    matrix.view(-1)[:1] = -0.0
    entry, parts = encode(matrix)
    assert Entry.read(json.loads(json.dumps(entry.record()))) == entry
    assert entry.kept == int((matrix != 0).sum())
    assert same_bytes(decode(entry, parts), matrix.masked_fill(matrix == 0, 0))


@pytest.mark.parametrize("share", [0.5, 0.6, 0.7, 0.8])
def test_packed_bytes_are_near_the_entropy(share):
    matrix = torch.randn(512, 1024).bfloat16().masked_fill_(torch.rand(512, 1024) < share, 0)
    entry, parts = encode(matrix)
    assert sum(part.nbytes for part in parts.values()) < 1.005 * bound(entry)


def test_packed_bytes_of_2_4_are_near_the_entropy_of_the_mask():
    keep = torch.rand(512, 256, 4).argsort(2).argsort(2) < 2
    matrix = torch.randn(512, 1024).bfloat16() * keep.view(512, 1024)
    _, parts = encode(matrix)
    least = 512 * 256 * (2.585 + 2 * 16) / 8  # log2(6) bits for the places in a group
    assert sum(part.nbytes for part in parts.values()) < 1.005 * least


def quantised(kind):
    """A matrix of integers with scales, its description and its tensors."""
    entry, parts = encode(torch.randn(6, 300).masked_fill_(torch.rand(6, 300) < 0.6, 0))
    low, high = (-8, 8) if kind == "int4" else (-128, 128)
    whole, scales = torch.randint(low, high, (entry.kept,)), torch.rand(6, 3)
    values = whole.to(torch.int8)
    if kind == "int4":
        even = torch.nn.functional.pad(whole + 8, (0, entry.kept % 2)).view(-1, 2)
        values = (even[:, 0] | (even[:, 1] << 4)).to(torch.uint8)
    entry = Entry(entry.shape, "float32", entry.kept, entry.mask, kind, entry.stored, 128)
    return entry, {MASK: parts[MASK], VALUES: values, SCALES: scales}, whole


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_decode_multiplies_integers_by_their_scales(kind):
    entry, parts, whole = quantised(kind)
    found = decode(entry, parts)
    spread = parts[SCALES].repeat_interleave(128, 1)[:, :300]
    expected = torch.zeros(6, 300)
    rows, columns = places(entry, bitmask(entry, parts[MASK]))
    expected[rows, columns] = whole.float() * spread[rows, columns]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("kind", ["int8", "int4", "float32"])
@pytest.mark.parametrize("vectors", [1, 5, 30])
def test_packed_module_multiplies_like_a_dense_one(native, kind, vectors, monkeypatch):
    if native and kernels() is None:
        pytest.skip("apt_kernels is not installed, or was without a compiler")
    if not native:
        monkeypatch.setattr("apt.runtime.linear.kernels", lambda: None)
    if kind == "float32":
        entry, parts = encode(torch.randn(6, 300).masked_fill_(torch.rand(6, 300) < 0.6, 0))
    else:
        entry, parts, _ = quantised(kind)
    module = PackedLinear(entry, bias=True)
    module.load_state_dict({**{f"weight_{k}": v for k, v in parts.items()}, "bias": torch.randn(6)})
    module.prepare()
    dense, x = decode(entry, parts), torch.randn(vectors, 2, 300)
    assert torch.equal(module.dense(), dense)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    expected = torch.nn.functional.linear(x, dense, module.bias)
    assert torch.allclose(module(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    wide = x.double().requires_grad_()
    module(wide).sum().backward()  # tuning of adapters passes the gradient of the input
    assert torch.allclose(wide.grad, dense.double().sum(0).expand_as(wide), atol=1e-5)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, checkpoint):
    """Pruned random models by family: bf16, and fp32 with tied weights and biases."""
    made = {}

    def make(variant="llama"):
        if variant not in made:
            path = made[variant] = tmp_path_factory.mktemp(variant)
            shutil.copytree(checkpoint(variant), path, dirs_exist_ok=True)
            tensors = load_file(path / "model.safetensors")
            draw = torch.Generator().manual_seed(0)
            for name, tensor in tensors.items():
                if tensor.ndim == 2 and "embed" not in name and "head" not in name:
                    tensor.masked_fill_(torch.rand(tensor.shape, generator=draw) < 0.6, 0)
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return made[variant]

    return make


@PLAIN
@pytest.mark.parametrize("variant", ["llama", "opt", "bloom", "mamba"])
def test_unpack_restores_the_files_of_a_packed_model(apt, pruned, variant):
    path = pruned(variant)
    done = apt("pack", path, "-o", "packed", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["packed_bytes"] < 0.85 * record["dense_bytes"]
    back = apt("unpack", "packed", "-o", "back")
    assert back.code == 0, back.err
    for name in ("model.safetensors", "config.json"):
        one, other = (Path(folder) / name for folder in (path, "back"))
        if name.endswith("json"):
            assert json.loads(one.read_text()) == json.loads(other.read_text())
        else:
            assert one.read_bytes() == other.read_bytes()
    dense = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    packed = runtime.load("packed")
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == record["matrices"]
    tokens = torch.randint(1, 60, (2, 9))
    with torch.no_grad():
        assert torch.allclose(packed(tokens).logits, dense(tokens).logits, atol=1e-4)
        base = AutoModel.from_pretrained("packed", dtype="auto")
        assert sum(isinstance(m, PackedLinear) for m in base.modules()) == record["matrices"]
        states = (model(tokens).last_hidden_state for model in (base, dense.base_model))
        assert torch.allclose(*states, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    measured = [apt("eval", folder, "--data", TEXT, "--seqlen", 16, "--samples", 2, "--json")
                for folder in (path, "packed")]  # fmt: skip
    values = [json.loads(run.out)["perplexity"] for run in measured]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@PLAIN
def test_pipeline_generates_the_same_text_with_a_packed_model(apt, pruned):
    path = pruned()
    assert apt("pack", path, "-o", "packed").code == 0
    texts = [
        pipeline("text-generation", model=str(folder), max_new_tokens=8, do_sample=False)("a b c")
        for folder in (path, "packed")
    ]
    assert texts[0] == texts[1]


def test_overwrite_replaces_packed_and_unpacked_outputs(apt, pruned):
    path = pruned()
    for command in (("pack", path, "-o", "packed"), ("unpack", "packed", "-o", "back")):
        assert apt(*command).code == 0
        run = apt(*command, "--overwrite")
        assert run.code == 0, run.err
        assert "replaces" in run.err
    assert apt("report", "packed", "-o", "page.html").code == 0


def test_packed_sharded_checkpoint_keeps_its_files(apt, pruned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pruned(), dtype="auto")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    names = sorted(p.name for p in (tmp_path / "shards").glob("*.safetensors"))
    assert len(names) > 1
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    index["metadata"]["format"] = "pt"
    (tmp_path / "shards" / INDEX).write_text(json.dumps(index))
    assert apt("pack", "shards", "-o", "packed").code == 0
    packed = sorted(p.name for p in Path("packed").glob("*.safetensors"))
    assert packed == [name.replace("model", "apt_packed") for name in names]
    assert apt("unpack", "packed", "-o", "back").code == 0
    assert json.loads(Path("back", INDEX).read_text())["metadata"]["format"] == "pt"
    for name in names:
        one, other = (load_file(Path(folder) / name) for folder in ("shards", "back"))
        assert one.keys() == other.keys()
        assert all(same_bytes(one[key], other[key]) for key in one)


def test_prune_writes_a_packed_copy(apt, checkpoint):
    run = apt("prune", checkpoint("llama"), "--sparsity", 0.7, "--method", "magnitude",
              "-o", "pruned", "--pack", "packed")  # fmt: skip
    assert run.code == 0, run.err
    assert "packed: " in run.err
    assert apt("unpack", "packed", "-o", "back").code == 0
    assert (
        Path("back/model.safetensors").read_bytes() == Path("pruned/model.safetensors").read_bytes()
    )
    reports = [json.loads(Path(f"{n}/apt_report.json").read_text()) for n in ("pruned", "packed")]
    files = [report.pop("files") for report in reports]
    assert reports[0] == reports[1]
    assert "model.safetensors" in files[0]
    assert "apt_packed.safetensors" in files[1]


def test_resumed_complete_run_is_packed(apt, checkpoint):
    command = ("prune", checkpoint("llama"), "--sparsity", 0.7, "--method", "magnitude",
               "-o", "pruned")  # fmt: skip
    assert apt(*command).code == 0
    run = apt(*command, "--resume", "--pack", "packed", "--dry-run")
    assert (run.code, Path("packed").exists()) == (0, False)
    run = apt(*command, "--resume", "--pack", "packed")
    assert run.code == 0, run.err
    assert "already complete" in run.out
    assert read_entries(Path("packed"))


def test_pack_uses_the_given_adapter(apt, tokenizer, tmp_path):
    config = OlmoConfig(vocab_size=2048, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                        num_attention_heads=2)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "olmo")
    tokenizer.save_pretrained(tmp_path / "olmo")
    assert apt("pack", "olmo", "-o", "x").code == 2
    options = ("--sparsity", 0.7, "--method", "magnitude", "--adapter", "llama", "--samples", 2,
               "--seqlen", 16, "--calibration", TEXT)  # fmt: skip
    run = apt("prune", "olmo", *options, "-o", "pruned", "--pack", "packed")
    assert run.code == 0, run.err
    assert apt("pack", "pruned", "-o", "again", "--adapter", "llama").code == 0
    assert read_entries(Path("packed")) == read_entries(Path("again"))


def test_models_that_cannot_be_packed_are_refused(apt, pruned, checkpoint):
    path = pruned()
    assert apt("pack", path, "-o", "packed").code == 0
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("a b c")
    for command, text in [
        (("pack", checkpoint("llama"), "-o", "x"), "has so many zeros that packing"),
        (("pack", "packed", "-o", "x"), "is packed already"),
        (("pack", path, "-o", "packed"), "overwrite it, or choose another"),
        (
            ("pack", path, "-o", "x", "--format", "compressed-tensors", "--quantize", "int4"),
            "use the format apt",
        ),
        (("unpack", path, "-o", "x"), "is not packed"),
        (("prune", "packed", "-o", "x"), "is packed, and its weights cannot be changed"),
        (("prune", path, "-o", "x", "--pack", "x"), "is the output itself"),
        (("prune", path, "-o", "x", "--pack", "x/packed"), "is the output itself, inside it"),
        (("prune", path, "-o", "x/y", "--pack", "x"), "is the output itself, inside it"),
        (("prune", path, "-o", "x", "--pack", path, "--overwrite"), "is an input of the run"),
        (
            ("prune", path, "-o", "x", "--calibration", "texts/a.txt", "--pack", "texts"),
            "contains an input of the run",
        ),
        (("prune", path, "-o", "x", "--pack", "packed"), "overwrite it, or choose another"),
        (("eval", "packed", "--stream"), "is packed"),
    ]:
        run = apt(*command)
        assert run.code == 2, command
        assert text in run.err
        assert not Path("x").exists()


def damage(folder, change):
    """Change the description of a packed model."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def first(about):
    return next(iter(about["matrices"].values()))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda about: about.update(version=4), "has version 4 of the packed format"),
        (lambda about: about.pop("matrices"), "is damaged"),
        (lambda about: about.update(matrices=[1]), "is damaged"),
        (lambda about: first(about).pop("kept"), "is damaged"),
        (lambda about: first(about).update(kept=-1), "is damaged"),
        (lambda about: first(about).update(kept=10**9), "is damaged"),
        (lambda about: first(about).update(kept=first(about)["kept"] - 1), "damaged"),
        (lambda about: first(about).update(shape=[1, 2, 3]), "is damaged"),
        (lambda about: first(about).update(shape=[10**6, 10**6]), "damaged"),
        (lambda about: first(about).update(mask="zip"), "is damaged"),
        (lambda about: first(about).update(values="int8"), "is damaged"),
        (lambda about: first(about).update(values="int4", group=64), "_scales, which its"),
        (lambda about: first(about).update(stored=3), "damaged"),
        (lambda about: first(about).update(more=3), "is damaged"),
    ],
)
def test_damaged_description_is_an_error_of_one_line(apt, output_of, pruned, change, text):
    shutil.copytree(output_of("pack", pruned()), "packed")
    damage("packed", change)
    for command in (("unpack", "packed", "-o", "x"), ("eval", "packed", "--data", TEXT,
                                                      "--seqlen", 16)):  # fmt: skip
        run = apt(*command)
        assert run.code == 2, (command, run.out)
        assert run.err.count("\n") == 1
        assert not Path("x").exists()
    assert text in apt("unpack", "packed", "-o", "x").err
    with pytest.raises(AptError):
        runtime.load("packed")


@pytest.mark.parametrize("part", [MASK, VALUES])
def test_packed_model_without_a_tensor_is_refused(apt, output_of, pruned, part):
    shutil.copytree(output_of("pack", pruned()), "packed")
    tensors = load_file("packed/apt_packed.safetensors")
    del tensors[next(name for name in tensors if name.endswith(f"_{part}"))]
    save_file(tensors, "packed/apt_packed.safetensors", {"format": "pt"})
    run = apt("unpack", "packed", "-o", "x")
    assert run.code == 2
    assert f"_{part}, which its config.json describes" in run.err
    assert not Path("x").exists()
    with pytest.raises(AptError, match=r"lacks 1 tensors|damaged"):
        runtime.load("packed")


@pytest.mark.parametrize("part", [MASK, VALUES, SCALES])
@pytest.mark.parametrize(
    "opens", [runtime.load, pytest.param(AutoModelForCausalLM.from_pretrained, marks=PLAIN)]
)
def test_matrix_without_a_part_is_an_error_with_its_name(pruned, tmp_path, part, opens):
    name = "model.layers.0.mlp.up_proj.weight"
    pack(pruned(), {name: Rounding("int8", 64)}, tmp_path)
    file, about = tmp_path / "apt_packed.safetensors", read_config(tmp_path)[KEY]["matrices"]
    tensors = load_file(file)
    del tensors[f"{name}_{part}"]
    save_file(tensors, file, {"format": "pt", CHECKSUMS: checksums(tensors, about)})
    with pytest.raises(AptError, match=f"lacks {name}_{part}, which its config.json describes"):
        opens(tmp_path)
    with pytest.raises((ValueError, OSError), match=f"lacks (the mask of )?{name}"):
        remote_code._dense_state(str(tmp_path), read_config(tmp_path)[KEY], {})


def changed(path, folder, change):
    """A copy of a checkpoint with changed tensors."""
    copied = Path(shutil.copytree(path, folder))
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    return copied


def test_stored_tied_weight_stays_dense(apt, pruned, tmp_path):
    def stored(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        embedding[:, ::2] = 0
        tensors["lm_head.weight"] = embedding.clone()

    path = changed(pruned("llama-grouped-tied"), tmp_path / "tied", stored)
    assert apt("pack", path, "-o", "packed").code == 0
    assert "lm_head.weight" not in read_entries(Path("packed"))
    dense, tokens = AutoModelForCausalLM.from_pretrained(path, dtype="auto"), torch.arange(1, 9)
    with torch.no_grad():
        found, expected = runtime.load("packed")(tokens[None]), dense(tokens[None])
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)


@PLAIN
def test_packed_head_is_ignored_by_the_model_without_a_head(apt, pruned, tmp_path):
    path = changed(pruned(), tmp_path / "head", lambda t: t["lm_head.weight"][:, ::2].zero_())
    assert apt("pack", path, "-o", "packed").code == 0
    assert "lm_head.weight" in read_entries(Path("packed"))
    tokens, base = torch.arange(1, 9)[None], AutoModel.from_pretrained("packed", dtype="auto")
    dense = AutoModel.from_pretrained(path, dtype="auto")
    with torch.no_grad():
        states = (model(tokens).last_hidden_state for model in (base, dense))
        assert torch.allclose(*states, atol=1e-4)


def test_matrices_of_zeros_and_with_nan_are_restored(apt, pruned, tmp_path):
    stem, nan = "model.layers.0.mlp", torch.tensor([-2, 0x7F81], dtype=torch.int16)

    def extreme(tensors):
        tensors[f"{stem}.up_proj.weight"] = tensors[f"{stem}.up_proj.weight"].bfloat16()
        tensors[f"{stem}.up_proj.weight"][0, :2] = nan.view(torch.bfloat16)
        for name in [name for name in tensors if "layers.1" in name or "self_attn" in name]:
            tensors[name].zero_()

    path = changed(pruned(), tmp_path / "extreme", extreme)
    names = set(load_file(path / "model.safetensors"))
    (tmp_path / "packed").mkdir()
    pack(path, dict.fromkeys(names), tmp_path / "packed")
    (tmp_path / "integers").mkdir()
    rounding = Rounding("int8", 64, exact=True)
    pack(path, dict.fromkeys(names, rounding), tmp_path / "integers")
    for folder in ("packed", "integers"):
        (tmp_path / f"{folder}-back").mkdir()
        unpack(tmp_path / folder, tmp_path / f"{folder}-back")
        one, other = (
            load_file(f / "model.safetensors") for f in (path, tmp_path / f"{folder}-back")
        )
        assert all(same_bytes(one[name], other[name]) for name in names)

    zeros = changed(pruned(), tmp_path / "zeros", lambda t: [x.zero_() for x in t.values()])
    run = apt("pack", zeros, "-o", "nothing")
    assert run.code == 0, run.err
    with pytest.raises(AptError, match=r"torch\.nn\.Linear"):
        pack(path, {}, tmp_path)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_every_changed_bit_is_detected(pruned, tmp_path, quantize):
    """In values, masks, scales, plain tensors, and the header with names, dtypes and checksums."""
    path, draw, packed = pruned(), random.Random(0), tmp_path / "packed"
    names = [name for name in load_file(path / "model.safetensors") if "proj" in name]
    packed.mkdir()
    pack(path, dict.fromkeys(names, Rounding(quantize, 64) if quantize else None), packed)
    file = packed / "apt_packed.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for index in range(100):
        broken = bytearray(whole)
        low, high = (0, header) if index % 4 == 0 else (header, len(whole))
        broken[draw.randrange(low, high)] ^= 1 << draw.randrange(8)
        file.write_bytes(broken)
        with pytest.raises(AptError, match="damaged|lacks|overlap|stored as"):
            PackedShards(packed).check()
    file.write_bytes(whole)
    PackedShards(packed).check()


@pytest.mark.parametrize(
    "opens", [runtime.load, pytest.param(AutoModelForCausalLM.from_pretrained, marks=PLAIN)]
)
def test_changed_value_is_detected_on_loading(pruned, tmp_path, opens):
    path, packed = pruned(), tmp_path / "packed"
    packed.mkdir()
    names = [name for name in load_file(path / "model.safetensors") if "proj" in name]
    pack(path, dict.fromkeys(names), packed)
    shards = Shards(packed, "apt_packed.safetensors")
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight_values"):
        entry = shards.entries[name]
        whole = entry.file.read_bytes()
        broken = bytearray(whole)
        broken[entry.start] ^= 1
        entry.file.write_bytes(broken)
        with pytest.raises(AptError, match=f"is damaged: {name} differs from its checksum"):
            opens(packed)
        entry.file.write_bytes(whole)
    assert opens(packed)


def test_changed_description_is_detected_by_its_checksum(pruned, tmp_path):
    """A group of 128 or of 65 columns gives two scales for 128 columns, but other weights."""
    path = pruned()
    pack(path, {"model.layers.0.mlp.up_proj.weight": Rounding("int8", 64)}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["quantization_config"]["matrices"]["model.layers.0.mlp.up_proj.weight"]
    entry["group"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AptError, match="the description of .* differs from its checksum"):
        PackedShards(tmp_path).check()


OPENS = """
import json, os, sys, torch
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM

def show(plain, packed, *flags):
    if "--without-apt" in flags:
        sys.modules["apt"] = None
    ids = torch.arange(20).view(1, -1)
    plain_model = AutoModelForCausalLM.from_pretrained(plain)
    try:
        model = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code="--trust" in flags)
    except OSError as error:
        return print("refused:", error)
    up = type(model.model.layers[0].mlp.up_proj).__name__
    print(up, bool((model(ids).logits - plain_model(ids).logits).abs().max() < 0.1))
    again = AutoModelForCausalLM.from_pretrained(plain)  # the plain class is still the default
    print(type(again.model.layers[0].mlp.up_proj).__name__)

for case in json.loads(sys.argv[1]):
    if not os.fork():
        show(*case)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
    print("end of case", flush=True)
"""


def test_plain_transformers_refuses_a_packed_model_or_opens_it_correctly(
    apt, output_of, pruned, tmp_path
):
    """Each case is a process without APT, forked from one that has imported transformers."""
    shutil.copytree(output_of("pack", pruned()), "packed")
    shutil.copytree("packed", "damaged")
    entry = Shards(Path("damaged"), "apt_packed.safetensors").entries["model.norm.weight"]
    broken = bytearray(entry.file.read_bytes())
    broken[entry.start] ^= 1
    entry.file.write_bytes(broken)
    cases = {
        ("packed",): r"refused: Error no file named .*\bmodel\.safetensors",
        ("packed", "--trust"): r"PackedLinear True\nLinear\n",
        ("packed", "--trust", "--without-apt"): r"Linear True\nLinear\n",
        ("damaged", "--trust", "--without-apt"):
            r"refused: .*model\.norm\.weight differs from its checksum",
    }  # fmt: skip
    words = [sys.executable, "-c", OPENS, json.dumps([[str(pruned()), *case] for case in cases])]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    found = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    message = found.stdout.split("end of case\n")
    for case, expected, one in zip(cases, cases.values(), message[:-1], strict=True):
        assert re.match(expected, one), (case, one, found.stderr)


def test_lm_eval_opens_a_packed_model_with_remote_code(
    apt, output_of, pruned, monkeypatch, tmp_path
):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(output_of("pack", pruned()), "packed")
    found = [
        huggingface.HFLM(pretrained=str(path), trust_remote_code=True, device="cpu")
        for path in (pruned(), Path("packed").resolve())
    ]
    assert isinstance(found[1].model.model.layers[0].mlp.up_proj, PackedLinear)
    ids = torch.arange(20).view(1, -1)
    one, other = (lm.model(ids).logits for lm in found)
    assert torch.allclose(one, other, atol=0.1)


@pytest.mark.parametrize("card", ["", "---\nlicense: mit\n---\n# A model\n", "# A model\n"])
def test_card_of_a_packed_model_explains_how_to_open_it(apt, pruned, card):
    shutil.copytree(pruned(), "plain")
    Path("plain/README.md").write_text(card)
    if not card:
        Path("plain/README.md").unlink()
    assert apt("pack", "plain", "-o", "packed").code == 0
    text = Path("packed/README.md").read_text()
    assert text.startswith(card.partition("# A")[0])
    for line in ("pip install apt-prune", "import apt.runtime", "trust_remote_code=True"):
        assert line in text
    assert apt("unpack", "packed", "-o", "back").code == 0
    after = Path("back/README.md")
    assert (after.read_text() if after.exists() else "") == card
    assert not list(Path("back").glob("*.py"))


def test_packed_model_keeps_the_code_of_the_model(apt, pruned):
    shutil.copytree(pruned(), "plain")
    config = json.loads(Path("plain/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    Path("plain/config.json").write_text(json.dumps(config))
    Path("plain/modeling.py").write_text("# the code of the model\n")
    assert apt("pack", "plain", "-o", "packed", "--trust-remote-code").code == 2  # no such class
    config["auto_map"] = {"AutoModel": "modeling.Model"}
    Path("plain/config.json").write_text(json.dumps(config))
    assert apt("pack", "plain", "-o", "packed").code == 0
    packed = json.loads(Path("packed/config.json").read_text())
    assert packed["auto_map"] == config["auto_map"]
    assert not Path("packed/apt_packed.py").exists()
    assert "Without APT it cannot be opened" in Path("packed/README.md").read_text()
    assert apt("unpack", "packed", "-o", "back").code == 0
    assert json.loads(Path("back/config.json").read_text()) == config


def test_verify_detects_damage_of_a_packed_model(apt, checkpoint):
    run = ("prune", checkpoint("llama"), "--sparsity", 0.7, "--method", "magnitude", "-o", "pruned")
    assert apt(*run, "--pack", "packed").code == 0
    found = apt("verify", "packed")
    assert (found.code, "meet their pattern in the report (0.7)" in found.out) == (0, True)
    assert apt("verify", "packed", "--sparsity", 0.8).code == 1
    entry = Shards(Path("packed"), "apt_packed.safetensors").entries["model.norm.weight"]
    broken = bytearray(entry.file.read_bytes())
    broken[entry.start] ^= 1
    entry.file.write_bytes(broken)
    assert "model.norm.weight differs from its checksum" in apt("verify", "packed").err


@pytest.mark.parametrize("group", ["row", 10**9, 64_000])
def test_scale_group_is_at_most_a_row(apt, checkpoint, group):
    """Memory and time follow the columns, not the number."""
    run = ("prune", checkpoint("llama"), "--sparsity", 0.7, "--method", "magnitude", "--quantize",
           "int4", "--scale-group", group, "--samples", 2, "--seqlen", 16, "-o", "pruned", "--pack",
           "packed")  # fmt: skip
    assert apt(*run).code == 0
    entries = read_entries(Path("packed")).values()
    assert all(entry.groups == 1 and entry.values == "int4" for entry in entries)
    assert apt("unpack", "packed", "-o", "back").code == 0
    files = [Path(name, "model.safetensors").read_bytes() for name in ("pruned", "back")]
    assert files[0] == files[1]
    assert (
        apt("pack", "pruned", "--quantize", "int8", "--scale-group", group, "-o", "other").code == 0
    )


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 20), columns=st.integers(1, 300), share=st.floats(0, 1),
    kind=st.sampled_from(["int8", "int4"]), group=st.sampled_from([64, 128, 256]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_rounding_keeps_zeros_with_an_error_of_at_most_half_a_step(
    rows, columns, share, kind, group, seed
):
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=draw)
    matrix.masked_fill_(torch.rand(rows, columns, generator=draw) < share, 0)
    entry, parts = encode_rounded(matrix, kind, group)
    found = decode(Entry.read(json.loads(json.dumps(entry.record()))), parts)
    assert (found[matrix == 0] == 0).all()
    spread = parts[SCALES].repeat_interleave(entry.group, 1)[:, :columns]
    cut = KINDS[kind] * spread  # weights beyond it are cut off
    bound = torch.maximum(spread / 2, matrix.abs() - cut) * (1 + 1e-5)
    assert ((found - matrix).abs() <= bound).all()
    plain = matrix.abs().reshape(-1).amax() / KINDS[kind]
    assert spread.max() <= plain * (1 + 1e-6) + 1e-29


def test_searched_scale_has_a_smaller_error_than_the_largest_weight():
    matrix = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    found = decode(*encode_rounded(matrix, "int4", 128))
    most = matrix.view(64, 4, 128).abs().amax(2).repeat_interleave(128, 1) / 7
    plain = (matrix / most).round() * most
    assert (found - matrix).square().sum() < 0.95 * (plain - matrix).square().sum()


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.999), ("int4", 0.95)])
def test_model_packed_as_integers_is_near_the_dense_one(apt, pruned, kind, least):
    path = pruned()
    done = apt("pack", path, "-o", "packed", "--quantize", kind, "--scale-group", 64, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert 0 < record["relative_error"] < 1 - least
    assert all(name.startswith("model.layers.") for name in read_entries(Path("packed")))
    assert apt("unpack", "packed", "-o", "back").code == 0
    dense = AutoModelForCausalLM.from_pretrained("back", dtype="auto").eval()
    packed, tokens = runtime.load("packed"), torch.randint(1, 60, (2, 3))
    with torch.no_grad():
        found, expected = packed(tokens).logits, dense(tokens).logits
    # The products round their inputs to 16 bits of the largest one in a group.
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))
    for arguments, text in [
        (("--quantize", "int3"), "quantize 'int3' is not one of"),
        (("--quantize", kind, "--scale-group", 100), "is not a multiple of 32"),
    ]:
        run = apt("pack", path, "-o", "x", *arguments)
        assert run.code == 2
        assert text in run.err


def test_quantised_run_is_packed_as_integers_without_loss(apt, checkpoint):
    options = ("--sparsity", 0.6, "--samples", 4, "--seqlen", 32, "--quantize", "int4",
               "--scale-group", 64, "--calibration", TEXT)  # fmt: skip
    run = apt("prune", checkpoint("llama"), *options, "-o", "pruned", "--pack", "packed")
    assert run.code == 0, run.err
    entries = read_entries(Path("packed"))
    assert {(entry.values, entry.group) for entry in entries.values()} == {("int4", 64)}
    assert apt("unpack", "packed", "-o", "back").code == 0
    one, other = (load_file(Path(f) / "model.safetensors") for f in ("pruned", "back"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    report = json.loads(Path("pruned/apt_report.json").read_text())
    assert (report["options"]["quantize"], report["options"]["group"]) == ("int4", 64)
    assert apt("verify", "pruned").code == 0
    for arguments, text in [
        (("--quantize", "int2"), "quantize 'int2' is not one of"),
        (("--quantize", "int4", "--scale-group", 16), "is not a multiple of 32"),
    ]:
        refused = apt("prune", checkpoint("llama"), "--sparsity", 0.6, *arguments, "-o", "x")
        assert refused.code == 2
        assert text in refused.err


def test_packed_integers_load_in_another_dtype(apt, pruned):
    path = pruned("mamba")
    assert apt("pack", path, "-o", "packed", "--quantize", "int8", "--scale-group", 64).code == 0
    assert any("dt_proj" in name for name in read_entries(Path("packed")))
    model, tokens = runtime.load("packed", dtype=torch.bfloat16), torch.arange(1, 9)[None]
    found = {m.weight.dtype for m in model.modules() if isinstance(m, PackedLinear)}
    assert found == {torch.bfloat16}
    with torch.no_grad():
        assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_packed_module_is_cast_like_a_dense_one(dtype):
    matrix = torch.randn(6, 300).masked_fill_(torch.rand(6, 300) < 0.6, 0)
    entry, parts = encode(matrix)
    module = PackedLinear(entry, bias=False)
    module.load_state_dict({f"weight_{name}": part for name, part in parts.items()})
    module.prepare()
    kept = torch.float32 if dtype == torch.float64 else dtype  # no kernels have double precision
    cast, expected = module.to(dtype), matrix.to(kept)
    assert cast.weight_values.dtype == kept
    assert torch.equal(cast.weight, expected.to(dtype))
    x = torch.randn(3, 300).to(dtype)
    wanted = x.double() @ expected.double().T
    assert cast(x).dtype == dtype
    assert torch.allclose(cast(x).double(), wanted, rtol=1e-2, atol=0.1)


def test_packed_model_in_another_dtype_equals_the_dense_one(apt, pruned):
    path = pruned()
    assert apt("pack", path, "-o", "packed").code == 0
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for model in (runtime.load("packed", dtype=torch.bfloat16), runtime.load("packed").bfloat16()):
        packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        assert packed
        for name, module in packed.items():
            assert module.weight_values.dtype == torch.bfloat16
            assert torch.equal(module.weight, dense.get_submodule(name).weight)


@pytest.mark.skipif(kernels() is None, reason="needs apt-kernels with its library")
@pytest.mark.skipif(sys.platform != "linux", reason="Linux says which files are in memory")
def test_file_of_a_loaded_model_is_not_mapped(apt, output_of, pruned):
    shutil.copytree(output_of("pack", pruned()), "packed")
    model = runtime.load("packed")
    assert str(Path("packed").absolute()) not in Path("/proc/self/maps").read_text()
    del model


def test_model_without_kernels_says_how_to_get_them(apt, output_of, pruned, monkeypatch):
    shutil.copytree(output_of("pack", pruned()), "packed")
    monkeypatch.setitem(sys.modules, "apt_kernels", None)  # as if it were not installed
    kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="packed products are slow here.*apt-prune.kernels."):
            runtime.load("packed")
        few = ("--samples", "1", "--seqlen", "32")
        result = apt("eval", "packed", "--data", "builtin", *few)
        assert "warning: packed products are slow here" in result.err
    finally:
        monkeypatch.undo()
        kernels.cache_clear()


@pytest.mark.skipif(kernels() is None, reason="needs apt-kernels with its library")
def test_dense_head_of_a_packed_model_uses_the_kernels(monkeypatch):
    monkeypatch.setattr("apt.compute.multiplies_fast", lambda dtype, device: True)
    module = torch.nn.Linear(1024, 1100, bias=True).bfloat16().requires_grad_(False)
    plain = torch.nn.Linear(64, 64).bfloat16()
    model = torch.nn.Sequential(module, plain)
    use_kernels(model)
    assert [type(part) for part in model] == [DenseLinear, torch.nn.Linear]
    expected = torch.nn.Linear.forward
    for count in (1, 3, 20):
        x = torch.randn(2, count, 1024).bfloat16()
        found, wanted = model[0](x).float(), expected(module, x).float()
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, rtol=1e-2, atol=1e-2)
    assert torch.equal(model[0](x[:, :0]), expected(module, x[:, :0]))
    assert torch.equal(copy.deepcopy(model)[0](x[:, :2]), model[0](x[:, :2]))
    module.weight.data[-1] = 0  # in the same memory
    assert torch.equal(model[0](x[:, :2])[..., -1], module.bias[-1].expand(2, 2))
    module.weight.requires_grad_()
    assert model[0](x[:, :2]).requires_grad
    module.weight.requires_grad_(False)
    module.weight.data = torch.zeros_like(module.weight)  # another memory
    assert torch.equal(model[0](x[:, :2]), module.bias.expand(2, 2, -1))
    module.float()
    assert torch.equal(model[0](x[:, :2].float()), expected(module, x[:, :2].float()))
