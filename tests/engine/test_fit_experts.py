"""``apt-prune fit`` of a mixture: experts, bits and zeros in one budget."""

import pytest
import torch

import apt.runtime
from apt import FitRun, Report, run
from apt.checkpoints.load import load, open_skeleton
from apt.evaluation.metrics import perplexity
from apt.locations.model_source import find
from apt.packing.directory import stored_tensors
from apt.plugin.registry import registry
from apt.pruning.expert_choice import lowest_scores
from apt.shrinking.expert_proxy import ExpertProxy
from tests.helpers import TEXT
from tests.helpers.families import STACKED

MODEL = "zoo:moe"
pytestmark = pytest.mark.skipif(not STACKED, reason="zoo:moe needs transformers 5")


@pytest.fixture(scope="module")
def opened():
    """The embedded mixture with its weights in fp32."""
    skeleton = open_skeleton(find(MODEL, registry()), registry())
    return load(skeleton, torch.float32, "cpu")


def test_experts_bits_and_zeros_share_one_budget(tmp_path, two_mixtures):
    folder, budget = tmp_path / "a", 1_080_000
    report = run(
        FitRun(
            model=str(two_mixtures), size=budget, samples=4, seqlen=32, effort="fast",
            output=folder,
            calibration=str(TEXT),
        )
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    written = sum(path.stat().st_size for path in stored_tensors(folder).files)
    assert written == report.fit["size"] <= budget
    assert abs(report.fit["expected"] - written) < 0.03 * written
    whole, *others = report.fit["candidates"]
    assert whole["means"] == "bits"
    assert {each["means"] for each in others} == {"experts"}
    (chosen,) = [each for each in others if each["chosen"]]
    assert chosen["measured"] == pytest.approx(report.fit["loss"], rel=0.1)
    kept = chosen["kept"]["experts"]
    assert report.structure["groups"]["experts"]["kept"] == kept < 16
    levels = set(report.fit["levels"].values())
    assert any(level.endswith("%") for level in levels)
    assert any(level.startswith("int") for level in levels)
    model = apt.runtime.load(folder)
    assert model.config.num_experts == kept
    tokens = torch.arange(32)[None]
    assert model(tokens).logits.isfinite().all()
    assert Report.read(folder).model["reference"] == "mixtures"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("zoo:llama", "-o", "x", "--may", "bits,experts"), "has no routed experts to remove"),
        (("zoo:llama", "-o", "x.gguf", "--may", "bits,experts"), "no experts to choose for gguf"),
        ((MODEL, "-o", "x", "--may", "bits"), "or allow zeros, experts"),
    ],
)
def test_impossible_experts_are_errors_of_one_line(words, message, apt, tmp_path):
    result = apt("fit", *words, "--size", "1MB", "--samples", 2, "--seqlen", 16)
    assert result.code == 2
    assert message in result.err
    assert not list(tmp_path.iterdir())


def test_loss_without_experts_is_that_of_a_router_that_avoids_them(opened):
    model, adapter = opened.module, opened.adapter
    tokens = torch.arange(64).reshape(2, 32)

    @lowest_scores
    def first_stay(experts):
        return -torch.arange(experts.count).float()

    proxy = ExpertProxy(model, adapter, tokens, first_stay, [16, 4])
    before = [parameter.clone() for parameter in model.parameters()]
    dense = float(torch.tensor(perplexity(model.eval(), tokens)).log())
    assert proxy.loss({"experts": 16}, tokens) == pytest.approx(dense)
    found = proxy.loss({"experts": 4}, tokens)
    hooks = [
        module.register_forward_hook(only_first_four)
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    assert len(hooks) == 3
    expected = float(torch.tensor(perplexity(model, tokens)).log())
    for hook in hooks:
        hook.remove()
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - dense) > 1e-3
    assert all(map(torch.equal, before, model.parameters()))


def only_first_four(module, inputs, output):
    """The choice of a router of Qwen2-MoE among the first four experts."""
    weight = module.weight
    logits = torch.nn.functional.linear(inputs[0].reshape(-1, weight.shape[1]), weight)
    logits[:, 4:] = -torch.inf
    weights, index = logits.softmax(-1, dtype=torch.float32).topk(2)
    return logits, weights, index
