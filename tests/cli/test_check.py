"""``apt check`` with mistakes of authors: one line each, with the place in the author's file."""

import json
import os
import re
import sys

import pytest
from torch import nn

# A run of pytest within pytest forgets the modules that it imports, but transformers does not.
from transformers.models.olmo import modeling_olmo  # noqa: F401

from apt.adapter import Input, Site
from apt.plugin.registry import registry
from apt.testing import CHECKS

RIGHT = """
from apt.adapter import DecoderAdapter, Input
from apt.hookspecs import hookimpl
from apt.hookspecs import AdapterSpec


class Mine(DecoderAdapter):
    blocks_path = "model.layers"
    inputs = (
        Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Input("heads", ("self_attn.o_proj",), residual=True),
        Input("mlp", ("mlp.gate_proj", "mlp.up_proj")),
        Input("neurons", ("mlp.down_proj",), residual=True),
    )
    # more


def example():
    from transformers import OlmoConfig, OlmoForCausalLM

    return OlmoForCausalLM(OlmoConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
    ))


@hookimpl
def apt_adapters():
    return [AdapterSpec(
        "mine", "Mine", "mine:Mine", model_types=("olmo",), example="mine:example"
    )]
"""
INPUTS = RIGHT[RIGHT.index("    inputs = (") : RIGHT.index("    # more")]
MODEL = RIGHT[RIGHT.index("    return Olmo") : RIGHT.index("@hookimpl")]
ENTER = """
    def enter(self, model, tokens):
        return self.masks(model)

    def masks(self, model):
        raise ValueError("no masks today")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs the module ``mine`` with replaced texts."""
    folder = tmp_path / "site"
    info = folder / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[apt]\nmine = mine\n")

    def install(changes):
        source = RIGHT
        for old, new in changes.items():
            assert old in source
            source = source.replace(old, new)
        (folder / "mine.py").write_text(source)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        registry.cache_clear()
        return source

    yield install
    registry.cache_clear()
    sys.modules.pop("mine", None)


def line_of(source, text):
    """The place of ``text`` as in messages; ``site`` is in the folder of the command."""
    return f" (site/mine.py:{source[: source.index(text)].count(chr(10)) + 1})"


BEGINNINGS = {
    "an example that raises": (
        {MODEL: '    raise OSError("no such file\\nat all")\n\n\n'},
        ["the example of adapter 'mine' raises OSError: no such file{raise OSError}"],
    ),
    "an example that raises within transformers": (
        {"num_attention_heads=4": "hidden_act='none'"},
        ["the example of adapter 'mine' raises {*}{return Olmo}"],
    ),
    "an example that returns None": (
        {"    return Olmo": "    made = Olmo"},
        ["the example of adapter 'mine' returns None, not a model{def example}"],
    ),
    "an example that returns its class": (
        {MODEL: "    return OlmoForCausalLM\n\n\n"},
        ["the example of adapter 'mine' returns a type, not a model{def example}"],
    ),
    "a mistyped class": (
        {"mine:Mine": "mine:Main"},
        ["target 'mine:Main' of adapter 'mine' cannot be imported: AttributeError: module 'mine' "
         "has no attribute 'Main'; did you mean 'Mine'?{mine:Main}"],
    ),
    "a mistyped module": (
        {"mine:Mine": "mein:Mine"},
        ["target 'mein:Mine' of adapter 'mine' cannot be imported: ModuleNotFoundError: No module "
         "named 'mein'{mein:Mine}"],
    ),
    "a mistyped class and an example that raises": (
        {"mine:Mine": "mine:Main", MODEL: '    raise OSError("no such file")\n\n\n'},
        ["target 'mine:Main' of adapter 'mine' cannot be imported: {*}{mine:Main}",
         "the example of adapter 'mine' raises OSError: no such file{raise OSError}"],
    ),
    "an adapter that cannot be made": (
        {"    # more": "    def __init__(self, size):\n        pass"},
        ["adapter 'mine': TypeError: {*}__init__() missing 1 required positional argument: 'size'"
         "{class Mine}"],
    ),
    "a tuple without its comma": (
        {'("self_attn.o_proj",)': '("self_attn.o_proj")'},
        ["no adapter 'mine'",
         "plugin mine 1.0 does not load: TypeError: Input 'heads': linears is 'self_attn.o_proj', "
         "not a tuple: write ('self_attn.o_proj',)"
         """{Input("heads", ("self_attn.o_proj"), residual=True)}"""],
    ),
    "a module that is no Python": (
        {"class Mine(": "class class Mine("},
        ["no adapter 'mine'",
         "plugin mine 1.0 does not load: SyntaxError: {*}{class class}"],
    ),
}  # fmt: skip
FAILURES = {
    "inputs missing": (
        {INPUTS: ""},
        ["declaration: Mine has no 'inputs'{class Mine}; prevents: names, {*}"],
    ),
    "nothing declared": (
        {INPUTS: "    pass\n", '    blocks_path = "model.layers"\n': ""},
        ["declaration: Mine has no 'blocks_path'{class Mine}; prevents: {*}",
         "declaration: Mine has no 'inputs'{class Mine}"],
    ),
    "enter raises": (
        {"    # more\n": ENTER},
        ["untouched: ValueError: no masks today{raise ValueError}; prevents: exception, "
         "repeat, blocks, batches, stream, logits, sites, orientation, capture, order, residual, "
         "gradients, in_time, effects, identity, pruning, saving"],
    ),
    "enter takes nothing": (
        {"    # more\n": "    def enter(self):\n        return None\n"},
        ["untouched: TypeError: Mine.enter() takes 1 positional argument but 3 were given"
         "{class Mine}; prevents: {*}"],
    ),
    "a Linear with another name": (
        {"mlp.down_proj": "mlp.fc2"},
        ["names: adapter Mine does not fit OlmoDecoderLayer: it has no mlp.fc2{class Mine}; "
         "prevents: {*}"],
    ),
    "three faults": (
        {'"mlp.up_proj")': '"mlp.up_proj"), residual=True', '("olmo",)': '("olmo2",)',
         "    # more\n": "    def residual(self, state):\n        return 2 * state\n"},
        ["model_types: model_types of adapter 'mine' name 'olmo2', its example is a 'olmo'"
         "{class Mine}",
         "stream: model.layers.0: residual() is not the stream that enters it in the model (the "
         "same in 1 more blocks){def residual}",
         "logits: the last state does not give the model's logits{class Mine}",
         "residual: model.layers.0.mlp.gate_proj is declared residual, but {*}{class Mine}",
         "residual: model.layers.0.mlp.up_proj is declared residual, but {*}{class Mine}"],
    ),
}  # fmt: skip


def expected(lines, source):
    """Regular expressions for lines, in which ``{text}`` stands for the place of this text."""
    for line in lines:
        parts = re.split(r"(\{.+?\})", line)
        made = [
            ".*" if part == "{*}"
            else re.escape(line_of(source, part[1:-1]) if part[:1] == "{" else part)
            for part in parts
        ]  # fmt: skip
        yield "".join(made)


@pytest.mark.parametrize("name", BEGINNINGS)
def test_problems_before_the_checks_are_one_line_each_and_status_2(name, package, apt):
    changes, lines = BEGINNINGS[name]
    source = package(changes)
    done = apt("check", "mine")
    assert done.code == 2, done.out
    assert done.out == ""
    messages = done.err.splitlines()
    assert len(messages) == len(lines), messages
    for line, pattern in zip(messages, expected(lines, source), strict=True):
        assert re.fullmatch(f"apt: {pattern}", line), (line, pattern)


@pytest.mark.parametrize("name", FAILURES)
def test_failed_checks_are_one_line_each_and_status_1(name, package, apt):
    changes, lines = FAILURES[name]
    source = package(changes)
    done = apt("check", "mine")
    assert done.code == 1, done.err
    assert done.err == ""
    messages = [line for line in done.out.splitlines() if re.match(r"\w+: ", line)]
    assert len(messages) == len(lines) + 1, messages
    for line, pattern in zip(messages, expected(lines, source), strict=False):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert re.fullmatch(rf"mine: \d+ of {len(CHECKS)} checks hold", messages[-1])


def test_correct_adapter_passes(package, apt):
    package({})
    done = apt("check", "mine")
    assert (done.code, done.err) == (0, "")
    assert f"mine: {len(CHECKS)} of {len(CHECKS)} checks hold" in done.out


def test_broken_plugin_is_a_warning_in_the_check_of_another_adapter(package, apt, checkpoint):
    package({"class Mine(": "class class Mine("})
    done = apt("check", "opt", checkpoint("opt"))
    assert done.code == 0
    assert "plugin failed to load: mine 1.0: SyntaxError" in done.err


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("an example that returns None", {"failed": 1, "skipped": len(CHECKS) - 1}),
        ("a tuple without its comma", {"failed": 1, "skipped": len(CHECKS) - 1}),
        ("enter raises", {"failed": 1, "skipped": 17, "passed": len(CHECKS) - 18}),
    ],
)
def test_pytest_plugin_reports_the_same_problems(name, outcomes, package, pytester, monkeypatch):
    changes, lines = (BEGINNINGS | FAILURES)[name]
    source = package(changes)
    monkeypatch.chdir(pytester.path)
    done = pytester.runpytest_inprocess("--apt-adapter", "mine", "-rs")
    done.assert_outcomes(**outcomes)
    if name in FAILURES:  # which name the check, as the test's name does here
        lines = [line.partition(": ")[2].partition("; prevents")[0] for line in lines]
    for pattern in expected(lines, source):
        pattern = pattern.replace(re.escape(" (site"), r" \(\S*site")
        assert re.search(f"^{pattern}$", done.stdout.str(), re.MULTILINE), pattern


WRONG = {
    "a list": (lambda: Input("heads", ["o"]), "write tuple(['o'])"),
    "a number": (lambda: Input(7, ("o",)), "Input 7: name is 7, not str"),
    "no path": (lambda: Input("heads", (None,)), "linears has None, which is not str"),
    "two texts": (lambda: Input("heads", ("o",), "yes"), "residual is 'yes', not bool"),
    "an order": (lambda: Site("o", "o.weight", "heads", "1"), "Site 'o': order is '1', not int"),
    "True for 1": (lambda: Site("o", "o.weight", "heads", True), "order is True, not int"),
    "an expert": (lambda: Site("o", "o", "o", expert="3"), "expert is '3', not int or None"),
    "a module": (lambda: Site("o", nn.Linear(1, 1), "o"), "parameter is Linear("),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_in_inputs_and_sites_raise_type_error(name):
    make, message = WRONG[name]
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_outcomes_are_printed_as_json(package, apt):
    package(FAILURES["enter raises"][0])
    done = apt("check", "mine", "--json")
    assert done.code == 1
    record = json.loads(done.out)
    assert record["checks"]["untouched"] == "failed"
    assert record["checks"]["logits"] == "not run"
    assert record["holding"] == list(record["checks"].values()).count("ok")
    assert "no masks today" in record["problems"][0]
