"""``compare``: the grid, what it shares, its tables, and how it continues."""

import csv
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from apt.comparing.cells import read_cells
from apt.comparing.claims import claimed
from apt.errors import AptError
from apt.plugin.registry import registry
from tests.families import TEXT
from tests.processes import start

SMALL = ("--samples", 4, "--seqlen", 16, "--windows", 3, "--calibration", TEXT, "--data", TEXT)
GRID = ("--methods", "magnitude,wanda,ss/owl", "--patterns", "0.5,2:4")


def results(output="out"):
    return json.loads((Path(output) / "comparison.json").read_text())


def test_a_grid_is_measured_as_single_runs_are(apt, checkpoint):
    model = checkpoint("llama")
    done = apt("compare", model, *SMALL, *GRID, "--metric", "perplexity", "--metric", "divergence",
               "-o", "out")  # fmt: skip
    assert done.code == 0, done.err
    rows = results()["rows"]
    labels = [(row["method"], row["pattern"]) for row in rows]
    assert labels == [
        ("dense", ""), ("magnitude", "0.5"), ("wanda", "0.5"), ("ss/owl", "0.5"),
        ("magnitude", "2:4"), ("wanda", "2:4"), ("ss", "2:4"),
    ]  # fmt: skip
    text = TEXT.name
    assert rows[0]["scores"][text]["divergence"] == pytest.approx(0, abs=1e-6)
    single = apt("prune", model, "--sparsity", 0.5, "--method", "wanda", *SMALL[:4],
                 "--calibration", TEXT, "-o", "single")  # fmt: skip
    assert single.code == 0, single.err
    alone = apt("eval", "single", "--data", TEXT, "--samples", 3, "--seqlen", 16, "--json")
    expected = json.loads(alone.out)["perplexity"]
    assert rows[2]["scores"][text]["perplexity"] == pytest.approx(expected, rel=1e-5)
    for row in rows:
        assert row["method"] in done.out
    other = apt("compare", model, *SMALL, *GRID, "--metric", "perplexity", "--metric",
                "divergence", "--with", "single", "-o", "out", "--json")  # fmt: skip
    assert other.code == 0, other.err
    last = json.loads(other.out)["rows"][-1]
    assert last["method"] == "single"
    assert last["scores"][text]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert last["sparsity"] == pytest.approx(0.5)
    with (Path("out") / "comparison.csv").open() as file:
        table = list(csv.reader(file))
    assert len(table) == 9
    assert table[0][3] == f"perplexity on {text}"
    assert table[0][4:6] == [f"perplexity on {text} low", f"perplexity on {text} high"]
    value, low, high = map(float, table[3][3:6])
    assert value == rows[2]["scores"][text]["perplexity"]
    assert low < value < high
    assert len(set(table[1][3:6])) == 1  # of the dense model, with which all are compared
    page = (Path("out") / "comparison.md").read_text()
    assert page.count("\n| ") == 10
    assert f"{value:.4g} ± {(high - low) / 2 / 1.959964:.2g}" in page
    assert (Path("out") / "comparison.png").stat().st_size > 5000


def test_a_metric_that_is_no_mean_of_windows_has_no_interval(apt, checkpoint, monkeypatch):
    plain = registry().evaluators.get("perplexity")
    known = registry().evaluators.specs
    monkeypatch.setitem(known, "perplexity", replace(plain, mean=None))
    done = apt("compare", checkpoint("llama"), *SMALL, "--methods", "wanda", "--patterns", "0.5",
               "-o", "out", "--json")  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["windows"][TEXT.name] for row in rows] == [{}, {}]
    assert [row["intervals"][TEXT.name] for row in rows] == [{}, {}]
    assert "±" not in (Path("out") / "comparison.md").read_text()


def test_a_killed_comparison_continues_and_measures_no_row_twice(apt, checkpoint, tmp_path):
    command = ("compare", checkpoint("llama"), *SMALL, "--methods", "wanda,ss,mm,admm",
               "--patterns", "0.5,2:4,0.7", "-o", "out")  # fmt: skip
    process = start(tmp_path, *command)
    file = tmp_path / "out/comparison.json"
    while process.is_alive() and not (file.is_file() and len(results()["rows"]) > 3):
        time.sleep(0.02)
    process.kill()
    process.join()
    before = results()["rows"]
    assert 3 < len(before) < 13
    done = apt(*command)
    assert done.code == 0, done.err
    after = results()["rows"]
    assert after[: len(before)] == before
    assert len(after) == 13
    changed = apt(*command, "--seed", 1)
    assert changed.code == 2
    assert "is another comparison" in changed.err
    assert "seed" in changed.err
    assert results()["rows"] == after


def test_two_processes_divide_the_rows(checkpoint, tmp_path):
    command = ("compare", checkpoint("llama"), *SMALL, "--methods", "wanda,ss,mm,admm",
               "--patterns", "0.5,2:4,0.7", "-o", "out")  # fmt: skip
    both = [start(tmp_path, *command) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    rows = results(tmp_path / "out")["rows"]
    assert len(rows) == len({row["key"] for row in rows}) == 13
    table = (tmp_path / "out/comparison.md").read_text()
    places = [table.index(name) for name in ("dense", "wanda", "ss", "mm", "admm")]
    assert places == sorted(places)


def test_a_row_is_free_again_when_its_process_ends(tmp_path):
    with claimed(tmp_path, "wanda", wait=False) as mine, claimed(tmp_path, "ss", wait=False) as too:
        assert mine
        assert too
        with claimed(tmp_path, "wanda", wait=False) as other:
            assert not other
    with claimed(tmp_path, "wanda", wait=True) as mine:
        assert mine


def test_cells_have_short_names_and_no_doubles():
    found = read_cells(["admm", "admm:fast", "ss/auto", "SS/uniform"], ["0.5", "2:4"], registry())
    assert [cell.key for cell in found] == [
        "admm 0.5", "admm:fast 0.5", "ss/auto 0.5", "ss 0.5", "admm 2:4", "admm:fast 2:4", "ss 2:4"
    ]  # fmt: skip
    mixed = read_cells(["ss"], ["auto:8@0.5"], registry())
    assert mixed[0].label == "ss"
    for method, pattern, message in (
        ("nonsense", "0.5", "no method 'nonsense'"),
        ("admm:long", "0.5", "effort 'long'"),
        ("wanda:fast", "0.5", "does not use the effort"),
        ("ss/nowhere", "0.5", "no allocation 'nowhere'"),
        ("ss", "5:4", "5:4"),
    ):
        with pytest.raises(AptError, match=message):
            read_cells([method], [pattern], registry())


def test_mistakes_are_one_line(apt, checkpoint, tmp_path):
    model = checkpoint("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for arguments, message in (
        (("--methods", "wanda,,ss", "-o", "out"), "has an empty part"),
        (("--patterns", "", "-o", "out"), "has an empty part"),
        (("--methods", "wnda", "-o", "out"), "did you mean 'wanda'?"),
        (("--metric", "nonsense", "-o", "out"), "nonsense"),
        (("--with", "nowhere", "-o", "out"), "--with nowhere is not a directory"),
        (("--data", "nowhere.txt", "-o", "out"), "nowhere.txt"),
        (("--windows", 0, "-o", "out"), "samples must be at least 1"),
        (("-o", "full"), "has other files"),
        (("-o", "full/mine.txt"), "is not a directory"),
    ):
        done = apt("compare", model, *SMALL, *arguments)
        assert done.code == 2, arguments
        assert message in done.err
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    good = ("compare", model, *SMALL, "--methods", "wanda", "--patterns", "0.5", "-o", "out")
    assert apt(*good).code == 0
    for damage in ("", "[]", '{"setting": {}}', '{"setting": {}, "rows": [1]}'):
        (tmp_path / "out/comparison.json").write_text(damage)
        done = apt(*good)
        assert done.code == 2
        assert "damaged" in done.err or "another comparison" in done.err
    shutil.rmtree(tmp_path / "out")
    assert apt(*good).code == 0
