"""The public interface: the same options for shell and programs, objects in place of names."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import apt as library
from apt.adapter import stubbed
from apt.calibration.storage import CpuStore
from apt.checkpoints.formats import find_source_file
from apt.checkpoints.safetensors_io import Shards
from apt.engine.api import PruneArguments
from apt.locations.model_source import Source
from apt.options import PruneRun, RecoverRun, ShrinkRun
from apt.plugin.registry import registry
from apt.solver import NM, ss
from tests.helpers import TEXT
from tests.helpers.families import random_model, random_tokens

SMALL = ("--samples", 4, "--seqlen", 32, "--calibration", TEXT)


def test_each_public_name_is_documented():
    for name in library.__all__:
        assert inspect.getdoc(getattr(library, name)), name
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = library.prunes


def test_prune_arguments_equal_the_parameters_of_prune():
    keywords = list(inspect.signature(library.prune).parameters)[2:]
    assert list(PruneArguments.__annotations__) == keywords


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "streamed"])
@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_shell_and_program_write_the_same_bytes(effort, stream, checkpoint, tokenizer, apt):
    """A program gives no text for norm tuning, and a streamed run generates none by default."""
    path, own_samples = checkpoint("llama"), 0 if stream and effort == "default" else None
    words = () if stream else ("--norm-epochs", 0)
    run = apt("prune", path, *SMALL, "--effort", effort, *stream, *words, "-o", "out")
    assert run.code == 0, run.err
    model = AutoModelForCausalLM.from_pretrained(path)
    tokens = library.calibration_tokens(tokenizer, str(TEXT), samples=4, seqlen=32)
    options = library.PruneOptions(effort=effort, own_samples=own_samples)
    report = library.prune(model, tokens, pattern="2:4", options=options, tokenizer=tokenizer)
    written = Shards(Path("out"))
    for name, value in model.state_dict().items():
        if name in written.entries:
            assert torch.equal(written.read(name), value), name
    recorded = library.Report.read(Path("out"))
    assert recorded.calibration | {"source": ""} == report.calibration
    named = [one.key for one in library.PruneOptions.OPTIONS]
    assert {name: recorded.options[name] for name in named} == {
        name: report.options[name] for name in named
    }


def test_report_survives_a_round_trip(checkpoint, apt):
    run = apt("prune", checkpoint("opt"), *SMALL, "--method", "wanda", "--eval", TEXT, "-o", "out")
    assert run.code == 0, run.err
    found = json.loads(Path("out/apt_report.json").read_text())
    assert library.Report.read(Path("out")).to_dict() == found
    assert found["schema"] == 1
    names = {field for field in library.Report.__dataclass_fields__}
    assert names | {"sparsity", "relative_layer_error"} == found.keys()
    with pytest.raises(library.AptError, match="schema 7, not 1"):
        library.Report.from_dict(found | {"schema": 7})
    for scores in ([], None):
        with pytest.raises(library.AptError, match="is damaged"):
            library.Report.from_dict(found | {"scores": scores})
    with pytest.raises(library.AptError, match="has no apt_report"):
        library.Report.read(checkpoint("opt"))


def test_each_option_of_a_run_is_documented_with_its_field():
    for options in (PruneRun, ShrinkRun, RecoverRun, library.PruneOptions):
        text = inspect.getdoc(options)
        for name in options.__dataclass_fields__:
            assert f"\n    {name}: " in text, name


def half_of_each(given):
    """An allocation."""
    return {site.name: 0.5 for site in given.plan.sites}


def test_objects_and_names_give_the_same_result():
    tokens, results = random_tokens(), []
    family = registry().adapter_for("llama").load()()
    how = {"pattern": "0.5", "options": library.PruneOptions(error_aware=False)}
    for given in (
        {"method": "ss", "adapter": "llama", "allocation": "uniform"},
        {"method": ss, "adapter": family, "allocation": half_of_each},
    ):
        model = random_model("llama")
        report = library.prune(model, tokens, **how, **given)
        results.append((model.state_dict(), report))
    (first, named), (second, objects) = results
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert (named.model["adapter"], objects.model["adapter"]) == ("llama", type(family).__name__)
    assert (named.options["method"], objects.options["method"]) == ("ss", "ss")
    assert objects.options["allocation"] == "half_of_each"
    assert named.model["sha256"] == objects.model["sha256"]


def test_model_without_a_configuration_needs_an_adapter():
    with pytest.raises(library.AptError, match="Linear has no config") as refused:
        library.prune(torch.nn.Linear(4, 4), random_tokens(), pattern=NM(2, 4))
    assert refused.value.options == ("adapter",)


@pytest.mark.parametrize("given", [type(registry().adapter_for("llama").make()), 5])
def test_wrong_adapter_is_refused(given):
    with pytest.raises(library.AptError, match="adapter is .*; give its name, or an instance of"):
        library.prune(random_model("llama"), random_tokens(), pattern="2:4", adapter=given)


def test_instance_forward_of_a_block_is_restored():
    model = random_model("llama")
    first, second = model.model.layers[:2]
    own = first.forward
    first.forward = own  # as accelerate keeps its hook
    with stubbed([first, second], lambda *args: None):
        assert first.forward is not own
    assert first.forward is own
    assert "forward" not in vars(second)


def test_activations_on_the_cpu_return_to_their_device():
    store, tensor = CpuStore(), torch.arange(6.0).view(2, 3)
    held = store.put({"a": (tensor, [tensor.T, None])})
    found = store.get(held)
    assert not store.with_model
    assert torch.equal(found["a"][0], tensor)
    assert torch.equal(found["a"][1][0], tensor.T)
    assert found["a"][0].device == tensor.device


def test_hub_without_an_answer_is_an_error(monkeypatch):
    def silent(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("apt.checkpoints.formats.cached_file", silent)
    with pytest.raises(library.AptError, match="owner/name"):
        find_source_file(Source("owner/name", "owner/name"), "config.json")
