"""The examples, messages, links and generated parts of the documents are correct."""

import ast
import re
import runpy
from importlib import import_module

import pytest
from transformers import AutoModelForCausalLM, PhiConfig

from apt import extending
from apt.adapter import DecoderAdapter, Input
from apt.testing import check_adapter, random_tokens
from tests.helpers import ROOT

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
GUIDE = (ROOT / "docs/first-adapter.md").read_text()
PYTHON = re.findall(r"```python\n(inputs = .*?)```", GUIDE, re.DOTALL)
SAID = [text.strip() for text in re.findall(r"```text\n(.*?)```", GUIDE, re.DOTALL)]


def phi():
    config = PhiConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def problems(inputs):
    adapter = type("Adapter", (DecoderAdapter,), {"blocks_path": "model.layers", "inputs": inputs})
    outcomes = check_adapter(adapter(), phi(), random_tokens(128))
    return [outcome.problem for outcome in outcomes if outcome.problem]


def declared(source):
    scope = {"Input": Input}
    exec(source, scope)
    return scope["inputs"]


@pytest.mark.parametrize("source", PYTHON)
def test_declarations_of_the_guide_conform(source):
    assert problems(declared(source)) == []


def test_mistakes_of_the_guide_give_the_quoted_messages():
    good = declared(PYTHON[1])
    template = (ROOT / "template/kinds/adapter.py.jinja").read_text()
    llama = re.search(r"    (inputs = \(\n.*?\n    \))", template, re.DOTALL).group(1)
    wrong = [
        declared(llama),
        (good[0], Input("heads", ("self_attn.dense", "mlp.fc2"), residual=True)),
        (*good[:2], Input("neurons", ("mlp.fc2",))),
    ]
    assert len(SAID) == len(wrong)
    for inputs, expected in zip(wrong, SAID, strict=True):
        assert any(expected in problem for problem in problems(inputs)), problems(inputs)


def raised():
    """All texts in the code, with ``…`` in place of inserted values."""
    roots = (ROOT / "apt", ROOT / "adapters", ROOT / "plugins")
    for path in (path for root in roots for path in root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_in_the_troubleshooting_tables_exist_in_the_code():
    tables = (ROOT / "docs/faq.md").read_text(encoding="utf-8").partition("## Error messages")[2]
    quoted = re.findall(r"^\| `(.+?)`", tables, re.MULTILINE)
    texts = "\n".join(raised())
    missing = []
    for message in quoted:
        pieces = (piece.strip(" ':") for piece in re.split("[…,]", message))  # joined in the code
        if not all(piece in texts for piece in pieces):
            missing.append(message)
    assert len(quoted) > 40
    assert not missing


def anchors(page):
    """The anchors that a forge makes of a page's headings, and those of its entries."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    for name in entries(page):
        yield from (name, *(f"{name}.{member}" for member in public(name)))


def entries(page):
    """The names whose docstrings mkdocstrings shows on a page."""
    return re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_existing_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("http"):
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


PUBLIC = ("apt", "apt.adapter", "apt.console", "apt.events", "apt.extending", "apt.hookspecs",
          "apt.options", "apt.runtime", "apt.solver", "apt.testing")  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_apt_in_the_pages_are_public(page):
    for name in re.findall(r"`{1,2}(apt(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        module = max((m for m in PUBLIC if name == m or name.startswith(f"{m}.")), key=len)
        first = name.removeprefix(module).removeprefix(".").partition(".")[0]
        assert not first or first in public(module), name


def public(name):
    """The public names of a module or a class."""
    try:
        found = import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        found = getattr(import_module(module), last)
    return getattr(found, "__all__", dir(found))


def test_public_names_have_one_entry_in_the_reference():
    pages = [entries(ROOT / "docs" / page) for page in ("api.md", "hooks.md", "report.md")]
    found = [name for names in pages for name in names]
    assert len(found) == len(set(found))
    whole = {"apt", "apt.solver", "apt.runtime", "apt.testing"} & set(found)
    names = {f"{module}.{name}" for module in {*PUBLIC} - whole for name in public(module)}
    # Of options and events the reference has those that plugins and programs need.
    left_out = {n for n in names - set(found) if not n.startswith(("apt.options.", "apt.events."))}
    types = {"adapter.Effects", "adapter.Sink", "adapter.State", "extending.Loss"}
    types |= {"extending.Document"}
    others = {"extending.Split", "hookspecs.API", "hookspecs.OLDEST_API", "hookspecs.hookimpl"}
    assert left_out == {f"apt.{name}" for name in types | others}
    with pytest.raises(AttributeError, match="no attribute 'Methods'"):
        _ = extending.Methods


def test_site_builds_without_warnings_and_shows_arguments(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    found = {page.stem: page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html")}
    words = {name: " ".join(re.sub(r"<[^>]+>", "", page).split()) for name, page in found.items()}
    assert 'id="apt.extending.Method.__call__"' in found["hooks"]
    assert "damping (float | None, default: None ) – Share of the mean diagonal" in words["api"]
    assert "AptError – the class cannot be imported" in words["hooks"]
    assert "seconds (float) – the time of the whole run." in words["report"]
    assert "--scale-group N|row" in words["cli"]
    assert "--error-aware / --layer-wise" in words["cli"]


def test_files_and_names_in_the_guide_for_contributors_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| to change |") : text.index("Dependencies point one way")]
    names = re.findall(r"`([^`]+)`", table)
    paths = [name for name in names if name.startswith(("apt/", "adapters/", "plugins/", "docs/"))]
    assert len(paths) > 40
    assert not [path for path in paths if not (ROOT / path).exists()]
    code = "".join(path.read_text() for path in (ROOT / "apt").rglob("*.py"))
    for name in (
        "PRESETS",
        "_ENTRY_ORDER",
        "_LATER_ENTRIES",
        "read_site",
        "KindSummary",
        "MACHINES",
    ):
        assert name in names
        assert re.search(rf"^(?:def |class )?{name}\b", code, re.MULTILINE)


def test_index_lists_every_page():
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\]\((\w[\w-]*\.md)\)", text))


def test_tables_and_figures_equal_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    pages = runpy.run_path(str(ROOT / "benchmarks/pages.py"))
    assert [path.name for path, _ in pages["changed"]()] == []
    assert list(pages["wrong_figures"]()) == []


def test_pictures_can_be_drawn_from_the_results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    plots = runpy.run_path(str(ROOT / "benchmarks/plots.py"))
    for name in plots["PICTURES"]:
        plots["draw"](name, tmp_path)
        assert (tmp_path / name).stat().st_size > 5000
        assert (ROOT / "docs/images" / name).is_file(), "run python benchmarks/plots.py"
