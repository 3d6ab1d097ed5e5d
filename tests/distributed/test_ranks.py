"""Several processes that prune together over gloo: equal results and divided work."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import apt
from apt.calibration.batches import check_finite
from apt.distributed.ranks import Ranks
from apt.events import SitePruned
from apt.plugin.registry import Registry
from apt.tuning.block_tuning import BlockTuning
from tests.helpers import TEXT
from tests.helpers.families import CONFIGS, random_model, random_tokens
from tests.helpers.interrupted import weights
from tests.helpers.processes import forked, on_ranks
from tests.helpers.releases import EXTRAS_SINCE, since

TOKENS = random_tokens(samples=8)
RUNS = {
    "wanda": {"method": "wanda"},
    "layer-wise": {"options": apt.PruneOptions(error_aware=False)},
    "at once": {"options": apt.PruneOptions(effort="fast", ordered=False)},
    "default": {},
    "integers": {"options": apt.PruneOptions(effort="fast", quantize="int4", scale_group=64)},
}
CASES = [("llama-grouped-tied", run) for run in RUNS] + [
    (variant, "wanda") for variant in ("opt", "bloom", "mamba2", "jamba") if variant in CONFIGS
]


def pruned(variant, run, tokens=TOKENS, ranks=None):
    """The weights and the report of a run with tuning steps of one sample."""
    model = random_model(variant)
    also = ("conv1d",) if variant == "mamba2" and since(*EXTRAS_SINCE) else ()
    small_steps = partial(BlockTuning, tokens_per_batch=tokens.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apt.engine.recipes.BlockTuning", small_steps)
        # The fixture `half_is_slow` does not reach other processes.
        patch.setattr("apt.devices._cpu_multiplies_faster", lambda dtype: False)
        report = apt.prune(model, tokens, pattern="2:4", also=also, ranks=ranks, **RUNS[run])
    return model.state_dict(), report


FOUR = [("llama-grouped-tied", "wanda"), ("llama-grouped-tied", "default")]  # on four ranks too


kept_groups = []  # torch 2.6 can wait for ever where Python deletes a group of gloo


def as_a_rank(rank, size, folder):
    """The program of each process."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for variant, run in CASES if size == 2 else FOUR:
        state, report = pruned(variant, run, ranks=Ranks(dist.group.WORLD))
        sites = [asdict(site) for site in report.sites]
        work = [asdict(work) for work in report.ranks]
        torch.save((state, sites, work), f"{folder}/{variant}-{run}-{rank}")
    kept_groups.append(dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A function from a number of ranks and a case to the ranks' results; all cases run at once."""

    @cache
    def written(size):
        folder = tmp_path_factory.mktemp("ranks")
        multiprocessing.start_processes(
            as_a_rank, (size, str(folder)), size, start_method=forked.get_start_method()
        )
        return folder

    return lambda size, variant, run: [
        torch.load(written(size) / f"{variant}-{run}-{rank}", weights_only=True)
        for rank in range(size)
    ]


def differing(left, right):
    """The share of weights that are zero in exactly one of two models."""
    zeros = [((left[name] == 0) != (right[name] == 0)).float().mean() for name in left]
    return float(torch.stack(zeros).mean())


@pytest.mark.parametrize(
    ("size", "variant", "run"), [(2, *case) for case in CASES] + [(4, *case) for case in FOUR]
)
def test_several_ranks_give_the_result_of_one(together, size, variant, run):
    (state, sites, work), *others = together(size, variant, run)
    for other, same_sites, _ in others:
        assert all(torch.equal(state[name], other[name]) for name in state)
        assert same_sites == sites
    alone, report = pruned(variant, run)
    assert [site["name"] for site in sites] == [site.name for site in report.sites]
    tokens = [part["tokens"] for part in work]
    copies = 2 if run == "default" else 0  # with tokens replaced
    assert sum(tokens) == (len(TOKENS) + copies) * TOKENS.shape[1]
    assert max(tokens) - min(tokens) <= (TOKENS.shape[1] if copies else 0)
    solves = [part["solves"] for part in work]
    extras = sum(site.kind.endswith("conv1d") for site in report.sites)
    assert sum(solves) + extras == len(sites)
    assert max(solves) - min(solves) <= 1
    assert {site["tokens"] for site in sites} == {site.tokens for site in report.sites}
    assert differing(state, alone) < (0.002 if run == "wanda" else 0.05)
    errors = torch.tensor([site["relative_error"] for site in sites])
    expected = torch.tensor([site.relative_error for site in report.sites])
    torch.testing.assert_close(errors, expected, rtol=0.02, atol=1e-4)


class Second(Ranks):
    """A rank of two, without a second process; the other rank has found an error."""

    first = False

    def sum(self, value):
        return value + 1


def test_activations_that_are_not_finite_raise_on_all_ranks():
    good, bad = torch.ones(1, 2, 3), torch.full((1, 2, 3), torch.inf)
    two_parts = SimpleNamespace(residual=lambda state: state[0] + state[1])
    check_finite(two_parts, [(good, good)], Ranks())
    for states, ranks in (([(good, good), (good, bad)], Ranks()), ([(good, good)], Second())):
        with pytest.raises(apt.AptError, match="activations after it are not finite"):
            check_finite(two_parts, states, ranks)


def test_only_the_first_rank_calls_the_hooks_of_plugins(monkeypatch):
    told, seen = [], []

    class NotFirst(Ranks):
        first = False

    monkeypatch.setattr(Registry, "site_pruned", lambda self, event: told.append(event))
    for ranks in (NotFirst(), Ranks()):
        how = {"pattern": "2:4", "method": "magnitude", "ranks": ranks, "observe": seen.append}
        apt.prune(random_model("opt"), TOKENS, **how)
        assert len(told) == (18 if ranks.first else 0)
    assert sum(isinstance(event, SitePruned) for event in seen) == 2 * 18


def with_another(kind):
    """Give the second rank another input of a kind, under the same name."""
    rank = int(os.environ["RANK"])
    place = {name: str(rank * (name == kind)) for name in ("weights", "tokens")}
    damping = 0.02 if rank and kind == "options.damping" else 0.03
    sys.argv[2:] = [
        f"{place['weights']}/model", "--calibration", f"{place['tokens']}/text.txt", "--samples",
        "4", "--seqlen", "24", "--pattern", "2:4", "--damping", str(damping), "-o", "out",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["weights", "tokens", "options.damping"])
def test_ranks_with_different_inputs_end_with_one_line(kind, tmp_path, tokenizer):
    text = TEXT.read_text()
    for rank in range(2):
        model, folder = random_model("llama"), tmp_path / str(rank)
        model.model.layers[2].mlp.up_proj.weight.data[0, 0] += rank
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "text.txt").write_text(text[rank * len(text) // 2 :])
    codes, output = on_ranks(2, tmp_path, "prune", before=partial(with_another, kind))
    assert codes == [2, 2], output
    lines = [line for line in output.splitlines() if "other inputs" in line]
    expected = f"rank 1 has other inputs than rank 0: {kind} differ; start all of them with the "
    assert all(expected in line for line in lines)
    assert sorted(line.startswith("apt: rank 1: ") for line in lines) == [False, True]
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def as_a_rank_of_a_program(rank, size, folder):
    """The program of each process; the second rank has other tokens."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    tokens = TOKENS.flip(0) if rank else TOKENS
    try:
        pruned("llama-grouped-tied", "wanda", tokens, Ranks(dist.group.WORLD))
    except apt.AptError as error:
        Path(folder, f"said-{rank}").write_text(error.message)
    dist.destroy_process_group()


def test_library_refuses_ranks_with_other_tokens(tmp_path):
    multiprocessing.start_processes(
        as_a_rank_of_a_program, (2, str(tmp_path)), 2, start_method=forked.get_start_method()
    )
    for rank in range(2):
        message = (tmp_path / f"said-{rank}").read_text()
        assert message == "rank 1 has other inputs than rank 0: tokens differ"


def test_half_of_the_tokens_gives_another_mask():
    alone, _ = pruned("opt", "wanda")
    part, _ = pruned("opt", "wanda", TOKENS[::2])
    assert differing(alone, part) > 0.01


COMMAND = ["--samples", "16", "--seqlen", "24", "--pattern", "2:4", "--stream",
           "--calibration", str(TEXT)]  # fmt: skip


def torchrun(folder, *command):
    """``apt`` on two ranks, as a process."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*run, "-m", "apt", *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(process):
    """The processes that ``torchrun`` started, by rank."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    result = {}
    for pid in path.read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [line for line in environment if line.startswith(b"RANK=")]
        result |= {int(line[5:]): int(pid) for line in ranks}
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks' processes in /proc")
def test_killed_rank_ends_the_job_and_resume_completes_it(checkpoint, tmp_path, apt):
    command = ("prune", str(checkpoint("llama")), *COMMAND)
    codes, output = on_ranks(2, tmp_path, *command, "-o", "whole")
    assert codes == [0, 0], output
    assert output.count("verified on disk") == 1
    report = json.loads((tmp_path / "whole" / "apt_report.json").read_text())
    assert [part["solves"] for part in report["ranks"]] == [11, 10]

    cut, journal = torchrun(tmp_path, *command, "-o", "out"), tmp_path / ".out.apt/journal.jsonl"
    while cut.poll() is None and not (journal.is_file() and journal.read_text().count("\n") > 2):
        time.sleep(0.01)
    os.kill(children(cut)[1], signal.SIGKILL)
    output, _ = cut.communicate()
    assert cut.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in output
    assert not (tmp_path / "out").exists()

    alone = apt(*command, "-o", "out", "--resume")
    assert alone.code == 2
    assert ": ranks differ" in alone.err
    codes, output = on_ranks(2, tmp_path, *command, "-o", "out", "--resume")
    assert codes == [0, 0], output
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def slow_on_the_second_rank():
    """Make the second rank slow, so that it would choose fewer samples for a given time."""
    from apt.engine import timed_run
    from apt.engine.costs import Machine

    speed = 1e15 if os.environ["RANK"] == "0" else 1.0
    timed_run.measure_machine = lambda device: Machine(speed, speed, speed)


def late_second_rank():
    """Let the clock of the second rank say that no time is left for a training, of four steps."""
    from apt.engine.store import ModelStore
    from apt.recovery import recover

    recover._steps_in = lambda *_: (4, 2, 2)
    if os.environ["RANK"] != "0":
        ModelStore.seconds = property(lambda store: 1e6)


def test_clock_of_the_first_rank_decides_on_the_training(checkpoint, tmp_path):
    words = ["prune", checkpoint("llama"), *COMMAND, "--effort", "fast", "--minutes", "9"]
    words.remove("--stream")
    codes, output = on_ranks(2, tmp_path, *words, "-o", "out", before=late_second_rank)
    assert codes == [0, 0], output
    report = json.loads((tmp_path / "out" / "apt_report.json").read_text())
    assert not report["problems"]
    assert len(report["recovery"]["training"]["losses"]) == 4


def test_first_rank_chooses_the_samples_for_a_given_time(checkpoint, tmp_path):
    words = ["prune", checkpoint("llama"), *COMMAND, "--effort", "fast", "--minutes", "0.02"]
    words.remove("--stream")
    codes, output = on_ranks(2, tmp_path, *words, "-o", "out", before=slow_on_the_second_rank)
    assert codes == [0, 0], output
    report = json.loads((tmp_path / "out" / "apt_report.json").read_text())
    assert report["calibration"]["shape"][0] == 16


def test_more_ranks_than_samples_are_refused(checkpoint, tmp_path):
    few = ("--samples", "2", "--effort", "fast", "-o", "out")
    codes, output = on_ranks(3, tmp_path, "prune", checkpoint("llama"), *COMMAND, *few)
    assert codes == [2, 2, 2]
    assert "too few samples: some of 3 ranks have none; give more samples" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
