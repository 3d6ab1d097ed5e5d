"""Tiny random multimodal checkpoints, with the processors of their towers."""

from importlib import import_module

import pytest
import torch
import transformers as t

from apt.checkpoints.architecture import class_of
from tests.helpers import ROOT

_SQUARE = {"height": 32, "width": 32}
_PATCHES = {"image_size": 32, "patch_size": 16}
_PIXELS = 28 * 28
FIELDS = {
    "llava": {"vision_config": _PATCHES},
    "gemma3": {"vision_config": _PATCHES, "mm_tokens_per_image": 4},
    "idefics3": {"vision_config": {"image_size": 32, "patch_size": 8}, "scale_factor": 2},
    "qwen2_5_vl": {"vision_config": {"window_size": 56}},
    "lfm2_vl": {},
    "voxtral": {"audio_config": {"max_source_positions": 50}},
    "audioflamingo3": {"audio_config": {"max_source_positions": 50}},
}
PROCESSORS = {
    "llava": lambda: t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SQUARE),
    "gemma3": lambda: t.SiglipImageProcessor(size=_SQUARE),
    "idefics3": lambda: t.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    ),
    "qwen2_5_vl": lambda: t.Qwen2VLImageProcessor(
        patch_size=14, merge_size=2,
        size={"shortest_edge": 4 * _PIXELS, "longest_edge": 16 * _PIXELS},
    ),
    "voxtral": lambda: t.WhisperFeatureExtractor(feature_size=128, chunk_length=1),
}  # fmt: skip


def multimodal_model(kind, words):
    """A tiny model of a type, with a vocabulary of ``words`` tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        tiny = import_module("tiny")
        config = tiny.config(kind, text_config={"vocab_size": words}, **FIELDS[kind])
        config.architectures = [class_of(config).__name__]
        torch.manual_seed(0)
        return tiny.with_values(class_of(config)._from_config(config).float().eval())


def write_multimodal(kind, folder, tokenizer):
    """Write a tiny checkpoint of a type with its tokenizer and its processor."""
    multimodal_model(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    PROCESSORS[kind]().save_pretrained(folder)
    return folder
