"""Random inputs of models that do not read windows of text."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from apt.adapter.text_config import text_config
from apt.checkpoints.processors import load_feature_extractor, load_image_processor
from apt.evaluation.generated import writes
from apt.extending import Opened
from apt.text.sampling import drawn, generator
from apt.text.special_tokens import named_ids
from apt_lab.benchmark.measures import SOUND_SECONDS

_IMAGE_SIDE = 256  # pixels, before the image processor


class RandomInputs:
    """Makes random inputs of a model: texts as token ids, images and sounds by its processors.

    Args:
        skeleton: the model.

    Raises:
        AptError: a processor of images or sounds is not there.
    """

    def __init__(self, skeleton: Opened) -> None:
        source, self._config = skeleton.source, skeleton.config
        self._reads, self._special = skeleton.reads, named_ids(skeleton.module)
        self._needs_target = self._reads.target and not writes(skeleton.module)
        self._images: Any = load_image_processor(source) if self._reads.image else None
        self._sounds: Any = load_feature_extractor(source) if self._reads.sound else None

    def make(self, batch: int, tokens: int, outputs: int, seed: int) -> dict[str, Tensor]:
        """Inputs by the names of the model's arguments (batch, …).

        Args:
            tokens: the number of tokens of a text; the last one is the end token, if there is one.
            outputs: the number of tokens that a decoder reads which does not write.
            seed: the seed of the values.
        """
        reads, found, draw = self._reads, dict[str, Tensor](), generator(seed)
        if reads.text is not None:
            found[reads.text] = self._ids(batch, tokens, draw)
        if self._needs_target:
            found["decoder_input_ids"] = self._ids(batch, outputs, draw)
        if reads.image is not None:
            side, values = _IMAGE_SIDE, np.random.default_rng(seed)
            pictures = values.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
            found[reads.image] = self._processed(self._images(list(pictures), return_tensors="pt"))
        if reads.sound is not None:
            rate = int(self._sounds.sampling_rate)
            wave = np.random.default_rng(seed).normal(0, 0.1, (batch, SOUND_SECONDS * rate))
            given = {"sampling_rate": rate, "return_tensors": "pt"}
            found[reads.sound] = self._processed(self._sounds(list(wave.astype("f4")), **given))
        return found

    def _processed(self, values: Any) -> Tensor:
        """The values of the argument for images or sounds of what a processor returns."""
        return torch.as_tensor(values[self._reads.image or self._reads.sound])

    def _ids(self, batch: int, tokens: int, draw: torch.Generator) -> Tensor:
        """Random token ids (batch, tokens) without special tokens before the end."""
        ids = drawn(text_config(self._config).vocab_size, (batch, tokens), draw, self._special)
        end = getattr(text_config(self._config), "eos_token_id", None)
        if isinstance(end, int):
            ids[:, -1] = end
        return ids
