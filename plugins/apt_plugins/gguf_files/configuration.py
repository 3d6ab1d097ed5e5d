"""The configuration of a model, from the entries of a GGUF file.

transformers reads most entries of its supported architectures. This module adds the missing ones,
and reads families of mixtures that transformers does not read. A value that has no entry is the
constant in llama.cpp's code of the architecture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apt.errors import AptError, describe
from apt_plugins.gguf_files.parameters import MAPPED
from apt_plugins.gguf_files.stored import StoredFile
from apt_plugins.gguf_files.writing import Array

Entries = Mapping[str, Any]
"""Entries by their keys without the name of the architecture."""
Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of the tensors of a file, by name."""
Values = dict[str, Any]
"""Values of a configuration of transformers, by name."""

FREQUENCIES = "rope_freqs.weight"
_HEAD, _QUERY_BIAS = "output.weight", "attn_q.bias"
_MAX_BLOCKS = 10_000  # each block becomes a module, even without weights
_SIGMOID = 2  # the value of the entry expert_gating_func
_ATTENTION_CHUNK, _MAVERICK_EXPERTS = 8192, 128  # constants in llama.cpp's code of llama4

_COMMON = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size", "expert_used_count": "num_experts_per_tok",
}  # fmt: skip
_WIDTH_TENSORS = {
    "moe_intermediate_size": "ffn_gate_exps", "shared_expert_intermediate_size": "ffn_gate_shexp",
}  # fmt: skip
_HEAD_SIZE = {"attention.key_length": "head_dim"}


class _InexpressibleError(Exception):
    """transformers has no model that computes what the file says."""


@dataclass(frozen=True)
class _Family:
    """How the entries of a mixture of experts become a configuration of transformers.

    Attributes:
        model_type: the type in transformers.
        fields: the fields of the configuration by entry, in addition to the common ones.
        defaults: values of fields whose entry is missing.
        adjust: changes the values, given the entries and the shapes of the tensors.
    """

    model_type: str
    fields: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adjust: Callable[[Values, Entries, Shapes], None] = lambda values, entries, shapes: None


def _qwen2_moe(values: Values, entries: Entries, shapes: Shapes) -> None:
    for name, tensor in _WIDTH_TENSORS.items():
        if not values.get(name) and (shape := shapes.get(f"blk.0.{tensor}.weight")):
            values[name] = shape[-2]  # old files have no such entry
    values["qkv_bias"] = f"blk.0.{_QUERY_BIAS}" in shapes


def _gpt_oss(values: Values, entries: Entries, shapes: Shapes) -> None:
    values["attention_bias"] = True


def _granite(values: Values, entries: Entries, shapes: Shapes) -> None:
    if not values.get("attention_multiplier"):
        heads = values["num_attention_heads"]
        values["attention_multiplier"] = (values["hidden_size"] // heads) ** -0.5
    if size := entries.get("expert_shared_feed_forward_length"):
        values |= {"model_type": "granitemoeshared", "shared_intermediate_size": size}


def _deepseek(values: Values, entries: Entries, shapes: Shapes) -> None:
    rotary_size = entries["rope.dimension_count"]
    key_size = entries.get("attention.key_length_mla") or entries["attention.key_length"]
    value_size = entries.get("attention.value_length_mla") or entries["attention.value_length"]
    values |= {
        "qk_rope_head_dim": rotary_size, "qk_nope_head_dim": key_size - rotary_size,
        "v_head_dim": value_size,
        "num_key_value_heads": values["num_attention_heads"],
        "q_lora_rank": entries.get("attention.q_lora_rank"), "num_mtp_layers": 0,
    }  # fmt: skip
    if entries.get("nextn_predict_layers"):
        raise _InexpressibleError("it has blocks that predict several tokens")
    groups = entries.get("expert_group_count", 1)
    values |= {"n_group": groups, "topk_group": entries.get("expert_group_used_count", 1)}
    if entries.get("expert_gating_func") == _SIGMOID:
        values["model_type"] = "deepseek_v3"
    elif values["norm_topk_prob"]:
        raise _InexpressibleError("its router normalises the weights of a softmax")
    else:
        values["topk_method"] = "greedy" if groups == 1 else "group_limited_greedy"


def _llama4(values: Values, entries: Entries, shapes: Shapes) -> None:
    values["use_qk_norm"] = entries["expert_count"] != _MAVERICK_EXPERTS
    if entries.get("attention.sliding_window") == 0:
        all_rotary = [1] * values["num_hidden_layers"]
        values |= {
            "attention_chunk_size": None, "no_rope_layers": all_rotary,
            "attn_temperature_tuning": False,
        }  # fmt: skip
    else:
        values |= {
            "attention_chunk_size": _ATTENTION_CHUNK,
            "floor_scale": _ATTENTION_CHUNK,
            "attn_scale": 0.1,
        }


_EXPERTS = {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"}
_LOCAL_EXPERTS = {"expert_count": "num_local_experts"}
_FAMILIES: Mapping[str, _Family] = {
    "qwen2moe": _Family(
        "qwen2_moe",
        {**_EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        _qwen2_moe,
    ),
    "qwen3moe": _Family(
        "qwen3_moe", {**_EXPERTS, **_HEAD_SIZE},
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "gpt-oss": _Family(
        "gpt_oss",
        {**_LOCAL_EXPERTS, **_HEAD_SIZE, "expert_feed_forward_length": "intermediate_size",
         "attention.sliding_window": "sliding_window"},
        {}, _gpt_oss,
    ),
    "olmoe": _Family(
        "olmoe", {"expert_count": "num_experts", "attention.clamp_kqv": "clip_qkv"},
        {"norm_topk_prob": False},
    ),
    "granitemoe": _Family(
        "granitemoe",
        {**_LOCAL_EXPERTS, "attention.scale": "attention_multiplier",
         "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
         "logit_scale": "logits_scaling"},
        {"attention_multiplier": None}, _granite,
    ),
    "deepseek2": _Family(
        "deepseek_v2",
        {"expert_count": "n_routed_experts", "expert_feed_forward_length": "moe_intermediate_size",
         "expert_shared_count": "n_shared_experts", "expert_weights_scale": "routed_scaling_factor",
         "expert_weights_norm": "norm_topk_prob", "attention.kv_lora_rank": "kv_lora_rank",
         "leading_dense_block_count": "first_k_dense_replace"},
        {"routed_scaling_factor": 1.0, "norm_topk_prob": False, "first_k_dense_replace": 0},
        _deepseek,
    ),
    "llama4": _Family(
        "llama4_text",
        {**_LOCAL_EXPERTS, **_HEAD_SIZE, "feed_forward_length": "intermediate_size_mlp",
         "expert_feed_forward_length": "intermediate_size",
         "interleave_moe_layer_step": "interleave_moe_layer_step"},
        {}, _llama4,
    ),
    "llama": _Family("mixtral", {**_LOCAL_EXPERTS, **_HEAD_SIZE}, {"sliding_window": None}),
}  # fmt: skip
"""Families of mixtures by architecture; ``llama`` only for files with experts."""

_COUNTS = {
    "block_count": ("num_hidden_layers",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}  # fmt: skip
"""Fields of configurations for the counts of blocks and experts, by entry."""

_MISSING_FIELDS: Mapping[str, Mapping[str, str]] = {
    "qwen2": _HEAD_SIZE, "qwen3": _HEAD_SIZE, "gpt2": {"context_length": "n_positions"},
    "falcon": {"feed_forward_length": "ffn_hidden_size"},
    "minimax-m2": {"expert_feed_forward_length": "intermediate_size"},
}  # fmt: skip
"""Fields by entry that transformers leaves out when it reads an architecture."""


def is_mixture(architecture: str, entries: Entries) -> bool:
    """True if this module reads the whole configuration of a file."""
    return architecture in _FAMILIES and bool(entries.get("expert_count"))


def config_of(file: StoredFile) -> Any:
    """The configuration of a file.

    Raises:
        AptError: the architecture is not supported, or transformers does not express the model.
    """
    entries = {"vocab_size": file.token_count, **file.entries}
    factors = _rotary_factors(file)
    try:
        if not 0 < entries.get("block_count", 1) <= _MAX_BLOCKS:
            raise _InexpressibleError(f"it has {entries['block_count']:,} blocks")
        if is_mixture(file.architecture, entries):
            return mixture_config(
                file.architecture, entries, file.shapes, file.special_tokens, factors
            )
        return _completed(file, entries, factors)
    except Exception as error:  # the classes of configurations raise many types of errors
        is_missing = isinstance(error, KeyError)
        reason = f"it has no entry {error}" if is_missing else describe(error)
        message = f"{file.path}, of architecture {file.architecture}, is not read: {reason}"
        raise AptError(message, "use its original checkpoint") from error


def smaller_config(
    file: StoredFile, config: Any, entries: Entries, shapes: Shapes, kinds: Sequence[Any] | None
) -> Any:
    """The configuration that a loader would read from the file of a smaller model.

    Args:
        file: the file of the original model.
        config: the configuration of the original model.
        entries: the entries of the file of the smaller model.
        shapes: the shapes of the tensors of that file.
        kinds: the kind of each block, if entries tell; None if kinds follow from positions.
    """
    if is_mixture(file.architecture, entries):
        all_entries = {"vocab_size": file.token_count, **entries}
        factors = _rotary_factors(file)
        return mixture_config(file.architecture, all_entries, shapes, file.special_tokens, factors)
    values = config.to_dict()
    for entry, aliases in _COUNTS.items():
        for alias in aliases:
            field_name = getattr(config, "attribute_map", {}).get(alias, alias)
            if entry in entries and field_name in values:
                values[field_name] = entries[entry]
    if values.get("layer_types"):
        values["layer_types"] = kinds
    return type(config).from_dict(values)


def mixture_config(
    architecture: str,
    entries: Entries,
    shapes: Shapes,
    tokens: Mapping[str, int],
    factors: Array | None,
) -> Any:
    """The configuration of a mixture of experts.

    Args:
        tokens: the numbers of special tokens.
        factors: the divisors of the rotary frequencies; None if the file has none.
    """
    family = _FAMILIES[architecture]
    values: Values = {"model_type": family.model_type, **family.defaults}
    for entry, name in {**_COMMON, **family.fields}.items():
        if entry in entries:
            values[name] = _same_for_all(entry, entries[entry])
    values["tie_word_embeddings"] = _HEAD not in shapes
    values["attention_bias"] = f"blk.0.{_QUERY_BIAS}" in shapes
    family.adjust(values, entries, shapes)
    special = {name: tokens.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values["rope_scaling"] = _rotary_scaling(entries, values, factors)
    if values["model_type"] == "gpt_oss" and values["rope_scaling"]["rope_type"] == "yarn":
        values["rope_scaling"]["truncate"] = False
    return AutoConfig.for_model(**values, **special)


def _same_for_all(entry: str, value: Any) -> Any:
    """The single value of an entry, which a file may repeat for each block."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise _InexpressibleError(f"{entry} is not the same for all blocks")
    return value[0]


def _completed(file: StoredFile, entries: Entries, factors: Array | None) -> Any:
    """The configuration that transformers reads, completed by the entries that it leaves out."""
    names = {file.architecture, file.architecture.replace("-", "_")}
    if not names & {*GGUF_SUPPORTED_ARCHITECTURES, *MAPPED}:
        raise _InexpressibleError("transformers does not read this architecture")
    if entries.get("expert_count") and not names & {*_MISSING_FIELDS, *MAPPED}:
        raise _InexpressibleError("transformers does not read its experts")
    config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
    for entry, name in _MISSING_FIELDS.get(file.architecture, {}).items():
        if entry in entries:
            setattr(config, name, _same_for_all(entry, entries[entry]))
    values = {"head_dim": getattr(config, "head_dim", None), "hidden_size": config.hidden_size,
              "num_attention_heads": getattr(config, "num_attention_heads", 1),
              "max_position_embeddings": getattr(config, "max_position_embeddings", 0),
              "rope_theta": entries.get("rope.freq_base", 10_000.0)}  # fmt: skip
    scaling = _rotary_scaling(entries, values, factors)
    if scaling["rope_type"] != "default":
        if hasattr(config, "rope_parameters"):
            config.rope_parameters = {"rope_theta": values["rope_theta"], **scaling}
        else:  # transformers 4
            config.rope_scaling = scaling
    return config


def _rotary_scaling(entries: Entries, values: Values, factors: Array | None) -> dict[str, Any]:
    """The scaling of the rotary embedding."""
    kind = entries.get("rope.scaling.type", "none")
    factor = entries.get("rope.scaling.factor", 1.0)
    if factors is not None:
        return _llama3_scaling(factors, values)
    if kind == "linear" and factor != 1:
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or factor == 1:
        return {"rope_type": "default"}  # the factors of longrope are tensors
    original = entries.get("rope.scaling.original_context_length")
    scaling = {
        "rope_type": "yarn", "factor": factor,
        "original_max_position_embeddings": original or values["max_position_embeddings"],
        "beta_fast": float(entries.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(entries.get("rope.scaling.yarn_beta_slow", 1.0)),
    }  # fmt: skip
    if multiplier := entries.get("rope.scaling.yarn_log_multiplier"):
        # The entry is a tenth of the value; llama.cpp takes both values to be the same.
        scale = round(multiplier * 10, 4)
        scaling |= {"mscale": scale, "mscale_all_dim": scale}
    return scaling


_LLAMA3_SCALING = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _llama3_scaling(factors: Array, values: Values) -> dict[str, Any]:
    """The parameters of LLaMA 3's scaling from which the divisors in the file were computed."""
    scaling = {**_LLAMA3_SCALING, "factor": round(float(factors.max()), 3)}
    size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    config = AutoConfig.for_model(
        "llama", head_dim=size, hidden_size=values["hidden_size"],
        num_attention_heads=values["num_attention_heads"], rope_theta=values["rope_theta"],
        rope_scaling=scaling, max_position_embeddings=values["max_position_embeddings"],
    )  # fmt: skip
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (2 * len(frequencies))
    expected = (1.0 / float(values["rope_theta"]) ** steps / frequencies).numpy()
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-3):
        raise _InexpressibleError("its rotary frequencies are scaled in an unknown way")
    return scaling


def _rotary_factors(file: StoredFile) -> Array | None:
    """The divisors of the rotary frequencies; None if the file has none, or only ones."""
    if FREQUENCIES not in file.shapes:
        return None
    factors = file.read(FREQUENCIES, 0, file.shapes[FREQUENCIES][0])
    return None if bool((factors == 1).all()) else factors
