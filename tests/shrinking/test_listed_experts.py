"""Experts in a list, as in transformers 4 and in custom code: fewer and narrower experts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from apt_adapters.auto import AutoAdapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import apt as library
from apt import AptError, ShrinkOptions
from apt.adapter import DecoderAdapter, Experts, Unrouted
from apt.checkpoints.smaller import shrunk
from tests.helpers import ROOT, TEXT, listed_mixture
from tests.helpers.families import CONFIGS, STACKED, adapter_of, random_model, random_tokens
from tests.helpers.interrupted import PLACES, KilledError, cut

SMALL = ("--samples", 4, "--seqlen", 32, "--calibration", TEXT)
TOKENS = random_tokens(4, 24)
BOTH = {"experts": 3, "expert-channels": 8}


def listed():
    """A random mixture of four experts in a list, two for each token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **CONFIGS["llama-grouped-tied"].to_dict() | {"num_hidden_layers": 2},
        num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    model = listed_mixture.ListedMixture(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Declared(DecoderAdapter):
    """The adapter of that mixture."""

    blocks_path = "model.layers"
    inputs = adapter_of(random_model("llama")).inputs[:2]
    experts = (Experts("mlp.experts", router="mlp.router", linears=(("w1", "w3"), ("w2",))),)


def opened(variant):
    if variant in ADAPTERS:
        return listed(), ADAPTERS[variant]()
    return random_model(variant), adapter_of(random_model(variant))


ADAPTERS = {"auto": AutoAdapter, "declared": Declared}
VARIANTS = [*ADAPTERS, *(() if STACKED else ("qwen2-moe", "mixtral", "olmoe"))]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_removed_experts_equal_experts_that_are_not_routed(variant):
    model, adapter = opened(variant)
    removed, routers = {}, {}
    for index, (name, block) in enumerate(adapter.blocks(model)):
        for groups in adapter.groups(block, model.config):
            if groups.kind == "experts":
                removed[name] = {"experts": [index % groups.count]}
                mask = torch.arange(groups.count) == index % groups.count
                router = next(m for n, m in block.named_modules() if n.endswith(("gate", "router")))
                routers[router.weight] = mask
    small = shrunk(model, adapter, removed)
    with Unrouted(routers):
        expected = model(TOKENS).logits
    torch.testing.assert_close(small(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "experts" not in name}
    left = {name for name in small.state_dict() if "experts" not in name}
    assert kept.keys() == left


@torch.no_grad()
def test_experts_without_effect_are_removed_and_later_ones_move_up():
    """The second expert of each block has no effect, so it is removed."""
    model = listed()
    for layer in model.model.layers:
        for parameter in layer.mlp.experts[1].w2.parameters():
            parameter.zero_()
    size = ShrinkOptions(sizes={"experts": 3})
    small, report = library.shrink(model, TOKENS, size=size, adapter=Declared())
    assert [e["removed"] for e in report.structure["experts"].values()] == [[1], [1]]
    for layer, other in zip(model.model.layers, small.model.layers, strict=True):
        left = [layer.mlp.experts[expert] for expert in (0, 2, 3)]
        for whole, moved in zip(left, other.mlp.experts, strict=True):
            assert all(map(torch.equal, whole.parameters(), moved.parameters()))
        assert torch.equal(other.mlp.router.weight, layer.mlp.router.weight[[0, 2, 3]])


@torch.no_grad()
def test_listed_experts_are_narrowed():
    model, distances = listed(), []
    for exact in (True, False):
        size = ShrinkOptions(sizes={"expert-channels": 8}, compensate=exact)
        small, _ = library.shrink(model, TOKENS, size=size, adapter=Declared())
        distances.append(float((small(TOKENS).logits - model(TOKENS).logits).norm()))
        narrow = small.model.layers[1].mlp.experts[3]
        assert [len(p) for p in narrow.w1.parameters()] == [8, 8]
        assert narrow.w2.weight.shape == (32, 8)
    assert 0 < distances[0] < distances[1]


def test_method_that_reads_the_router_is_refused_for_listed_experts():
    size = ShrinkOptions(sizes={"experts": 3})
    with pytest.raises(AptError, match="ModuleList does not get the indices .* leave the method"):
        library.shrink(listed(), TOKENS, size=size, adapter=Declared(), method="reap")


def tensors(folder):
    return {k: v for f in Path(folder).glob("*.safetensors") for k, v in load_file(f).items()}


def test_custom_code_model_is_streamed_and_resumed(apt, monkeypatch):
    listed().save_pretrained("dense")
    shutil.copy(listed_mixture.__file__, "dense")
    config = json.loads(Path("dense/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "listed_mixture.ListedMixture"}
    Path("dense/config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(ROOT / "adapters/apt_adapters/zoo/moe").save_pretrained("dense")
    sizes = [word for kind, n in BOTH.items() for word in ("--size", f"{kind}={n}")]
    words = ("shrink", "dense", "--adapter", "auto", "--trust-remote-code", *sizes, *SMALL)
    whole = apt(*words, "-o", "whole")
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 3, KilledError())
        with pytest.raises(KilledError):
            apt(*words, "--stream", "-o", "streamed")
    result = apt(*words, "--resume", "-o", "streamed")
    assert result.code == 0, result.err
    one, other = tensors("whole"), tensors("streamed")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    small = AutoModelForCausalLM.from_pretrained("streamed", trust_remote_code=True)
    assert [*small.model.layers[0].mlp.experts[2].w1.weight.shape] == [8, 32]
    assert small.generate(TOKENS[:1], max_new_tokens=2).shape == (1, 26)
