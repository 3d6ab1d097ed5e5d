"""Choices of the experts to remove: by use, and by saliency."""

import torch
from torch import Tensor

from apt.extending import RoutedExperts, lowest_scores


@lowest_scores
def by_frequency(experts: RoutedExperts) -> Tensor:
    """The experts to which the router gives the fewest tokens."""
    return experts.sums(torch.ones_like(experts.routing.weights))


@lowest_scores
def reap(experts: RoutedExperts) -> Tensor:
    """The experts of the smallest mean of ``g ‖f(x)‖`` (REAP, arXiv 2510.13999, eq. 9).

    The mean is over the tokens of an expert, ``g`` is its weight and ``f(x)`` is its output.
    """
    tokens = experts.sums(torch.ones_like(experts.judged.weights))
    return experts.sums(experts.norms()) / tokens.clamp_min(1)


@lowest_scores
def by_effect(experts: RoutedExperts) -> Tensor:
    """The experts of the smallest ``Σ ‖g f(x)‖² / ‖h‖²``, with ``h`` the stream after the block.

    This is the change of the block's output without the expert, if no other takes its tokens.
    """
    relative = experts.norms().square() / experts.sizes.unsqueeze(1)
    return experts.sums(relative)
