"""The extension module: C++ without dependencies, one build for all versions of Python."""

from setuptools import Extension, setup

NAMES = ("library", "block", "portable", "avx2", "avx512", "avx512_bf16", "tiled", "neon")
LIBRARY = Extension(
    "apt_kernels._library",
    sources=["src/module.cpp", *(f"src/{name}.cpp" for name in NAMES)],
    depends=[
        "src/matrix.h",
        "src/products.h",
        "src/pool.h",
        "src/vectors.inc",
        "src/expand512.inc",
    ],
    extra_compile_args=["-O3", "-std=c++17", "-pthread", "-fvisibility=hidden"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
    optional=True,  # without a compiler the package installs, and APT expands matrices with torch
)

setup(ext_modules=[LIBRARY], options={"bdist_wheel": {"py_limited_api": "cp311"}})
