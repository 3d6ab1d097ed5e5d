"""The levels of a GGUF file: a file of any choice of levels has exactly the promised bytes."""

import random
from functools import cache

import pytest

pytest.importorskip("gguf")

from apt_plugins.gguf_files.export import export
from apt_plugins.gguf_files.file_form import file_form
from apt_plugins.gguf_files.grids import GRIDS, encode
from gguf import GGUFReader

from apt.checkpoints.exporting import EncodedRows, Exportable
from apt.checkpoints.load import open_skeleton
from apt.fit.choice import choose, smallest_size
from apt.fit.table import LossTable, MeasuredLevel
from apt.locations.model_source import find
from apt.plugin.registry import registry


@pytest.fixture(scope="module")
def model(two_blocks):
    """Two blocks of the embedded LLaMA."""
    return Exportable(open_skeleton(find(str(two_blocks), registry()), registry()))


@pytest.fixture(scope="module")
def rows_of(model):
    """A function of a parameter and a level that returns its bytes in a file."""
    grids = {grid.name: grid for grid in GRIDS}

    @cache
    def rows(name, level):
        return EncodedRows(level, encode(model.read(name).float(), grids[level]))

    return rows


def test_levels_are_the_grids_that_fit_the_width(model):
    form = file_form(model)
    down, gate = (form.levels[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("down", "gate"))
    assert {x.name for x in down} > {"bf16", "q4_K", "q2_K", "iq4_nl"}  # 512 columns
    assert "q4_K" not in {x.name for x in gate}  # 192 columns
    assert "model.norm.weight" not in form.levels
    assert form.levels["model.embed_tokens.weight"][0].grid is None


def test_files_of_50_random_budgets_have_the_promised_sizes(model, rows_of, tmp_path):
    form, draw = file_form(model), random.Random(0)
    tensors = {
        name: tuple(MeasuredLevel(x.name, x.size, draw.random()) for x in levels)
        for name, levels in form.levels.items()
    }
    table, path = LossTable(tensors, form.rest), tmp_path / "x.gguf"
    for _ in range(50):
        budget = draw.randint(smallest_size(form), table.largest)
        levels = choose(table, budget)
        encoded = {name: rows_of(name, x) for name, x in levels.items() if x != "bf16"}
        export(model.with_encoded(encoded), path)
        assert path.stat().st_size == table.size(levels) <= budget
    written = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(path).tensors}
    assert written["token_embd.weight"] == levels["model.embed_tokens.weight"].lower()
