"""The compiled library and its functions."""

import ctypes
import os
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

LEVELS = ("portable", "avx2", "avx512", "avx512-bf16", "neon")
"""The instruction sets, in the order of the library's numbers."""


class Fields(ctypes.Structure):
    """``apt::Matrix`` of ``matrix.h``."""

    _fields_ = (
        ("mask", c_void_p), ("mask_stride", c_int64), ("values", c_void_p),
        ("offsets", c_void_p), ("scales", c_void_p),
        ("rows", c_int64), ("words", c_int64), ("group_words", c_int64), ("kind", c_int32),
    )  # fmt: skip


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
VECTORS = ("q_bias", "k_bias", "v_bias", "o_bias", "input_norm", "output_norm", "q_norm", "k_norm")
"""The matrices and the vectors of ``apt::Block``, in its order."""


class BlockFields(ctypes.Structure):
    """``apt::Block`` of ``block.cpp``."""

    _fields_ = (
        *((name, POINTER(Fields)) for name in MATRICES),
        *((name, c_void_p) for name in VECTORS),
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_width")),
        ("epsilon", c_float), ("scaling", c_float), ("level", c_int32),
    )  # fmt: skip


def _load() -> ctypes.CDLL | None:
    """The library; None if it was not compiled from this version."""
    try:
        from apt_kernels import _library
    except ImportError:
        return None
    library = ctypes.CDLL(_library.__file__)
    if not hasattr(library, "apt_decode"):  # compiled from an earlier version
        return None
    pointer = POINTER(Fields)
    library.apt_offsets.argtypes = [c_void_p, c_int64, c_int64, c_int, c_void_p]
    library.apt_offsets.restype = c_int64
    library.apt_arrange.argtypes = [c_void_p, c_int64, c_int64, *[c_void_p] * 3]
    library.apt_arrange.restype = None
    library.apt_product.argtypes = [pointer, c_void_p, c_void_p, c_int64, c_void_p, c_int, c_int]
    library.apt_product.restype = None
    library.apt_tiled.argtypes = [pointer, c_void_p, c_int64, c_void_p, c_int, c_int]
    library.apt_tiled.restype = c_int
    library.apt_expand.argtypes = [
        pointer, c_int64, c_int64, c_int64, c_void_p, c_int, c_int, c_int
    ]  # fmt: skip
    library.apt_expand.restype = None
    library.apt_decode.argtypes = [
        POINTER(BlockFields), c_int64, *[c_void_p] * 4, c_int64, *[c_void_p] * 2, *[c_int64] * 3,
        c_void_p, c_int, c_int,
    ]  # fmt: skip
    library.apt_decode.restype = None
    library.apt_use_openmp.argtypes = [c_void_p]
    library.apt_use_openmp.restype = None
    if team := torch_openmp():
        library.apt_use_openmp(team)
    return library


def torch_openmp() -> int | None:
    """The address of ``GOMP_parallel`` in torch's OpenMP runtime; None without this function.

    The runtimes of GNU, LLVM and Intel have this function on Linux. The symbol is searched in the
    libraries to which torch's own library is linked, not in all libraries of the process.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):  # another system, or another kind of threads
        return None
    return ctypes.cast(function, c_void_p).value


def _served() -> tuple[str, ...]:
    """The instruction sets of this processor, the best one last."""
    if LIBRARY is None:
        return ()
    best = LEVELS[LIBRARY.apt_level()]
    return ("portable", best) if best == "neon" else LEVELS[: LEVELS.index(best) + 1]


def _chosen() -> str:
    """The instruction set that ``APT_KERNELS_LEVEL`` names; by default the best one."""
    if not SERVED:
        return ""
    level = os.environ.get("APT_KERNELS_LEVEL") or SERVED[-1]
    if level not in SERVED:
        raise ValueError(f"APT_KERNELS_LEVEL is {level!r}; this processor has {', '.join(SERVED)}")
    return level


LIBRARY = _load()
SERVED = _served()
"""The instruction sets of this processor, the best one last; empty without the library."""
LEVEL = _chosen()
"""The instruction set of new matrices; empty if the library was not compiled."""


def available() -> bool:
    """True if the library was compiled."""
    return LIBRARY is not None
