"""Calibration samples beside the given ones: text of the model's own, and random tokens."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from apt.text.random_tokens import RandomTokens
from apt.text.sampling import mixed, vocabulary
from apt.text.self_generated import own_text


@dataclass(frozen=True)
class Augmentation:
    """What is added to the calibration samples that a user gives.

    Args:
        own_samples: how many samples the model writes itself.
        random_tokens: how many copies with random tokens there are of samples, given and written.
    """

    own_samples: int = 0
    random_tokens: RandomTokens | None = None

    def written(self, given: int) -> int:
        """How many samples there are once the model has written its own."""
        return given + self.own_samples

    def samples(self, given: int, seqlen: int) -> int:
        """How many samples of ``seqlen`` tokens there are in all."""
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
    ) -> Tensor:
        """``tokens`` (samples, seqlen) and those that the model writes, in an order by ``seed``.

        Raises:
            AptError: the model cannot write text.
        """
        if not self.own_samples:
            return tokens
        own = own_text(model, self.own_samples, tokens.shape[1], seed, bos=bos, special=special)
        return mixed(tokens, own, seed)

    def with_random_tokens(
        self, model: nn.Module, tokens: Tensor, special: Collection[int] = ()
    ) -> Tensor:
        """``tokens`` (samples, seqlen) and the copies of some with random tokens."""
        if self.random_tokens is None:
            return tokens
        return self.random_tokens.beside(tokens, vocabulary(model), special)
