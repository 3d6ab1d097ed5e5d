"""Export of GGUF files: tensors and entries, and the errors for unsupported models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split, Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytest.importorskip("accelerate", reason="the extra [gguf] is not installed")

from apt_plugins.gguf_files.layouts import CHANGES  # noqa: E402
from apt_plugins.gguf_files.tensors import can_write  # noqa: E402
from apt_plugins.gguf_files.vocabulary import name_of_steps  # noqa: E402
from apt_plugins.gguf_files.writing import as_q4_0  # noqa: E402

import apt as package  # noqa: E402
from apt.options import ExportRun  # noqa: E402
from apt.plugin.registry import registry  # noqa: E402
from tests.helpers import TEXT  # noqa: E402
from tests.helpers.families import CONFIGS, random_model, random_tokens  # noqa: E402
from tests.helpers.gguf_files import checkpoint_of, entries, read, write_llama, write_random  # noqa: E402
from tests.helpers.mounting import mounted  # noqa: E402

SHORT = ("--samples", 4, "--seqlen", 24, "--calibration", TEXT)
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def describe(writer):
    """Metadata of kinds that transformers does not read."""
    writer.add_name("A tiny model")
    writer.add_size_label("42K")
    writer.add_languages(["en", "de"])
    writer.add_array("general.sizes", [1.5, -2.0])
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
    writer.add_bool("tokenizer.ggml.add_space_prefix", False)
    writer.add_uint8("general.byte", 7)


@pytest.fixture(scope="module")
def original(tmp_path_factory, tokenizer):
    """A GGUF file of a tiny LLaMA."""
    path = tmp_path_factory.mktemp("original") / "tiny.gguf"
    variant = "llama-grouped-tied"
    write_llama(path, random_model(variant), CONFIGS[variant], tokenizer, describe, 300)
    return path


@pytest.fixture(scope="module")
def pruned(original, output_of):
    """The directory of the pruned model."""
    return output_of("prune", original, "--sparsity", "0.5", "--method", "wanda", *SHORT)


@pytest.fixture(scope="module")
def small(original, output_of):
    """The directory of a model with fewer channels, heads and blocks."""
    sizes = ("--size", "channels=40", "--size", "heads=2", "--blocks", 2)
    return output_of("shrink", original, *sizes, *SHORT, "--effort", "fast")


def equal(directory, path, dtype=torch.float32):
    """True if a file has the tensors of a directory, its matrices rounded to a dtype."""
    stored = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    exported = read(path, dtype=torch.float32).state_dict()
    assert stored.keys() == exported.keys()
    matrices = {name for name, tensor in stored.items() if tensor.ndim > 1}
    return all(
        torch.equal(exported[name], tensor.to(dtype).float() if name in matrices else tensor)
        for name, tensor in stored.items()
    )


@pytest.mark.parametrize("kind", DTYPES)
def test_exported_model_has_the_tensors_and_metadata_of_the_original(
    apt, original, pruned, tmp_path, kind
):
    shutil.copyfile(original, "tiny.gguf")  # the name in the report, in the current directory
    run = apt("export", pruned, "--type", kind, "-o", "out.gguf", "--json")
    assert run.code == 0, run.err
    record = json.loads(run.out)
    assert record["type"] == kind
    assert record["zeros"] == record["kept"] > 3 * 32 * 32  # of the q and o of three blocks
    assert record["size"] == Path("out.gguf").stat().st_size
    assert equal(pruned, tmp_path / "out.gguf", DTYPES[kind])
    before, after = entries(original), entries(tmp_path / "out.gguf")
    assert before.keys() == after.keys()
    differing = {key for key in before if before[key] != after[key]}
    assert differing == (set() if kind == "f32" else {"general.file_type"})
    names = [
        [tensor.name for tensor in gguf.GGUFReader(str(path)).tensors]
        for path in (original, tmp_path / "out.gguf")
    ]
    assert names[0] == names[1]


def test_default_type_is_the_dtype_of_the_checkpoint(apt, original, pruned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16)
    model.save_pretrained("half")
    run = apt("export", "half", "--source", original, "-o", "out.gguf")
    assert run.code == 0, run.err
    assert f"metadata and tokenizer: from {original}" in run.err
    assert equal("half", tmp_path / "out.gguf")
    kinds = {t.tensor_type.name for t in gguf.GGUFReader("out.gguf").tensors}
    assert kinds == {"BF16", "F32"}


def test_smaller_model_changes_only_entries_of_sizes(apt, original, small, tmp_path):
    run = apt("export", small, "--source", original, "-o", "out.gguf")
    assert run.code == 0, run.err
    before, after = entries(original), entries(tmp_path / "out.gguf")
    sizes = {"llama.block_count": 2, "llama.feed_forward_length": 40,
             "llama.attention.head_count": 2, "llama.attention.key_length": 8,
             "llama.attention.value_length": 8}  # fmt: skip
    differing = {key for key in after if before.get(key) != after[key]}
    assert differing == {*sizes, "general.size_label"}
    fields = gguf.GGUFReader("out.gguf").fields
    assert {key: fields[key].contents() for key in sizes} == sizes
    assert fields["general.size_label"].contents() == "77K"  # 2 · (4 · 512 + 3 · 40 · 32) + …
    assert equal(small, tmp_path / "out.gguf")
    tokens = random_tokens(2, 12)
    logits = [model(tokens).logits for model in (
        AutoModelForCausalLM.from_pretrained(small), read(tmp_path / "out.gguf")
    )]  # fmt: skip
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(("kind", "keeps"), [("q8_0", True), ("q4_0", True), ("q4_1", False)])
def test_report_counts_the_zeros_in_the_written_file(apt, original, pruned, tmp_path, kind, keeps):
    run = apt("export", pruned, "--source", original, "--type", kind, "-o", "q.gguf", "--json")
    assert run.code == 0, run.err
    record = json.loads(run.out)
    exported = read(tmp_path / "q.gguf").model
    stored = AutoModelForCausalLM.from_pretrained(pruned)
    kept = sum(
        int(((weight == 0) & (exported.get_parameter(name) == 0)).sum())
        for name, weight in stored.model.named_parameters()
        if name.startswith("layers.") and weight.ndim > 1
    )
    assert record["kept"] == kept
    assert (record["kept"] == record["zeros"]) == keeps
    fields = gguf.GGUFReader("q.gguf").fields
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    first = gguf.GGUFReader("q.gguf").tensors[0]
    assert (first.name, first.tensor_type.name) == ("token_embd.weight", "Q8_0")


@pytest.mark.parametrize(("dtype", "group"), [("bfloat16", 32), ("float32", 64)])
def test_stored_integers_are_the_same_in_the_file(apt, original, pruned, dtype, group):
    grid = ("--sparsity", 0, "--quantize", "int4", "--scale-group", group, "--dtype", dtype)
    run = apt("prune", pruned, *grid, *SHORT, "--effort", "fast", "-o", "integers")
    assert run.code == 0, run.err
    run = apt("export", "integers", "--source", original, "-o", "q.gguf")
    assert run.code == 0, run.err
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader("q.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "Q4_0"
    assert "matrices have the integers of the model" in run.err
    exported = read(Path("q.gguf")).model
    stored = AutoModelForCausalLM.from_pretrained("integers", dtype=torch.float32).model
    step = 2**-8 if dtype == "bfloat16" else 2**-10  # the file has scales in fp16
    for name, weight in stored.named_parameters():
        if name.startswith("layers.") and weight.ndim > 1:
            torch.testing.assert_close(exported.get_parameter(name), weight, rtol=step, atol=0)


def test_as_q4_0_returns_none_for_scales_outside_fp16():
    integers = torch.randint(-7, 8, (4, 64), generator=torch.Generator().manual_seed(0)).float()
    packed = as_q4_0((integers * 0.01).numpy())
    stacked = as_q4_0((integers * 0.01).view(2, 2, 64).numpy())
    assert (stacked == packed.reshape(2, 2, -1)).all()
    for scale in (1e6, 1e-8):
        assert as_q4_0((integers * scale).numpy()) is None
    assert as_q4_0((integers + 0.01 * torch.randn(4, 64)).numpy()) is None


def test_matrices_with_partial_blocks_are_f16(apt, original, small):
    run = apt("export", small, "--source", original, "--type", "q8_0", "-o", "q.gguf")
    assert run.code == 0, run.err
    assert "4 matrices are f16: their rows are not multiples of Q8_0's blocks" in run.err
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader("q.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.1.attn_output.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_help_lists_the_types_that_the_package_quantises():
    types = registry().exports.get("gguf").types
    text = next(one.option.help for one in ExportRun.OPTIONS if one.name == "type")
    assert text.rpartition("gguf: ")[2] == f"{', '.join(types[:-1])} or {types[-1]}."
    assert all(can_write(gguf.GGMLQuantizationType[kind.upper()]) for kind in types)


FAMILIES = {
    "qwen2": ("Qwen2Config", {}), "qwen3": ("Qwen3Config", {"head_dim": 128}),
    "phi3": ("Phi3Config", {"vocab_size": 32064}),
    "starcoder2": ("Starcoder2Config", {"vocab_size": 300}),
    "gemma2": ("Gemma2Config", {"head_dim": 16}), "gemma3": ("Gemma3TextConfig", {"head_dim": 16}),
    "llama": ("MistralConfig", {"head_dim": 8}),
    "mamba": ("MambaConfig", {"state_size": 8, "time_step_rank": 4}),
}  # fmt: skip


@pytest.mark.parametrize("architecture", CHANGES)
def test_export_of_a_converted_file_restores_tensors_and_entries(
    apt, tmp_path, tokenizer, architecture
):
    kind, fields = FAMILIES[architecture]
    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
             "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
    config = getattr(transformers, kind)(**sizes | fields)
    write_random(tmp_path / "a.gguf", architecture, config, tokenizer)
    assert apt("convert", "a.gguf", "-o", "a").code == 0
    run = apt("export", "a", "-o", "b.gguf")
    assert run.code == 0, run.err
    before, after = (gguf.GGUFReader(name) for name in ("a.gguf", "b.gguf"))
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    for one, other in zip(before.tensors, after.tensors, strict=True):
        values = [torch.tensor(tensor.data) for tensor in (one, other)]
        # The logarithm of A, and norms minus 1, are rounded.
        torch.testing.assert_close(*values, rtol=2e-6, atol=2e-7 if "norm" in one.name else 0)
    original, exported = (entries(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    differing = {key for key in exported if original.get(key) != exported[key]}
    heads = {f"{architecture}.attention.{kind}_length" for kind in ("key", "value")}
    assert differing <= {"general.file_type", *heads}  # transformers does not read these entries


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128, "rope_theta": 10000.0}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("LlamaConfig", {}), ("LlamaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
        ("MistralConfig", {"sliding_window": None}), ("Qwen2Config", {}),
        ("Qwen3Config", {"head_dim": 128}),
    ],
)  # fmt: skip
def test_checkpoint_without_an_original_is_exported(apt, tmp_path, tokenizer, kind, fields):
    checkpoint_of(tokenizer, kind, **fields)
    run = apt("export", "model", "-o", "out.gguf")
    assert run.code == 0, run.err
    assert equal("model", tmp_path / "out.gguf")
    tokens = random_tokens(2, 12)
    stored = AutoModelForCausalLM.from_pretrained("model")
    torch.testing.assert_close(read(tmp_path / "out.gguf")(tokens).logits, stored(tokens).logits)
    if kind == "LlamaConfig":  # transformers uses the steps of Qwen for all files of Qwen
        text = TEXT.read_text()[:2000]
        exported = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
        tokens = exported(text, add_special_tokens=False)["input_ids"]  # transformers 4 adds one
        assert tokens == tokenizer(text)["input_ids"]
    fields = gguf.GGUFReader("out.gguf").fields
    if kind != "Qwen2Config":  # transformers uses the steps and the end of Qwen 2 for its files
        assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
        assert fields["tokenizer.ggml.tokens"].contents()[-2:] == ["[PAD2048]", "[PAD2049]"]
    assert fields["general.name"].contents() == "model"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_special_token_with_number_0_is_written(apt, tokenizer):
    checkpoint_of(tokenizer, bos_token_id=5, eos_token_id=7)
    assert apt("export", "model", "-o", "out.gguf").code == 0
    fields = gguf.GGUFReader("out.gguf").fields
    ids = {kind: fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("bos", "eos")}
    assert ids == {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    assert ids == {"bos": 0, "eos": 0}


def test_scaled_rotary_frequencies_are_written_as_a_tensor(apt, tokenizer):
    checkpoint_of(tokenizer, rope_scaling=SCALED)
    assert apt("export", "model", "-o", "out.gguf").code == 0
    last = gguf.GGUFReader("out.gguf").tensors[-1]
    # Llama 3: factor 1 above 4 rotations in 128 positions, factor 8 below one rotation.
    assert last.name == "rope_freqs.weight"
    assert last.data.tolist() == pytest.approx([1, 2.339, 8, 8], rel=1e-3)


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # the pattern of Qwen 2; Llama 3 has 1 to 3 digits


@pytest.mark.parametrize(
    ("steps", "merges", "name"),
    [
        ([ByteLevel(add_prefix_space=False)], {}, "gpt-2"),
        ([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)], {}, "smollm"),
        ([Split(Regex(WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)],
         {}, "qwen2"),
        ([Split(Regex(WORDS.replace("{N}|", "{N}{1,3}|")), "isolated"),
          ByteLevel(add_prefix_space=False, use_regex=False)],
         {"ignore_merges": True}, "llama-bpe"),
        ([ByteLevel(add_prefix_space=True)], {}, None),
        ([Digits(), ByteLevel(add_prefix_space=False)], {}, None),
        ([ByteLevel(add_prefix_space=False)], {"ignore_merges": True}, None),
        ([ByteLevel(add_prefix_space=False)], {"byte_fallback": True}, None),
        ([Split(Regex(WORDS), "removed"), ByteLevel(add_prefix_space=False, use_regex=False)],
         {}, None),
        ([Whitespace()], {}, None),
    ],
)  # fmt: skip
def test_name_of_steps_recognises_tokenizers_by_all_steps(steps, merges, name):
    tokenizer = Tokenizer(BPE(**merges))
    tokenizer.pre_tokenizer = Sequence(steps) if len(steps) > 1 else steps[0]
    assert name_of_steps(json.loads(tokenizer.to_str())) == name


def assert_one_line(run, *texts):
    assert run.code == 2, run.err
    assert len(run.err.splitlines()) == 1
    assert all(text in run.err for text in texts), run.err


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("zoo:opt", "-o", "x.gguf"), ["models of type 'opt'", "does not know this family"]),
        (("zoo:bloom", "-o", "x.gguf"), ["models of type 'bloom'", "convert_hf_to_gguf.py"]),
        (("zoo:mamba", "-o", "x.gguf"), ["not made from a GGUF file", "convert_hf_to_gguf.py"]),
        (("zoo:llama", "-o", "x.bin"), ["does not say the format", "gguf (.gguf)", "--format"]),
        (("zoo:llama", "--format", "gguf", "-o", "x"), ["x is not a .gguf file", "--output"]),
        (("zoo:llama", "--format", "onnx", "-o", "x"), ["no export format 'onnx'"]),
        (("zoo:llama", "--type", "iq1_s", "-o", "x.gguf"),
         ["has no type 'iq1_s'", "f32, bf16, f16, q8_0, q6_K, q5_1, q5_K, q5_0"]),
        (("zoo:llama", "--source", "no.gguf", "-o", "x.gguf"), ["no.gguf"]),
        (("zoo:llama", "--source", TEXT, "-o", "x.gguf"), ["is not a GGUF file", "--source"]),
    ],
)  # fmt: skip
def test_wrong_arguments_are_errors_of_one_line(apt, arguments, texts):
    assert_one_line(apt("export", *arguments), *texts)
    assert not list(Path().iterdir())


def test_existing_file_is_replaced_only_with_overwrite(apt):
    for _ in range(2):
        shutil.copyfile(TEXT, "x.gguf")
        assert_one_line(apt("export", "zoo:llama", "-o", "x.gguf"), "x.gguf exists", "--overwrite")
        assert Path("x.gguf").read_bytes() == TEXT.read_bytes()
        assert apt("export", "zoo:llama", "-o", "x.gguf", "--overwrite").code == 0
        assert gguf.GGUFReader("x.gguf").tensors
        assert sorted(path.name for path in Path().iterdir()) == ["x.gguf"]


def test_failed_export_leaves_the_existing_file(apt, tokenizer):
    checkpoint_of(tokenizer)
    model = AutoModelForCausalLM.from_pretrained("model")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e6
    model.save_pretrained("model")
    shutil.copyfile(TEXT, "x.gguf")
    run = apt("export", "model", "--type", "f16", "--overwrite", "-o", "x.gguf")
    assert_one_line(run, "blk.1.ffn_down.weight has values beyond 65,504", "--type")
    assert sorted(path.name for path in Path().iterdir()) == ["model", "x.gguf"]
    assert Path("x.gguf").read_bytes() == TEXT.read_bytes()


def test_full_disk_is_an_error_with_the_file_name(apt, original, pruned, tmp_path):
    with mounted(tmp_path / "disk", "-o", "size=64k") as folder:
        run = apt("export", pruned, "--source", original, "-o", folder / "small.gguf")
        assert run.code == 2
        assert "small.gguf: its disk is full; free space on that disk" in run.err
        assert not any(folder.iterdir())


def test_wrong_original_is_refused(apt, original, pruned, tokenizer):
    assert_one_line(apt("export", pruned, "-o", "x.gguf"), "was made from tiny.gguf", "--source")
    checkpoint_of(tokenizer)
    run = apt("export", "model", "--source", original, "-o", "x.gguf")
    assert_one_line(run, "it has 2,048 tokens, not 2,050")
    checkpoint_of(tokenizer, vocab_size=2048)  # with a head, which the file does not have
    run = apt("export", "model", "--source", original, "-o", "x.gguf")
    assert_one_line(run, "it has no output.weight for lm_head.weight")
    checkpoint_of(tokenizer, "Qwen2Config", vocab_size=2048)
    run = apt("export", "model", "--source", original, "-o", "x.gguf")
    assert_one_line(run, "its architecture is llama, not qwen2")
    damaged = Path("cut.gguf")
    damaged.write_bytes(original.read_bytes()[:5000])
    assert_one_line(apt("export", pruned, "--source", "cut.gguf", "-o", "x.gguf"), "is damaged")


def test_gemma2_with_fewer_blocks_is_refused(apt, tmp_path, tokenizer):
    config = transformers.Gemma2Config(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    write_random(tmp_path / "a.gguf", "gemma2", config, tokenizer)
    del config.layer_types[0]
    config.num_hidden_layers = 1
    AutoModelForCausalLM.from_config(config).save_pretrained("a")
    tokenizer.save_pretrained("a")
    run = apt("export", "a", "--source", "a.gguf", "-o", "b.gguf")
    assert_one_line(run, "are of several kinds")


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"kind": "MistralConfig", "sliding_window": 8}, ["attends within a window"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         ["rotary frequencies of type 'linear'"]),
    ],
)  # fmt: skip
def test_unsupported_attention_is_refused_with_the_converter(apt, tokenizer, fields, texts):
    checkpoint_of(tokenizer, **fields)
    run = apt("export", "model", "-o", "x.gguf")
    assert_one_line(run, *texts, "run llama.cpp's convert_hf_to_gguf.py", "model")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("Llama", {"hidden_act": "gelu"}, "has hidden_act 'gelu', and llama.cpp runs models of"),
        ("Mistral", {"hidden_act": "relu"}, "of type 'mistral' with 'silu' alone"),
        ("Qwen2", {"hidden_act": "gelu_new"}, "of type 'qwen2' with 'silu' alone"),
        ("Qwen3", {"hidden_act": "relu"}, "of type 'qwen3' with 'silu' alone"),
        ("Qwen3", {"attention_bias": True}, "has attention_bias True"),
        ("Llama", {"partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5"),
        ("Gemma2", {"hidden_activation": "gelu"}, "with 'gelu_pytorch_tanh' alone"),
        ("Starcoder2", {"hidden_act": "gelu"}, "with 'gelu_pytorch_tanh' alone"),
        ("Mamba", {"hidden_act": "gelu"}, "of type 'mamba' with 'silu' alone"),
    ],
)
def test_configuration_that_gguf_cannot_express_is_refused(apt, tokenizer, kind, fields, message):
    checkpoint_of(tokenizer, kind=f"{kind}Config", **fields)
    result = apt("export", "model", "-o", "m.gguf")
    assert result.code == 2
    assert message in result.err
    assert "GGUF cannot express this model" in result.err
    assert not Path("m.gguf").exists()


def test_scaled_frequencies_outside_llama_are_refused(apt, tokenizer):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    checkpoint_of(tokenizer, kind="Qwen2Config", rope_scaling=scaling)
    result = apt("export", "model", "-o", "m.gguf")
    assert result.code == 2
    assert "rotary frequencies of type 'llama3'" in result.err


def test_unknown_tokenizer_is_refused_with_the_converter(apt, tokenizer):
    checkpoint_of(tokenizer)
    path = Path("model/tokenizer.json")
    record = json.loads(path.read_text())
    steps = [{"type": "Digits", "individual_digits": False}, record["pre_tokenizer"]]
    record["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    path.write_text(json.dumps(record))
    assert_one_line(
        apt("export", "model", "-o", "x.gguf"), "tokenizer of model is none that is known"
    )


def test_packed_models_and_files_are_refused(apt, original):
    small = ("--sparsity", "0.8", "--method", "magnitude", *SHORT)
    assert apt("prune", "zoo:llama", *small, "-o", "p", "--pack", "packed").code == 0
    assert_one_line(apt("export", "packed", "-o", "x.gguf"), "packed is packed", "apt-prune unpack")
    assert_one_line(apt("export", original, "-o", "x.gguf"), "is not a directory", "prune it")


def test_pickled_weights_are_exported_after_a_conversion(apt, tokenizer):
    checkpoint_of(tokenizer)
    state = AutoModelForCausalLM.from_pretrained("model").state_dict()
    torch.save(state, "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()
    run = apt("export", "model", "-o", "x.gguf")
    assert_one_line(run, "its tensors cannot be read one by one", "apt-prune convert")
    assert "--stream" not in run.err
    assert apt("convert", "model", "-o", "plain").code == 0
    assert apt("export", "plain", "-o", "x.gguf").code == 0


def test_missing_package_gguf_is_the_first_error(apt, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    run = apt("export", "nowhere", "-o", "x.gguf")
    assert_one_line(run, "gguf files need the package gguf", "pip install 'apt-prune[gguf]'")


def test_convert_refuses_an_output_named_like_a_file(apt):
    run = apt("convert", "zoo:llama", "-o", "x.gguf")
    assert_one_line(run, "apt-prune export x -o x.gguf", "--output")


def test_prune_writes_the_file_alone_or_beside_its_directory(apt, original, tmp_path):
    Path("elsewhere").mkdir()
    shutil.copyfile(original, "elsewhere/tiny.gguf")
    command = ("prune", "elsewhere/tiny.gguf", "--pattern", "2:4", "--method", "magnitude", *SHORT)
    run = apt(*command, "-o", "x.gguf")
    assert run.code == 0, run.err
    assert "zeros kept" in run.err
    assert not Path("x").exists()
    assert apt(*command, "-o", "x", "--export", "beside.gguf").code == 0
    assert Path("x.gguf").read_bytes() == Path("beside.gguf").read_bytes()
    assert equal("x", tmp_path / "x.gguf")
    before, after = entries(original), entries(tmp_path / "x.gguf")
    assert [key for key in before if before[key] != after[key]] == []
    assert apt("verify", "x").code == 0
    again = apt("prune", "elsewhere/tiny.gguf", *SHORT, "-o", "y", "--export", "x.gguf")
    assert_one_line(again, "x.gguf exists", "--export")
    inside = apt("prune", "zoo:llama", *SHORT, "-o", "y", "--export", "y/x.gguf")
    assert_one_line(inside, "export y/x.gguf is inside the output", "--export")
    assert_one_line(apt("prune", "zoo:llama", *SHORT, "--export", "y.bin"), "the suffix of y.bin")
    assert not Path("y").exists()


def test_shrink_run_of_a_program_exports_its_model(apt, original, tmp_path):
    run = package.ShrinkRun(
        model=str(original), output=Path("small"), export=Path("small.gguf"), samples=4, seqlen=24,
        sizes={"channels": 40}, calibration=str(TEXT), effort="fast",
    )  # fmt: skip
    package.run(run)
    assert equal("small", tmp_path / "small.gguf")


def test_unsupported_model_is_refused_before_the_run(apt):
    run = apt(
        "prune", "zoo:opt", "--sparsity", 0.5, "--method", "magnitude", *SHORT, "-o", "x.gguf"
    )
    assert run.code == 2
    assert "no GGUF is written of models of type 'opt'" in run.err.splitlines()[-1]
    assert not Path("x").exists()
    assert not Path("x.gguf").exists()


def test_unsupported_gguf_file_is_refused_before_the_run(apt, tmp_path, tokenizer):
    config = transformers.StableLmConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    write_random(tmp_path / "other.gguf", "stablelm", config, tokenizer)
    run = apt("prune", "other.gguf", *SHORT, "-o", "x.gguf")
    assert run.code == 2
    assert "no GGUF is written of models of type 'stablelm'" in run.err.splitlines()[-1]
    assert not Path("x").exists()


def test_export_model_raises_the_error_of_the_command(tmp_path):
    from apt.engine.export import export_model

    run = ExportRun(model="zoo:llama", output=tmp_path / "x.gguf", type="q9")
    with pytest.raises(package.AptError, match="has no type 'q9'"):
        export_model(run, registry())


def test_complete_recovery_is_exported_on_resume(apt, original, pruned):
    shutil.copyfile(original, "tiny.gguf")
    command = ("recover", pruned, "--kind", "layers", "--blocks", 3, "--steps", 8, "--checks", 2,
               "--batch", 4, "--rate", 1e-2, *SHORT[2:], "-o", "out")  # fmt: skip
    assert apt(*command).code == 0
    run = apt(*command, "--resume", "--export", "out.gguf")
    assert run.code == 0, run.err
    assert "already complete" in run.out
    assert Path("out.gguf").is_file()


def test_weights_in_fp64_are_exported_as_f32(apt, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float64)
    shutil.copytree(checkpoint("llama"), "wide")
    model.save_pretrained("wide")
    run = apt("export", "wide", "-o", "out.gguf", "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)["type"] == "f32"
