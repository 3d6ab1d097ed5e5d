"""The pages that build an adapter: their code runs, and the quoted messages are correct."""

import re
import runpy
import shlex
import sys
import tomllib
from functools import cache
from types import ModuleType

import pytest
import yaml

import apt as library
from apt.plugin.registry import registry
from apt.testing import check_adapter, embedded, random_tokens
from tests.helpers import ROOT
from tests.helpers.processes import run_pytest
from tests.helpers.template import copied

_NAMED = re.compile(r"# ([\w./]+)\n")


def blocks(page, language):
    """The blocks of a page in one language, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def files(page):
    """The Python files of a page by name, but those parts that belong to no named file."""
    named = [text for text in blocks(page, "python") if _NAMED.match(text)]
    return {_NAMED.match(text)[1]: text for text in named}


def parts(page):
    """The parts of the module that a page builds."""
    return [text for text in blocks(page, "python") if not _NAMED.match(text)]


RWKV = parts("worked-adapter.md")
IMPORTS, DECLARATION, INPUTS_OF, RUNNING, HOOK = range(5)
QUOTED = [text.strip() for text in blocks("worked-adapter.md", "text")]


def module(upto, changes=()):
    """The module as it is after some part, with some text replaced."""
    source = "\n".join(RWKV[: upto + 1])
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    made = ModuleType("apt_rwkv")
    exec(source, vars(made))
    return made


@cache
def problems(upto, changes=()):
    made = module(upto, changes)
    found = check_adapter(made.RwkvAdapter(), made.example().eval(), random_tokens(128))
    return "\n".join(outcome.problem for outcome in found if outcome.problem)


_VALUE, _RECEPTANCE = (
    f'        Input("{name}", ("feed_forward.{path}",)),\n'
    for name, path in (("neurons", "value"), ("channel_receptance", "receptance"))
)
RESCALED = (("rescale_every=0,", "rescale_every=1,"),)
MISTAKES = [
    (DECLARATION, ((_VALUE + _RECEPTANCE, _RECEPTANCE + _VALUE),)),
    (DECLARATION, ((_VALUE, _VALUE.replace(",)),", ",), residual=True),")),)),
    (DECLARATION, ()),
    (INPUTS_OF, RESCALED),
    (INPUTS_OF, RESCALED),
]


def test_auto_refuses_the_family_with_the_quoted_message():
    model = module(IMPORTS, RESCALED).example()
    with pytest.raises(library.AptError, match=re.escape(QUOTED[0])):
        library.prune(model, random_tokens(128), pattern="2:4", adapter="auto")


@pytest.mark.parametrize(("place", "mistake"), list(enumerate(MISTAKES, 1)))
def test_faults_of_the_adapter_give_the_quoted_messages(place, mistake):
    assert QUOTED[place] in problems(*mistake)


def test_all_quotes_of_the_page_are_checked():
    assert len(QUOTED) == 1 + len(MISTAKES)
    assert len(RWKV) == 1 + HOOK


def test_adapter_conforms_with_and_without_its_last_method():
    assert problems(INPUTS_OF) == problems(HOOK) == ""


@pytest.fixture
def shell(apt, tmp_path, monkeypatch):
    """Run the commands of a page's block, and install modules for them."""
    installed = []

    def run(commands, status=0):
        message = ""
        for program, *words in (shlex.split(line) for line in commands.splitlines()):
            if program == "apt-prune":
                ran = apt(*words)
                assert ran.code == status, (words, ran.out, ran.err)
                message += ran.out
            elif program == "python":
                runpy.run_path(*words, run_name="__main__")
            else:
                assert program == "pytest"
                tested, lines = run_pytest(tmp_path, *words)
                assert tested == 0, lines
        return message

    def install(module, folder):
        """Install a module as ``pip install -e`` does."""
        info = folder / f"{module}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[apt]\n{module} = {module}\n")
        monkeypatch.syspath_prepend(folder)
        installed.append(module)
        run.again()

    def again():
        """Forget imported modules, so that the files on disk are imported."""
        for module in installed:
            sys.modules.pop(module, None)
        registry.cache_clear()

    run.install, run.again = install, again
    yield run
    monkeypatch.undo()
    again()


def test_commands_of_the_worked_adapter_succeed(shell, tmp_path):
    for name, text in files("worked-adapter.md").items():
        (tmp_path / name).write_text(text)
    (tmp_path / "apt_rwkv.py").write_text("\n".join(RWKV))
    shell.install("apt_rwkv", tmp_path)
    installed, commands = blocks("worked-adapter.md", "console")
    assert installed.startswith("pip install")
    shell("pytest test_rwkv.py\n" + commands)


def test_commands_of_the_guide_succeed(shell, tmp_path):
    for name, text in files("first-adapter.md").items():
        (tmp_path / name).write_text(text)
    _, look, package, check, prune = blocks("first-adapter.md", "console")
    shell(look)
    copy, installed = package.splitlines()
    copied(tmp_path, **dict(word.split("=") for word in shlex.split(copy) if "=" in word))
    assert installed.endswith("-e ./apt-phi")
    shell.install("apt_phi", tmp_path / "apt-phi/src")
    assert blocks("first-adapter.md", "text")[0].strip() in shell(check, status=1)
    correct(tmp_path / "apt-phi/src/apt_phi.py", parts("first-adapter.md")[-1])
    shell.again()
    shell(check + prune)


PLUGINS = "plugins.md"
KINDS = re.findall(r"-d kind=(\S+) -d name=(\S+)", "".join(blocks(PLUGINS, "console")))


def test_page_on_plugins_shows_the_packages_of_the_template(tmp_path):
    shown = [text for text in blocks(PLUGINS, "python") if text.startswith('"""')]
    asked = yaml.safe_load((ROOT / "copier.yml").read_text())["kind"]["choices"].values()
    assert {kind for kind, _ in KINDS} == set(asked) - {"adapter"}
    for (kind, name), text in zip(KINDS, shown, strict=True):
        made = copied(tmp_path, kind=kind)
        assert made.name == f"apt-{name}"
        assert (made / f"src/apt_{name}.py").read_text() == text
        needed = tomllib.loads((made / "pyproject.toml").read_text())["project"]["dependencies"]
        assert needed == [f"apt-prune{'[recover]' if kind == 'recovery' else ''}>=0.1"]


def test_allocation_of_the_page_on_plugins_runs():
    (source,) = (text for text in blocks(PLUGINS, "python") if "def less_where" in text)
    scope = {}
    exec(source, scope)
    allocation = scope["less_where_the_stream_turns"]
    model, tokens = embedded("llama")[0], random_tokens(2048)
    _, report = library.prune_copy(
        model, tokens, pattern="0.5", method="magnitude", allocation=allocation
    )
    weights = sum(site.shape[0] * site.shape[1] for site in report.sites)
    assert sum(site.zeros for site in report.sites) == weights // 2
    assert len({site.zeros / (site.shape[0] * site.shape[1]) for site in report.sites}) > 3


def test_commands_of_the_page_on_plugins_succeed(shell, tmp_path):
    for kind, name in KINDS:
        shell.install(f"apt_{name}", copied(tmp_path, kind=kind, name=name) / "src")
    for commands in blocks(PLUGINS, "console"):
        if not commands.startswith(("copier ", "pip ")):
            shell(commands)


def correct(path, inputs):
    """Replace the inputs that a module declares."""
    indented = "".join(f"    {line}\n" for line in inputs.splitlines())
    source = re.sub(r"    inputs = \(\n.*?\n    \)\n", indented, path.read_text(), flags=re.DOTALL)
    path.write_text(source)
