"""``compare``: its grid, its tables, resumed runs, and several processes."""

import copy
import csv
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from apt_lab.comparing.cells import read_cells
from apt_lab.comparing.results import Comparison, claimed
from transformers import AutoModelForCausalLM

from apt.errors import AptError
from apt.plugin.registry import registry
from tests.helpers import TEXT
from tests.helpers.families import CONFIGS
from tests.helpers.processes import start

SMALL = ("--samples", 4, "--seqlen", 16, "--windows", 3, "--calibration", TEXT, "--data", TEXT)
GRID = ("--methods", "magnitude,wanda,ss/owl", "--patterns", "0.5,2:4")


def results(output="out"):
    return json.loads((Path(output) / "comparison.json").read_text())


def test_comparison_equals_single_runs(apt, checkpoint):
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
    assert f"{value:.4g} ± " in page
    assert (Path("out") / "comparison.png").stat().st_size > 5000


def test_metric_that_is_not_a_mean_of_windows_has_no_interval(apt, checkpoint, monkeypatch):
    plain = registry().evaluators.get("perplexity")
    known = registry().evaluators.specs
    monkeypatch.setitem(known, "perplexity", replace(plain, mean=None))
    done = apt("compare", checkpoint("llama"), *SMALL, "--methods", "wanda", "--patterns", "0.5",
               "-o", "out", "--json")  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["windows"][TEXT.name] for row in rows] == [{}, {}]
    assert [row["intervals"][TEXT.name] for row in rows] == [{}, {}]
    assert "± " not in (Path("out") / "comparison.md").read_text()


def test_changed_directory_of_another_tool_is_measured_again(apt, checkpoint, tmp_path):
    model = checkpoint("llama")
    for place, sparsity in (("dense", 0.5), ("a/dense", 0.7)):
        made = apt("prune", model, *SMALL[:4], "--calibration", TEXT, "--sparsity", sparsity,
                   "--method", "magnitude", "-o", place)  # fmt: skip
        assert made.code == 0, made.err
    command = ("compare", model, *SMALL, "--methods", "wanda", "--patterns", "0.5", "-o", "out",
               "--with", "dense", "--json")  # fmt: skip
    rows = json.loads(apt(*command).out)["rows"]
    assert [row.get("sparsity") for row in rows] == [None, *2 * [pytest.approx(0.5)]]
    assert rows[2]["key"].startswith("with dense ")
    assert str(tmp_path) not in json.dumps(rows)
    both = json.loads(apt(*command, "--with", "a/dense", "--with", "dense").out)["rows"]
    assert [row["method"] for row in both[2:]] == ["dense", "a/dense"]
    shutil.rmtree("dense")
    shutil.move("a/dense", "dense")
    changed = json.loads(apt(*command).out)["rows"]
    assert changed[2]["sparsity"] == pytest.approx(0.7, rel=1e-3)
    small = copy.deepcopy(CONFIGS["llama"])
    small.vocab_size = 512
    AutoModelForCausalLM.from_config(small).save_pretrained("small")
    wrong = apt(*command, "--with", "small")
    assert wrong.code == 2
    assert "small has 512 tokens, and the dense model" in wrong.err


def test_samples_are_capped_at_the_positions(apt):
    done = apt("compare", "zoo:opt", "--methods", "magnitude", "--patterns", "2:4", "--samples", 2,
               "--windows", 2, "-o", "out", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert "seqlen: 512" in done.err
    assert json.loads(done.out)["windows"] == {"builtin": [2, 512]}


def test_metric_that_is_not_finite_is_recorded(apt, checkpoint):
    command = ("compare", checkpoint("llama"), *SMALL, "--methods", "wanda,ss", "--patterns",
               "0.5", "-o", "out")  # fmt: skip
    assert apt(*command).code == 0
    known = results()
    row = known["rows"][1]
    row["scores"][TEXT.name]["perplexity"] = "NaN"
    row["windows"][TEXT.name]["perplexity"]["values"][0] = "NaN"
    del known["rows"][2]
    Path("out/comparison.json").write_text(json.dumps(known))
    done = apt(*command)
    assert done.code == 0, done.err
    assert "nan" in done.out
    assert results()["rows"][1]["scores"][TEXT.name]["perplexity"] == "NaN"
    page = apt("report", "out", "-o", "page.html")
    assert page.code == 0, page.err
    assert '"nan"' not in Path("page.html").read_text()  # no width of a bar


def test_two_texts_with_one_name_are_refused(apt, checkpoint, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        shutil.copyfile(TEXT, tmp_path / place / "text.txt")
    done = apt("compare", checkpoint("llama"), *SMALL[:-2], "--data", "a/text.txt", "--data",
               "b/text.txt", "-o", "out")  # fmt: skip
    assert done.code == 2
    assert "data a/text.txt and b/text.txt have the same name; rename one (--data)" in done.err


def test_killed_comparison_continues_with_the_missing_rows(apt, checkpoint, tmp_path):
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


def test_two_processes_share_the_rows(checkpoint, tmp_path):
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


def test_claim_is_released_when_its_process_ends(tmp_path):
    with claimed(tmp_path, "wanda", wait=False) as mine, claimed(tmp_path, "ss", wait=False) as too:
        assert mine
        assert too
        with claimed(tmp_path, "wanda", wait=False) as other:
            assert not other
    with claimed(tmp_path, "wanda", wait=True) as mine:
        assert mine


def test_cells_have_short_unique_labels():
    found = read_cells(["admm", "admm:fast", "ss/auto", "SS/uniform"], ["0.5", "2:4"])
    assert [cell.key for cell in found] == [
        "admm 0.5", "admm:fast 0.5", "ss/auto 0.5", "ss 0.5", "admm 2:4", "admm:fast 2:4", "ss 2:4"
    ]  # fmt: skip
    mixed = read_cells(["ss"], ["auto:8@0.5"])
    assert mixed[0].label == "ss"
    for method, pattern, message in (
        ("nonsense", "0.5", "no method 'nonsense'"),
        ("admm:long", "0.5", "effort 'long'"),
        ("wanda:fast", "0.5", "does not use effort"),
        ("ss/nowhere", "0.5", "no allocation 'nowhere'"),
        ("ss", "5:4", "5:4"),
    ):
        with pytest.raises(AptError, match=message):
            read_cells([method], [pattern])


def test_wrong_arguments_are_errors_of_one_line(apt, checkpoint, tmp_path):
    model = checkpoint("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for arguments, message in (
        (("--methods", "wanda,,ss", "-o", "out"), "has an empty part"),
        (("--patterns", "", "-o", "out"), "has an empty part"),
        (("--methods", "wnda", "-o", "out"), "did you mean 'wanda'?"),
        (("--metric", "nonsense", "-o", "out"), "nonsense"),
        (("--with", "nowhere", "-o", "out"), "nowhere is not a directory (--with)"),
        (("--data", "nowhere.txt", "-o", "out"), "nowhere.txt"),
        (("--windows", 0, "-o", "out"), "windows is 0; it must be at least 1"),
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


DAMAGE = {
    "no text": lambda d: d["rows"][1]["scores"].clear(),
    "no metric": lambda d: d["rows"][1]["scores"][TEXT.name].clear(),
    "text for a number": lambda d: d["rows"][1].update(sparsity="x"),
    "list of windows": lambda d: d["rows"][1].update(windows=[1]),
    "windows without a mean": lambda d: d["rows"][1]["windows"][TEXT.name].update(perplexity={}),
    "tasks": lambda d: d["rows"][1].update(tasks=5),
    "task": lambda d: d["rows"][1].update(tasks={"a": {"metrics": [1]}}),
    "method": lambda d: d["rows"][1].update(method=None),
    "key": lambda d: d["rows"][1].pop("key"),
    "row": lambda d: d["rows"].append(3),
    "shape": lambda d: d["setting"].update(shape=5),
    "setting": lambda d: d.update(setting=[["a", 1]]),
    "windows": lambda d: d["setting"].update(windows={"a": 3}),
}


@pytest.fixture(scope="module")
def compared(output_of, checkpoint):
    words = ("compare", checkpoint("llama"), *SMALL, "--methods", "wanda", "--patterns", "0.5")
    return output_of(*words), words


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_comparison_is_refused(compared, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(compared[0], "out")
    record = results()
    DAMAGE[name](record)
    Path("out/comparison.json").write_text(json.dumps(record))
    with pytest.raises(AptError, match=r"out/comparison.json is damaged"):
        Comparison.stored(Path("out"))


def test_damaged_comparison_is_an_error_of_one_line(apt, compared):
    shutil.copytree(compared[0], "out")
    Path("out/comparison.json").write_text(json.dumps(results() | {"rows": [3]}))
    for command in (("report", "out", "-o", "page.html"), (*compared[1], "-o", "out")):
        run = apt(*command)
        assert (run.code, "out/comparison.json is damaged" in run.err) == (2, True)
    assert not Path("page.html").exists()


@pytest.mark.parametrize("name", ["comparison.md", "comparison.csv", "comparison.json"])
def test_comparison_refuses_links_in_its_output(apt, compared, name):
    shutil.copytree(compared[0], "out")
    Path("mine").write_text("mine")
    (Path("out") / name).unlink()
    (Path("out") / name).symlink_to(Path("mine").resolve())
    run = apt(*compared[1], "-o", "out")
    assert (run.code, Path("mine").read_text()) == (2, "mine")
    assert f"out/{name} is a link" in run.err


def test_file_instead_of_the_lock_folder_is_an_error_of_one_line(apt, compared):
    Path("out").mkdir()
    Path("out/.claims").touch()
    run = apt(*compared[1], "-o", "out")
    assert (run.code, "cannot be opened: File exists; delete out/.claims" in run.err) == (2, True)
