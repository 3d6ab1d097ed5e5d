"""``apt-prune fit --speed``: the choice by times of products, on this machine."""

from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import apt.runtime
from apt import Report
from apt.checkpoints.load import open_skeleton
from apt.engine import fit_speed, pace
from apt.engine.fit_speed import MISSED, SpeedTask
from apt.engine.pace import Pace, measured_pace
from apt.engine.packed_form import Means, packed_form
from apt.fit.levels import FileForm, Level
from apt.fit.table import LossTable, MeasuredLevel
from apt.locations.model_source import find
from apt.packing import times
from apt.packing.times import MatrixKind, ProductTimes
from apt.patterns import IntegerGrid, Unstructured
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.runtime.entries import read_entries
from apt.runtime.linear import kernels
from tests.helpers import TEXT
from tests.helpers.families import STACKED

SMALL = (
    "--samples", 2, "--seqlen", 32, "--effort", "fast", "--may", "bits", "--calibration", TEXT,
)  # fmt: skip
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip

needs_kernels = pytest.mark.skipif(kernels() is None, reason="without kernels nothing is faster")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Few steps and products are measured."""
    monkeypatch.setattr(pace, "_STEPS", (4, 8))
    monkeypatch.setattr(pace, "PROMPT", 16)
    monkeypatch.setattr(times, "_PASSES", 1)


@pytest.fixture
def wide(apt, tokenizer):
    """A random model whose products take most of the time of a step."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **WIDE, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained("wide")
    tokenizer.save_pretrained("wide")
    return "wide"


def pace_of(model, means=("zeros", "bits")):
    """The pace of a model on this machine."""
    skeleton = open_skeleton(find(model, registry()), registry())
    plan = make_plan(skeleton.module, skeleton.adapter, Unstructured(0.0))
    form = packed_form(skeleton, plan, Means.named(means, 64, "row"), None).form
    return measured_pace(skeleton, form, torch.bfloat16)


def with_times_by_bits(found):
    """The same pace with products whose time is that of their bits; in caches it may not be."""
    dense = {kind: float(kind.rows * kind.columns) for kind in found.times.dense}
    packed = {
        (kind, grid): [(zeros, dense[kind] * grid.bits / 16) for zeros, _ in times]
        for (kind, grid), times in found.times.packed.items()
    }
    total = sum(dense[kind] for kind in found.kinds.values())
    return replace(
        found, times=ProductTimes(dense, packed), factor=1.0, rest=total / 10,
        dense=1.1 * total, fastest=0.35 * total,
    )  # fmt: skip


@needs_kernels
def test_directory_has_the_levels_of_a_speed(wide, apt, tmp_path, monkeypatch):
    found = pace_of(wide, ("bits",))
    found = with_times_by_bits(found)
    monkeypatch.setattr(fit_speed, "measured_pace", lambda *arguments: found)
    monkeypatch.setattr(Pace, "measured", lambda self, losses, x: self.table(losses).size(x))
    assert {kind.in_call for kind in found.kinds.values()} == {True}
    goal = geometric_mean([1e9 / found.dense, 1e9 / found.fastest])
    done = apt("fit", wide, *SMALL, "--speed", goal, "-o", "fast")
    assert done.code == 0, done.err
    report = Report.read(tmp_path / "fast")
    fit, speed = report.fit, report.fit["speed"]
    assert speed["goal"] == pytest.approx(goal)
    assert speed["threads"] == torch.get_num_threads()
    assert min(speed["measured"], speed["dense"]) > 0
    assert speed["highest"] > goal
    assert 1 <= len(speed["trials"]) <= 4
    entries = read_entries(tmp_path / "fast")
    for name, level in fit["levels"].items():
        assert (name in entries) == (level != "bfloat16")
        assert name not in entries or entries[name].values == level.partition(" ")[0]
    speeds, losses = zip(*fit["frontier"], strict=True)
    assert list(speeds) == sorted(speeds, reverse=True)
    assert list(losses) == sorted(losses, reverse=True)
    assert f"goal {goal:g}" in " ".join(done.out.split())
    assert fit["size"] == (tmp_path / "fast" / "apt_packed.safetensors").stat().st_size
    logits = apt_runtime("fast")(torch.arange(8).view(1, 8)).logits
    assert logits.isfinite().all()
    # The table has bytes, so that it serves for a size.
    other = ("--size", "2.4MB", "--from", "fast", "-o", "small")
    assert apt("fit", wide, *SMALL, *other).code == 0
    assert Report.read(tmp_path / "small").fit["table"] == fit["table"]
    assert apt("report", "fast", "-o", "page.html").code == 0
    assert f"for a goal of {goal:g}" in Path("page.html").read_text(encoding="utf-8")


def apt_runtime(directory):
    """A packed model."""
    return apt.runtime.load(directory)


@pytest.mark.parametrize(
    ("model", "speed", "message"),
    [
        ("zoo:llama", 1e6, "does not decode 1e+06 tokens/s on this processor"),
        ("zoo:llama", 0.001, "tokens/s on this processor"),
        pytest.param(
            "zoo:moe",
            50,
            "is no Linear module, so that no speed is predicted; give a size",
            marks=pytest.mark.skipif(not STACKED, reason="experts are stacked in transformers 5"),
        ),
    ],
)
def test_impossible_speeds_are_errors_before_the_work(model, speed, message, apt, tmp_path):
    done = apt("fit", model, *SMALL, "--speed", speed, "-o", "x")
    assert done.code == 2
    assert message in done.err
    assert not list(tmp_path.iterdir())


def test_modules_outside_calls_are_measured_as_modules():
    found = pace_of("zoo:mamba", ("bits",))
    assert {kind.in_call for kind in found.kinds.values()} == {False}
    assert 0 < found.fastest <= found.dense


INT4 = IntegerGrid(4, 64)
LEVELS = (
    Level("bfloat16", 8192), Level("int4", 2048, INT4),
    Level("int4 50%", 1536, INT4, Unstructured(0.5)),
)  # fmt: skip


def given_pace(slower=0.0):
    """A pace with given times: two matrices of 100 ns, of 40 ns in int4, and 1,000 ns of rest.

    Args:
        slower: the nanoseconds that a real step takes in addition.
    """

    class Given(Pace):
        def measured(self, losses, choice):
            return self.table(losses).size(choice) + slower

    kind = MatrixKind(64, 64, in_call=True)
    products = ProductTimes({kind: 100.0}, {(kind, INT4): [(0.1, 40.0), (0.5, 20.0)]})
    levels = {f"{n}.weight": LEVELS for n in "abcd"}
    return Given(
        None, torch.bfloat16, FileForm(levels, 0), dict.fromkeys(levels, kind), products,
        dense=1400.0, fastest=1080.0, factor=1.0, rest=1000.0,
    )  # fmt: skip


def losses():
    """A table in which each tensor costs twice as much as the one before."""
    return LossTable(
        {
            f"{name}.weight": (
                MeasuredLevel("bfloat16", 8192, 0.0, 0.0),
                MeasuredLevel("int4", 2048, cost, 0.1),
                MeasuredLevel("int4 50%", 1536, 3 * cost, 0.5),
            )
            for name, cost in zip("abcd", (0.1, 0.2, 0.4, 0.8), strict=True)
        },
        500,
    )


def test_levels_cost_the_time_of_their_products():
    table = given_pace().table(losses())
    assert table.rest == 1000
    assert [level.size for level in table.tensors["a.weight"]] == [100, 40, 20]
    assert [level.loss for level in table.tensors["b.weight"]] == [0.0, 0.2, pytest.approx(0.6)]
    halved = replace(given_pace(), factor=0.5)
    assert [level.size for level in halved.table(losses()).tensors["c.weight"]] == [50, 20, 10]


class Store:
    """The part of a store that shows the progress."""

    def status(self, phase, text=""):
        """Show nothing."""


def chosen(budget, slower):
    """The choice for a budget of nanoseconds."""
    task = object.__new__(SpeedTask)
    vars(task).update(budget=budget, pace=given_pace(slower))
    return task.chosen(losses(), Store(), [], None)


def test_estimate_is_corrected_by_the_measured_time():
    exact = chosen(1340, 0)
    assert len(exact.trials) == 1
    assert [name for name, level in exact.levels.items() if level != "bfloat16"] == ["a.weight"]
    slow = chosen(1340, 150)  # 12 % of a step
    assert len(slow.trials) == 2
    assert slow.costs.rest == 1150
    assert slow.trials[1].measured <= 1340 < slow.trials[0].measured
    assert slow.levels == slow.trials[1].levels
    assert slow.table == losses()


def test_unreachable_speed_ends_after_the_corrections():
    found = chosen(1000, 500)
    assert len(found.trials) == 4
    assert set(found.levels.values()) == {"int4 50%"}
    assert all(abs(1000 / each.measured - 1) > MISSED for each in found.trials)
