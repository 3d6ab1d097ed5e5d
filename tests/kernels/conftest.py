"""mamba_ssm's own Python on a processor; run in a process of its own, by ``make kernels``."""

import importlib.util
import sys

from tests.kernels.stubs import install


def _reason() -> str:
    """The reason why these tests cannot be run; empty if they can be."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba_ssm is not installed; run: make kernels"
    if importlib.util.find_spec("selective_scan_cuda") is not None:
        return "the real kernels are installed, see tests/gpu"
    if "transformers.models.mamba.modeling_mamba" in sys.modules:
        return "transformers has chosen its kernels already; run: make kernels"
    return ""


REASON = _reason()
if not REASON:
    install()


def pytest_ignore_collect(collection_path):
    """Ignore the test files that import mamba_ssm, if it cannot be imported."""
    left_out = ("test_paths.py", "test_native.py", "test_models.py")
    return True if REASON and collection_path.name in left_out else None
