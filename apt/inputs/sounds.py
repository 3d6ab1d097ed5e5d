"""Samples of sounds, as waves or as the features that a model takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch

from apt.adapter import Sample, Samples
from apt.errors import AptError
from apt.inputs.items import Item, Kind, drawn_items
from apt.inputs.texts import TextReader, check_alike, near_length
from apt.plugin.registry import Registry
from apt.text.datasets import Split

SOUNDS = Kind("sounds", (".wav", ".flac", ".ogg"))
_MASKED = "return_attention_mask"
_LONGEST = 16.0  # seconds
_SHORTEST = 0.1  # seconds: what the convolutions of all models need


@dataclass(frozen=True)
class SoundReader:
    """Reads sounds through the feature extractor of a model.

    A sound is cut to the nearest of a few lengths, of at most 16 seconds, so that batches have
    samples of equal lengths. If the features have one size for all lengths, as those of Whisper
    have, it is not cut.

    Args:
        extractor: the feature extractor, as transformers has it.
        name: the argument of the model's forward.
        transcripts: returns the reader of the texts of sounds, for a decoder that reads them.
        inputs: makes the samples of a sound from its features, for a model that takes something
            else.
    """

    extractor: Any
    name: str
    transcripts: Callable[[], TextReader] | None = None
    inputs: Callable[[Mapping[str, Any]], Sequence[Sample]] | None = None

    @property
    def tokenizer(self) -> None:
        """None: the samples have no special tokens."""
        return None

    @property
    def rate(self) -> int:
        """The values per second that the model takes."""
        return int(self.extractor.sampling_rate)

    @cached_property
    def _is_fixed(self) -> bool:
        """True if the features of all sounds have one size."""
        waves = (np.zeros(self.rate * length, "float32") for length in (1, 2))
        one, other = ([each.shape for each in self._features(w).values()] for w in waves)
        return one == other

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
            AptError: the source has too few sounds, or one that cannot be read or that is not what
                the model takes.
        """
        items = drawn_items(source, SOUNDS, split, count, seed, registry, fewer=fewer)
        samples: list[Sample] = [self._features(self._wave(item)) for item in items]
        if self.transcripts is None or all(item.text is None for item in items):
            return Samples(samples)
        texts = self.transcripts()
        samples = [
            sample if item.text is None else {**sample, **texts.target(item.text)}
            for sample, item in zip(samples, items, strict=True)
        ]
        check_alike(samples, f"some sounds of {source} have a text, and others have none")
        return Samples(samples)

    def _features(self, wave: "np.ndarray[Any, Any]") -> Sample:
        """The features of a wave (values,), as the model takes them."""
        if self.inputs is not None:
            return self.inputs(features_of(self.extractor, wave))[0]
        found = self.extractor(wave, sampling_rate=self.rate, return_tensors="pt")
        return {self.name: torch.as_tensor(found[self.name])[0]}

    def _wave(self, item: Item) -> "np.ndarray[Any, Any]":
        """The values of a sound (values,), cut."""
        import soundfile

        try:
            with item.open() as file:
                values, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except Exception as error:  # of soundfile's own types, which depend on its release
            raise item.unreadable("a sound", error) from error
        self._check(item, values.shape[1], rate)
        if len(values) < _SHORTEST * rate:
            message = f"{item.name} has {len(values) / rate:.3g} seconds of sound"
            hint = f"a sound needs at least {_SHORTEST} seconds: remove it"
            raise AptError(message, hint, ("calibration", "evaluation"))
        longest = min(len(values), int(_LONGEST * rate))
        wave: np.ndarray[Any, Any] = values[: None if self._is_fixed else near_length(longest), 0]
        return wave

    def _check(self, item: Item, channels: int, rate: int) -> None:
        """Raise unless a sound has what the model takes."""
        if channels == 1 and rate == self.rate:
            return
        given = f"{channels} channel{'s' * (channels > 1)} of {rate:,} Hz"
        raise AptError(
            f"{item.name} has {given}, and the model takes 1 channel of {self.rate:,} Hz",
            f"convert it, such as with: ffmpeg -i IN -ac 1 -ar {self.rate} OUT.wav",
            ("calibration", "evaluation"),
        )


def features_of(extractor: Any, wave: "np.ndarray[Any, Any]") -> Mapping[str, Any]:
    """The features of a wave (values,), with their mask if the extractor can make one."""
    masked = {_MASKED: True} if _MASKED in signature(extractor.__call__).parameters else {}
    found: Mapping[str, Any] = extractor(
        wave, sampling_rate=extractor.sampling_rate, return_tensors="pt", **masked
    )
    return found
