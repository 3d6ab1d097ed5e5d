"""GGUF files as checkpoints that are expanded tensor by tensor, and sliced byte by byte."""

import copy
import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytest.importorskip("transformers.conversion_mapping", reason="transformers 4 has no stacks")

from apt_plugins.gguf_files.quantised import GgufCheckpoint, open_file  # noqa: E402
from gguf import GGMLQuantizationType as Type  # noqa: E402

from apt import AptError  # noqa: E402
from apt.checkpoints.load import load_tokenizer  # noqa: E402
from apt.checkpoints.quantised import Slices  # noqa: E402
from apt.layouts.conversions import converted  # noqa: E402
from apt.locations.model_source import find  # noqa: E402
from apt.plugin.registry import registry  # noqa: E402
from tests.helpers.gguf_mixtures import MODELS, random_mixture, write_mixture, write_qwen35moe  # noqa: E402

KEPT = [1, 2, 4, 6]
BLOCKS = {"gpt-oss": [0, 3], "llama4": [0, 1, 6, 7], "deepseek2-v2": [0, 1, 2, 3]}
"""The blocks to keep of models whose blocks are of several kinds by their positions."""
LITE = [*range(13), *range(14, 27)]
"""The blocks to keep of a deepseek2-v2 that llama.cpp opens."""

TOKENS = torch.arange(5, 45)
EXPERT_PARTS = (".experts.", "router.", ".mlp.gate.weight", "correction_bias")


@pytest.fixture(scope="module")
def file(tmp_path_factory, tokenizer):
    """A function that writes a random file of a case and a type once."""
    made = {}

    def write(case, kind=Type.Q8_0, describe=lambda writer: None, blocks=None):
        key = (case, kind, describe, blocks)
        if key not in made:
            path = tmp_path_factory.mktemp("files") / f"{case}.gguf"
            size = 256 if kind is Type.Q4_K else 64
            model = random_mixture(case, size, blocks or (8 if case == "llama4" else 4))
            write_mixture(path, model, case, tokenizer, kind, describe)
            made[key] = path, model
        return made[key]

    return write


def slices_of(checkpoint, blocks, experts=KEPT):
    """The slices of a smaller model, without APT's engine."""
    config, sources, rows = copy.deepcopy(checkpoint.config), {}, {}
    for name in checkpoint.tensors:
        target, parts = name, name.split(".")
        if ".layers." in name:
            if int(parts[2]) not in blocks:
                continue
            parts[2] = str(blocks.index(int(parts[2])))
            target = ".".join(parts)
        sources[target] = name
        if experts and any(part in name for part in EXPERT_PARTS):
            rows[target] = experts
    for name in ("layer_types", "no_rope_layers"):
        if kinds := getattr(config, name, None):
            setattr(config, name, [kinds[block] for block in blocks])
    if (layers := getattr(config, "moe_layers", None)) is not None:
        config.moe_layers = [blocks.index(layer) for layer in layers if layer in blocks]
    config.num_hidden_layers = len(blocks)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if experts and hasattr(config, name):
            setattr(config, name, len(experts))
    return Slices(config, sources, rows, blocks, len(experts) if experts else None)


def model_of(config, weights):
    """A model of transformers with some weights."""
    model = AutoModelForCausalLM.from_config(config).float().eval()
    loaded = model.load_state_dict(weights, strict=False)
    assert set(loaded.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@torch.no_grad()
def log_probabilities(model):
    return model(TOKENS[None]).logits[0].log_softmax(-1)


def assert_same_bytes(before, after, blocks, experts=KEPT):
    """Every tensor of the smaller file has the original's bytes, type and order."""
    names = {}
    for tensor in before.tensors:
        _, found, rest = tensor.name.partition("blk.")
        block, _, part = rest.partition(".")
        if not found:
            names[tensor.name] = tensor
        elif int(block) in blocks:
            names[f"blk.{blocks.index(int(block))}.{part}"] = tensor
    assert [tensor.name for tensor in after.tensors] == list(names)
    for tensor in after.tensors:
        source = names[tensor.name]
        routed = experts and any(
            part in tensor.name for part in ("_exps.", "ffn_gate_inp.", "exp_probs_b")
        )
        stored = source.data[experts] if routed else source.data
        assert tensor.tensor_type is source.tensor_type
        assert tensor.data_offset % after.alignment == 0
        assert tensor.data.tobytes() == stored.tobytes(), tensor.name


@pytest.mark.parametrize("case", MODELS)
def test_expanded_tensors_and_configuration_are_those_of_the_model(file, case):
    path, model = file(case, Type.F32)
    checkpoint = open_file(find(str(path), registry()))
    state = model.state_dict()
    for name, expanded in checkpoint.tensors.items():
        assert torch.equal(checkpoint.read(name), state[name].float()), name
        assert expanded.shape == tuple(state[name].shape)
    parameters = converted(model, {name: each.shape for name, each in checkpoint.tensors.items()})
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert parameters.keys() == state.keys() - tied
    assert all(piece.whole for each in parameters.values() for piece in each.pieces)
    assert not any(each.problem for each in parameters.values())
    opened = model_of(checkpoint.config, {n: checkpoint.read(n) for n in checkpoint.tensors})
    torch.testing.assert_close(
        log_probabilities(opened), log_probabilities(model), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "MXFP4"])
@pytest.mark.parametrize("case", [case for case in MODELS if case != "llama-dense"])
def test_kept_experts_have_the_stored_bytes(file, tmp_path, case, kind):
    path, _ = file(case, Type[kind])
    checkpoint = GgufCheckpoint(path)
    blocks = BLOCKS.get(case, [0, 2, 3])
    slices = slices_of(checkpoint, blocks)
    checkpoint.check_slices(slices)
    checkpoint.write_sliced(slices, tmp_path / "small.gguf")
    before, after = (gguf.GGUFReader(str(p)) for p in (path, tmp_path / "small.gguf"))
    assert_same_bytes(before, after, blocks)
    by_hand = {}
    for target, source in slices.sources.items():
        values = checkpoint.read(source)
        by_hand[target] = values[slices.rows[target]] if target in slices.rows else values
    small = GgufCheckpoint(tmp_path / "small.gguf")
    stored = {name: small.read(name) for name in small.tensors}
    expected = log_probabilities(model_of(slices.config, by_hand))
    assert torch.equal(log_probabilities(model_of(small.config, stored)), expected)


def test_architecture_with_a_mapping_of_transformers_is_read_and_sliced(tmp_path, tokenizer):
    write_qwen35moe(tmp_path / "a.gguf", tokenizer, Type.Q8_0)
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32, config=checkpoint.config
    )
    state = theirs.state_dict()
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(checkpoint.read(name), state[name]) for name in state)
    slices = slices_of(checkpoint, [0, 1, 2, 3])
    checkpoint.write_sliced(slices, tmp_path / "small.gguf")
    files = (gguf.GGUFReader(str(tmp_path / name)) for name in ("a.gguf", "small.gguf"))
    assert_same_bytes(*files, [0, 1, 2, 3])
    with pytest.raises(AptError, match="several kinds"):
        checkpoint.write_sliced(slices_of(checkpoint, [0, 1, 3]), tmp_path / "other.gguf")


def test_tokenizer_of_any_architecture_is_read(file, tokenizer):
    """transformers reads the tokenizers of its supported architectures alone."""
    for case in ("deepseek2", "olmoe"):
        read = load_tokenizer(find(str(file(case)[0]), registry()))
        tokens = read("the same words")["input_ids"]
        assert tokens
        assert read.decode(tokens).endswith("the same words")


def test_entries_follow_and_all_others_keep_their_bytes_and_order(file, tmp_path):
    def describe(writer):
        writer.add_array("qwen3moe.attention.sliding_window_pattern", [True, False, True, True])
        writer.add_array("qwen3moe.rope.dimension_sections", [1, 2, 3, 4])
        writer.add_array("general.sizes", [1.5, -2.0, 3.0, 4.0])
        writer.add_float32("qwen3moe.some.number", 0.1)
        writer.add_custom_alignment(64)

    path, _ = file("qwen3moe", Type.Q8_0, describe)
    checkpoint = GgufCheckpoint(path)
    checkpoint.write_sliced(slices_of(checkpoint, [0, 2, 3]), tmp_path / "small.gguf")
    before, after = (gguf.GGUFReader(str(p)).fields for p in (path, tmp_path / "small.gguf"))
    assert list(before) == list(after)
    changed = {
        key: after[key].contents() for key, field in before.items()
        if b"".join(part.tobytes() for part in field.parts)
        != b"".join(part.tobytes() for part in after[key].parts)
    }  # fmt: skip
    assert changed.pop("GGUF.tensor_count") < before["GGUF.tensor_count"].contents()
    label = changed.pop("general.size_label")
    assert label.startswith("4x")
    assert changed == {
        "qwen3moe.block_count": 3, "qwen3moe.expert_count": 4,
        "qwen3moe.attention.sliding_window_pattern": [True, True, True],
    }  # fmt: skip


@pytest.mark.parametrize("per_block", [False, True])
def test_blocks_of_a_dense_model_are_dropped(file, tmp_path, per_block):
    def describe(writer):
        writer.add_array("llama.attention.some_pattern", [4, 5, 6, 7])

    path, _ = file("llama-dense", Type.Q4_0, *([describe] if per_block else []))
    checkpoint = GgufCheckpoint(path)
    checkpoint.write_sliced(slices_of(checkpoint, [0, 3], None), tmp_path / "small.gguf")
    before, after = (gguf.GGUFReader(str(p)) for p in (path, tmp_path / "small.gguf"))
    assert_same_bytes(before, after, [0, 3], None)
    assert after.fields["llama.block_count"].contents() == 2
    if per_block:
        assert after.fields["llama.attention.some_pattern"].contents() == [4, 7]


def test_leading_dense_blocks_are_counted_again(file, tmp_path):
    path, _ = file("deepseek2")
    checkpoint = GgufCheckpoint(path)
    slices = slices_of(checkpoint, [1, 2, 3])
    slices.config.first_k_dense_replace = 0
    checkpoint.write_sliced(slices, tmp_path / "small.gguf")
    small = GgufCheckpoint(tmp_path / "small.gguf")
    assert small.config.first_k_dense_replace == 0
    assert small.file.entries["leading_dense_block_count"] == 0


@pytest.mark.parametrize("case", ["qwen2moe", "gpt-oss", "deepseek2", "llama", "llama4"])
def test_new_values_are_rounded_in_the_type_of_their_tensor(file, tmp_path, case):
    path, _ = file(case)
    checkpoint = GgufCheckpoint(path)
    slices = slices_of(checkpoint, BLOCKS.get(case, [0, 2, 3]))
    name = next(n for n in slices.sources if "layers.1." in n and "experts.gate_up" in n)
    names = [name, name.replace("gate_up_proj", "down_proj")]
    routers = ("layers.1.mlp.gate.w", "layers.1.mlp.router.w", "layers.1.feed_forward.router.w")
    names += [name for name in slices.sources if any(router in name for router in routers)]
    names += [n for n in slices.sources if "layers.1." in n and n.endswith("q_proj.weight")]
    for changed in names:
        rows = slices.rows.get(changed)
        value = checkpoint.read(slices.sources[changed])
        slices.values[changed] = 1.5 * (value if rows is None else value[rows])
    checkpoint.write_sliced(slices, tmp_path / "small.gguf")
    small = GgufCheckpoint(tmp_path / "small.gguf")
    for target, source in slices.sources.items():
        kept, values = checkpoint.read(source), small.read(target)
        kept = kept[slices.rows[target]] if target in slices.rows else kept
        if target in names:
            error = (values - slices.values[target]).norm() / slices.values[target].norm()
            assert error < 0.01, target
            assert small.tensors[target].stored == checkpoint.tensors[source].stored
        else:
            assert torch.equal(values, kept), target


def test_new_values_of_a_type_that_is_not_rounded_to_are_refused(file, tmp_path):
    checkpoint = GgufCheckpoint(file("qwen3moe", Type.Q4_K)[0])
    slices = slices_of(checkpoint, [0, 1, 2, 3])
    name = "model.layers.1.mlp.experts.down_proj"
    slices.values[name] = checkpoint.read(name)[KEPT]
    with pytest.raises(AptError, match="is of type Q4_K, to which no value is rounded"):
        checkpoint.write_sliced(slices, tmp_path / "small.gguf")
    assert not (tmp_path / "small.gguf").exists()


@pytest.mark.parametrize(
    ("case", "blocks", "message"),
    [
        ("gpt-oss", [0, 2], "several kinds, which follow from positions"),
        ("llama4", [0, 1, 2, 4], "several kinds"),
        ("deepseek2-v2", [0, 1, 2], "26 or 27 blocks"),
    ],
)  # fmt: skip
def test_blocks_that_llama_cpp_would_compute_otherwise_are_refused(
    file, tmp_path, case, blocks, message
):
    checkpoint = GgufCheckpoint(file(case)[0])
    with pytest.raises(AptError, match=message):
        checkpoint.write_sliced(slices_of(checkpoint, blocks, None), tmp_path / "small.gguf")
    assert not (tmp_path / "small.gguf").exists()


def test_llama4_of_128_experts_keeps_them(tmp_path, tokenizer):
    model = random_mixture("llama4", num_local_experts=128, use_qk_norm=False)
    write_mixture(tmp_path / "a.gguf", model, "llama4", tokenizer)
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    assert not checkpoint.config.use_qk_norm
    with pytest.raises(AptError, match="computes use_qk_norm of llama4 from the number of experts"):
        checkpoint.write_sliced(slices_of(checkpoint, [0, 1, 2, 3]), tmp_path / "small.gguf")


def test_damaged_and_unknown_files_are_refused_in_one_line(file, tmp_path, tokenizer):
    whole = file("qwen3moe")[0].read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "head": whole[:100], "none": b""}.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(AptError, match="is not a GGUF file, or is damaged"):
            GgufCheckpoint(path)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "rwkv6")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AptError, match="of architecture rwkv6, is not read"):
        GgufCheckpoint(tmp_path / "other.gguf")

    def split(writer):
        writer.add_uint16("split.count", 2)

    write_mixture(tmp_path / "part.gguf", file("olmoe")[1], "olmoe", tokenizer, describe=split)
    with pytest.raises(AptError, match="is one of several files"):
        GgufCheckpoint(tmp_path / "part.gguf")


def test_values_that_are_not_finite_are_refused(file, tmp_path):
    path, _ = file("olmoe")
    tensor = next(t for t in gguf.GGUFReader(str(path)).tensors if "0.ffn_down_exps" in t.name)
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = b"\xff\xff"
    (tmp_path / "bad.gguf").write_bytes(data)
    checkpoint = GgufCheckpoint(tmp_path / "bad.gguf")
    with pytest.raises(AptError, match="blk.0.ffn_down_exps.weight of .* are not finite"):
        checkpoint.read("model.layers.0.mlp.experts.down_proj")


def test_file_with_experts_of_any_width_is_pruned(apt, file):
    path, model = file("qwen3moe", Type.F32)
    run = apt("convert", path, "-o", "plain")
    assert run.code == 0, run.err
    config = AutoConfig.from_pretrained("plain")
    assert config.moe_intermediate_size == 64
    plain = AutoModelForCausalLM.from_pretrained("plain").eval()
    torch.testing.assert_close(log_probabilities(plain), log_probabilities(model))


LLAMA = """
import json, socket, sys, urllib.request, xllamacpp
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.n_parallel, given.warmup = sys.argv[1], 128, 1, False
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
given.fit_params = False
given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    given.port = free.getsockname()[1]
server = xllamacpp.Server(given)
body = {"prompt": json.loads(sys.argv[2]), "n_predict": 4, "temperature": 0, "n_probs": 300,
        "logit_bias": [[70, 1000.0]]}
request = urllib.request.Request(server.listening_address + "/completion",
    json.dumps(body).encode(), {"content-type": "application/json"})
top = json.load(urllib.request.urlopen(request))["completion_probabilities"][0]["top_logprobs"]
print("FOUND", json.dumps({one["id"]: one["logprob"] for one in top}))
"""


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp is not installed")
@pytest.mark.parametrize("case", MODELS)
def test_llama_cpp_computes_the_smaller_model(file, tmp_path, case):
    lite = case == "deepseek2-v2"
    path, _ = file(case, Type.F32, **({"blocks": 27} if lite else {}))
    checkpoint = GgufCheckpoint(path)
    experts = None if case == "llama-dense" else KEPT
    blocks = LITE if lite else BLOCKS.get(case, [0, 2, 3])
    slices = slices_of(checkpoint, blocks, experts)
    checkpoint.write_sliced(slices, tmp_path / "small.gguf")
    assert_llama_cpp_agrees(tmp_path / "small.gguf")


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp is not installed")
def test_llama_cpp_computes_the_smaller_model_of_linear_attention(tmp_path, tokenizer):
    write_qwen35moe(tmp_path / "a.gguf", tokenizer)
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    checkpoint.write_sliced(slices_of(checkpoint, [0, 1, 2, 3]), tmp_path / "small.gguf")
    assert_llama_cpp_agrees(tmp_path / "small.gguf", 1e-2)  # both compute it in chunks


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


def yarn_of_deepseek(writer):
    yarn(writer)
    writer.add_rope_scaling_yarn_log_mul(0.1 * 0.7)


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


SCALED = {"factor": 4.0, "rope_theta": 10_000.0}
YARN = {**SCALED, "rope_type": "yarn", "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
SCALINGS = [
    ("qwen3moe", yarn, YARN), ("llama-dense", yarn, YARN), ("olmoe", linear,
                                                           {**SCALED, "rope_type": "linear"}),
    ("deepseek2", yarn_of_deepseek, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}),
    ("gpt-oss", yarn, {**YARN, "truncate": False}),
]  # fmt: skip


@pytest.mark.parametrize(("case", "describe", "expected"), SCALINGS)
def test_scaled_rotary_frequencies_are_read(file, case, describe, expected):
    path, _ = file(case, Type.F32, describe)
    checkpoint = GgufCheckpoint(path)
    found = {k: v for k, v in checkpoint.config.rope_parameters.items() if v is not None}
    assert found == expected
    if case != "gpt-oss" and find_spec("xllamacpp"):  # llama.cpp rounds two of its numbers
        assert_llama_cpp_agrees(path)


def test_factors_of_rotary_frequencies_are_those_of_llama_3(tmp_path, tokenizer):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    model = random_mixture(
        "llama-dense", 64, 2, rope_scaling=scaling, rope_theta=500_000.0, head_dim=64
    )
    plain = 500_000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = plain / model.model.rotary_emb.inv_freq

    def describe(writer):
        writer.add_tensor("rope_freqs.weight", factors.numpy())

    write_mixture(tmp_path / "a.gguf", model, "llama-dense", tokenizer, describe=describe)
    with pytest.raises(AptError, match="frequencies are scaled in an unknown way"):
        GgufCheckpoint(tmp_path / "a.gguf")  # of another base, which the helper writes
    data = (tmp_path / "a.gguf").read_bytes()
    change = (b"rope.freq_base\x06\0\0\0" + np.float32(b).tobytes() for b in (1e4, 5e5))
    (tmp_path / "b.gguf").write_bytes(data.replace(*change))
    checkpoint = GgufCheckpoint(tmp_path / "b.gguf")
    found = {k: v for k, v in checkpoint.config.rope_parameters.items() if v is not None}
    assert found == {**scaling, "rope_theta": 500_000.0}
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    torch.testing.assert_close(
        log_probabilities(model_of(checkpoint.config, weights)), log_probabilities(model)
    )
    if find_spec("xllamacpp"):
        assert_llama_cpp_agrees(tmp_path / "b.gguf")


def assert_llama_cpp_agrees(path, error=1e-3):
    """The next token has the same probabilities in llama.cpp as in transformers."""
    command = [sys.executable, "-c", LLAMA, path, json.dumps(TOKENS.tolist())]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "FOUND" in answer.stdout, answer.stderr[-2000:]
    found = json.loads(answer.stdout.split("FOUND")[1])
    small = GgufCheckpoint(path)
    model = model_of(small.config, {name: small.read(name) for name in small.tensors})
    expected = log_probabilities(model)[-1]
    theirs = torch.tensor([found[str(token)] for token in range(300)])
    torch.testing.assert_close(theirs, expected, rtol=0, atol=error)
