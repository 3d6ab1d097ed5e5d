"""What plain option values may be, and what a machine can do."""

import subprocess
import sys
import typing

import pytest
import torch

from apt.distributed.launch import joined
from apt.engine.machine import check_tokens, choose_device, memory
from apt.errors import AptError
from apt.options import PRESETS, CalibrationOptions, DtypeOptions
from apt.solver import EFFORTS
from apt.solver.options import Effort
from tests.helpers import TEXT

Q = ("--samples", 4, "--seqlen", 64, "--method", "wanda", "--calibration", TEXT)

REFUSED = [
    (("prune", "zoo:llama", "--seed", "1" + "0" * 23), "seed 1" + "0" * 23 + " is out of range"),
    (("prune", "zoo:llama", "--damping", "1e308"), "damping is 1e+308; it must be from 0 to 1e+06"),
    (("prune", "zoo:llama", "--damping", "nan"), "damping is nan; it must be from 0 to"),
    (("prune", "zoo:llama", "--samples", "-1"), "samples is -1; it must be at least 0"),
    (("prune", "zoo:llama", "--per", "row"), "needs a sparsity"),
    (("prune", "zoo:llama", "--per", "row", "--pattern", "2:4"), "an n:m pattern is the same in"),
    (
        ("prune", "zoo:llama", "--activations", "tape"),
        "activations 'tape' is not one of memory, cpu, disk (--activations)",
    ),
    (
        ("prune", "zoo:llama", "--max-shard-size", "5"),
        "'5' is not a file size; write 5GB or 500MB (--max-shard-size)",
    ),
    (("prune", "zoo:llama", "--max-shard-size", "0GB"), "'0GB' is not a file size"),
    (("inspect", "zoo:llama", "--samples", "0"), "samples is 0; it must be at least 1"),
    (("inspect", "zoo:llama", "--samples", "-2"), "samples is -2; it must be at least 1"),
    (("inspect", "zoo:llama", "--seqlen", "1"), "seqlen is 1; it must be at least 2 (--seqlen)"),
    (("eval", "zoo:llama", "--samples", "0"), "samples is 0; it must be at least 1"),
    (("eval", "zoo:llama", "--dtype", "float8"), "dtype 'float8' is not one of auto, float32"),
    (("convert", "zoo:llama", "-o", "out", "--dtype", "int4"), "dtype 'int4' is not one of auto"),
    (("verify", ".", "--pattern", "2:4", "--per", "row"), "needs a sparsity"),
    (("prune", "./nowhere", "--pattern", "2:4"), "no such model"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=lambda value: str(value)[-40:])
def test_plain_mistakes_are_one_line_with_nothing_before_it(apt, arguments, said):
    run = apt(*arguments)
    assert run.code == 2
    assert said in run.err
    assert len(run.err.splitlines()) == 1, run.err


def test_they_are_found_without_torch():
    """What takes seconds to import is not imported for a mistyped number."""
    arguments = [["apt-prune", *words] for words, _ in REFUSED if words[0] != "verify"]
    code = (
        "import sys, os\nos.environ['APT_DISABLE_PLUGINS'] = '*'\nimport apt.cli\n"
        f"for sys.argv in {arguments!r}:\n"
        "    try: apt.cli.main()\n"
        "    except SystemExit as stop: assert stop.code == 2, sys.argv\n"
        "    assert 'torch' not in sys.modules, sys.argv\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_names_are_those_of_torch_and_the_solver():
    assert tuple(PRESETS) == EFFORTS == typing.get_args(Effort)
    auto, *names = DtypeOptions.OPTIONS[0].choices
    assert auto == "auto"
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in names)


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_every_seed_that_is_let_through_is_taken(seed):
    CalibrationOptions(seed=seed).check()
    torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_no_other_seed_is(seed):
    with pytest.raises((RuntimeError, ValueError)):  # by the side
        torch.Generator().manual_seed(seed)
    with pytest.raises(AptError, match="out of range"):
        CalibrationOptions(seed=seed).check()


@pytest.mark.filterwarnings("ignore:'mkldnn' is no longer used")
@pytest.mark.parametrize("name", ["meta", "mkldnn", "xla", "hpu", "", "cuda:99", "gpu"])
def test_a_device_that_computes_nothing_is_refused(name):
    with pytest.raises(AptError, match=f"device '{name}' is not available here"):
        choose_device(name)
    assert choose_device("cpu") == "cpu"


def test_samples_that_no_memory_holds_are_refused_before_any_work(apt):
    for option in ("--samples", "--own-samples"):
        run = apt("prune", "zoo:llama", *Q, option, 999_999_999)
        assert run.code == 2
        assert "GiB of memory, and there are" in run.err
        assert len(run.err.splitlines()) == 1


def test_samples_are_held_against_memory_by_all_processes_together():
    total = memory("cpu")
    check_tokens(1, 2, total // 2, "cpu", 1)
    with pytest.raises(AptError, match="2 samples of 2 tokens take more than"):
        check_tokens(2, 2, total // 2, "cpu", 1)
    check_tokens(2, 2, total // 2, "cpu", 2)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', not a whole number from 1 up"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a whole number from 1 up"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "9", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is 9"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "p"}, "PORT is 'p'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_nonsense_of_the_environment_is_named(monkeypatch, variables, said):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AptError, match=said), joined():
        pass


@pytest.mark.parametrize("per", ["layer", "row"])
def test_a_sparsity_that_rounds_to_nothing_is_refused(apt, per):
    run = apt("prune", "zoo:llama", *Q, "--sparsity", "0.000001", "--per", per)
    assert run.code == 2
    assert "nothing would be pruned: 1e-06 of the weights of model.layers.0" in run.err
    assert "rounds to none" in run.err


def test_sites_that_lose_nothing_are_counted(apt):
    # k_proj and v_proj have a third of the weights of q_proj, and round to none.
    run = apt("inspect", "zoo:llama", "--sparsity", "0.00002", "--samples", 1, "--seqlen", 64)
    assert run.code == 0
    assert "sites lose no weight: 2e-05 of the weights of model.layers.0.self_attn." in run.err


@pytest.mark.parametrize("positions", [-5, 0, 1])
@pytest.mark.parametrize("command", ["prune", "eval", "inspect"])
def test_a_model_without_positions_is_refused(apt, edited, command, positions):
    run = apt(command, edited("llama", max_position_embeddings=positions))
    assert run.code == 2
    assert f"has {positions} positions, and a sample needs at least 2" in run.err
