"""Calibration samples: token ids (samples, seqlen)."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from apt.errors import AptError


def generator(seed: int) -> torch.Generator:
    """What draws by that seed.

    Raises:
        AptError: torch takes no such seed.
    """
    try:
        return torch.Generator().manual_seed(seed)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:  # by releases of torch
        raise AptError(
            f"seed {seed} is out of range", "give a whole number from 0 to 2**64 - 1"
        ) from error


def mixed(given: Tensor, more: Tensor, seed: int = 0) -> Tensor:
    """Both, (samples, seqlen), in an order drawn by ``seed``."""
    both = torch.cat([given, more])
    return both[torch.randperm(len(both), generator=generator(seed))]


def drawn(
    vocabulary: int, shape: tuple[int, ...], draw: torch.Generator, special: Collection[int] = ()
) -> Tensor:
    """Token ids of that shape, of which none is ``special``.

    Those that would be are drawn again, and the generator goes on as if none had been.
    """
    found = torch.randint(vocabulary, shape, generator=draw)
    barred = torch.isin(torch.arange(vocabulary), torch.tensor(list(special), dtype=torch.long))
    again, plain = barred[found], torch.arange(vocabulary)[~barred]
    if again.any() and len(plain):
        state = draw.get_state()
        found[again] = plain[torch.randint(len(plain), (int(again.sum()),), generator=draw)]
        draw.set_state(state)
    return found


def vocabulary(model: nn.Module) -> int:
    """How many tokens a causal language model of transformers knows."""
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return min(len(embeddings), getattr(model.config, "vocab_size", None) or len(embeddings))
