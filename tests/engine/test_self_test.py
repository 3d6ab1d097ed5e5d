"""``apt-prune doctor --test``: a working machine passes, and each failure is named."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from apt.engine import self_test
from apt.engine.self_test import self_test as outcomes_on
from apt.plugin.registry import registry

TINY = {"samples": 2, "seqlen": 16, "pattern": "2:4", "method": "wanda"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Runs are small, and the test of two processes is replaced: tests/distributed has it."""
    monkeypatch.setattr(self_test, "_RUN", TINY)
    absent = self_test.NotThereError("left out here")
    monkeypatch.setattr(
        self_test._DeviceTests, "ranks", lambda machine: (_ for _ in ()).throw(absent)
    )


def test_working_machine_passes_all_tests(apt):
    run = apt("doctor", "--test", "--device", "cpu", "--json")
    assert run.code == 0, run.out
    found = json.loads(run.out)
    assert found["device"] == "cpu"
    outcomes = {test["what"]: test["outcome"] for test in found["tests"]}
    assert list(outcomes.values()) == 6 * ["passed"] + ["not there"]
    assert outcomes["two processes"] == "not there"
    assert "a model in bfloat16 computes in" in found["tests"][0]["detail"]
    assert found["tests"][-1]["detail"] == "left out here"


def outcome(what):
    """The outcome of the first test whose name begins with ``what``; later tests do not run."""
    found = (test for test in outcomes_on("cpu", registry()) if test.what.startswith(what))
    return next(found)


def test_wrong_weights_fail_the_solver_test(monkeypatch, apt):
    right = self_test.joint_weights

    def wrong(weight, *given, **named):
        found = right(weight, *given, **named)
        return replace(found, weight=found.weight * 1.01)

    monkeypatch.setattr(self_test, "joint_weights", wrong)
    found = outcome("joint weights")
    assert found.outcome == "failed"
    assert "a relative difference of 0.01 from fp64" in found.detail
    monkeypatch.setattr(self_test, "run", lambda options: 1 / 0)
    run = apt("doctor", "--test")
    assert run.code == 1
    assert "failed" in run.out


def test_inputs_other_than_on_the_cpu_fail_the_capture_test(monkeypatch):
    right, calls = self_test.as_rows, []

    def wrong(*given):
        calls.append(given)
        return right(*given) * len(calls)

    monkeypatch.setattr(self_test, "as_rows", wrong)
    assert outcome("captured").outcome == "failed"


def test_high_perplexity_fails_the_run_test(monkeypatch):
    scores = {"before": {"perplexity": 10.0}, "after": {"perplexity": float("nan")}}
    monkeypatch.setattr(self_test, "run", lambda options: SimpleNamespace(scores=scores))
    found = outcome("a run")
    assert (found.outcome, found.detail) == (
        "failed", "ValueError: the perplexity after pruning is nan")  # fmt: skip


def test_tests_that_need_a_run_are_left_out_without_it(monkeypatch):
    monkeypatch.setattr(self_test, "run", lambda options: 1 / 0)
    kinds = {test.what: test.outcome for test in outcomes_on("cpu", registry())}
    assert kinds["a run, its model opened again"] == "failed"
    assert kinds["packed products against dense ones"] == "not there"


def test_tests_are_left_out_without_an_embedded_model():
    none = SimpleNamespace(adapters=SimpleNamespace(specs={}))
    outcomes = [test.outcome for test in outcomes_on("cpu", none)]
    assert outcomes[:2] == ["passed", "passed"]
    assert set(outcomes[2:]) == {"not there"}


def test_exact_weights_meet_the_normal_equations():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    found = self_test._exact(
        torch.tensor([[1.0, 2.0]], dtype=torch.float64), matrix, torch.tensor([[False, True]])
    )
    assert found.tolist() == [[2.0, 0.0]]  # (2 + 2) / 2
