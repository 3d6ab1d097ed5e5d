"""The heap of a process of the command line."""

import os
import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
import sys

import torch

from apt.cli.heap import keep_freed_memory


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(2**20) for _ in range(40)]  # 160 MiB, in blocks of 4 MiB
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


if sys.argv[1] == "keep":
    keep_freed_memory()
faults()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(
    ("argument", "setting", "again"),
    [
        pytest.param("leave", {}, True, id="returned to the system by default"),
        pytest.param("keep", {}, False, id="kept"),
        pytest.param("keep", {"MALLOC_TRIM_THRESHOLD_": "65536"}, True, id="the user's setting"),
    ],
)
def test_freed_memory_is_used_again_without_page_faults(
    argument: str, setting: dict[str, str], again: bool
) -> None:
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, argument], env=environment | setting,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert (int(result.stdout) > 1000) == again
