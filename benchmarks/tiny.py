"""Tiny random models of any model type of transformers.

The default configuration of the type is made smaller field by field: widths, heads, layers,
experts, ranks, the vocabulary, and the parts for images and sound. Of lists with an entry for each
layer, a layer of every kind is kept. The few types for which this does not suffice are in
`SPECIAL`::

    model = tiny.model("qwen3_5_moe")
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE,
)

from apt.checkpoints.architecture import class_of

Fields = dict[str, Any]

_NO_DECODERS = (
    "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "CTC",
    "SPEECH_SEQ_2_SEQ",
)  # fmt: skip
_ANY = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION")

LAYERS = 4
VOCABULARY = 2048  # that of the tokenizer of the embedded models
_FIRST, _LAST = 110, 250  # ordinary tokens: special ones are below and above
_SPREAD = 0.1  # standard deviation of the weights

SIZES = (
    (r"qk_head_dim", 16),  # qk_nope_head_dim and qk_rope_head_dim
    (r"(vision_|v_|swa_|sliding_)?.*head_?dim|head_size|d_kv|d_head|kv_channels|.*dim_head", 8),
    (r".*(key_value|kv)_heads", 2),
    (r".*heads(_per_layer)?|n_heads?|n_head_kv", 4),
    (r"n_groups|mamba_n_?groups", 2),
    (r"rotary_dim", 8),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"(.*_)?num_experts_per_tok(en)?|moe_(topk|top_k|k)|.*experts_per_tok", 2),
    (r".*num_(local_)?experts|moe_num_experts|n_routed_experts|num_expert", 4),
    (r"zero_expert_num", 2),
    (r".*shared_experts?", 1),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers", 1),
    (r".*(intermediate|ffn|ff|mlp|feed_forward|expert|inner|ffn_hidden)_?(size|dim)s?", 64),
    (r"d_ff|d_inner|dff|dim_ff|ffn_dim|intermediate_size_mlp|.*ffn_hidden_size", 64),
    (r"decoder_ffn_dim|encoder_ffn_dim", 64),
    (r".*lora_rank|.*_rank|hc_lowrank", 16),
    (r".*hidden_size(_global|s)?|.*_hidden_dim|d_model|n_embd|.*embed(ding)?_(dim|size)", 32),
    (r".*(embed|embedding|emb|model|out|output|input|in|projection|hidden)_dim", 32),
    (r".*vocab(_size)?|vocab_size.*|.*_vocab|.*codebook_size", VOCABULARY),
    (r"(.*_)?(num_)?(.*_)?layers|n_layers?|depth|num_blocks|.*_depth", LAYERS),
    (r".*position_embeddings|.*positions|n_ctx|max_seq_len|context_length|max_.*_length", 128),
    (r"model_max_length", 128),
    (r".*window(_size|_len)?|local_attention|attention_chunk_size", 8),
    (r".*chunk_size", 8),
    (r".*state(_size)?|mamba_d_state", 8),
    (r"d_conv|conv_kernel(_size)?", 4),
    (r".*channels?", 32),
    (r"image_size|.*img_size", 28),
    (r"index_kpool", 4),
    (r"index_topk", 8),
)
"""Patterns of names of fields, and the largest value of a tiny model."""

_COUNT = r"num_hidden_layers|num_blocks|n_layers?|num_layers|depth|decoder_layers|layers"
_TOKEN = r".*(token_id|token_index|_idx|_index|_id|_ids)"
_INDICES = r".*(_idxs|_layer_ids|layers|_indexes|_indices|_block_indexes)"
_LANGUAGE = r"text_config|decoder(_config)?"

NEEDED: dict[str, Fields] = {
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
}
"""Fields of types that have no default configuration."""

_HEAD: Fields = {"head_dim": 8}
_THREE: Fields = {  # rotary positions in time, height and width
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
_GEMMA4: Fields = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
_MAP = {"<image>": 300}
_HYBRID = ["linear_attention", "hybrid"] * 2

_SLIDING, _INDEXED = "sliding_attention", "indexed_attention"

SPECIAL: dict[str, Fields] = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        }
    },
    "apertus1p5": {
        "image_token_offset": 300,
        "audio_token_offset": 364,
        "vision_config": {"codebook_size": 64},
        "audio_config": {"codebook_size": 64},
    },
    "chameleon": {"vocabulary_map": _MAP},
    "chameleon_vqgan": {"channel_multiplier": [1], "num_res_blocks": 1},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": None,
    },
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "num_experts_per_tok": 2,
        "n_group": 1,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 2,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_text": {"head_dim": 16},
    "emu3": {"vocabulary_map": _MAP},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**_THREE["rope_parameters"], "mrope_section": [1, 1, 2]}
    },
    "gemma4_assistant": {"text_config": {"enable_moe_block": False}},
    "gemma4_text": _GEMMA4,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "intermediate_size": [64] * 6,
        "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 3,
    },
    "granite4_vision": {
        "deepstack_layer_map": [[0, 1]],
        "spatial_target_layers": [0, 1],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},  # a head of the projector has 64 of them
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": {**_HEAD, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl_text": {**_THREE, **_HEAD},
    "kolibri1_1": {
        "num_hidden_layers": 5,
        "layer_types": [_SLIDING, _SLIDING, _INDEXED, _INDEXED, _SLIDING],
        "index_layers": [2],
        "kv_source_layers": [0, 1, 2, 2, 4],
        "mlp_only_layers": [0],
        "head_dim": 16,
        "index_num_heads": 1,
        "index_pool_size": 16,
        "index_compression": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": _HEAD,
    "mistral4": {"head_dim": 16},
    "mistral_large4": {"kv_source_layers": None},
    "mistral_large4_text": {"kv_source_layers": None},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "paligemma": {"text_config": {"num_key_value_heads": 1}},  # not the default of its type
    "phi4_multimodal_audio": {"num_blocks": 1},
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 8]},
    "rwkv": {"rescale_every": 2},  # as in a model of more than six blocks
    "smolvlm_vision": {"image_size": 64},  # patches of 32
    "step3p5": {"sliding_window": 8},
    "wavtokenizer_encoder": {"codebook_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": _HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 2,  # these projections are as small a part of a block as in a large model
        "mamba_d_state": 2,
    },
    "zamba2": {
        "layers_block_type": _HYBRID,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "glm46v_text": _THREE,
    "glm4v_text": _THREE,
    "glm_ocr_text": {**_THREE, **_HEAD},
    "glmga": {"text_config": _HEAD},
    "qwen2_5_omni_text": _THREE,
    "qwen2_5_vl_text": _THREE,
    "qwen2_vl_text": _THREE,
    "paddleocr_vl_text": _THREE,
    "glm4v_moe_text": {**_THREE, "head_dim": 16},
}
"""Fields of single types, by type: they replace those that the rules give."""

_RESNET: Fields = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
_SERIES: Fields = {"prediction_length": 8, "context_length": 16}
_WIDE: Fields = {"hidden_size": 64}  # one head has 64 values

OTHER: dict[str, Fields] = {
    "autoformer": _SERIES,
    "bridgetower": {**_WIDE, "text_config": _WIDE, "vision_config": _WIDE},
    "clap": {"audio_config": {"hidden_size": 256}},
    "conditional_detr": _RESNET,
    "csm": {"codec_config": {"upsample_groups": 32}},
    "dab-detr": _RESNET,
    "deformable_detr": _RESNET,
    "detr": _RESNET,
    "informer": _SERIES,
    "bros": _WIDE,
    "esm": {"pad_token_id": 1, "mask_token_id": 300},
    "lilt": {"hidden_size": 48},
    "mimi": {"upsample_groups": 32},
    "mobilebert": {**_WIDE, "intra_bottleneck_size": 32},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "table-transformer": _RESNET,
    "time_series_transformer": _SERIES,
}
"""The same for the models of `other_model`."""


def config(model_type: str, **fields: Any) -> Any:
    """The configuration of a tiny model.

    Args:
        model_type: the type of the configuration.
        fields: values that replace those of the rules; a dictionary replaces those of a part.
    """
    kind = CONFIG_MAPPING[model_type]
    needed = NEEDED.get(model_type, {})
    large = kind(**copy.deepcopy(needed)).to_dict()
    small = _merged(copy.deepcopy(needed), shrunk(large))
    if "model_type" in fields.get("backbone_config", {}):  # of another type
        small.pop("backbone_config", None)
    return kind(**_merged(small, fields))


def model(model_type: str, *, image: bool = False, **fields: Any) -> Any:
    """A tiny model with random values for all parameters, in fp32.

    Args:
        model_type: the type of its configuration.
        image: True for the class that takes images and text; by default that for text.
        fields: see `config`.
    """
    torch.manual_seed(0)
    kind = getattr(transformers, (IMAGE if image else CAUSAL)[model_type])
    whole = config(model_type, **fields)
    parts = [whole, *(value for value in vars(whole).values() if hasattr(value, "model_type"))]
    own = next((part for part in parts if isinstance(part, kind.config_class)), whole)
    if not image and getattr(own, "is_decoder", None) is False:
        own.is_decoder = True  # by default BERT and its relatives read in both directions
    own.architectures = [kind.__name__]  # as `save_pretrained` writes it
    return with_values(kind._from_config(own).float().eval())


def other_types() -> set[str]:
    """The types of all other mappings: encoders, models of several stacks, images and sounds.

    A decoder of text is none of them, even if it has a head for classes.
    """

    def named(*tasks: str) -> set[str]:
        return {
            kind
            for task in tasks
            for kind in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        }

    every = {*modeling_auto.MODEL_MAPPING_NAMES, *named(*_ANY)}
    return named(*_NO_DECODERS) | (every - set(CAUSAL) - set(IMAGE))


def other_model(model_type: str, **fields: Any) -> Any:
    """A tiny model of one of the `other_types`, of the class that opens its checkpoints."""
    torch.manual_seed(0)
    large = CONFIG_MAPPING[model_type](**copy.deepcopy(NEEDED.get(model_type, {}))).to_dict()
    special = copy.deepcopy(OTHER.get(model_type, {}))
    own = config(model_type, **_merged(_merged(_sizes(large), special), fields))
    kind = class_of(own)
    if kind is None:
        raise ValueError("transformers has no class for it")
    own.architectures = [kind.__name__]
    return with_values(kind._from_config(own).float().eval())


def _sizes(fields: Fields) -> Fields:
    """The sizes of images and of convolutions that fit the other fields of a type and its parts."""
    made = {n: part for n, v in fields.items() if isinstance(v, dict) and (part := _sizes(v))}
    if isinstance(fields.get("conv_dim"), list | tuple) and "num_feat_extract_layers" in fields:
        made["num_feat_extract_layers"] = len(fields["conv_dim"])
    if _is_int(kernel := fields.get("conv_kernel_size")) and kernel % 2:
        made["conv_kernel_size"] = 3  # the rules give even ones, for causal convolutions
    if isinstance(heads := fields.get("num_heads"), list):  # of widths that are all 32
        made["num_heads"] = [2] * len(heads)
    size, patch, window = (fields.get(name) for name in ("image_size", "patch_size", "window_size"))
    stages = fields.get("depths")
    if _is_int(window) and isinstance(stages, list) and _is_int(patch):
        return made | {"window_size": 2, "image_size": patch * 2 ** len(stages)}
    merge = fields.get("spatial_merge_size")
    if _is_int(window) and _is_int(merge) and _is_int(patch):
        made["window_size"] = 2 * merge * patch
    if size is not None and _is_int(patch):
        edge = patch * max(2, 28 // patch)
        return made | {"image_size": edge if _is_int(size) else [edge] * len(size)}
    return made


def with_values(made: nn.Module) -> nn.Module:
    """The model with new values for its parameters: some classes leave memory uninitialised."""
    draw = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        values = torch.randn(parameter.shape, generator=draw) * _SPREAD
        parameter.data.copy_(values if parameter.ndim > 1 else values + 1)
    return made


def tokens(samples: int = 4, seqlen: int = 32) -> Tensor:
    """Ids of ordinary tokens (samples, seqlen)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(_FIRST, _LAST, (samples, seqlen), generator=draw)


def shrunk(fields: Fields, layers: int = LAYERS) -> Fields:
    """The fields that differ in a tiny model, from all fields of a large one; parts included.

    Args:
        fields: the fields of a configuration.
        layers: the number of layers, which is larger if there are more kinds of layers.
    """
    count = next((v for n, v in fields.items() if re.fullmatch(_COUNT, n) and _is_int(v)), 0)
    kept = list(_kept(fields, count, layers))
    made = {name: _small(name, value, count, kept) for name, value in fields.items()}
    heads = [n for n in ("num_attention_heads", "num_key_value_heads") if n in fields]
    if len(heads) == 2 and fields[heads[0]] == fields[heads[1]]:  # no groups of heads
        made[heads[1]] = made[heads[0]]
    changed = {n: v for n, v in made.items() if v != fields[n] or n == "model_type"}
    special = SPECIAL.get(fields.get("model_type", ""), {})
    return _merged(changed, copy.deepcopy(special))  # configurations change what they are given


def _kept(fields: Fields, count: int, layers: int) -> list[int]:
    """The layers of a tiny model: one of each kind, and the first ones."""
    if count <= layers:
        return list(range(count))
    lists = [value for value in fields.values() if _is_per_layer(value, count)]
    chosen = [set(value) for name, value in fields.items() if _is_indices(name, value, count)]
    kinds: dict[str, int] = {}
    for layer in range(count):
        kind = [*(each[layer] for each in lists), *(layer in each for each in chosen)]
        kinds.setdefault(repr(kind), layer)
    first = [*kinds.values(), *(layer for layer in range(count) if layer not in kinds.values())]
    return sorted(first[: max(layers, min(len(kinds), 2 * layers))])


def _small(name: str, value: Any, count: int, kept: Sequence[int]) -> Any:
    """The value of a field in a tiny model."""
    if isinstance(value, dict):
        if name == "per_layer_config":
            own = {int(layer): each for layer, each in value.items()}
            return {str(kept.index(n)): shrunk(own[n]) for n in own if n in kept}
        if "model_type" in value or name.endswith("config"):
            return shrunk(value, LAYERS if re.fullmatch(_LANGUAGE, name) else 2)
        return _small_rotation(value)
    if _is_per_layer(value, count):
        return [_small(name, value[layer], 0, ()) for layer in kept]
    if _is_indices(name, value, count):
        return [kept.index(layer) for layer in value if layer in kept]
    if isinstance(value, list):
        return [_small(name, each, 0, ()) for each in value]
    if name == "vocab_size" and value is None:
        return VOCABULARY  # a model of sound that has no head by default
    if not _is_int(value):
        return value
    if kept and (re.fullmatch(_COUNT, name) or (name == "num_kv_shared_layers" and value == count)):
        return len(kept)
    if re.fullmatch(_TOKEN, name):
        return value if value < _FIRST else _LAST + value % (VOCABULARY - _LAST)
    return min([value, *(most for pattern, most in SIZES if re.fullmatch(pattern, name))][:2])


def _small_rotation(value: Any) -> Any:
    """The parameters of rotary positions, for heads of width 8."""
    if not isinstance(value, dict):
        return value
    return {n: [2, 1, 1] if n == "mrope_section" else _small_rotation(v) for n, v in value.items()}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_per_layer(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count > 1


def _is_indices(name: str, value: Any, count: int) -> bool:
    """True for a list of the layers of a kind."""
    listed = isinstance(value, list) and not _is_per_layer(value, count)
    return listed and re.fullmatch(_INDICES, name) is not None and count > 0


def _merged(fields: Fields, other: Fields) -> Fields:
    """The fields with those of ``other`` in their places, parts included."""
    both = dict(fields)
    for name, value in other.items():
        part = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = _merged(both[name], value) if part else value
    return both
