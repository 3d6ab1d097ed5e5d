"""A test that reports why the tests of this folder are skipped."""

import pytest

from tests.kernels.conftest import REASON


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_real_packages_run_with_stand_ins():
    import causal_conv1d
    import mamba_ssm
    from transformers.models.mamba import modeling_mamba

    assert mamba_ssm.__version__
    assert causal_conv1d.__version__
    model = modeling_mamba.MambaMixer
    assert model
