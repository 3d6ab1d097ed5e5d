"""Calibration samples with random tokens in place of some: what the given text leaves out.

A few thousand tokens of text hold a few thousand of a vocabulary's tokens, and nearly no pair of
them that other text has. Weights that make up for the error of those before them fit what the given
text holds, and do worse on the rest. A copy of some of its samples in which half of the tokens are
drawn from the whole vocabulary (random replacement, as text is augmented for classifiers: Wei and
Zou, arXiv 1901.11196) shows them more of it, needs no other text and costs nothing to make.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.text.sampling import drawn, generator, mixed


@dataclass(frozen=True)
class RandomTokens:
    """How many samples with random tokens there are beside the given ones.

    Args:
        copies: for each sample that is given.
        share: of the tokens of a copy that are replaced. The first token stays: attention may rest
            on it, and it may say that a sequence begins.
        tokens: an upper bound of about so many tokens in all copies, but one sample at least. The
            more text is given, the less of the vocabulary is missing.
    """

    copies: float = 0.25
    share: float = 0.5
    tokens: int = 4096

    def samples(self, given: int, seqlen: int) -> int:
        """How many samples of ``seqlen`` tokens there are beside ``given`` ones."""
        return min(math.ceil(self.copies * given), max(1, self.tokens // seqlen))

    def beside(
        self, tokens: Tensor, vocabulary: int, special: Collection[int] = (), seed: int = 0
    ) -> Tensor:
        """The given tokens (samples, seqlen) and the copies, in an order drawn by ``seed``.

        Args:
            tokens: the given token ids.
            vocabulary: how many tokens there are to draw from.
            special: tokens that are no text, and are never drawn.
            seed: draws tokens, places and order.
        """
        given, seqlen = tokens.shape
        count, draw = self.samples(given, seqlen), generator(seed)
        copies = tokens[torch.arange(count) * given // count].cpu()
        random = drawn(vocabulary, tuple(copies.shape), draw, special)
        replaced = torch.rand(copies.shape, generator=draw) < self.share
        replaced[:, 0] = False
        return mixed(tokens, torch.where(replaced, random, copies).to(tokens), seed)
