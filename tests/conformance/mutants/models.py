"""Correct adapters, and the small models on which mutants fail."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from apt.adapter import DecoderAdapter, Experts, Input
from apt.plugin.registry import registry
from tests.helpers.families import _HEADS, _IDS, _SMALL, CONFIGS, random_model

LLAMA = registry().adapters.get("llama").load()
OPT = registry().adapters.get("opt").load()
MAMBA = registry().adapters.get("mamba").load()
MAMBA2 = registry().adapters.get("mamba2").load()
JAMBA = registry().adapters.get("jamba").load()
MOE = registry().adapters.get("moe").load()


class Gemma(DecoderAdapter):
    """A right one: Gemma 3, whose norms lie between the products and the stream."""

    blocks_path = "model.layers"
    inputs = tuple(replace(entry, residual=False) for entry in LLAMA.inputs)


def gemma(kinds=("sliding_attention", "full_attention")):
    """A model with a block of each of the ``kinds``, each with rotary embeddings of its own."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **{**_SMALL, **_HEADS, **_IDS, "num_hidden_layers": len(kinds)}, intermediate_size=64,
        num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=list(kinds),
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


class GptOss(DecoderAdapter):
    """A right one: GPT-OSS, whose experts have their gate and the other weight in pairs of rows."""

    blocks_path = "model.layers"
    inputs = LLAMA.inputs[:2]
    experts = (Experts("mlp.experts", router="mlp.router", transposed=True),)
    left_dense = ("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias")


def short():
    """A model with a table of 32 positions."""
    torch.manual_seed(0)
    options = {**_SMALL, **_HEADS, **_IDS, "max_position_embeddings": 32}
    config = OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **options)
    return AutoModelForCausalLM.from_config(config).eval()


def three_experts():
    """A Jamba that sends each token to three of its eight experts."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["jamba"])
    config.num_experts, config.num_experts_per_tok = 8, 3
    return AutoModelForCausalLM.from_config(config).eval()


def olmo2():
    """A model that normalises q and k over all heads together."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmo2", intermediate_size=64, **_SMALL | _HEADS | _IDS)
    return AutoModelForCausalLM.from_config(config).eval()


def gpt_oss():
    """Two blocks with a sliding window and without."""
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("gpt_oss", **_SMALL | _HEADS | _IDS | sizes | experts)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.1)
    return model


class Llava(DecoderAdapter):
    """A right one: LLaVA, of which the language model alone is pruned."""

    blocks_path = "model.language_model.layers"
    inputs = LLAMA.inputs


def llava():
    """A model with a part for images, which text does not run."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    images = {"image_size": 16, "patch_size": 8, "num_attention_heads": 2, **sizes}
    words = CONFIGS["llama-grouped-tied"].to_dict()
    vision = CLIPVisionConfig(**images)
    config = LlavaConfig(vision_config=vision, text_config=words, image_token_index=5)
    return LlavaForConditionalGeneration._from_config(config).eval()


class EchoBlock(nn.Module):
    """A block that returns the stream and what it adds to it, which the next block takes."""

    def __init__(self, width):
        super().__init__()
        self.own, self.echo = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, state, before=None):
        """The stream after the block, and what it added."""
        added = self.own(state)
        before = state if before is None else before
        return state + added + self.echo(before), added


class EchoModel(PreTrainedModel):
    """A language model whose blocks pass a second value to each other."""

    config_class = LlamaConfig
    base_model_prefix = "none"

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(EchoBlock(width) for _ in range(3))  # none can be dropped
        self.head = nn.Linear(width, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, use_cache=None):
        """The logits."""
        state, added = self.embedding(input_ids), None
        for layer in self.layers:
            state, added = layer(state, added)
        return CausalLMOutput(logits=self.head(state))


class Echo(DecoderAdapter):
    """A right one, for `EchoModel`."""

    blocks_path = "layers"
    inputs = (Input("stream", ("own",), residual=True), Input("before", ("echo",), residual=True))


def echo():
    """A model whose blocks pass a second value to each other."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"])
    config._attn_implementation = "eager"  # it has none, and another test may have chosen one
    return EchoModel(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: random_model("llama"),
    "eager": lambda: random_model("llama", attention="eager"),
    "gemma": gemma,
    "gemma, one kind": lambda: gemma(["sliding_attention"] * 2),
    "short": short,
    "opt": lambda: random_model("opt"),
    "mamba": lambda: random_model("mamba"),
    "mamba2": lambda: random_model("mamba2"),
    "jamba": lambda: random_model("jamba"),
    "jamba, three experts": three_experts,
    "qwen2-moe": lambda: random_model("qwen2-moe"),
    "gpt-oss": gpt_oss,
    "grouped": lambda: random_model("llama-grouped-tied"),
    "olmo2": olmo2,
    "llava": llava,
    "echo": echo,
}
RIGHT = {
    "llama": LLAMA,
    "eager": LLAMA,
    "gemma": Gemma,
    "short": OPT,
    "opt": OPT,
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "jamba": JAMBA,
    "jamba, three experts": JAMBA,
    "gpt-oss": GptOss,
    "llava": Llava,
    "echo": Echo,
}
"""The correct adapters of the models."""

if "jamba" not in CONFIGS:  # experts are modules in transformers 4
    del RIGHT["jamba"], RIGHT["jamba, three experts"], RIGHT["gpt-oss"]
