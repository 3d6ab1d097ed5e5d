"""Samples of images, and of images with texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch

from apt.adapter import Sample, Samples
from apt.inputs.classes import class_numbers
from apt.inputs.items import Item, Kind, drawn_items
from apt.inputs.texts import TextReader, passages
from apt.plugin.registry import Registry
from apt.text.datasets import Split, documents
from apt.text.sampling import generator
from apt.text.special_tokens import special_ids

IMAGES = Kind("images", (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_OTHER_TEXTS = "builtin"  # the texts for images that have none


@dataclass(frozen=True)
class ImageReader:
    """Reads images through the image processor of a model.

    Args:
        processor: the image processor, as transformers has it.
        name: the argument of the model's forward.
        texts: the reader of the texts of a model of images and texts; else None. An image without
            a text gets one of the embedded text.
        classes: the numbers of the classes of the model by their names.
        inputs: makes the samples of an image from what the processor makes, for a model that takes
            something else. Of an image in several tiles, one tile is drawn.
    """

    processor: Any
    name: str = "pixel_values"
    texts: TextReader | None = None
    classes: Mapping[str, int] = field(default_factory=dict)
    inputs: Callable[[Mapping[str, Any]], Sequence[Sample]] | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the texts; None without texts."""
        return None if self.texts is None else self.texts.tokenizer

    def read(
        self,
        source: str,
        split: Split,
        count: int,
        seed: int,
        registry: Registry,
        *,
        fewer: bool = False,
    ) -> Samples:
        """Samples in an order drawn by ``seed``; see `drawn_items`.

        Raises:
            AptError: the source has too few images, or one that cannot be read.
        """
        items = drawn_items(source, IMAGES, split, count, seed, registry, fewer=fewer)
        draw = generator(seed)
        samples: list[Sample] = [self._sample(item, draw) for item in items]
        if self.texts is None:
            labels = class_numbers([item.label for item in items], self.classes, source)
            return Samples(samples, labels=labels)
        texts = _texts_of(items, split, registry)
        samples = [
            {**sample, "input_ids": self.texts.encode(text)["input_ids"]}
            for sample, text in zip(samples, texts, strict=True)
        ]
        return Samples(samples, self.tokenizer.mask_token_id, special_ids(self.tokenizer))

    def _sample(self, item: Item, draw: torch.Generator) -> Sample:
        """The values of an image, as the model takes them."""
        from PIL import Image

        try:
            with item.open() as file, Image.open(file) as image:
                made = self.processor(images=image.convert("RGB"), return_tensors="pt")
        except Exception as error:  # the decoders of Pillow raise errors of many types
            raise item.unreadable("an image", error) from error
        if self.inputs is None:
            return {self.name: torch.as_tensor(made[self.name])[0]}
        samples = self.inputs(made)
        return samples[int(torch.randint(len(samples), (), generator=draw))]


def _texts_of(items: Sequence[Item], split: Split, registry: Registry) -> list[tuple[str, ...]]:
    """The text of each item; passages of the embedded text for those without one."""
    if all(item.text is not None for item in items):
        return [(str(item.text),) for item in items]
    others = cycle(text.texts[:1] for text in passages(documents(_OTHER_TEXTS, split, registry)))
    return [(item.text,) if item.text is not None else next(others) for item in items]
