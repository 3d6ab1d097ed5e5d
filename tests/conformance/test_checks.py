"""The conformance kit: correct adapters pass, and faults are reported with their place."""

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from apt.adapter import Call, DecoderAdapter, Input
from apt.calibration.batches import Batch, OpenBlock
from apt.calibration.capture import Capture
from apt.conformance.outcomes import outcome
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.solver import NM, ss
from apt.testing import CHECKS, AdapterConformance, Subject, check_adapter
from tests.helpers.families import CONFIGS, Twice, adapter_of, random_model, random_tokens
from tests.helpers.pruning import prune_blocks

LLAMA = registry().adapters.get("llama").load()
TOKENS = random_tokens(2, 16)


@pytest.mark.parametrize("variant", [name for name in CONFIGS if name != "llama-grouped-tied"])
def test_shipped_adapters_conform(variant):
    model = random_model(variant)
    problems = {o.name: o.problem for o in check_adapter(adapter_of(model), model, TOKENS)}
    assert problems == dict.fromkeys(CHECKS, "")


class SquareBlock(nn.Module):
    """A block that multiplies by one weight twice, and by a router that is left dense."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.router = nn.Linear(32, 4)

    def forward(self, state):
        gate = self.router(state).softmax(-1)[..., :1]
        return state + gate * self.second(torch.tanh(self.first(state)))


def test_shared_weight_is_one_site_with_both_inputs():
    class Shared(DecoderAdapter):
        inputs = (Input("state", ("first",)), Input("hidden", ("second",)))
        left_dense = ("router",)

    adapter, block = Shared(), SquareBlock()
    (site,) = adapter.sites(block)
    assert (site.name, site.calls, site.input) == ("first", 2, "state")
    state = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    capture = Capture(block, [site])
    with torch.no_grad():
        capture.run(OpenBlock(adapter, block, 0, [Batch(state, [Call()], 10)]))
        rows = torch.cat([state, torch.tanh(block.first(state))]).flatten(0, 1)
    torch.testing.assert_close(capture.sums["state"].gram.matrix, rows.T @ rows)
    assert capture.sums["state"].gram.tokens == 20


def test_blocks_that_run_twice_are_a_fault():
    model = random_model("llama")
    model.model.layers = Twice(model.model.layers)
    problems = {o.name: o.problem for o in check_adapter(LLAMA(), model, TOKENS)}
    assert "the model calls its 3 blocks 6 times, not once each" in problems["blocks"]


class TestLlamaAsAClass(AdapterConformance):
    def adapter(self):
        return LLAMA()

    def model(self):
        return random_model("llama-grouped-tied")


def test_conformance_class_has_a_test_for_every_check():
    assert {n for n in dir(TestLlamaAsAClass) if n.startswith("test_")} == {
        f"test_{name}" for name in CHECKS
    }


def test_check_command_on_a_wrong_model_is_an_error(apt, checkpoint):
    done = apt("check", "opt", checkpoint("llama"))
    assert done.code == 2
    assert "OptAdapter does not fit" in done.err


def test_pytest_plugin_adds_a_test_for_each_check(pytester):
    done = pytester.runpytest_inprocess("--apt-adapter", "llama", "-v")
    done.assert_outcomes(passed=len(CHECKS))
    done = pytester.runpytest_inprocess("--apt-adapter", "llamo")
    done.assert_outcomes(failed=1, skipped=len(CHECKS) - 1)
    done.stdout.fnmatch_lines(["*did you mean 'llama'?*"])


def test_tower_beside_the_decoder_is_no_fault():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=int(TOKENS.max()) + 1,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=text.vocab_size)

    class Llava(LLAMA):
        blocks_path = "model.language_model.layers"

    model = LlavaForConditionalGeneration(config).eval()
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert not [o for o in check_adapter(Llava(), model, TOKENS) if o.problem]
    plan = make_plan(model, Llava(), NM(2, 4))
    prune_blocks(model, Llava(), plan, TOKENS, ss)
    changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert changed == {f"{site.name}.weight" for site in plan.sites}
    assert len(changed) == 14


def test_rotary_positions_may_exceed_the_configuration():
    model = random_model("llama")
    model.config.max_position_embeddings = TOKENS.shape[1] - 1
    for check in ("batches", "logits"):
        assert not outcome(check, Subject(LLAMA(), model, TOKENS)).problem
