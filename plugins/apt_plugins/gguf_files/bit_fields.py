"""The order of bits in the blocks of GGUF: integers of a few bits share bytes."""

import torch
from torch import Tensor


def shared_bytes(fields: Tensor, bits: int, run: int) -> Tensor:
    """Integers of a few bits in bytes (out, groups, columns · bits / 8).

    A run of columns has the lowest bits of a run of bytes, and the next run the bits above.

    Args:
        fields: integers (out, groups, columns) in uint8, below ``2**bits``.
        bits: 1, 2 or 4.
        run: the number of columns in a run.
    """
    rows, groups, columns = fields.shape
    runs = fields.view(rows, groups, -1, 8 // bits, run)
    result = runs[:, :, :, 0].clone()
    for place in range(1, 8 // bits):
        result |= runs[:, :, :, place] << (bits * place)
    return result.view(rows, groups, columns * bits // 8)


def half_bytes(values: Tensor) -> Tensor:
    """The bytes (out, groups, 2) of values (out, groups) in fp16."""
    return values.half().unsqueeze(2).contiguous().view(torch.uint8)


def six_bit_pairs(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits (out, groups, 8) in 12 bytes, as ``q4_K`` has them.

    The first four of each have the lower bits of a byte. The others are divided: their lower bits
    share the last four bytes, and their upper bits are in the bytes of the first four.
    """
    first, last = slice(0, 4), slice(4, 8)
    own = [(part[..., first] | (part[..., last] >> 4 << 6)) for part in (scales, minima)]
    return torch.cat([*own, (scales[..., last] & 15) | ((minima[..., last] & 15) << 4)], 2)
