"""Tiny random models of every family, in the variants that adapters must support."""

import copy
from itertools import chain

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconH1Config,
    FalconMambaConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Qwen2MoeConfig,
)

# A run of pytest within pytest forgets the modules that it imports, but transformers does not.
from transformers.models.falcon_h1 import modeling_falcon_h1  # noqa: F401
from transformers.models.falcon_mamba import modeling_falcon_mamba  # noqa: F401
from transformers.models.jamba import modeling_jamba  # noqa: F401
from transformers.models.mamba import modeling_mamba  # noqa: F401
from transformers.models.mamba2 import modeling_mamba2  # noqa: F401

from apt.checkpoints.load import load, load_tokenizer, open_skeleton
from apt.locations.model_source import find
from apt.plugin.registry import registry
from apt.text.datasets import calibration_tokens, documents

VOCABULARY = 2048  # that of the zoo's tokenizer
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3}
_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_HEADS = {"num_attention_heads": 4, "max_position_embeddings": 128}
_GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2}
_MAMBA = {"state_size": 8, "time_step_rank": 4, **_SMALL, **_IDS}

CONFIGS = {
    "llama": LlamaConfig(intermediate_size=64, num_key_value_heads=4, **_SMALL, **_HEADS, **_IDS),
    "llama-grouped-tied": LlamaConfig(
        intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True,
        **_SMALL, **_HEADS, **_IDS,
    ),
    "mistral": MistralConfig(
        intermediate_size=64, num_key_value_heads=2, sliding_window=8, **_SMALL, **_HEADS, **_IDS
    ),
    "opt": OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **_SMALL, **_HEADS, **_IDS),
    "opt-350m": OPTConfig(
        ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False, **_SMALL, **_HEADS, **_IDS
    ),
    "bloom": BloomConfig(n_layer=3, n_head=4, vocab_size=VOCABULARY, hidden_size=32, **_IDS),
    "mamba": MambaConfig(**_MAMBA),
    "falcon-mamba": FalconMambaConfig(**_MAMBA),
    "mamba2": Mamba2Config(
        state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=8, **_SMALL, **_IDS
    ),
    "jamba": JambaConfig(
        attn_layer_period=3, attn_layer_offset=1, expert_layer_period=3, expert_layer_offset=2,
        num_experts=4, num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=4,
        use_mamba_kernels=False, **_GROUPED, **_SMALL, **_HEADS, **_IDS,
    ),
    "falcon-h1": FalconH1Config(
        head_dim=8, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1,
        mamba_d_state=8, mamba_chunk_size=8, ssm_in_multiplier=1.25, ssm_out_multiplier=0.5,
        attention_in_multiplier=0.75, attention_out_multiplier=0.5, mlp_multipliers=[0.5, 0.25],
        **_GROUPED, **_SMALL, **_HEADS, **_IDS,
    ),
    "qwen2-moe": Qwen2MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1],
        shared_expert_intermediate_size=24, **_GROUPED, **_SMALL, **_HEADS, **_IDS,
    ),
}  # fmt: skip
# Served by the adapter of another variant; few tests use them.
ALIKE = {
    "mamba-no-fp32-residual": MambaConfig(residual_in_fp32=False, **_MAMBA),
    "mixtral": MixtralConfig(num_local_experts=4, **_GROUPED, **_SMALL, **_HEADS, **_IDS),
    "olmoe": OlmoeConfig(
        num_experts=4, num_experts_per_tok=2, **_GROUPED, **_SMALL, **_HEADS, **_IDS
    ),
}
STACKED = int(transformers.__version__.split(".")[0]) >= 5  # experts are modules before
if not STACKED:
    del CONFIGS["jamba"]
SCANS = ["mamba", "falcon-mamba", "mamba2", "jamba", "falcon-h1"]
ATTENTION = [name for name in CONFIGS if name not in SCANS]
FAMILIES = {
    "llama": "llama-grouped-tied", "opt": "opt", "bloom": "bloom", "mamba": "mamba",
    "moe": "qwen2-moe",
}  # fmt: skip


def random_model(variant, dtype=torch.float32, attention=None):
    """A random model whose weights are large enough for every path to matter."""
    torch.manual_seed(0)
    options = {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_config(copy.deepcopy((CONFIGS | ALIKE)[variant]), **options)
    for name, parameter in model.named_parameters():
        if (parameter.ndim == 2 and "A_log" not in name) or ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.3 if "x_proj" not in name else 0.6)
    return model.to(dtype).eval()


def adapter_of(model):
    """The adapter for a model."""
    return registry().adapter_for(model.config.model_type).load()()


class Twice(torch.nn.ModuleList):
    """A list of blocks that the model runs twice."""

    def __iter__(self):
        return chain(super().__iter__(), super().__iter__())


def random_tokens(samples=4, seqlen=24, seed=0):
    """Token ids (samples, seqlen)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (samples, seqlen), generator=generator)


def builtin(split):
    """A part of the embedded text: all of it takes a second to tokenise."""
    return next(iter(documents("builtin", split, registry())))[:200_000]


def zoo_model(name, samples, seqlen):
    """An embedded model with calibration and evaluation tokens (samples, seqlen)."""
    source = find(f"zoo:{name}", registry())
    tokenizer = load_tokenizer(source)
    tokens = [
        calibration_tokens(tokenizer, [builtin(split)], samples, seqlen, 0, "builtin")
        for split in ("calibration", "evaluation")
    ]
    return load(open_skeleton(source, registry())), *tokens
