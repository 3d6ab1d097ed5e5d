"""The HTML page about pruned models: complete, safe, reproducible, and readable in a browser."""

import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from apt_lab.reporting.beside_dense import by_frequency, token_losses
from apt_lab.reporting.heat import block_of, expert_of, heat
from apt_lab.reproduction import command_of
from safetensors.torch import load_file

from apt.evaluation.metrics import perplexity
from apt.output.report import Report
from tests.helpers import TEXT
from tests.helpers.families import CONFIGS, random_model
from tests.helpers.releases import EXTRAS

SMALL = ("--samples", 4, "--seqlen", 16, "--calibration", "text.txt")


@pytest.fixture
def prune(apt, checkpoint, tmp_path):
    """A function that prunes a random model into a directory."""
    shutil.copyfile(TEXT, tmp_path / "text.txt")

    def make(output, *arguments, variant="llama"):
        shutil.copytree(checkpoint(variant), tmp_path / "m", dirs_exist_ok=True)
        done = apt("prune", "m", *SMALL, *arguments, "-o", output)
        assert done.code == 0, done.err
        return tmp_path / output

    return make


def page_of(apt, *arguments):
    done = apt("report", *arguments, "-o", "page.html", "--overwrite")
    assert done.code == 0, done.err
    return Path("page.html").read_text(encoding="utf-8")


def test_page_has_the_content_of_the_report(apt, prune):
    directory = prune("a", "--sparsity", 0.6, "--method", "wanda", "--eval", "text.txt")
    page, report = page_of(apt, directory), Report.read(directory)
    assert "Before and after" in page
    assert f"{report.scores['after']['perplexity']:.4g}" in page
    for site in report.sites:
        assert f"{site.relative_error:.3f}" in page
        assert block_of(site) in page
    for phase, _ in report.timeline["phases"]:
        assert phase[:20] in page
    assert report.timeline["end"] >= max(start for _, start in report.timeline["phases"])
    assert all(size > 10**7 for _, size in report.timeline["memory"])
    assert not re.search(r"(src|href)=.(?!#|data:,|https://arxiv\.org)", page)  # no network


def test_page_compares_several_models(apt, prune):
    first = prune("a", "--sparsity", 0.6, "--method", "wanda", "--eval", "text.txt")
    second = prune("b", "--pattern", "2:4", "--method", "magnitude", "--eval", "text.txt")
    page = page_of(apt, first, second)
    assert "Comparison" in page
    assert page.count('href="#model-') == 4
    assert page.count(">dense<") == 1
    assert "Comparison" not in page_of(apt, first)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--sparsity", 0.6, "--method", "wanda", "--allocation", "owl"),
        (
            "--pattern",
            "2:4",
            "--effort",
            "fast",
            "--skip",
            "*.k_proj",
            "--override",
            "*.q_proj=0.3",
        ),
        ("--pattern", "auto:4", "--sparsity", 0.5, "--method", "ss", "--seed", 3),
        pytest.param(
            ("--sparsity", 0.5, "--layer-wise", "--also", "conv1d", "--stream"), marks=EXTRAS
        ),
    ],
)
def test_command_of_a_report_reproduces_the_model(apt, prune, arguments):
    variant = "mamba" if "conv1d" in arguments else "llama"
    directory = prune("a", *arguments, variant=variant)
    command = shlex.split(command_of(json.loads((directory / "apt_report.json").read_text())))
    assert command[:3] == ["apt-prune", "prune", "m"]
    again = apt(*command[1:-1], "again")
    assert again.code == 0, again.err
    left, right = (load_file(Path(name) / "model.safetensors") for name in ("a", "again"))
    assert all((left[name] == right[name]).all() for name in left)


@pytest.mark.parametrize(
    "arguments", [("--drop", 1), ("--keep", 0.6, "--width-only"), ("--size", "channels=24")]
)
def test_command_of_a_report_reproduces_a_smaller_model(
    apt, prune, checkpoint, tmp_path, arguments
):
    shutil.copyfile(TEXT, tmp_path / "text.txt")
    shutil.copytree(checkpoint("llama"), tmp_path / "m")
    made = apt("shrink", "m", *SMALL, "--effort", "fast", *arguments, "-o", "a")
    assert made.code == 0, made.err
    command = shlex.split(command_of(json.loads(Path("a/apt_report.json").read_text())))
    assert command[:3] == ["apt-prune", "shrink", "m"]
    again = apt(*command[1:-1], "again")
    assert again.code == 0, again.err
    left, right = (load_file(Path(name) / "model.safetensors") for name in ("a", "again"))
    assert left.keys() == right.keys()
    assert all((left[name] == right[name]).all() for name in left)


def test_smaller_and_recovered_models_have_pages(apt, prune, checkpoint):
    pruned = prune("a", "--sparsity", 0.6, "--method", "wanda")
    recovered = apt(
        "recover", pruned, "--kind", "layers", "--steps", 4, "--checks", 2, "--seqlen", 16,
        "--rate", 1e-2, "--calibration", "text.txt", "--eval", "text.txt", "-o", "r",
    )  # fmt: skip
    assert recovered.code == 0, recovered.err
    page = page_of(apt, "r")
    assert "Loss of the recovery" in page
    assert "The command that reproduces it" not in page
    assert "perplexity on text.txt (recovery)" in page
    small = apt("shrink", checkpoint("llama"), "--drop", 1, *SMALL, "--effort", "fast", "-o", "s")
    assert small.code == 0, small.err
    assert "parameters of the blocks kept" in page_of(apt, "s")


@pytest.fixture
def compared(apt, checkpoint, tmp_path):
    """A comparison of two methods."""
    shutil.copyfile(TEXT, tmp_path / "text.txt")
    done = apt("compare", checkpoint("llama"), *SMALL, "--methods", "magnitude,wanda",
               "--patterns", "0.5", "--data", "text.txt", "--windows", 2,
               "--metric", "perplexity", "--metric", "divergence", "-o", "comparison")  # fmt: skip
    assert done.code == 0, done.err
    return tmp_path / "comparison"


def test_comparison_has_a_section(apt, prune, compared):
    rows = json.loads((compared / "comparison.json").read_text())["rows"]
    alone = page_of(apt, compared)
    for row in rows:
        assert f"{row['scores']['text.txt']['perplexity']:.4g}" in alone
    assert alone.count("<svg") == 2  # of each metric
    assert "divergence on text.txt" in alone
    directory = prune("a", "--sparsity", 0.6, "--method", "wanda")
    done = apt("report", directory, compared, "-o", "page.html", "--overwrite", "--json")
    assert json.loads(done.out).items() >= {"models": 1, "comparisons": 1}.items()
    both = Path("page.html").read_text(encoding="utf-8")
    assert 'href="#model-0"' in both
    assert 'href="#comparison-0"' in both


def test_wrong_comparisons_are_errors_of_one_line(apt, compared):
    path = compared / "comparison.json"
    known = json.loads(path.read_text())
    done = apt("report", compared, "--text", "text.txt", "-o", "page.html")
    assert (done.code, "none is named" in done.err) == (2, True)
    rows, bad = known["rows"], "<script>alert(1)</script>"
    for damage in ({"rows": 3}, {"setting": {}}, {"rows": [*rows, {"key": "a"}]}):
        path.write_text(json.dumps(known | damage))
        done = apt("report", compared, "-o", "page.html")
        assert done.code == 2
        assert "is damaged" in done.err
    path.write_text(json.dumps(known | {"rows": []}))
    assert "no row of the dense model yet" in apt("report", compared, "-o", "page.html").err
    path.write_text(json.dumps(known | {"rows": rows[::-1]}))  # rows of several processes
    page = page_of(apt, compared)
    assert page.index(">dense<") < page.index(">wanda<") < page.index(">magnitude<")
    path.write_text(json.dumps(known | {"rows": [{**row, "method": bad} for row in rows]}))
    page = page_of(apt, compared)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_names_in_a_report_are_escaped(apt, prune):
    directory = prune("a", "--sparsity", 0.6, "--method", "wanda")
    path = directory / "apt_report.json"
    report = json.loads(path.read_text())
    bad = "<script>alert(1)</script>"
    report["model"]["reference"] = report["options"]["method"] = bad
    report["sites"][0]["name"] = report["sites"][0]["kind"] = f"x.{bad}"
    report["timeline"]["phases"][0][0] = bad
    path.write_text(json.dumps(report))
    page = page_of(apt, directory)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_wrong_arguments_are_errors_of_one_line(apt, prune):
    directory = prune("a", "--sparsity", 0.6, "--method", "wanda")
    Path("there.html").write_text("mine")
    for arguments, message in (
        ((directory, "-o", "there.html"), "there.html exists"),
        ((directory, "-o", "page.txt"), "is not an .html file"),
        ((directory, "-o", "none/page.html"), "its folder does not exist"),
        (("m", "-o", "page.html"), "has no apt_report.json"),
        (("nowhere", "-o", "page.html"), "has no apt_report.json"),
    ):
        done = apt("report", *arguments)
        assert done.code == 2
        assert message in done.err
    assert Path("there.html").read_text() == "mine"
    path = directory / "apt_report.json"
    report = json.loads(path.read_text())
    wrong = [
        {"timeline": {"phases": 3}},
        {"scores": {"before": {"a": "x"}, "after": {"a": 1}}},
        {"recovery": {"training": {"losses": 1}}},
    ]
    for damage in wrong:
        path.write_text(json.dumps(report | damage))
        done = apt("report", directory, "-o", "page.html")
        assert done.code == 2
        assert "is damaged" in done.err


@pytest.mark.skipif("jamba" not in CONFIGS, reason="experts are modules in this transformers")
def test_experts_of_a_block_share_a_cell(apt, prune):
    directory = prune("a", "--sparsity", 0.5, "--method", "magnitude", variant="jamba")
    sites = Report.read(directory).sites
    experts = [site for site in sites if site.name != f"{block_of(site)}.{site.kind}"]
    assert experts
    assert {block_of(site) for site in experts} == {"model.layers.2"}
    table = heat("Error", sites, lambda site: site.sparsity, str)
    assert len(table.rows) == 3
    assert table.columns.count(experts[0].kind) == 1


@pytest.mark.skipif("jamba" not in CONFIGS, reason="experts are modules in this transformers")
def test_page_shows_the_tokens_of_each_expert(apt, prune):
    page = page_of(apt, directory := prune("a", "--method", "wanda", variant="jamba"))
    up = [s for s in Report.read(directory).sites if s.kind.endswith("gate_up_proj")]
    table = heat("Tokens", up, lambda site: site.tokens, str, expert_of)
    assert table.columns == [str(index) for index in range(len(up))]
    assert [float(cell.text) for cell in table.rows[0][1]] == [site.tokens for site in up]
    assert "Tokens of each expert" in page


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_browser_shows_the_page_without_errors(apt, prune, tmp_path):
    page = page_of(apt, prune("a", "--sparsity", 0.6, "--method", "wanda"))
    probe = "<script>document.title = [document.documentElement.scrollWidth <= innerWidth, "
    probe += "document.querySelectorAll('svg').length].join()</script></body>"
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,800",
         "--enable-logging=stderr", "--dump-dom", str(tmp_path / "probe.html")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "<title>true,2</title>" in done.stdout
    assert "CONSOLE" not in done.stderr


def test_page_compares_texts_with_the_dense_model(apt, checkpoint, prune):
    directory = prune("a", "--sparsity", 0.7, "--method", "magnitude")
    page = page_of(apt, directory, "--text", "text.txt", "--prompts", 2, "--dense", "m",
                   "--png", "images")  # fmt: skip
    assert "Loss by frequency" in page
    assert page.count('class="texts"') == 1
    body = page.partition('class="texts"')[2].partition("</table>")[0]
    assert body.count("<tr>") == 3
    names = {path.name for path in Path("images").iterdir()}
    heats = ("relative-layer-error", "sparsity")
    assert names == {f"a-{heat}-by-block-and-kind.png" for heat in heats}
    for arguments, text in [
        (("--dense", "m"), "the dense model is used with a text only"),
        (("--text", "text.txt", "--prompts", -1), "prompts is -1"),
        (("--png", "text.txt"), "is not a directory"),
        (("--text", "text.txt", "--dense", "nowhere"), "nowhere"),
    ]:
        run = apt("report", directory, *arguments, "-o", "other.html")
        assert run.code == 2, arguments
        assert text in run.err


def test_losses_by_frequency_average_to_the_perplexity(tokenizer):
    model = random_model("llama").eval()
    tokens = torch.randint(1, 60, (4, 64), generator=torch.Generator().manual_seed(0))
    losses = token_losses(model, tokens)
    assert losses.shape == (4, 63)
    assert math.exp(losses.double().mean()) == pytest.approx(perplexity(model, tokens), rel=1e-5)
    groups = by_frequency(tokens, losses, losses + 1)
    assert sum(group.share for group in groups) == pytest.approx(1)
    mean = sum(group.share * group.dense for group in groups)
    assert mean == pytest.approx(float(losses.double().mean()), rel=1e-5)
    assert all(group.pruned - group.dense == pytest.approx(1, rel=1e-4) for group in groups)
