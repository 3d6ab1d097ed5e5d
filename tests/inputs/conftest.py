"""Folders of images and sounds, and tiny random models that read them, on disk."""

import wave

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from transformers import PreTrainedTokenizerFast

_BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 4}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, **_BLOCKS}
_IMAGES = {"image_size": 16, "patch_size": 4}
_PAIR = {
    "vocab_size": 2048, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WAVES = {
    "vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (10, 8), "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "mask_time_prob": 0.0,
    "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer",
}  # fmt: skip


def _vit():
    return T.ViTForImageClassification(T.ViTConfig(**_TOWER, **_IMAGES))


def _clip():
    text = {**_TOWER, "vocab_size": 2048, "max_position_embeddings": 20, "eos_token_id": 2}
    vision = {**_TOWER, **_IMAGES}
    return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _wav2vec2():
    return T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**_TOWER, **_WAVES))


def _whisper():
    return T.WhisperForConditionalGeneration(
        T.WhisperConfig(
            **_PAIR, num_mel_bins=8, max_source_positions=50, max_target_positions=24,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


def _t5():
    return T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=2048, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2,
            num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


_PROCESSORS = {
    "vit": lambda: T.ViTImageProcessor(size={"height": 16, "width": 16}),
    "clip": lambda: T.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ),
    "wav2vec2": lambda: T.Wav2Vec2FeatureExtractor(),
    "whisper": lambda: T.WhisperFeatureExtractor(feature_size=8, chunk_length=1),
}
_MODELS = {"vit": _vit, "clip": _clip, "wav2vec2": _wav2vec2, "whisper": _whisper, "t5": _t5}


@pytest.fixture(scope="session")
def model_of(tmp_path_factory, tokenizer):
    """A function that writes a tiny random model of a type, and returns its directory."""
    made = {}

    def write(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = _MODELS[name]()
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(made[name])
            if name in _PROCESSORS:
                _PROCESSORS[name]().save_pretrained(made[name])
            if name in ("clip", "t5", "whisper"):
                _masked(tokenizer).save_pretrained(made[name])
        return made[name]

    return write


def _masked(tokenizer):
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token,
        pad_token=tokenizer.eos_token, model_input_names=names, model_max_length=20,
    )  # fmt: skip


@pytest.fixture
def images(tmp_path):
    """A folder of 12 random images in two subfolders, of which 6 have a text."""
    folder, draw = tmp_path / "images", np.random.default_rng(0)
    for number in range(12):
        place = folder / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        values = draw.integers(0, 255, (20 + number, 24, 3), dtype=np.uint8)
        Image.fromarray(values).save(place / f"{number}.{('png', 'jpg')[number % 2]}")
        if number % 2:
            (place / f"{number}.txt").write_text(f"the image number {number}", "utf-8")
    return folder


def write_wave(path, seconds=0.5, rate=16_000, channels=1, seed=0):
    """Write noise as a .wav file of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    values = draw.integers(-8000, 8000, (round(seconds * rate), channels), dtype=np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())


@pytest.fixture
def sounds(tmp_path):
    """A folder of 12 sounds of noise, of different lengths."""
    pytest.importorskip("soundfile", reason="the extra speech is not installed")
    folder = tmp_path / "sounds"
    for number in range(12):
        write_wave(folder / f"{number}.wav", 0.3 + 0.04 * number, seed=number)
    return folder
