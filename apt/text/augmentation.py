"""Additional calibration samples: text that the model generates, and copies with random tokens."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from apt.text.random_tokens import RandomTokens
from apt.text.sampling import mixed, vocabulary
from apt.text.self_generated import own_text


@dataclass(frozen=True)
class Augmentation:
    """The samples that are added to the given ones: own text, and copies with random tokens."""

    own_samples: int = 0
    random_tokens: RandomTokens | None = None

    def written(self, given: int) -> int:
        """The number of samples, with those that the model generates, for ``given`` ones."""
        return given + self.own_samples

    def samples(self, given: int, seqlen: int) -> int:
        """The total number of samples of ``seqlen`` tokens, for ``given`` ones."""
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
        """``tokens`` (samples, seqlen) and generated samples, in an order drawn by ``seed``."""
        if not self.own_samples:
            return tokens
        own = own_text(model, self.own_samples, tokens.shape[1], seed, bos=bos, special=special)
        return mixed(tokens, own, seed)

    def with_random_tokens(
        self, model: nn.Module, tokens: Tensor, special: Collection[int] = ()
    ) -> Tensor:
        """``tokens`` (samples, seqlen), and copies of some of them with random tokens."""
        if self.random_tokens is None:
            return tokens
        return self.random_tokens.beside(tokens, vocabulary(model), special)
