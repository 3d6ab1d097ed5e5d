"""The divergence from the dense model, against the same divergence in one piece."""

import pytest
import torch
from torch import Tensor

from apt.recovery.teacher import divergence

VOCABULARY, TOP, SEQLEN = 70, 6, 50  # more rows than are converted at a time


def in_one_piece(logits: Tensor, tokens: Tensor, logs: Tensor) -> Tensor:
    """KL(dense ‖ pruned) over the known tokens and one event for all others."""
    student = logits.float().log_softmax(-1).gather(-1, tokens)
    rest, student_rest = 1 - logs.exp().sum(-1), 1 - student.exp().sum(-1)
    known = (logs.exp() * (logs - student)).sum(-1)
    return (known + rest * (rest.log() - student_rest.log())).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_divergence_and_its_gradient(dtype, transposed):
    shape = (VOCABULARY, SEQLEN, 3) if transposed else (3, SEQLEN, VOCABULARY)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    dense = torch.randn(3, SEQLEN, VOCABULARY, generator=torch.Generator().manual_seed(1))
    logs, tokens = dense.log_softmax(-1).topk(TOP)
    losses, gradients = [], []
    for function in (in_one_piece, divergence):
        given = values.clone().requires_grad_()
        logits = given.transpose(0, 2) if transposed else given
        loss = function(logits, tokens, logs)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(given.grad)
        assert torch.equal(given.detach(), values)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=1e-8)
    assert gradients[1].dtype == dtype
