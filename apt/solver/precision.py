"""Full fp32 products, whatever the process has been told to allow."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep TF32 and bf16 out of fp32 products while this is entered; also a decorator.

    Gram matrices and their factors do not survive products of 10 or 7 bits: neighbouring columns
    of activations are nearly dependent.
    """
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
