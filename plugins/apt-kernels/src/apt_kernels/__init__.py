"""Products with packed matrices on a processor: the zeros are neither stored nor read.

A packed matrix is a bitmask and the kept values, row by row. `Matrix` multiplies it by a few
vectors, and expands rows for products with many vectors. `DenseMatrix` multiplies a plain matrix.
The functions are C++, for AVX-512 (VBMI2, BF16), AVX2, NEON and any other processor. `LEVEL` is the
instruction set of the current processor.
"""

from apt_kernels.block import Block
from apt_kernels.library import LEVEL, LEVELS, available
from apt_kernels.matrix import DenseMatrix, Matrix
from apt_kernels.memory import in_large_pages

__all__ = ["LEVEL", "LEVELS", "Block", "DenseMatrix", "Matrix", "available", "in_large_pages"]
__version__ = "0.1.0"
