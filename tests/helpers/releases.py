"""Markers of tests that need newer releases of a package."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def since(package, release):
    """True if ``package`` is installed in this release or a newer one."""
    return Version(version(package)) >= Version(release)


def needs(package, release, why):
    """A marker: skip the test with the reason ``why`` if ``package`` is older than ``release``."""
    reason = f"{why}: needs {package} {release}"
    return pytest.mark.skipif(not since(package, release), reason=reason)


EXTRAS_SINCE = ("transformers", "5.24")
"""Older releases have the convolution and the scan of Mamba inside the mixer, where they cannot be
measured or replaced."""
EXTRAS = needs(*EXTRAS_SINCE, "what is pruned beyond the Linears of Mamba")
SCAN = needs(*EXTRAS_SINCE, "Mamba on a CPU in less than 5 minutes")
