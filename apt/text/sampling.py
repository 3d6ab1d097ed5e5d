"""Random draws and shuffling of calibration samples (samples, seqlen)."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from apt.adapter.text_config import text_config
from apt.errors import AptError


def generator(seed: int) -> torch.Generator:
    """A random generator; raises `AptError` if the seed is out of the range of torch."""
    try:
        return torch.Generator().manual_seed(seed)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:  # depends on the release
        raise AptError(
            f"seed {seed} is out of range", "give a whole number from -2**63 to 2**64 - 1"
        ) from error


def mixed(given: Tensor, more: Tensor, seed: int = 0) -> Tensor:
    """All samples in an order drawn by ``seed``, with the device and dtype of ``given``."""
    both = torch.cat([given, more.to(given)])
    return both[torch.randperm(len(both), generator=generator(seed))]


def drawn(
    vocabulary: int, shape: tuple[int, ...], draw: torch.Generator, special: Collection[int] = ()
) -> Tensor:
    """Random token ids of this shape without ``special`` tokens.

    Special tokens are drawn again. The final state of the generator does not depend on this.
    """
    tokens = torch.randint(vocabulary, shape, generator=draw)
    is_special = torch.isin(torch.arange(vocabulary), torch.tensor(list(special), dtype=torch.long))
    redrawn, allowed = is_special[tokens], torch.arange(vocabulary)[~is_special]
    if redrawn.any() and len(allowed):
        state = draw.get_state()
        tokens[redrawn] = allowed[
            torch.randint(len(allowed), (int(redrawn.sum()),), generator=draw)
        ]
        draw.set_state(state)
    return tokens


def vocabulary(model: nn.Module) -> int:
    """The size of the vocabulary of a causal language model of transformers.

    Raises:
        AptError: the model names no embeddings of its tokens.
    """
    try:
        embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    except NotImplementedError:
        raise AptError(
            f"{type(model).__name__} has no embeddings of tokens that transformers knows: "
            "APT cannot draw tokens for it",
            "turn own samples, random tokens and norm epochs off with 0",
            ("own_samples", "random_tokens", "norm_epochs"),
        ) from None
    return min(
        len(embeddings), getattr(text_config(model.config), "vocab_size", None) or len(embeddings)
    )
