"""Checks of token ids from a program or a tokenizer."""

import torch
from torch import Tensor, nn

from apt.errors import AptError


def check_ids(tokens: Tensor, least: int = 1, name: str = "tokens") -> None:
    """Raise `AptError` unless tokens are ids (samples, seqlen), each of ``least`` at least.

    Args:
        name: the name of the argument.
    """

    def error(message: str, hint: str) -> AptError:
        return AptError(f"{name.replace('_', ' ')} {message}", hint, (name,))

    if tokens.ndim != 2 or not tokens.numel() or tokens.shape[1] < least:
        hint = "give (samples, seqlen)" + f", with {least} tokens or more" * (least > 1)
        raise error(f"have shape {tuple(tokens.shape)}", hint)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise error(f"are {tokens.dtype}", "give token ids as torch.int64")
    if tokens.is_meta:
        raise error("have no values: they are on the device meta", "load them into memory")
    if tokens.layout != torch.strided:
        raise error(f"are of {tokens.layout}", "give a dense tensor")


def check_vocabulary(tokens: Tensor, module: nn.Module, reference: str) -> None:
    """Raise if a token has no embedding; models without known embeddings are not checked."""
    if (vocabulary := vocabulary_size(module)) is None:
        return
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise AptError(
            f"the tokenizer of {reference} gives ids from {int(tokens.min())} to "
            f"{int(tokens.max())}, but the model has {vocabulary} embeddings",
            "the tokenizer belongs to another model",
        )


def vocabulary_size(module: nn.Module) -> int | None:
    """The number of tokens with an embedding; None without known embeddings of tokens."""
    try:
        return int(module.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
