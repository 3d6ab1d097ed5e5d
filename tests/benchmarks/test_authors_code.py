"""The benchmark against the authors' code: definitions of a checkout, and the order of heads."""

from importlib import import_module

import pytest
import torch

from tests.helpers import ROOT
from tests.helpers.families import zoo_model

FILE = """
import a_library_of_2023
from .layerwrapper import WrappedGPT
LIMIT = a_library_of_2023.limit()

def helper(x):
    return WrappedGPT(x) + 1

def prune(x):
    print("they say a lot")
    return helper(torch.as_tensor(x)).item()
"""


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The folder of the benchmarks, whose files import each other."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_taken_loads_a_definition_without_the_imports_of_its_module(tmp_path, capsys):
    (tmp_path / "lib.py").write_text(FILE)
    taken = import_module("authors_code").taken
    code = taken(tmp_path / "lib.py", "helper", "prune", WrappedGPT=lambda x: x * 2)
    assert code.prune(3) == 7
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [("lib.py", "has no other: it is another version"), ("no.py", "is not a file")],
)
def test_wrong_checkout_is_an_error_of_one_line(tmp_path, name, message):
    (tmp_path / "lib.py").write_text(FILE)
    with pytest.raises(SystemExit, match=message):
        import_module("authors_code").taken(tmp_path / name, "prune", "other")


def test_ordered_rows_have_the_heads_at_equal_distances():
    model, tokens, _ = zoo_model("llama", 2, 8)
    model, adapter, authors = model.module.float(), model.adapter, import_module("authors")
    authors.gradients(model, tokens)
    block = adapter.blocks(model)[0][1]
    kinds = {groups.kind: groups for groups in adapter.groups(block, model.config)}
    groups = kinds["key-value-heads"]
    rows, columns = authors.ordered(block, groups)
    total = torch.zeros(groups.count)
    for parameters, dim in ((rows, 1), (columns, 0)):
        for parameter in parameters:  # as their importances add the entries of larger weights
            sums = (parameter * parameter.grad).abs().sum(dim)
            total += sums.view(-1, rows[1].shape[0]).sum(0).view(groups.count, -1).sum(1)
    parts = [
        (block.get_parameter(p.parameter) * block.get_parameter(p.parameter).grad).movedim(p.dim, 0)
        for p in groups.parts
    ]
    expected = sum(part.abs().sum(1).view(groups.count, -1).sum(1) for part in parts)
    torch.testing.assert_close(total, expected)
