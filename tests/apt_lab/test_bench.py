"""``apt-prune bench``: measurements of small models, and workers that fail or are killed."""

import json
import os
import shutil
import signal
import time
import warnings
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from apt_lab.benchmark.generation import speed
from apt_lab.benchmark.measures import Facts, Result, Speed, Turn, ratios, spread
from apt_lab.benchmark.rounds import _order, fitted
from apt_lab.benchmark.worker import Fault, Turns, fault, serve
from apt_lab.commands.bench import PaysFrom, show_results
from apt_lab.options import BenchRun

from apt.errors import AptError
from apt.evaluation.generation import prompts
from apt.locations.model_source import find
from apt.plugin.registry import registry
from apt.runtime.linear import kernels
from tests.helpers.families import CONFIGS, adapter_of, random_model
from tests.helpers.processes import start

LITTLE = ("--prompt", 16, "--generate", 4, "--batch", 2, "--threads", 1)
PATIENCE = 60  # seconds, for a machine that does much else
FAULTS = """
import os
from transformers import LlamaForCausalLM

class Faulty(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        {fault}
"""


@pytest.fixture
def faulty(checkpoint, tmp_path):
    """A function that writes a model whose forward runs a line of Python."""

    def write(line):
        path = Path(shutil.copytree(checkpoint("llama"), tmp_path / "faulty"))
        (path / "modeling_faulty.py").write_text(FAULTS.format(fault=line))
        config = json.loads((path / "config.json").read_text())
        own = {"AutoModelForCausalLM": "modeling_faulty.Faulty"}
        (path / "config.json").write_text(json.dumps({**config, "auto_map": own}))
        return path

    return write


@pytest.mark.usefixtures("forked_workers")
def test_models_are_measured_in_turn_and_compared(apt):
    run = apt("bench", "zoo:llama", "zoo:mamba", *LITTLE, "--batch", 1, "--rounds", 2, "--json")
    assert run.code == 0, run.err
    record = json.loads(run.out)
    assert [record[key] for key in ("prompt", "generate", "batches", "rounds", "threads")] == [
        16, 4, [2, 1], 2, 1,
    ]  # fmt: skip
    first, second = record["models"]
    assert (first["model"], second["model"]) == ("zoo:llama", "zoo:mamba")
    for model in record["models"]:
        folder = registry().adapters.get(model["model"].removeprefix("zoo:")).zoo_path()
        assert model["weight_bytes"] == (folder / "model.safetensors").stat().st_size
        assert model["peak_memory_bytes"]["cpu"] >= model["idle_bytes"] > 2**25
        assert (model["dtype"], model["load_seconds"]["median"] > 0) == ("bfloat16", True)
        assert [entry["batch"] for entry in model["speeds"]] == [2, 1]
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        base, other = (model["speeds"][0][key] for model in (first, second))
        assert base["ratio"] is None
        expected = [b / a for a, b in zip(base["values"], other["values"], strict=True)]
        assert other["ratio"]["median"] == pytest.approx(sum(expected) / 2)
        assert base["smallest"] == min(base["values"]) > 0


@pytest.mark.parametrize("variant", [name for name in CONFIGS if name != "opt-350m"])
def test_decoding_generates_the_requested_number_of_tokens(variant):
    model, lengths = random_model(variant), []
    model.generation_config.eos_token_id = list(range(2048))
    model.generation_config.do_sample = True
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with adapter_of(model).running(model):
        found = speed(model, prompts(model, 2, 7, seed=0), 5)
    assert lengths == [(2, 7), (2, 1), (2, 7), *[(2, 1)] * 4]
    assert found.batch == 2
    assert min(found.prefill, found.decode) > 0


def test_prompts_follow_the_seed_without_special_tokens():
    model = random_model("llama")
    model.generation_config.eos_token_id = list(range(1000))
    drawn = prompts(model, 4, 100, seed=1)
    assert drawn.shape == (4, 100)
    assert drawn.min() >= 1000
    assert torch.equal(drawn, prompts(model, 4, 100, seed=1))
    assert not torch.equal(drawn, prompts(model, 4, 100, seed=2))


def test_every_second_round_is_reversed():
    assert list(_order(3, 2)) == [(0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)]


def test_ratios_are_computed_in_each_round():
    assert ratios([2.0, 40.0, 3.0], [1.0, 10.0, 3.0]) == [2, 4, 1]
    found = spread([2.0, 4.0, 1.0])
    assert (found.median, found.smallest, found.largest) == (2, 1, 4)


def test_prompt_is_shortened_to_the_fewest_positions():
    lines, run = [], BenchRun(models=("a", "b"), prompt=100, generate=10)
    assert fitted(run, {"a": None, "b": 110}, lines.append) is run
    assert fitted(run, {"a": 64, "b": 110}, lines.append).prompt == 54
    assert lines == ["prompt: 54 tokens (not 100: a has 64 positions, and 10 tokens are generated)"]
    with pytest.raises(AptError, match="a has 10 positions, too few") as refused:
        fitted(run, {"a": 10}, lines.append)
    assert refused.value.options == ("generate",)


def result(model, *decode):
    facts = Facts(1_000_000, 2**21, 512, 2**28, "cpu", "x86_64", 2, {})
    turns = [Turn(1.0, "float32", (Speed(8, 1000.0, speed),), {"cpu": 2**29}) for speed in decode]
    return Result(model, facts, tuple(turns))


def test_table_has_medians_ranges_and_ratios(capsys):
    run = BenchRun(models=("dense",), batch=(8,))
    show_results(run, [result("dense", 10, 30, 20)], as_json=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["dense", "8", "1,000", "20", "(10–30)"]
    assert rows[3] == ["dense", "1.000", "512.0", "MiB", "2.0", "MiB", "1,000,000", "float32"]
    show_results(run, [result("dense", 10, 20), result("pruned", 20, 30)], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["pruned", "8", "1,000", "1.00", "25", "(20–30)", "1.75",
                                "(1.50–2.00)"]  # fmt: skip
    assert lines[-2] == (
        "median (smallest–largest) of 2 rounds; 512 tokens of prompt, 64 generated; "
        "on cpu (2 threads)"
    )
    assert lines[-1] == "pruned is not faster than dense in: prefill of 8 sequences"


def test_slow_dtype_of_a_dense_model_is_reported(capsys):
    found = result("dense", 10)
    slow = replace(found, turns=(replace(found.turns[0], dtype="bfloat16", slow=True),))
    run = BenchRun(models=("dense",), batch=(8,))
    show_results(run, [slow], as_json=False)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "dense runs in bfloat16, in which transformers opens it; this processor multiplies that "
        "more slowly than float32: see --dtype float32"
    )
    show_results(run, [slow], as_json=True)
    assert json.loads(capsys.readouterr().out)["models"][0]["slow_dtype"] is True


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "are not faster"), (0.0, "with any share of zeros"), (0.3, "from 30% zeros on")],
)
def test_break_even_of_packing_is_reported(share, text, capsys):
    found = [result("dense", 10, 20), result("packed", 20, 30)]
    show_results(BenchRun(models=("dense",), batch=(8,)), found, PaysFrom(share), as_json=False)
    assert text in capsys.readouterr().out.splitlines()[-1]
    show_results(BenchRun(models=("dense",), batch=(8,)), found, PaysFrom(share), as_json=True)
    assert json.loads(capsys.readouterr().out)["packed_pays_from"] == share


@pytest.mark.usefixtures("forked_workers")
def test_bench_of_a_packed_model_reports_the_break_even(apt):
    words = ("--sparsity", 0.7, "--method", "magnitude", "--samples", 2, "--seqlen", 16)
    assert apt("prune", "zoo:llama", *words, "--pack", "packed", "-o", "pruned").code == 0
    run = apt("bench", "pruned", "packed", *LITTLE, "--batch", 1, "--rounds", 1, "--json")
    assert run.code == 0, run.err
    sizes = [model["weight_bytes"] for model in json.loads(run.out)["models"]]
    files = [Path("pruned/model.safetensors"), Path("packed/apt_packed.safetensors")]
    assert sizes == [file.stat().st_size for file in files]
    share = json.loads(run.out)["packed_pays_from"]
    assert share in {None, *(n / 10 for n in range(10))}
    assert share is None or kernels() is not None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--batch", 0), "a batch must have at least 1 sequence (--batch)"),
        (("--prompt", 0), "prompt is 0; it must be at least 1 (--prompt)"),
        (("--generate", 1), "generate is 1; it must be at least 2 (--generate)"),
        (("--rounds", 0), "rounds is 0; it must be at least 1 (--rounds)"),
        (("--threads", 0), "0 threads are not between 1 and"),
        (("--threads", 10**9), "the processors of this machine (--threads)"),
        (("--dtype", "int4"), "dtype 'int4' is not one of auto, float32"),
        (("--revision", "main"), "a revision is for models of the hub"),
        (("./nowhere",), "no such model: './nowhere' does not exist"),
    ],
    ids=str,
)
def test_wrong_options_are_errors_of_one_line(apt, words, line):
    run = apt("bench", "zoo:llama", *words)
    assert run.code == 2
    assert line in run.err
    assert len(run.err.splitlines()) == 1


def test_fault_turns_errors_into_messages_for_users():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    found = fault(caught.value, "zoo:llama")
    assert found.message == "there is too little memory to run zoo:llama"
    assert found.options == ("batch", "prompt", "generate")
    assert "torch.empty(2**60" in found.traceback
    assert fault(AptError("a", "b", ("dtype",)), "m").options == ("dtype",)
    denied = PermissionError(13, "Permission denied", "/x")
    assert fault(denied, "m").message == "cannot use /x: Permission denied"


def test_exception_of_a_model_is_a_fault(faulty):
    ours, theirs = Pipe()
    source = find(str(faulty("raise ValueError('no such kernel')")), registry(),
                  trust_remote_code=True)  # fmt: skip
    run = BenchRun(models=("m",), prompt=4, generate=2, batch=(1,), device="cpu")
    ours.send(Turns(run, 0))
    with warnings.catch_warnings():
        serve(theirs, source, run)
    assert isinstance(ours.recv(), Facts)
    found = ours.recv()
    assert isinstance(found, Fault)
    assert found.message == f"{source.reference} failed: no such kernel"
    assert "modeling_faulty.py" in found.traceback


@pytest.mark.usefixtures("forked_workers")
def test_death_of_a_worker_is_an_error_of_one_line(apt, faulty):
    path = faulty("os.kill(os.getpid(), 9)")
    run = apt("bench", path, *LITTLE, "--trust-remote-code")
    assert run.code == 2
    assert run.err == (
        f"apt: the process of {path} was killed; the system kills a process if memory runs out: "
        "use a smaller batch, or fewer tokens (--batch, --prompt, --generate)\n"
    )


def is_alive(process):
    """True if there is a process with this id that is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the /proc of Linux")
def test_no_worker_survives_the_command(tmp_path):
    mains = {}
    for number in (signal.SIGINT, signal.SIGKILL):
        folder = tmp_path / number.name
        folder.mkdir()
        (folder / "said").touch()
        mains[number] = start(folder, "bench", "zoo:llama", *LITTLE, "--rounds", 10**6, "-v")
    try:
        for number, main in mains.items():
            ends_with_its_workers(main, number, tmp_path / number.name / "said")
    finally:
        for main in mains.values():
            main.kill()


def ends_with_its_workers(main, number, output):
    wait_until(lambda: "round 2/" in output.read_text() or not main.is_alive())
    workers = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
    assert workers
    os.kill(main.pid, number)
    main.join(PATIENCE)
    assert main.exitcode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, workers)))
    assert "Traceback" not in output.read_text()
    assert ("apt: interrupted" in output.read_text()) == (number == signal.SIGINT)
