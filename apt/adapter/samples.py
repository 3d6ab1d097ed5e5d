"""Samples for models of any kind: named tensors, put into batches of equal shapes.

Windows of text for a decoder have one length and are one tensor of token ids. The samples of other
models are texts of their natural length, pairs of texts, images or sounds. A batch has samples of
equal shapes only, so that nothing is padded: every row of a block's input is a real position.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

ModelInputs = Tensor | Mapping[str, Tensor]
"""The inputs of a model: token ids (samples, seqlen), or tensors (samples, …) by their names."""

Sample = Mapping[str, Tensor]
"""The tensors of one sample, by the names of the model's arguments."""

_VALUES = 256  # of an image or a sound for a position, about


class Samples(Sequence[Sample]):
    """Samples of named tensors, in a random order.

    Args:
        samples: the samples; all have the same names.
        mask: the token that hides a token of a text; None if the model knows none.
        special: the special tokens of texts.
        labels: the class of each sample (samples,), for the metric ``accuracy``; None if unknown.
        first: True if the vector of a sample is the state of its first position, and not the mean
            over its positions.

    Attributes:
        pairs: a second text for each sample, and the score of both, for the metric ``spearman``;
            None if unknown.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        mask: int | None = None,
        special: tuple[int, ...] = (),
        labels: Tensor | None = None,
        *,
        first: bool = False,
    ) -> None:
        self._samples = list(samples)
        self.mask, self.special, self.labels, self.first = mask, special, labels, first
        self.pairs: ScoredPairs | None = None

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, chosen: int) -> Sample: ...
    @overload
    def __getitem__(self, chosen: slice | Tensor) -> "Samples": ...
    def __getitem__(self, chosen: int | slice | Tensor) -> "Sample | Samples":
        """A sample, or the samples of a slice, of indices, or of a mask (samples,)."""
        if isinstance(chosen, int):
            return self._samples[chosen]
        made = self.with_samples(self._chosen(chosen))
        made.labels = None if self.labels is None else self.labels[chosen]
        made.pairs = None if self.pairs is None else self.pairs[chosen]
        return made

    def _chosen(self, chosen: slice | Tensor) -> list[Sample]:
        if isinstance(chosen, slice):
            return self._samples[chosen]
        indices = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen
        return [self._samples[index] for index in indices.tolist()]

    def with_samples(self, samples: Sequence[Sample]) -> "Samples":
        """Other samples without classes and scores, with the same special tokens."""
        return Samples(samples, self.mask, self.special, first=self.first)

    @property
    def shape(self) -> tuple[int, int]:
        """The number of samples, and the largest number of positions in a sample."""
        return len(self), max(map(positions_of, self._samples), default=0)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors of a sample."""
        return tuple(self._samples[0]) if self._samples else ()

    def numel(self) -> int:
        """The number of positions of all samples."""
        return sum(map(positions_of, self._samples))

    def batches(self, positions: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches of samples of equal shapes, with the indices of their samples (samples,).

        The order of the batches is mixed, so that any first batches have all lengths.

        Args:
            positions: the approximate number of positions in a batch; a batch has at least one
                sample.
        """
        groups: dict[tuple[torch.Size, ...], list[int]] = {}
        for index, sample in enumerate(self._samples):
            groups.setdefault(tuple(each.shape for each in sample.values()), []).append(index)
        batches = list[list[int]]()
        for members in groups.values():
            size = max(1, positions // positions_of(self._samples[members[0]]))
            batches += [members[start : start + size] for start in range(0, len(members), size)]
        draw = torch.Generator().manual_seed(0)
        for place in torch.randperm(len(batches), generator=draw).tolist():
            members = batches[place]
            stacked = {
                name: torch.stack([self._samples[index][name] for index in members])
                for name in self.names
            }
            yield stacked, torch.tensor(members)

    def digest(self) -> str:
        """The SHA-256 of the names, shapes and values of all samples."""
        found = hashlib.sha256()
        for sample in self._samples:
            for name, tensor in sample.items():
                found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if self.labels is not None:
            found.update(f"labels {self.labels.tolist()}\n".encode())
        if self.pairs is not None:
            scores = self.pairs.scores.tolist()
            found.update(f"pairs {self.pairs.others.digest()} {scores}\n".encode())
        return found.hexdigest()


@dataclass(frozen=True)
class ScoredPairs:
    """The second text of each sample, and how similar people found both.

    Attributes:
        others: the second texts.
        scores: the scores (samples,).
    """

    others: Samples
    scores: Tensor

    def __getitem__(self, chosen: slice | Tensor) -> "ScoredPairs":
        """The pairs of a slice, of indices, or of a mask (samples,)."""
        return ScoredPairs(self.others[chosen], self.scores[chosen])


def positions_of(sample: Sample) -> int:
    """The number of tokens of all texts of a sample, and about that of its images and sounds."""
    others = [each.numel() // _VALUES for each in sample.values() if each.is_floating_point()]
    ids = [each.shape[-1] for name, each in sample.items() if name.endswith("input_ids")]
    return max(1, sum(ids) + sum(others))


def on_device(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    """The same inputs, on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: tensor.to(device) for name, tensor in inputs.items()}
