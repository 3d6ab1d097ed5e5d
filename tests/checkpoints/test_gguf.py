"""GGUF files: a tiny LLaMA written with the `gguf` package, read, pruned and saved."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import TEXT
from tests.helpers.families import CONFIGS, random_model, random_tokens

pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytest.importorskip("accelerate", reason="the extra [gguf] is not installed")

from tests.helpers.gguf_files import write_llama  # imports gguf


@pytest.fixture
def file(tmp_path, tokenizer):
    model = random_model("llama-grouped-tied")
    write_llama(tmp_path / "tiny.gguf", model, CONFIGS["llama-grouped-tied"], tokenizer)
    return tmp_path / "tiny.gguf", model


def test_pruned_gguf_file_becomes_a_directory_of_transformers(apt, file):
    path, original = file
    sample = random_tokens(samples=2)
    small = ("--samples", 4, "--seqlen", 32, "--calibration", TEXT)
    run = apt("prune", path, *small, "--dtype", "float32")
    assert run.code == 0, run.err
    pruned = AutoModelForCausalLM.from_pretrained("tiny-2of4-admm")
    assert not getattr(pruned.config, "quantization_config", None)
    assert torch.equal(pruned.model.embed_tokens.weight, original.model.embed_tokens.weight)
    with torch.no_grad():
        assert torch.isfinite(pruned(sample).logits).all()
    weight = pruned.model.layers[1].mlp.up_proj.weight
    assert int(((weight.view(-1, 4) != 0).sum(1) > 2).sum()) == 0
    dense = original.model.layers[0].self_attn.q_proj.weight
    first = pruned.model.layers[0].self_attn.q_proj.weight
    assert torch.corrcoef(torch.stack([dense[first != 0], first[first != 0]]))[0, 1] > 0.7
    assert (weight != 0).any()


def test_shrunk_model_survives_a_round_trip_through_gguf(apt, file, tokenizer):
    sizes = ("--size", "channels=40", "--blocks", 2)
    run = apt("shrink", file[0], *sizes, "--samples", 4, "--seqlen", 24, "--calibration", TEXT,
               "--effort", "fast", "-o", "small")  # fmt: skip
    assert run.code == 0, run.err
    small = AutoModelForCausalLM.from_pretrained("small").eval()
    write_llama("small.gguf", small, small.config, tokenizer)
    opened = AutoModelForCausalLM.from_pretrained(".", gguf_file="small.gguf").eval()
    tokens = random_tokens(2, 12)
    torch.testing.assert_close(opened(tokens).logits, small(tokens).logits, rtol=1e-4, atol=1e-4)
