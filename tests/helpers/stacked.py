"""Tiny random encoders, models of several stacks, and samples for them."""

import torch
import transformers as t

from apt import Samples

VOCABULARY = 64
_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 1,
}  # fmt: skip
_BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 40, "decoder_start_token_id": 0,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
_TOWER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_IMAGE = {**_TOWER, "image_size": 16, "patch_size": 4}
_TEXT = {
    **_TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 12, "eos_token_id": 2,
    "bos_token_id": 0,
}  # fmt: skip
_SOUND = {
    **_TOWER, "vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (5, 4),
    "conv_kernel": (10, 8), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0,
}  # fmt: skip
_WHISPER = {
    **_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20,
}  # fmt: skip
_DEBERTA = {
    **_BERT, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 8,
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}  # fmt: skip
_MODERN = {
    **_BERT, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3, "cls_token_id": 3,
    "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8,
}  # fmt: skip

MODELS = {
    "bert": (t.BertForMaskedLM, lambda: t.BertConfig(**_BERT), "texts"),
    "roberta": (t.RobertaForSequenceClassification, lambda: t.RobertaConfig(**_BERT), "texts"),
    "electra": (t.ElectraForTokenClassification, lambda: t.ElectraConfig(**_BERT), "texts"),
    "distilbert": (
        t.DistilBertForQuestionAnswering,
        lambda: t.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
        "texts",
    ),
    "deberta": (t.DebertaForMaskedLM, lambda: t.DebertaConfig(**_DEBERTA), "texts"),
    "deberta-v2": (
        t.DebertaV2ForSequenceClassification, lambda: t.DebertaV2Config(**_DEBERTA), "texts"
    ),
    "mpnet": (t.MPNetModel, lambda: t.MPNetConfig(**_BERT), "texts"),
    "modernbert": (t.ModernBertModel, lambda: t.ModernBertConfig(**_MODERN), "texts"),
    "t5": (t.T5ForConditionalGeneration, lambda: t.T5Config(**_T5), "pairs"),
    "gated t5": (
        t.T5ForConditionalGeneration,
        lambda: t.T5Config(**_T5, feed_forward_proj="gated-gelu"),
        "pairs",
    ),
    "t5 encoder": (t.T5EncoderModel, lambda: t.T5Config(**_T5), "texts"),
    "bart": (t.BartForConditionalGeneration, lambda: t.BartConfig(**_BART), "pairs"),
    "marian": (t.MarianMTModel, lambda: t.MarianConfig(**_BART), "pairs"),
    "m2m": (t.M2M100ForConditionalGeneration, lambda: t.M2M100Config(**_BART), "pairs"),
    "whisper": (
        t.WhisperForConditionalGeneration, lambda: t.WhisperConfig(**_WHISPER), "transcripts"
    ),
    "vit": (t.ViTForImageClassification, lambda: t.ViTConfig(**_IMAGE), "images"),
    "clip": (
        t.CLIPModel,
        lambda: t.CLIPConfig(text_config=_TEXT, vision_config=_IMAGE, projection_dim=16),
        "captions",
    ),
    "siglip": (
        t.SiglipModel,
        lambda: t.SiglipConfig(text_config=_TEXT, vision_config=_IMAGE),
        "captions",
    ),
    "wav2vec2": (
        t.Wav2Vec2ForCTC,
        lambda: t.Wav2Vec2Config(
            **_SOUND, do_stable_layer_norm=True, feat_extract_norm="layer"
        ),
        "sounds",
    ),
    "hubert": (t.HubertForCTC, lambda: t.HubertConfig(**_SOUND), "sounds"),
    "wavlm": (t.WavLMForCTC, lambda: t.WavLMConfig(**_SOUND), "sounds"),
}  # fmt: skip
"""The class, the configuration and the kind of samples of each family."""


def stacked_model(name):
    """A random model whose weights are large enough for every path to matter."""
    torch.manual_seed(0)
    model_class, config, _ = MODELS[name]
    model = model_class(config()).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def samples_of(name, count=16):
    """Random samples for a model; texts have several lengths."""
    draw = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=draw)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    makers = {
        "texts": lambda n: {"input_ids": ids((8, 8, 12, 16)[n % 4])},
        "pairs": lambda n: {
            "input_ids": ids((12, 12, 16, 16)[n % 4]),
            "decoder_input_ids": ids((8, 8, 8, 10)[n % 4]),
        },
        "transcripts": lambda n: {"input_features": normal(8, 40), "decoder_input_ids": ids(8)},
        "images": lambda n: {"pixel_values": normal(3, 16, 16)},
        "captions": lambda n: {"pixel_values": normal(3, 16, 16), "input_ids": ids(10)},
        "sounds": lambda n: {"input_values": normal(800)},
    }
    make = makers[MODELS[name][2]]
    return Samples([make(number) for number in range(count)], mask=1, special=(0, 1, 2))
