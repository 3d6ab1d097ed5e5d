"""Storage and compute: the dtype of a checkpoint, and the dtype that its model computes in."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import apt as library
from apt.checkpoints.load import open_skeleton
from apt.compute import ComputeDtype, compute_dtype, computing_in, fp32_names, rounded_to
from apt.engine.costs import PlannedRun
from apt.engine.estimate import _generating_bytes
from apt.errors import AptError
from apt.locations.model_source import find
from apt.options import PruneRun
from apt.patterns import NM
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from tests.helpers import TEXT
from tests.helpers.families import random_model, random_tokens

OF_STREAMED = ("--own-samples", 0, "--norm-epochs", 0)  # the defaults of a streamed run
WORDS = ("--samples", 4, "--seqlen", 32, "--calibration", TEXT)
SMALL = {"samples": 4, "seqlen": 32, "calibration": str(TEXT)}


@pytest.fixture
def slow_half(monkeypatch):
    """A machine that multiplies half precision more slowly than fp32."""
    monkeypatch.setattr("apt.compute.multiplies_fast", lambda dtype, device: False)
    monkeypatch.setattr("apt.compute.multiplies_bf16", lambda device: False)


@pytest.fixture
def fast_half(monkeypatch):
    monkeypatch.setattr("apt.compute.multiplies_fast", lambda dtype, device: True)
    monkeypatch.setattr("apt.compute.multiplies_bf16", lambda device: True)


@pytest.fixture(scope="module")
def half(tmp_path_factory, tokenizer):
    """The directory of a random model that is stored in bf16."""
    directory = tmp_path_factory.mktemp("half")
    random_model("llama").bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def weights(directory):
    files = sorted(Path(directory).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_auto_is_fp32_if_half_precision_is_slow(slow_half):
    assert compute_dtype(torch.bfloat16, "cpu") == torch.float32
    assert compute_dtype(torch.float16, "cpu") == torch.float32
    assert compute_dtype(torch.float64, "cpu") == torch.float64
    assert compute_dtype(torch.bfloat16, "cpu", "bfloat16") == torch.bfloat16


def test_auto_is_the_stored_dtype_if_it_is_fast(fast_half):
    assert compute_dtype(torch.bfloat16, "cpu") == torch.bfloat16
    assert compute_dtype(torch.float32, "cpu") == torch.float32
    assert compute_dtype(torch.float32, "cpu", "bfloat16") == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "compute"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
     (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
)  # fmt: skip
def test_unchanged_tensors_are_restored_bit_for_bit(stored, compute):
    model = random_model("llama").to(stored)
    model.register_buffer("table", torch.randn(8).to(stored))
    model.register_buffer("positions", torch.randn(8), persistent=False)
    before = copy.deepcopy(model.state_dict())
    pointers = {name: id(p) for name, p in model.named_parameters()}
    with computing_in(model, compute):
        assert {p.dtype for p in model.parameters()} == {compute}
        assert model.table.dtype == compute
        assert model.positions.dtype == torch.float32
        model(random_tokens())
    assert {name: id(p) for name, p in model.named_parameters()} == pointers
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_model_in_the_compute_dtype_is_not_changed():
    model = random_model("llama").bfloat16()
    model.norm = nn.LayerNorm(4)
    before = {name: (t.data_ptr(), t.dtype) for name, t in model.state_dict().items()}
    with computing_in(model, torch.bfloat16):
        assert {n: (t.data_ptr(), t.dtype) for n, t in model.state_dict().items()} == before


def test_changed_values_are_rounded_and_others_keep_their_precision():
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    cast = ComputeDtype(model, torch.bfloat16)
    model.weight.data[0] = 0
    model.weight.data[1, 1] = 3
    cast.restore()
    assert torch.equal(model.weight[2:], before[2:])
    assert not model.weight[0].any()
    assert model.weight[1, 1] == 3


def test_tied_parameters_stay_tied_and_fp64_and_integers_keep_their_dtypes():
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(2, 2).double()}
    )
    model["b"].weight = model["a"].weight
    model.register_buffer("count", torch.ones(2, dtype=torch.long))
    with computing_in(model, torch.bfloat16):
        assert model["b"].weight is model["a"].weight
        assert model["a"].weight.dtype == torch.bfloat16
        assert model["c"].weight.dtype == torch.float64
        assert model.count.dtype == torch.long
    assert model["b"].weight.dtype == torch.float32


def test_tensors_that_a_class_keeps_in_fp32_are_not_cast():
    model = nn.ModuleDict({"router": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)})
    model._keep_in_fp32_modules_strict = {"router"}
    assert fp32_names(model, torch.bfloat16, model.state_dict()) == {"router.weight", "router.bias"}
    with computing_in(model, torch.bfloat16):
        assert model["router"].weight.dtype == torch.float32
        assert model["mlp"].weight.dtype == torch.bfloat16


def test_value_beyond_the_range_of_the_stored_dtype_is_an_error():
    with pytest.raises(AptError, match=r"head has values that are not finite in torch.float16"):
        rounded_to("head", torch.tensor([1e6]), torch.float16)


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "streamed"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_run_in_fp32_writes_the_stored_dtype_and_exact_zeros(half, apt, stream, quantize):
    words = ("prune", half, *WORDS, "--pattern", "2:4", *["--stream"] * stream)
    words += ("--quantize", quantize) if quantize else ()
    run = apt(*words, "--compute", "float32", *OF_STREAMED, "-o", "out")
    assert run.code == 0, run.err
    assert apt("verify", "out", "--pattern", "2:4").code == 0
    before, after = weights(half), weights("out")
    pruned = {site.name for site in library.Report.read("out").sites}
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        if name.removesuffix(".weight") in pruned:
            assert int((tensor == 0).sum()) == tensor.numel() // 2
        else:
            assert torch.equal(tensor, before[name])
    report = library.Report.read("out")
    assert report.model["dtype"] == "bfloat16"
    assert report.model["compute"] == "float32"
    if quantize:  # the integers and their scales are exact in the stored dtype
        packed = apt("pack", "out", "-o", "packed")
        assert packed.code == 0, packed.err


def test_streamed_run_in_fp32_writes_the_bytes_of_the_run_in_memory(half, apt):
    for name, stream in (("one", OF_STREAMED), ("two", ("--stream",))):
        run = apt("prune", half, *WORDS, "--compute", "float32", *stream, "-o", name)
        assert run.code == 0, run.err
    one, two = weights("one"), weights("two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_slow_machine_computes_in_fp32_with_a_notice(half, apt, slow_half):
    requested = apt("prune", half, *WORDS, "--compute", "float32", "-o", "asked")
    chosen = apt("prune", half, *WORDS, "-o", "chosen")
    assert requested.code == chosen.code == 0, chosen.err
    assert "compute: float32 (default, since cpu multiplies bfloat16 more slowly)" in chosen.err
    assert "compute:" not in requested.err
    one, two = weights("asked"), weights("chosen")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_program_prunes_as_the_command_and_keeps_dtypes_and_buffers(
    half, apt, slow_half, tokenizer
):
    words = ("--pattern", "2:4", "--norm-epochs", 0)
    assert apt("prune", half, *WORDS, *words, "-o", "shell").code == 0
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16)
    buffers = {name: (id(b), b.dtype) for name, b in model.named_buffers()}
    tokens = library.calibration_tokens(tokenizer, str(TEXT), samples=4, seqlen=32)
    report = library.prune(model, tokens, pattern="2:4", tokenizer=tokenizer)
    assert report.model["compute"] == report.model["products"] == "float32"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {name: (id(b), b.dtype) for name, b in model.named_buffers()} == buffers
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights("shell").items())


@pytest.mark.parametrize("size", [{"keep": 0.7}, {"blocks": 2}])
def test_smaller_model_is_solved_in_fp32_and_keeps_the_stored_dtype(
    half, slow_half, tokenizer, size
):
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16)
    tokens = library.calibration_tokens(tokenizer, str(TEXT), samples=4, seqlen=32)
    small, report = library.shrink(model, tokens, size=library.ShrinkOptions(**size))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert report.model["compute"] == "float32"


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "streamed"])
def test_smaller_model_computed_in_bf16_keeps_unsolved_fp32_weights(checkpoint, apt, stream):
    given = checkpoint("llama")
    run = apt("shrink", given, *WORDS, "--drop", "1", "--compute", "bfloat16", *stream, "-o", "out")
    assert run.code == 0, run.err
    before, after = weights(given), weights("out")
    kept = "model.layers.0.self_attn.q_proj.weight"
    assert after[kept].dtype == torch.float32
    assert torch.equal(after[kept], before[kept])


def test_run_in_bf16_keeps_the_bits_of_unpruned_fp32_tensors(checkpoint, apt):
    given = checkpoint("llama")
    run = apt("prune", given, *WORDS, "--only", "*q_proj", "--compute", "bfloat16", "-o", "out")
    assert run.code == 0, run.err
    before, after = weights(given), weights("out")
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name]) == ("q_proj" not in name)


def test_given_dtype_is_written_in_any_compute_dtype(half, apt):
    words = ("prune", half, *WORDS, "--dtype", "float16", "--compute", "float32", "-o", "out")
    run = apt(*words)
    assert run.code == 0, run.err
    assert {tensor.dtype for tensor in weights("out").values()} == {torch.float16}


def test_training_begins_with_the_stored_weights_and_writes_their_dtype(half, apt, slow_half):
    run = apt("prune", half, *WORDS, "--pattern", "2:4", "-o", "sparse")
    assert run.code == 0, run.err
    run = apt(
        "recover", "sparse", "--steps", 12, "--batch", 2, "--rate", 1e-2,
        "--seqlen", 32, "--samples", 24, "--calibration", TEXT, "--kind", "layers", "-o", "trained",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert {tensor.dtype for tensor in weights("trained").values()} == {torch.bfloat16}
    assert apt("verify", "trained", "--pattern", "2:4").code == 0
    record = library.Report.read("trained").recovery
    assert (record["dtype"], record["compute"]) == ("bfloat16", "float32")
    assert record["training"]["products"] == "float32"


@pytest.mark.parametrize(
    ("words", "products"),
    [((), "bfloat16"), (("--compute", "float32"), "float32"), (("--layer-wise",), "float32")],
)
def test_report_has_the_dtype_of_the_products(checkpoint, apt, fast_half, words, products):
    run = apt("prune", checkpoint("llama"), *WORDS, "--pattern", "2:4", *words, "-o", "out")
    assert run.code == 0, run.err
    model = library.Report.read("out").model
    assert (model["dtype"], model["compute"]) == ("float32", "float32")
    assert model["products"] == products


def test_training_in_fp16_is_refused(half, apt):
    run = apt("recover", half, "--compute", "float16", "-o", "out")
    assert run.code == 2
    assert "a training does not compute in float16" in run.err
    assert "(--compute)" in run.err
    run = apt("prune", half, "--minutes", 1, "--compute", "float16", "-o", "out")
    assert run.code == 2
    assert "(--minutes, --compute)" in run.err


def test_eval_and_compare_compute_in_the_given_dtype(half, apt, monkeypatch):
    seen = []
    plain = nn.functional.linear

    def linear(inputs, weight, *rest):
        seen.append(weight.dtype)
        return plain(inputs, weight, *rest)

    monkeypatch.setattr(nn.functional, "linear", linear)
    words = ("--data", TEXT, "--seqlen", 32, "--compute", "float32")
    for command in (
        ("eval", half, "--samples", 2, *words),
        ("eval", half, "--samples", 2, *words, "--stream"),
        ("compare", half, *WORDS, "--data", TEXT, "--windows", 2, "--methods", "magnitude",
         "--patterns", "2:4", "--compute", "float32", "-o", "cells"),
    ):  # fmt: skip
        seen.clear()
        run = apt(*command)
        assert run.code == 0, run.err
        assert set(seen) == {torch.float32}, command


def test_inspect_counts_the_memory_of_the_compute_dtype(half, apt):
    import json

    needs = partial(apt, "inspect", half, "--json", "--compute")
    one, two = (json.loads(needs(name).out)["needs"] for name in ("bfloat16", "float32"))
    assert two["weights"] == 2 * one["weights"]
    assert two["activations"] > one["activations"]


def test_memory_of_generated_text_includes_copies_of_the_weights_in_bf16(checkpoint, fast_half):
    skeleton = open_skeleton(find(str(checkpoint("llama")), registry()), registry())
    plan = make_plan(skeleton.module, skeleton.adapter, NM(2, 4))

    def run(**options):
        return PlannedRun(skeleton, plan, PruneRun(own_samples=1, seqlen=32, **options))

    copies = 2 * run().parameters
    without = _generating_bytes(run(compute="float32"), blocks=4)
    assert _generating_bytes(run(), blocks=4) == without + copies
    assert _generating_bytes(run(stream=True), blocks=4) == without
    assert _generating_bytes(replace(run(), error_aware=False), blocks=4) == without


def test_resuming_with_another_compute_dtype_is_refused(half, apt):
    words = ("prune", half, *WORDS, "--stream", "-o", "out")
    assert apt(*words, "--compute", "float32").code == 0
    run = apt(*words, "--compute", "bfloat16", "--resume")
    assert run.code == 2
    assert "compute" in run.err
