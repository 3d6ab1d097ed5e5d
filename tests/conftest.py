"""Fixtures: adapters, checkpoints on disk, the command line in process."""

import gc
import io
import json
import os
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from apt_plugins import texts
from hypothesis import settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from apt.cli import main
from apt.engine import costs
from apt.plugin.registry import registry
from apt.text import datasets
from tests.helpers import ROOT
from tests.helpers.families import random_model
from tests.helpers.processes import forked

disable_progress_bar()  # the command line does that before it imports transformers

pytest_plugins = ["pytester", "tests.helpers.durations"]

# CI repeats the same examples: a red run is a change's doing. Elsewhere they are drawn anew.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# A job in the background ignores Ctrl-C, and one under nohup SIGHUP. Some tests send both.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture
def half_is_slow(monkeypatch):
    """A processor that multiplies bf16 and fp16 slowly: APT computes the products in fp32.

    Tests that compare the weights of two runs use it: rounding errors of bf16 change masks.
    """
    monkeypatch.setattr("apt.devices._cpu_multiplies_faster", lambda dtype: False)


@pytest.fixture(autouse=True, scope="session")
def _this_machine_is_measured_once():
    """The measurement of a machine is cached: it takes a second."""
    known = cache(costs.measure_machine)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("costs", "timed_run"):
            patch.setattr(f"apt.engine.{module}.measure_machine", known)
        yield


@pytest.fixture(autouse=True, scope="session")
def _long_texts_are_tokenized_once():
    """The ids of a long text are cached: those of the embedded one take two seconds."""
    compute, known = datasets.token_ids, {}

    def token_ids(tokenizer, text):
        if len(text) < 5_000 or not isinstance(tokenizer, PreTrainedTokenizerFast):
            return compute(tokenizer, text)
        key = tokenizer.backend_tokenizer.to_str(), text
        if key not in known:
            known[key] = compute(tokenizer, text)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "token_ids", token_ids)
        yield


@pytest.fixture(autouse=True, scope="session")
def _disk_is_not_waited_for():
    """A flush only looks whether the file is open: no test cuts the power. Processes flush."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield


def pytest_collection_finish():
    """Freeze the imported objects: each run of the command line collects garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Freeze the objects of libraries that the tests of a file have imported."""
    done = nextitem is None or nextitem.path != item.path
    if done and len(gc.get_objects(2)) > 50_000:
        gc.collect()
        gc.freeze()


@pytest.fixture
def tiny(monkeypatch):
    """The maker of tiny random models of any type."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("tiny")


@pytest.fixture(scope="session")
def tokenizer():
    """The zoo's tokenizer."""
    return AutoTokenizer.from_pretrained(registry().adapters.get("llama").zoo_path())


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory, tokenizer):
    """The directory of an embedded LLaMA with two of its blocks, for runs that take a while."""
    return _first_blocks("llama", tmp_path_factory.mktemp("two") / "blocks", tokenizer)


@pytest.fixture(scope="session")
def two_mixtures(tmp_path_factory, tokenizer):
    """The same of the embedded mixture of experts."""
    return _first_blocks("moe", tmp_path_factory.mktemp("two") / "mixtures", tokenizer)


def _first_blocks(name, place, tokenizer):
    path = registry().adapters.get(name).zoo_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:2]
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A function that writes a random model of a variant, and returns its directory."""
    made = {}

    def write(variant, **options):
        key = (variant, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(variant)
            random_model(variant, **options).save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return write


def _run(*arguments):
    """Run the command line in this process, and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["apt", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


@pytest.fixture
def apt(monkeypatch, capsys, tmp_path):
    """Run the command line in a new directory: ``apt("prune", …)`` → code, out, err."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = _run(*arguments)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def output_of(tmp_path_factory):
    """A function that runs a command once for all tests, and returns its output directory."""
    made = {}

    def run(*command):
        if command not in made:
            made[command] = tmp_path_factory.mktemp("output") / "out"
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as output:
                assert _run(*command, "-o", made[command]) == 0, output.getvalue()
        return made[command]

    return run


@pytest.fixture
def forked_workers(monkeypatch):
    """The workers of ``bench`` are forked from a process that has imported the slow libraries."""
    ensure_running()  # before `bench` blocks SIGINT, which the server would pass on
    monkeypatch.setattr("apt_lab.benchmark.process.get_context", lambda kind: forked)


@pytest.fixture
def little_to_measure_on(monkeypatch):
    """The embedded text for measuring is cut to its beginning."""
    whole = texts.builtin

    def shorter(split):
        return (text[:50_000] if split == "evaluation" else text for text in whole(split))

    monkeypatch.setattr(texts, "builtin", shorter)


@pytest.fixture
def edited(checkpoint, tmp_path):
    """A function that copies a variant's checkpoint and changes its ``config.json``."""

    def write(variant, **fields):
        path = Path(shutil.copytree(checkpoint(variant), tmp_path / "edited"))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **fields}))
        return path

    return write
