"""Directories of quantised safetensors files: expanded, and sliced byte by byte."""

import json
import re
import shutil
from dataclasses import replace

import numpy
import pytest
import torch
from apt_plugins.quantised_directories.mlx import Mlx
from apt_plugins.quantised_directories.opening import open_directory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)

from apt.errors import AptError
from apt.locations.model_source import Source
from apt.output.report import Report
from tests.helpers.families import STACKED
from tests.helpers.quantised_directories import (
    MADE,
    removed_by_hand,
    slices_of,
    write_directory,
    write_files,
)

KEPT = {0: [1, 2, 5, 7], 1: [0, 1, 2, 3], 2: [0, 3, 4, 6]}
BLOCKS = [0, 2]


def opened(directory):
    return open_directory(Source(str(directory), str(directory)))


def stored(directory):
    """All stored tensors of a directory."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folders that were written, by their kinds."""
    return {}, tmp_path_factory


@pytest.fixture
def write(written):
    """A function that writes a quantised directory, and the plain one beside it."""
    folders, factory = written

    def write(kind, directory):
        if kind not in folders:
            folders[kind] = factory.mktemp("written") / "model"
            folders[kind].mkdir()
            write_directory(kind, folders[kind])
        for name in ("model", "plain"):
            source, target = (path.with_name(name) for path in (folders[kind], directory))
            shutil.copytree(source, target, dirs_exist_ok=True)
        return MADE[kind]

    return write


@pytest.mark.parametrize("kind", MADE)
def test_a_smaller_model_has_the_stored_bytes_of_its_sources(kind, directory, tmp_path, write):
    made = write(kind, directory)
    checkpoint = opened(directory)
    slices = slices_of(checkpoint, made, KEPT, BLOCKS)
    checkpoint.write_sliced(slices, tmp_path / "small")
    small = opened(tmp_path / "small")
    assert small.tensors.keys() == slices.sources.keys()
    for name, source in slices.sources.items():
        whole = checkpoint.read(source)
        expected = whole[slices.rows[name]] if name in slices.rows else whole
        assert torch.equal(small.read(name), expected), name
    old, new = stored(directory), stored(tmp_path / "small")
    for key, tensor in new.items():
        source = old[original(key)]
        assert tensor.dtype == source.dtype
        kept = [source]
        if tensor.shape != source.shape:
            kept = [source[row] for row in KEPT[BLOCKS[int(key.split(".")[2])]]]
        expected = torch.cat([as_bytes(part).flatten() for part in kept])
        assert torch.equal(as_bytes(tensor).flatten(), expected), key
    blocks, experts = (re.compile(rf"{word}\.(\d+)\.") for word in ("layers", "experts"))
    assert {int(n) for key in new for n in blocks.findall(key)} == {0, 1}
    assert {int(n) for key in new for n in experts.findall(key)} <= {0, 1, 2, 3}
    assert index_of(tmp_path / "small").keys() == new.keys()


def original(key):
    """The name in the checkpoint of a stored tensor of the smaller model."""
    parts = key.split(".")
    if "layers" in parts:
        block = BLOCKS[int(parts[2])]
        parts[2] = str(block)
        if "experts" in parts and parts[parts.index("experts") + 1].isdigit():
            at = parts.index("experts") + 1
            parts[at] = str(KEPT[block][int(parts[at])])
    return ".".join(parts)


def index_of(directory):
    """The file of each tensor, which has it."""
    files = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in files.items():
        with safe_open(directory / file, "pt") as opened_file:
            assert name in opened_file.keys()  # noqa: SIM118
    return files


def plain_model(tensors, config, path):
    """A model of transformers with these weights, through a plain checkpoint."""
    path.mkdir()
    config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def own_reader(kind, directory):
    """The model as transformers opens the quantised directory on a CPU."""
    if kind.startswith("compressed"):
        pytest.importorskip("compressed_tensors")
        about = CompressedTensorsConfig(dequantize=True)
    else:
        about = (Mxfp4Config if kind == "mxfp4" else FineGrainedFP8Config)(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=about, dtype=torch.bfloat16
    )


def assert_same(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name].to(tensor.dtype)), name
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    "kind", ["fp8", "fp8-deepseek", "mxfp4", "compressed-int4", "compressed-fp8"]
)
@pytest.mark.skipif(not STACKED, reason="before transformers 5, experts are modules")
def test_transformers_reads_the_same_weights_before_and_after(kind, directory, tmp_path, write):
    made = write(kind, directory)
    checkpoint = opened(directory)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    whole = plain_model(tensors, checkpoint.config, tmp_path / "expanded")
    assert_same(whole, own_reader(kind, directory))
    slices = slices_of(checkpoint, made, KEPT, BLOCKS)
    checkpoint.write_sliced(slices, tmp_path / "small")
    by_hand = removed_by_hand(checkpoint, slices)
    expected = plain_model(by_hand, slices.config, tmp_path / "by_hand")
    assert_same(expected, own_reader(kind, tmp_path / "small"))


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "mxfp4"])
def test_expanded_weights_differ_from_plain_ones_by_rounding_alone(kind, directory, write):
    write(kind, directory)
    checkpoint = opened(directory)
    plain = load_file(directory.with_name("plain") / "model.safetensors")
    assert checkpoint.tensors.keys() == plain.keys()
    for name, tensor in plain.items():
        expanded = checkpoint.read(name)
        about = checkpoint.tensors[name]
        assert (expanded.shape, expanded.dtype) == (tensor.shape, about.dtype)
        bound = {"int3": 0.25, "int4": 0.12, "nf4": 0.12, "int8": 0.01, "fp8": 0.04}
        error = (expanded.float() - tensor.float()).norm() / tensor.float().norm()
        assert error <= bound.get(about.stored, 0), name
        assert error > 0 or about.stored == "bf16"


@pytest.mark.parametrize("kind", ["nf4", "nf4-dense"])
def test_bitsandbytes_expands_the_same_values(kind, directory, tmp_path, write):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = write(kind, directory)
    checkpoint = opened(directory)
    tensors = stored(directory)
    for name in (key.removesuffix(".absmax") for key in tensors if key.endswith(".absmax")):
        parts = {
            k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")
        }
        state = bitsandbytes.functional.QuantState.from_dict(parts, torch.device("cpu"))
        expected = bitsandbytes.functional.dequantize_4bit(tensors[name], state)
        assert torch.equal(checkpoint.read(name), expected)
    if kind == "nf4-dense":  # of experts transformers 5 reads no such files
        slices = slices_of(checkpoint, made, {}, BLOCKS)
        checkpoint.write_sliced(slices, tmp_path / "small")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = module.weight
                values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                expected = checkpoint.read(slices.sources[f"{name}.weight"])
                assert torch.equal(values.to(torch.bfloat16), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_expands_and_rounds_the_same_values(bits):
    mx = pytest.importorskip("mlx.core")
    weight = torch.randn(8, 64)
    given = mx.quantize(mx.array(weight.numpy()), group_size=32, bits=bits)
    numbers, scales, biases = (torch.from_numpy(numpy.array(each)) for each in given)
    scheme = Mlx({"model_type": "llama"}, {"group_size": 32, "bits": bits}, None)
    rounded = scheme.rounded("x", weight, {"scales": scales})
    assert torch.equal(rounded["numbers"].view(torch.int32), numbers.view(torch.int32))
    assert torch.equal(rounded["scales"], scales)
    assert torch.equal(rounded["biases"], biases)
    expected = torch.from_numpy(numpy.array(mx.dequantize(*given, group_size=32, bits=bits)))
    assert torch.equal(scheme.expand("x", (8, 64), rounded), expected)


@pytest.mark.parametrize(
    ("kind", "name", "rows"),
    [
        ("compressed-int4", "model.layers.1.self_attn.q_proj.weight", [0, 3, 40]),
        ("compressed-fp8", "model.layers.1.self_attn.q_proj.weight", [5]),
        ("mlx", "model.layers.1.mlp.gate.weight", [0, 7]),
        ("fp8", None, None), ("awq", None, None), ("gptq", None, None), ("nf4", None, None),
    ],
)  # fmt: skip
def test_rows_are_cut_out_of_stored_bytes_or_refused(kind, name, rows, directory, tmp_path, write):
    made = write(kind, directory)
    checkpoint = opened(directory)
    slices = slices_of(checkpoint, made, {block: range(8) for block in range(3)}, [0, 1, 2])
    if name is None:
        name, rows = "model.layers.1.self_attn.q_proj.weight", [1]
        with pytest.raises(AptError, match="of which single rows cannot be cut out; remove them"):
            checkpoint.check_slices(replace(slices, rows={name: rows}))
        with pytest.raises(AptError, match="of which single rows cannot be cut out; remove them"):
            checkpoint.write_sliced(replace(slices, rows={name: rows}), tmp_path / "small")
        assert not (tmp_path / "small").exists()
        return
    checkpoint.check_slices(replace(slices, rows={name: rows}))
    checkpoint.write_sliced(replace(slices, rows={name: rows}), tmp_path / "small")
    assert torch.equal(opened(tmp_path / "small").read(name), checkpoint.read(name)[rows])


@pytest.mark.parametrize("kind", ["fp8", "fp8-deepseek", "compressed-int4", "compressed-fp8",
                                  "mlx", "mlx-mixtral"])  # fmt: skip
def test_new_values_are_rounded_in_the_kind_of_their_source(kind, directory, tmp_path, write):
    made = write(kind, directory)
    checkpoint = opened(directory)
    slices = slices_of(checkpoint, made, KEPT, BLOCKS)
    last = "w2" if "mixtral" in kind else "down_proj"
    matrix = next(n for n in slices.sources if f"layers.1.mlp.experts.1.{last}" in n
                  or f"layers.1.block_sparse_moe.experts.1.{last}" in n)  # fmt: skip
    router = next(name for name in slices.rows if name.endswith("gate.weight"))
    values = {
        matrix: torch.randn(checkpoint.tensors[matrix].shape),
        router: torch.randn(4, checkpoint.tensors[router].shape[1]),
    }
    checkpoint.write_sliced(replace(slices, values=values), tmp_path / "small")
    small = opened(tmp_path / "small")
    for name, tensor in removed_by_hand(checkpoint, slices).items():
        if name in values:
            error = (small.read(name).float() - values[name]).norm() / values[name].norm()
            stored_as = small.tensors[name].stored
            assert stored_as == checkpoint.tensors[slices.sources[name]].stored
            bound = {"int3": 0.2, "int4": 0.12, "int8": 0.01, "fp8": 0.04, "bf16": 0.003}
            assert error < bound[stored_as]
        else:
            assert torch.equal(small.read(name), tensor), name


def test_mxfp4_keeps_its_own_values_and_rounds_others(directory, tmp_path, write):
    made = write("mxfp4", directory)
    checkpoint = opened(directory)
    slices = slices_of(checkpoint, made, KEPT, BLOCKS)
    same, other = (f"model.layers.{block}.mlp.experts.down_proj" for block in range(2))
    kept = removed_by_hand(checkpoint, slices)
    values = {same: kept[same], other: torch.randn(kept[other].shape)}
    checkpoint.write_sliced(replace(slices, values=values), tmp_path / "small")
    small = opened(tmp_path / "small")
    assert torch.equal(small.read(same), values[same])
    assert (small.read(other) - values[other]).norm() / values[other].norm() < 0.13


@pytest.mark.parametrize("kind", ["awq", "gptq", "nf4"])
def test_new_values_are_refused_where_they_are_not_rounded(kind, directory, tmp_path, write):
    made = write(kind, directory)
    checkpoint = opened(directory)
    slices = slices_of(checkpoint, made, KEPT, BLOCKS)
    name = next(name for name in slices.sources if "down_proj" in name and "bias" not in name)
    shape = checkpoint.tensors[slices.sources[name]].shape
    values = {name: torch.zeros(len(slices.rows[name]) if name in slices.rows else shape[0],
                                *shape[1:])}  # fmt: skip
    with pytest.raises(AptError, match="in which APT rounds no new values; choose"):
        checkpoint.write_sliced(replace(slices, values=values), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def cut_file(directory):
    path = sorted(directory.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-5])


def lose_part(directory):
    ends = ("weight", "_scales", "qzeros", "weight_packed", ".biases", "quant_map")
    _rewrite(directory, lambda key, _: key.startswith("model.layers.1") and key.endswith(ends))


def change_shape(directory):
    def changed(key, tensor):
        last = key.rpartition(".")[2]
        if "layers.1." in key and ("scale" in last or last == "absmax") and "nested" not in last:
            return tensor[..., :-1] if tensor.shape[-1] > 1 else tensor[:-1]
        return False

    _rewrite(directory, changed)


def _rewrite(directory, change):
    """Write the tensors again, without those for which ``change`` is True, or changed ones."""
    tensors = {}
    for key, tensor in stored(directory).items():
        new = change(key, tensor)
        if new is not True:
            tensors[key] = tensor if new is False else new.contiguous()
    write_files(directory, tensors)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("damage", [cut_file, lose_part, change_shape])
def test_damaged_directories_are_one_line(kind, damage, directory, write):
    write(kind, directory)
    damage(directory)
    with pytest.raises(AptError, match=r"is damaged: .*; get the checkpoint again") as error:
        opened(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["fp8", "compressed-int4", "awq", "mlx"])
def test_values_that_are_not_finite_are_one_line(kind, directory, write):
    write(kind, directory)
    name = "model.layers.1.self_attn.q_proj.weight"

    def damaged(key, tensor):
        scales = key.startswith(name.removesuffix("weight")) and "scale" in key
        return torch.full_like(tensor, torch.inf) if scales else False

    _rewrite(directory, damaged)
    with pytest.raises(AptError, match=rf"^{name} in .* is damaged: it has values that are not"):
        opened(directory).read(name)


@pytest.mark.parametrize(("kind", "ending", "fault"), [
    ("gptq", "g_idx", "it names groups that do not exist"),
    ("nf4", "quant_state.bitsandbytes__nf4", "it is not JSON"),
])  # fmt: skip
def test_damaged_parts_are_one_line(kind, ending, fault, directory, write):
    write(kind, directory)
    _rewrite(directory, lambda key, x: torch.full_like(x, 99) if key.endswith(ending) else False)
    with pytest.raises(AptError, match=f"{ending} is damaged: {fault}"):
        opened(directory).read("model.layers.1.self_attn.q_proj.weight")


def test_a_file_that_ends_while_it_is_copied_leaves_nothing(directory, tmp_path, write):
    made = write("fp8", directory)
    checkpoint = opened(directory)
    cut_file(directory)
    slices = slices_of(checkpoint, made, KEPT, BLOCKS)
    with pytest.raises(AptError, match="is it complete"):
        checkpoint.write_sliced(slices, tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "AWQ of another"),
        ({"quantization_config": {"quant_method": "gptq", "format": "marlin"}}, "GPTQ with"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "8 bits"),
        ({"quantization_config": {"quant_method": "compressed-tensors",
                                  "format": "nvfp4-pack-quantized"}}, "nvfp4-pack-quantized"),
        ({"model_type": "mamba", "quantization": {"group_size": 64, "bits": 4}}, "type 'mamba'"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_with_what_to_do(config, what, directory):
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(AptError, match=f"{what}.*; remove them from the original, and quantise"):
        opened(directory)


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "aqlm"}}, []])
def test_directories_of_other_formats_are_not_opened(config, directory):
    (directory / "config.json").write_text(json.dumps(config))
    assert opened(directory) is None


def test_names_of_modules_follow_their_blocks_and_experts(directory, tmp_path, write):
    made = write("fp8", directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules_to_not_convert"] = [
        "lm_head", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate", "layers.2.self_attn",
        "model.layers.2.mlp.experts.4.up_proj", "model.layers.2.mlp.experts.5.up_proj",
        "re:.*norm2?$",
    ]  # fmt: skip
    path.write_text(json.dumps(config))
    checkpoint = opened(directory)
    checkpoint.write_sliced(slices_of(checkpoint, made, KEPT, BLOCKS), tmp_path / "small")
    about = json.loads((tmp_path / "small/config.json").read_text())["quantization_config"]
    assert about["modules_to_not_convert"] == [
        "lm_head", "model.layers.1.mlp.gate", "layers.1.self_attn",
        "model.layers.1.mlp.experts.2.up_proj", "re:.*norm2?$",
    ]  # fmt: skip


def test_a_pattern_that_would_match_other_modules_is_refused(directory, tmp_path, write):
    made = write("gptq", directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["dynamic"] = {r"-:model\.layers\.2\..*": {}}
    path.write_text(json.dumps(config))
    checkpoint = opened(directory)
    slices = slices_of(checkpoint, made, KEPT, BLOCKS)
    with pytest.raises(AptError, match="matches model.layers.2.mlp but not model.layers.1.mlp,"):
        checkpoint.write_sliced(slices, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_own_settings_of_modules_of_mlx_follow_their_blocks(directory, tmp_path, write):
    made = write("mlx", directory)
    checkpoint = opened(directory)
    checkpoint.write_sliced(slices_of(checkpoint, made, KEPT, BLOCKS), tmp_path / "small")
    config = json.loads((tmp_path / "small/config.json").read_text())
    gates = {f"model.layers.{block}.mlp.gate" for block in range(2)}
    for field in ("quantization", "quantization_config"):
        assert config[field].keys() == {"group_size", "bits", *gates}


def test_scales_of_activations_follow_their_modules(directory, tmp_path, write):
    made = write("fp8", directory)
    scales = {
        f"model.layers.{block}.self_attn.{name}": torch.tensor(float(block))
        for block in range(3)
        for name in ("k_scale", "q_proj.activation_scale")
    }
    write_files(directory, stored(directory) | scales)
    checkpoint = opened(directory)
    assert not scales.keys() & checkpoint.tensors.keys()
    checkpoint.write_sliced(slices_of(checkpoint, made, KEPT, BLOCKS), tmp_path / "small")
    small = stored(tmp_path / "small")
    found = {key: float(value) for key, value in small.items() if key in scales}
    assert found == {
        f"model.layers.{place}.self_attn.{name}": float(block)
        for place, block in enumerate(BLOCKS)
        for name in ("k_scale", "q_proj.activation_scale")
    }


@pytest.mark.parametrize("kind", ["fp8-deepseek", "mxfp4", "mlx"])
def test_a_run_removes_experts_and_a_block(kind, directory, tmp_path, tokenizer, apt):
    tokenizer.save_pretrained(directory)
    made = write_directory(kind, directory, vocab_size=2048)
    small = tmp_path / "small"
    options = ("--size", "experts=4", "--drop", 1, "--samples", 4, "--seqlen", 16)
    result = apt("shrink", directory, *options, "-o", small)
    assert result.code == 0, result.err
    structure = Report.read(small).structure
    assert structure["rounded"] == {}
    assert structure["groups"]["experts"] == {"kept": 4, "of": 8}
    removed = {int(n.rpartition(".")[2]): x["removed"] for n, x in structure["experts"].items()}
    kept = {block: [e for e in range(8) if e not in removed.get(block, ())] for block in BLOCKS}
    whole, after = opened(directory), opened(small)
    slices = slices_of(whole, made, kept, BLOCKS)
    for name, tensor in removed_by_hand(whole, slices).items():
        assert torch.equal(after.read(name), tensor), name
    assert (small / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


@pytest.mark.skipif(not STACKED, reason="before transformers 5, experts are modules")
def test_a_run_with_compensation_rounds_again_in_fp8(directory, tmp_path, tokenizer, apt):
    tokenizer.save_pretrained(directory)
    write_directory("fp8", directory, vocab_size=2048)
    options = ("--size", "experts=4", "--samples", 4, "--seqlen", 16, "--compensate")
    result = apt("shrink", directory, *options, "-o", tmp_path / "small")
    assert result.code == 0, result.err
    rounded = Report.read(tmp_path / "small").structure["rounded"]
    assert len(rounded) == 12
    assert set(rounded.values()) == {"fp8"}


def test_values_that_cannot_be_rounded_are_refused_before_the_run(
    directory, tmp_path, tokenizer, apt
):
    tokenizer.save_pretrained(directory)
    write_directory("awq", directory, vocab_size=2048)
    options = ("--size", "experts=4", "--calibration", tmp_path / "missing.txt", "--compensate")
    result = apt("shrink", directory, *options, "-o", tmp_path / "small")
    assert result.code == 2
    assert "in which APT rounds no new values; choose" in result.err
    assert not (tmp_path / "small").exists()


def test_a_run_on_a_truncated_directory_is_one_line(directory, tmp_path, tokenizer, apt, write):
    tokenizer.save_pretrained(directory)
    write("mlx", directory)
    cut_file(directory)
    result = apt("shrink", directory, "--size", "experts=4", "-o", tmp_path / "small")
    assert result.code == 2
    assert "is damaged" in result.err
    assert result.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plain"]
