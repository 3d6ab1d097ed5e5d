"""mamba_ssm's own Python on a processor; run in a process of its own, by ``make kernels``."""

import importlib.util
import sys

from tests.kernels.stubs import install


def _reason() -> str:
    """Why these tests cannot be run here; empty where they can."""
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
    """Leave the modules out, that import mamba_ssm, where it cannot be."""
    left_out = ("test_paths.py", "test_native.py", "test_models.py")
    return True if REASON and collection_path.name in left_out else None
