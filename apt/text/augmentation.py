"""Additional calibration samples: text that the model generates, and copies with random tokens."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.adapter import Sample, Samples
from apt.options import PRESETS
from apt.text.sampling import drawn, generator, mixed, vocabulary
from apt.text.self_generated import own_text


@dataclass(frozen=True)
class RandomTokens:
    """The options of copies of samples, in which some tokens are replaced by random ones.

    A few thousand tokens of text contain at most a few thousand different tokens of the vocabulary,
    and few of the token pairs of other text. Weights that compensate for earlier errors fit the
    given text and do worse on other text. Copies with half of the tokens drawn from the whole
    vocabulary cover more of it, need no other text, and are cheap to make. Random replacement
    also augments text for classifiers (Wei and Zou, arXiv 1901.11196).

    Args:
        copies: the number of copies per given sample.
        share: the share of a copy's tokens that are replaced. The first token is kept: it may be
            the BOS token or an attention sink.
        tokens: the approximate greatest number of tokens in all copies; there is at least one copy.
            More given text covers more of the vocabulary, so that it needs no more copies.
    """

    copies: float = PRESETS["default"].random_tokens
    share: float = 0.5
    tokens: int = 4096

    def samples(self, given: int, seqlen: int) -> int:
        """The number of copies of ``seqlen`` tokens for ``given`` samples."""
        return min(math.ceil(self.copies * given), max(1, self.tokens // seqlen))

    def beside(
        self, tokens: Tensor, vocabulary: int, special: Collection[int] = (), seed: int = 0
    ) -> Tensor:
        """The given samples (samples, seqlen) and the copies, in an order drawn by ``seed``.

        Args:
            special: special tokens, which are never drawn.
            seed: the seed of the tokens, their positions and the order.
        """
        given, seqlen = tokens.shape
        count, draw = self.samples(given, seqlen), generator(seed)
        copies = tokens[torch.arange(count) * given // count].cpu()
        random = drawn(vocabulary, tuple(copies.shape), draw, special)
        replaced = torch.rand(copies.shape, generator=draw) < self.share
        replaced[:, 0] = False
        return mixed(tokens, torch.where(replaced, random, copies), seed)

    def beside_texts(self, samples: Samples, vocabulary: int, seed: int = 0) -> Samples:
        """The given texts and the copies, in the order of `beside`.

        Special tokens are neither replaced nor drawn.
        """
        given, draw = len(samples), generator(seed)
        count, copies = self.samples(given, max(1, samples.numel() // given)), list[Sample]()
        for index in (torch.arange(count) * given // count).tolist():
            ids = samples[index]["input_ids"]
            random = drawn(vocabulary, tuple(ids.shape), draw, samples.special)
            replaced = torch.rand(ids.shape, generator=draw) < self.share
            replaced &= ~torch.isin(ids, torch.tensor(samples.special))
            copies.append({**samples[index], "input_ids": torch.where(replaced, random, ids)})
        both = [*samples, *copies]
        order = torch.randperm(len(both), generator=generator(seed))
        return samples.with_samples([both[index] for index in order.tolist()])


@dataclass(frozen=True)
class Augmentation:
    """The samples that are added to the given samples: own text, and copies with random tokens."""

    own_samples: int = 0
    random_tokens: RandomTokens | None = None

    def written(self, given: int) -> int:
        """The number of given and generated samples, for ``given`` samples."""
        return given + self.own_samples

    def samples(self, given: int, seqlen: int) -> int:
        """The total number of samples of ``seqlen`` tokens, for ``given`` samples."""
        count = self.written(given)
        return count + (self.random_tokens.samples(count, seqlen) if self.random_tokens else 0)

    def with_own_text(
        self,
        model: nn.Module,
        tokens: Tensor,
        seed: int = 0,
        *,
        bos: int | None = None,
        special: Collection[int] | None = None,
        compute: str = "float32",
    ) -> Tensor:
        """``tokens`` (samples, seqlen) and generated samples, in an order drawn by ``seed``.

        Args:
            bos, special, compute: see `apt.text.self_generated.own_text`.
        """
        if not self.own_samples:
            return tokens
        own = own_text(
            model, self.own_samples, tokens.shape[1], seed, bos=bos, special=special,
            compute=compute,
        )  # fmt: skip
        return mixed(tokens, own, seed)

    def with_random_tokens(
        self, model: nn.Module, tokens: Tensor | Samples, special: Collection[int] = ()
    ) -> Tensor | Samples:
        """The given samples, and copies of some of them with random tokens."""
        if self.random_tokens is None:
            return tokens
        if isinstance(tokens, Samples):
            return self.random_tokens.beside_texts(tokens, vocabulary(model))
        return self.random_tokens.beside(tokens, vocabulary(model), special)
