"""The devices of a machine, and the check of its memory."""

import pytest

from apt.engine.machine import check_tokens, choose_device, memory
from apt.errors import AptError
from tests.helpers import TEXT

Q = ("--samples", 4, "--seqlen", 64, "--method", "wanda", "--calibration", TEXT)


@pytest.mark.filterwarnings("ignore:'mkldnn' is no longer used")
@pytest.mark.parametrize("name", ["meta", "mkldnn", "xla", "hpu", "", "cuda:99", "gpu"])
def test_device_with_wrong_results_is_refused(name):
    with pytest.raises(AptError, match=f"device '{name}' is not available here"):
        choose_device(name)
    assert choose_device("cpu") == "cpu"


def test_samples_beyond_the_memory_are_refused_before_the_work(apt):
    for option in ("--samples", "--own-samples"):
        run = apt("prune", "zoo:llama", *Q, option, 999_999_999)
        assert run.code == 2
        assert "GiB of memory, and there are" in run.err
        assert len(run.err.splitlines()) == 1


def test_memory_check_divides_the_samples_by_the_processes():
    total = memory("cpu")
    check_tokens(1, 2, total // 2, "cpu", 1)
    with pytest.raises(AptError, match="2 samples of 2 tokens take more than"):
        check_tokens(2, 2, total // 2, "cpu", 1)
    check_tokens(2, 2, total // 2, "cpu", 2)


@pytest.mark.parametrize(
    ("command", "positions"),
    [("prune", -5), ("prune", 0), ("prune", 1), ("eval", 1), ("inspect", 1)],
)
def test_model_without_positions_is_refused(apt, edited, command, positions):
    run = apt(command, edited("llama", max_position_embeddings=positions))
    assert run.code == 2
    assert f"has {positions} positions, and a sample needs at least 2" in run.err
