"""Models whose weights are wrapped are refused by name, with the step that unwraps them."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

import apt as library
from apt.adapter.wrapped import refuse_wrapped
from apt.runtime import PackedLinear
from apt.runtime.matrix import Entry
from tests.helpers.families import CONFIGS, random_model, random_tokens

TOKENS = random_tokens(2, 16)
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
QUANTISED = "take the model without quantisation"


def linears(model):
    return [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]


def with_each(function):
    """A model, after a function of each Linear of its blocks."""
    model = random_model("llama")
    for linear in linears(model):
        function(linear)
    return model


def with_down(made):
    """A model with another module, a function of the Linear, in one place."""
    model = random_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.down_proj = made(mlp.down_proj)
    return model


def lora(whole):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    tuned = peft.get_peft_model(random_model("llama"), config)
    return tuned if whole else tuned.get_base_model()


def compiled(in_place):
    model = random_model("llama")
    for index, block in enumerate(model.model.layers):
        if in_place:
            block.compile(backend="eager")
        else:
            model.model.layers[index] = torch.compile(block, backend="eager")
    return model


def fake_quantised():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = random_model("llama")
    layers = model.model.layers.train()
    layers.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(layers, inplace=True)
    return model.eval()


def dynamic():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = random_model("llama")
    return quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def compressed():
    """A Linear that compressed-tensors has begun to quantise."""
    initialize = pytest.importorskip("compressed_tensors.quantization.lifecycle.initialize")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8))
    return with_each(lambda linear: initialize.initialize_module_for_quantization(linear, scheme))


class Linear4bit(nn.Linear):
    """A stand-in for the class of bitsandbytes, which needs a GPU: integers for a weight."""


def in_integers(linear):
    made = Linear4bit(1, 1, bias=False)
    packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
    made.weight = nn.Parameter(packed, requires_grad=False)
    return made


def packed(linear):
    out, width = linear.weight.shape
    entry = Entry((out, width), "float32", out * width // 2, "bits", "float32", out * width // 8)
    return PackedLinear(entry, bias=False)


WRAPPED = {
    "peft": (
        lambda: lora(True), "the model", r"peft\.peft_model\.\w+", r"\(merge_and_unload of the"
    ),
    "peft, the base model": (
        lambda: lora(False), Q_PROJ, r"peft\.tuners\.lora\.layer\.Linear", r"\(merge_and_unload of"
    ),
    "weight_norm": (
        lambda: with_each(weight_norm), Q_PROJ, r"torch\.nn\.utils\.weight_norm\.WeightNorm",
        r"call torch\.nn\.utils\.remove_weight_norm\(module\) first",
    ),
    "weight_norm as a parametrization": (
        lambda: with_each(parametrizations.weight_norm), Q_PROJ,
        r"torch\.nn\.utils\.parametrizations\._WeightNorm", "remove_parametrizations",
    ),
    "spectral_norm": (
        lambda: with_each(nn.utils.spectral_norm), Q_PROJ, r".*\.SpectralNorm",
        r"remove_spectral_norm\(module\) first",
    ),
    "torch.nn.utils.prune": (
        lambda: with_each(lambda linear: prune.l1_unstructured(linear, "weight", 0.3)), Q_PROJ,
        r"torch\.nn\.utils\.prune\.L1Unstructured", r"prune\.remove\(module, 'weight'\) first",
    ),
    "compiled blocks": (
        lambda: compiled(False), r"model\.layers\.0", r"torch\._dynamo\.\w+\.OptimizedModule",
        r"from before torch\.compile \(its _orig_mod\)",
    ),
    "blocks compiled in place": (
        lambda: compiled(True), r"model\.layers\.0", "its method compile", "before its modules are",
    ),
    "data parallel": (
        lambda: nn.DataParallel(random_model("llama")), "the model",
        r"torch\.nn\.parallel\.data_parallel\.DataParallel", r"inside \(its module\)",
    ),
    "fake-quantised": (
        fake_quantised, Q_PROJ, r"torch\.ao\.nn\.qat\.modules\.linear\.Linear", QUANTISED
    ),
    "dynamically quantised": (
        dynamic, Q_PROJ, r"torch\.ao\.nn\.quantized\.dynamic\.modules\.linear\.Linear", QUANTISED
    ),
    "compressed-tensors": (
        compressed, Q_PROJ, r"torch\.nn\.modules\.linear\.Linear with weight_scale", QUANTISED
    ),
    "in integers": (
        lambda: with_down(in_integers), DOWN, r".*\.Linear4bit with weight in torch\.uint8",
        QUANTISED,
    ),
    "in fp8": (
        lambda: with_down(lambda linear: linear.to(torch.float8_e4m3fn)), DOWN,
        r".*\.Linear with weight in torch\.float8_e4m3fn", QUANTISED,
    ),
    "packed": (
        lambda: with_down(packed), DOWN, r"apt\.runtime\.linear\.PackedLinear",
        r"unpack the model first",
    ),
}  # fmt: skip
RUNS = (
    lambda model, adapter: library.prune(model, TOKENS, pattern="2:4", adapter=adapter),
    lambda model, adapter: library.shrink(model, TOKENS, adapter=adapter),
    lambda model, adapter: library.recover(model, TOKENS, kind="layers", adapter=adapter),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper_is_refused_with_a_remedy(name):
    make, place, wrapper, advice = WRAPPED[name]
    model = make()
    before = [p.clone() for p in model.parameters()]
    for run in RUNS:
        for adapter in ("llama", "auto"):
            with pytest.raises(library.AptError) as caught:
                run(model, adapter)
            message = str(caught.value)
            assert re.fullmatch(f"{place} is wrapped by {wrapper}; .*", message), message
            assert re.search(advice, message), message
            assert "\n" not in message
    for was, parameter in zip(before, model.parameters(), strict=True):
        assert was.dtype == parameter.dtype
        assert was.isnan().any() or torch.equal(was, parameter)


UNWRAPPED = {
    "peft": lambda: lora(True).merge_and_unload(),
    "weight_norm": lambda: with_each(lambda x: remove_weight_norm(weight_norm(x))),
    "parametrizations": lambda: with_each(
        lambda linear: parametrize.remove_parametrizations(
            parametrizations.weight_norm(linear), "weight"
        )
    ),
    "torch.nn.utils.prune": lambda: with_each(
        lambda linear: prune.remove(prune.l1_unstructured(linear, "weight", 0.3), "weight")
    ),
    "compiled as a whole": lambda: torch.compile(random_model("llama"), backend="eager"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNWRAPPED)
def test_remedy_makes_the_model_prunable(name):
    model, options = UNWRAPPED[name](), library.PruneOptions(effort="fast")
    report = library.prune(model, TOKENS, pattern="2:4", adapter="llama", options=options)
    assert report.sparsity == 0.5
    assert all((linear.weight == 0).float().mean() == 0.5 for linear in linears(model))


@pytest.mark.parametrize("variant", CONFIGS)
def test_models_of_all_families_are_accepted(variant):
    refuse_wrapped(random_model(variant))
    refuse_wrapped(random_model(variant, torch.bfloat16))


def test_directory_of_a_peft_adapter_is_refused_with_a_remedy(tmp_path, apt):
    lora(True).save_pretrained(tmp_path / "tuned")
    done = apt("prune", tmp_path / "tuned", "--sparsity", "0.5", "--output", tmp_path / "out")
    assert done.code == 2
    assert "tuned has the weights of a peft adapter, and no model; merge it" in done.err
