"""Options in files: written files are read again, and wrong entries are errors."""

import json
import tomllib
from pathlib import Path

import pytest

from apt.options import PruneRun
from apt.options.files import read_options
from apt.options.recover import read_amount
from tests.helpers import TEXT

SMALL = ("--samples", 4, "--seqlen", 64, "--method", "wanda", "--calibration", TEXT)


def plan(apt, *arguments):
    """The plan of a dry run as JSON, without measurements."""
    run = apt("prune", *arguments, "--dry-run", "--json")
    assert run.code == 0, run.err
    record = json.loads(run.out)
    del record["needs"]
    return record


def test_saved_options_repeat_the_command(apt, checkpoint):
    given = (
        *(checkpoint("llama"), *SMALL, "--sparsity", 0.6, "--per", "row", "--skip", "*.k_proj"),
        *("--override", "*.q_proj=0.4", "--layer-wise", "--damping", 0.02, "-o", "out"),
    )
    first = plan(apt, *given, "--save-config", "run.toml")
    assert plan(apt, "--config", "run.toml") == first
    assert plan(apt, "--config", "run.toml", "--save-config", "again.toml") == first
    assert Path("again.toml").read_text() == Path("run.toml").read_text()
    assert apt("prune", "--config", "run.toml").code == 0
    report = json.loads(Path("out/apt_report.json").read_text())["options"]
    assert (report["pattern"], report["per"], report["damping"]) == ("0.6", "row", 0.02)
    assert report["overrides"] == {"*.q_proj": "0.4"}
    assert report["error_aware"] is False


def test_chosen_defaults_are_saved(apt):
    plan(apt, "--adapter", "llama", "--samples", 4, "--seqlen", 64, "--save-config", "run.toml")
    saved = tomllib.loads(Path("run.toml").read_text())
    assert saved["model"] == "zoo:llama"
    assert (saved["pattern"], saved["method"], saved["calibration"]) == ("2:4", "admm", "builtin")
    assert saved["output"] == "llama-2of4-admm"
    assert (saved["samples"], saved["metric"]) == (4, ["perplexity"])
    assert not {"skip", "overwrite", "dry-run", "json", "save-config"} & saved.keys()


def test_command_line_takes_precedence_over_the_file(apt):
    Path("run.toml").write_text('model = "zoo:llama"\nsamples = 9\nseqlen = 32\npattern = "1:4"\n')
    record = plan(apt, "--config", "run.toml", "--samples", 4, "--pattern", "2:4")
    assert (record["samples"], record["seqlen"]) == (5, 32)
    assert {site["pattern"] for site in record["sites"]} == {"2:4"}


@pytest.mark.parametrize(
    ("line", "mode"), [("layer-wise = true", None), ("error-aware = true", True), ("", None)]
)
def test_both_keys_of_a_two_way_flag_are_read(apt, checkpoint, line, mode):
    Path("run.toml").write_text(f'{line}\noutput = "out"\n')
    assert apt("prune", checkpoint("llama"), *SMALL, "--config", "run.toml").code == 0
    report = json.loads(Path("out/apt_report.json").read_text())["options"]
    assert report["error_aware"] is bool(mode)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampels = 3", "no option 'sampels'; did you mean 'samples'?"),
        ("config = 'x'", "no option 'config'"),
        ("samples = true", "samples in run.toml is not a string or a number"),
        ("samples = [3]", "samples in run.toml is not a string or a number"),
        ("samples = 'many'", "samples in run.toml is 'many', not a number"),
        ("samples = 4.5", "samples in run.toml is 4.5, not a whole number"),
        ("skip = [[1]]", "skip in run.toml is not a list of strings"),
        ("stream = 'yes'", "stream in run.toml is neither true nor false"),
        ("pattern = 2:4", "run.toml cannot be read: "),
        ("[prune]\nsamples = 3", "no option 'prune'"),
        ("samples = -1", "samples is -1; it must be at least 0"),
        ("error-aware = true\nlayer-wise = true", "in run.toml contradicts another line"),
        (None, "run.toml cannot be read: "),
    ],
    ids=str,
)
def test_wrong_entries_of_a_file_are_one_line_errors(apt, text, message):
    if text is not None:
        Path("run.toml").write_text(text)
    run = apt("prune", "zoo:llama", "--config", "run.toml")
    assert run.code == 2
    assert message in run.err
    assert "Traceback" not in run.err
    assert [path.name for path in Path().iterdir()] == ["run.toml"] * (text is not None)


def test_other_file_is_not_overwritten(apt):
    Path("run.toml").write_text("# mine\n")
    run = apt("prune", "zoo:llama", *SMALL, "--dry-run", "--save-config", "run.toml")
    assert run.code == 2
    assert "run.toml exists; choose another file (--save-config)" in run.err
    assert Path("run.toml").read_text() == "# mine\n"


def test_number_is_read_as_a_path(apt):
    Path("run.toml").write_text("output = 2024\n")
    run = apt("prune", "zoo:llama", *SMALL, "--dry-run", "--config", "run.toml", "--json")
    assert run.code == 0, run.err
    assert read_options(Path("run.toml"), [PruneRun])["output"] == Path("2024")


def test_number_of_tokens_may_have_underscores():
    assert read_amount("1_000_000") == read_amount("1000000_") == 10**6
