"""Models and checkpoints of mamba_ssm: pruned in memory, and on disk in their own format."""

import json
from pathlib import Path

import pytest
import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from transformers import AutoModelForCausalLM

import apt as library
from apt.conformance.outcomes import outcome
from apt.evaluation.metrics import perplexity
from apt.plugin.registry import registry
from apt.solver import NM, meets
from apt.testing import CHECKS, Subject
from tests.helpers.families import random_tokens

MIXERS = {
    "mamba": {"d_state": 8, "dt_rank": 4},
    "mamba2": {"layer": "Mamba2", "d_state": 16, "headdim": 32, "chunk_size": 8},
}
TOKENS = random_tokens(1, 12)  # two chunks; Triton's interpreter is slow


def native(kind, dtype=torch.float32, n_layer=2, **options):
    """A random model of mamba_ssm, with weights that matter."""
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=32, n_layer=n_layer, vocab_size=2045, ssm_cfg=dict(MIXERS[kind]), **options
    )
    model = MambaLMHeadModel(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "A_log" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def written(tmp_path, tokenizer):
    """A checkpoint that mamba_ssm wrote, with a tokenizer beside it."""

    def write(kind, dtype=torch.float32):
        model, folder = native(kind, dtype), tmp_path / f"native-{kind}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model, folder

    return write


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def assert_near(found, expected, dtype):
    """Check that values are equal up to the rounding of a complete forward in ``dtype``."""
    distance = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert distance < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize(
    ("kind", "fused", "mlp"),
    [
        ("mamba", True, 0),
        ("mamba", False, 48),
        ("mamba2", False, 48),
    ],  # Triton's interpreter is slow
)
def test_native_models_conform_to_the_checks(kind, fused, mlp):
    model = native(kind, fused_add_norm=fused, d_intermediate=mlp, n_layer=1)
    adapter = registry().adapter_for("MambaLMHeadModel").load()()
    # mamba_ssm saves in its own way, and gradients of its norms need a GPU; fused norms add to the
    # stream below what can be followed; Triton's interpreter is slow on more tokens.
    left_out = {"saving", "gradients"} | ({"residual"} if fused else set())
    left_out |= {"batches", "logits"} if kind == "mamba2" else set()
    subject = Subject(adapter, model, random_tokens(1 if kind == "mamba2" else 2, 8))
    problems = {name: outcome(name, subject).problem for name in CHECKS if name not in left_out}
    assert problems == dict.fromkeys(problems, "")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused norms", "plain norms"])
@pytest.mark.parametrize("kind", MIXERS)
def test_chained_native_blocks_compute_the_logits_of_the_model(kind, fused, dtype):
    model = native(kind, dtype, fused_add_norm=fused)
    adapter = registry().adapter_for("MambaLMHeadModel").load()()
    state, calls = adapter.enter(model, TOKENS)
    for (_, block), call in zip(adapter.blocks(model), calls, strict=True):
        state = adapter.step(block, state, call)
    backbone = model.backbone
    found = model.lm_head(backbone.norm_f(state.to(backbone.norm_f.weight.dtype)))
    assert state.dtype == (torch.float32 if backbone.residual_in_fp32 else dtype)
    assert_near(found, logits(model), dtype)


@pytest.mark.parametrize("kind", MIXERS)
def test_native_models_are_pruned_like_their_conversions(kind, written):
    model, folder = written(kind)
    report = library.prune(model, TOKENS, pattern="2:4", method="sm")
    assert report.model.items() >= {"type": "MambaLMHeadModel", "adapter": "mamba-ssm"}.items()
    from apt.checkpoints.load import load, open_skeleton
    from apt.locations.model_source import find

    converted = load(open_skeleton(find(str(folder), registry()), registry())).module
    library.prune(converted, TOKENS, pattern="2:4", method="sm")
    theirs = dict(converted.named_parameters())
    for site in report.sites:
        ours = model.get_parameter(f"{site.name}.weight")
        assert meets(ours, NM(2, 4))
        torch.testing.assert_close(ours, theirs[f"{site.name}.weight"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MIXERS)
def test_native_checkpoint_is_pruned_in_its_format_and_converted(kind, dtype, written, apt):
    dense, folder = written(kind, dtype)
    result = apt(
        "prune", folder, "--pattern", "2:4", "--samples", 2, "--seqlen", 12, "--output", "pruned",
        "--effort", "fast",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert apt("verify", "pruned").code == 0
    config = json.loads((folder / "config.json").read_text())
    assert json.loads(Path("pruned/config.json").read_text()) == config
    pruned = MambaLMHeadModel.from_pretrained("pruned", dtype=dtype).eval()
    stored = torch.load("pruned/pytorch_model.bin", weights_only=True)
    original = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert {n: t.dtype for n, t in stored.items()} == {n: t.dtype for n, t in original.items()}
    weight = pruned.backbone.layers[1].mixer.in_proj.weight
    assert meets(weight, NM(2, 4))
    assert not torch.equal(weight, dense.backbone.layers[1].mixer.in_proj.weight)

    result = apt("convert", "pruned", "--output", "converted")
    assert result.code == 0, result.err
    assert apt("verify", "converted").code == 0
    converted = AutoModelForCausalLM.from_pretrained("converted", dtype="auto").eval()
    assert_near(logits(converted), logits(pruned), dtype)
    assert perplexity(converted, TOKENS) > 1
