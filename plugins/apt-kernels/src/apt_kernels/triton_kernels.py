"""The kernels of `apt_kernels.gpu`, as Triton compiles them."""
# Triton reads the annotations of its functions: only constants may have one.
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def weights(
    mask, values, scales, starts, row, part, width, mask_width, groups, parts,
    KIND: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weights of a part of a row with their zeros (COLUMNS,), in fp32, and its columns."""
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    valid = columns < width
    byte = tl.load(mask + row * mask_width + columns // 8, mask=valid, other=0).to(tl.int32)
    kept = (byte >> (columns % 8)) & 1
    place = tl.load(starts + row * parts + part) + tl.cumsum(kept, 0) - kept
    if KIND == "int4":
        pair = tl.load(values + place // 2, mask=kept == 1, other=0).to(tl.int32)
        weight = (((pair >> ((place % 2) * 4)) & 15) - 8).to(tl.float32)
    else:
        weight = tl.load(values + place, mask=kept == 1, other=0).to(tl.float32)
    if GROUP > 0:
        weight *= tl.load(scales + row * groups + columns // GROUP, mask=valid, other=0).to(
            tl.float32
        )
    return tl.where(kept == 1, weight, 0.0), columns


@triton.jit
def multiply(
    mask, values, scales, starts, x, y, rows, width, mask_width, groups, parts,
    VECTORS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``y[n, row] = Σ x[n, column] W[row, column]`` for one row and all vectors."""
    row = tl.program_id(0).to(tl.int64)
    vector = tl.arange(0, VECTORS)
    total = tl.zeros((VECTORS,), dtype=tl.float32)
    for part in range(parts):
        weight, columns = weights(
            mask, values, scales, starts, row, part, width, mask_width, groups, parts,
            KIND, GROUP, COLUMNS,
        )  # fmt: skip
        given = tl.load(
            x + vector[:, None] * width + columns[None, :], mask=columns[None, :] < width, other=0
        )
        total += tl.sum(given.to(tl.float32) * weight[None, :], 1)
    tl.store(y + vector * rows + row, total)


@triton.jit
def expand(
    mask, values, scales, starts, dense, first, width, mask_width, groups, parts,
    KIND: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One part of one row with its zeros."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    weight, columns = weights(
        mask, values, scales, starts, row + first, part, width, mask_width, groups, parts,
        KIND, GROUP, COLUMNS,
    )  # fmt: skip
    tl.store(dense + row * width + columns, weight, mask=columns < width)
