"""Calibration samples in which some tokens are replaced by random ones.

A few thousand tokens of text contain at most a few thousand different tokens of the vocabulary, and
few of the token pairs of other text. Weights that compensate for earlier errors fit the given text
and do worse on other text. Copies of some samples, in which half of the tokens are drawn from the
whole vocabulary, cover more of it. They need no other text and are cheap to make. Random
replacement is also used to augment text for classifiers (Wei and Zou, arXiv 1901.11196).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.text.sampling import drawn, generator, mixed


@dataclass(frozen=True)
class RandomTokens:
    """The options of copies with random tokens.

    Args:
        copies: the number of copies per given sample.
        share: the share of a copy's tokens that are replaced. The first token is kept: it may be
            the BOS token or an attention sink.
        tokens: the approximate greatest number of tokens in all copies; at least one sample is
            made. With more given text, less of the vocabulary is missing.
    """

    copies: float = 0.25
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
