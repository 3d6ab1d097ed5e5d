"""The ranges of single options."""

import subprocess
import sys
import typing

import pytest
import torch

from apt.errors import AptError
from apt.options import DAMPING, PRESETS, CalibrationOptions, DtypeOptions
from apt.solver import EFFORTS, gram
from apt.solver.options import Effort

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
    (("fit", "zoo:llama", "--size", "little"), "little is not a size; write 73MiB, 1.5GB"),
    (("fit", "zoo:llama", "--bits", "0"), "bits is 0; it must be above 0"),
    (("fit", "zoo:llama"), "size and bits are missing: what must the model fit into?"),
    (("fit", "--size", "1GB"), "no MODEL is given; name one"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[-40:])
def test_wrong_values_are_one_line_errors_without_other_output(apt, arguments, message):
    run = apt(*arguments)
    assert run.code == 2
    assert message in run.err
    assert len(run.err.splitlines()) == 1, run.err


def test_wrong_values_are_found_without_torch():
    """Slow libraries are not imported before a wrong number is found."""
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


def test_choices_equal_the_names_of_torch_and_the_solver():
    assert tuple(PRESETS) == EFFORTS == typing.get_args(Effort)
    assert DAMPING == gram.DAMPING
    auto, *names = DtypeOptions.OPTIONS[0].choices
    assert auto == "auto"
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in names)


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_each_accepted_seed_works_with_torch(seed):
    CalibrationOptions(seed=seed).check()
    torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_other_seeds_are_refused(seed):
    with pytest.raises((RuntimeError, ValueError)):  # by the side
        torch.Generator().manual_seed(seed)
    with pytest.raises(AptError, match="out of range"):
        CalibrationOptions(seed=seed).check()
