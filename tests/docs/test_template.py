"""The template's package conforms as it is, and its example has a layer of every kind."""

import re
import tomllib
from types import ModuleType

import pytest
from jinja2 import Template
from transformers import JambaConfig, LlamaConfig, MistralConfig

from apt.testing import CHECKS, check_adapter, every_kind, random_tokens
from tests.helpers import ROOT
from tests.helpers.template import copied

SOURCE = ROOT / "template/kinds/adapter.py.jinja"
ANSWERS = {
    "olmo": {"name": "olmo", "family": "OLMo", "config_class": "OlmoConfig"},
    "gemma3_text": {"name": "gemma", "family": "Gemma 3", "config_class": "Gemma3TextConfig"},
}


def package(model_type):
    """The module that copier makes."""
    answers = {**ANSWERS[model_type], "model_type": model_type, "module": "mine"}
    module = ModuleType("mine")
    exec(Template(SOURCE.read_text()).render(answers), vars(module))
    return module


def problems(adapter, module):
    (spec,) = module.apt_adapters()
    found = check_adapter(adapter, module.example().eval(), random_tokens(128), spec)
    return {outcome.name: outcome.problem for outcome in found if outcome.problem}


def test_unchanged_template_conforms():
    module = package("olmo")
    assert problems(module.Adapter(), module) == {}


def test_example_has_every_kind_of_layer():
    module = package("gemma3_text")
    config = module.example().config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window == 8
    assert set(problems(module.Adapter(), module)) == {"residual"}  # norms lie in between

    class OneKind(module.Adapter):
        def enter(self, model, tokens):
            state, calls = super().enter(model, tokens)
            return state, [calls[0]] * len(calls)

    assert "model.layers.1: the state after it" in problems(OneKind(), module)["blocks"]


@pytest.mark.parametrize(
    ("config_class", "window"),
    [(LlamaConfig, {}), (JambaConfig, {}), (MistralConfig, {"sliding_window": 8})],
)
def test_every_kind_omits_layer_types_without_the_argument(config_class, window):
    assert every_kind(config_class) == {"num_hidden_layers": 2, **window}


def test_every_check_has_a_summary_line():
    assert all(check.__doc__.endswith(".") for check in CHECKS.values())


def test_hyphenated_name_gives_a_module_with_an_underscore(tmp_path):
    made = copied(tmp_path, name="recurrent-gemma", model_type="recurrent_gemma")
    declared = tomllib.loads((made / "pyproject.toml").read_text())["project"]
    assert declared["name"] == "apt-recurrent-gemma"
    assert declared["entry-points"]["apt"] == {"recurrent-gemma": "apt_recurrent_gemma"}
    (test,) = (made / "tests").iterdir()
    assert test.stem.isidentifier()
    assert "class TestRecurrentGemma(" in test.read_text()
    for path in (test, made / "src/apt_recurrent_gemma.py"):
        compile(path.read_text(), path, "exec")


@pytest.mark.parametrize("name", ["Gemma", "gemma-", "-gemma", "g--emma", "gem_ma", "2gemma", ""])
def test_invalid_names_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=re.escape("lower-case letters, digits and inner hyphens")):
        copied(tmp_path, name=name)
