"""Calibration samples: token ids (samples, seqlen)."""

import torch
from torch import Tensor, nn


def mixed(given: Tensor, more: Tensor, seed: int = 0) -> Tensor:
    """Both, (samples, seqlen), in an order drawn by ``seed``."""
    both = torch.cat([given, more])
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))]


def vocabulary(model: nn.Module) -> int:
    """How many tokens a causal language model of transformers knows."""
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return min(len(embeddings), getattr(model.config, "vocab_size", None) or len(embeddings))
