"""Blocks of zeros, counted without APT, for every method and every kind of run."""

import json
import sys

import pytest
import torch
from apt_block_pattern import Blocks
from safetensors.torch import load_file

import apt
from apt.cli import main
from apt.files import journal
from apt.planning.plan import read_pattern
from apt.solver import Gram, SolverOptions, admm, sm, solve_live, ss
from apt.testing import check_pattern, embedded, random_tokens

RUN = ("--samples", "2", "--seqlen", "48", "--effort", "fast")
PATTERN = ("--pattern", "block:16x16@0.5")


class KilledError(BaseException):
    """An exception in place of a killed process."""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line in a folder of its own: the exit status, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["apt-prune", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        output = capsys.readouterr()
        return code, output.out + output.err

    return call


def empty_blocks(weight, rows, columns):
    """The number of blocks of zeros."""
    parts = [p for band in weight.split(rows, 0) for p in band.split(columns, 1)]
    return sum(not part.any() for part in parts)


def counts(folder, rows=16, columns=16):
    """The blocks of zeros, all blocks, and the zeros of each site on disk."""
    report = json.loads((folder / "apt_report.json").read_text())
    weights = load_file(folder / "model.safetensors")
    found = {}
    for site in report["sites"]:
        weight = weights[f"{site['name']}.weight"]
        every = weight.numel() // (rows * columns)
        zeros = int((weight == 0).sum())
        assert zeros == site["zeros"]
        found[site["name"]] = (empty_blocks(weight, rows, columns), every, zeros)
    return found


@pytest.mark.parametrize("pattern", [Blocks(16, 16, 0.5), Blocks(4, 8, 0.3), Blocks(64, 1, 0.9)])
def test_pattern_keeps_the_promises_of_the_protocol(pattern):
    check_pattern(pattern, (64, 96))


def test_lowest_prunes_the_blocks_of_the_lowest_sums():
    scores = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    mask = Blocks(4, 5, 0.5).lowest(scores)
    sums = {(i, j): scores[i : i + 4, j : j + 5].sum() for i in (0, 4, 8) for j in (0, 5, 10, 15)}
    chosen = sorted(sums, key=sums.get)[:6]
    expected = torch.zeros_like(mask)
    for i, j in chosen:
        expected[i : i + 4, j : j + 5] = True
    assert torch.equal(mask, expected)


def test_smallest_prunes_the_blocks_of_the_smallest_squares():
    flat, steep = torch.full((2, 2), 0.6), torch.tensor([[0.0, 0.0], [0.0, 1.9]])
    magnitudes = torch.cat([flat, steep], 1)  # sums 2.4 and 1.9, squares 1.44 and 3.61
    assert Blocks(2, 2, 0.5).smallest(magnitudes)[:, :2].all()
    assert Blocks(2, 2, 0.5).lowest(magnitudes)[:, 2:].all()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ss", "sm", "alps", "admm"])
def test_methods_remove_the_exact_number_of_blocks(method):
    model, _ = embedded("llama")
    report = apt.prune(model, random_tokens(256), pattern="block:8x32@0.4", method=method,
                       allocation="uniform")  # fmt: skip
    for site in report.sites:
        weight = model.get_parameter(f"{site.name}.weight")
        wanted = int(0.4 * (weight.numel() // 256) + 0.5)
        assert empty_blocks(weight, 8, 32) == wanted
        assert int((weight == 0).sum()) == site.zeros == wanted * 256


@pytest.mark.parametrize("method", [admm, ss, sm])
def test_dead_inputs_keep_the_number_of_blocks_exact(method):
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 60, 32, generator=draw)
    inputs[..., [0, 1, 2, 9, 17]] = 0
    weight, pattern = torch.randn(16, 32, generator=draw), Blocks(4, 8, 0.5)
    found = solve_live(method, weight, Gram.of(inputs), pattern, SolverOptions())
    assert int(found.mask.sum()) == empty_blocks(found.weight, 4, 8) * 32 == 8 * 32


def test_allocation_gives_each_site_its_number_of_blocks(run, tmp_path):
    assert run("prune", "zoo:llama", *PATTERN, "--allocation", "auto", *RUN, "-o", "out")[0] == 0
    found = counts(tmp_path / "out")
    assert all(zeros == blocks * 256 for blocks, _, zeros in found.values())
    assert sum(b for b, _, _ in found.values()) * 2 == sum(every for _, every, _ in found.values())
    assert len({blocks / every for blocks, every, _ in found.values()}) > 5
    code, output = run("verify", "out")
    assert code == 0
    assert "28 of 28 sites meet their pattern in the report (block:16x16@0.5)" in output
    assert run("verify", "out", *PATTERN)[0] == 0
    assert run("report", "out")[0] == 0
    assert "block:16x16@0.5" in (tmp_path / "report.html").read_text()


def test_verify_detects_a_filled_block(run, tmp_path):
    words = ("--pattern", "block:16x16", "--sparsity", "0.5", "--method", "magnitude")
    assert run("prune", "zoo:llama", *words, *RUN[:4], "-o", "out")[0] == 0
    from safetensors.torch import save_file

    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = weights[name]
    row, column = (weight == 0).nonzero()[0].tolist()
    weight[row, column] = 0.5
    save_file(weights, file, {"format": "pt"})
    code, output = run("verify", "out", "--pattern", "block:16x16@0.5")
    assert code == 1
    assert "model.layers.1.mlp.up_proj: 191 blocks of zeros, 192 needed" in output


def test_streamed_and_resumed_runs_write_the_same_bytes(run, tmp_path, monkeypatch):
    command = ("prune", "zoo:llama", *PATTERN, *RUN)
    assert run(*command, "-o", "whole")[0] == 0
    assert run(*command, "--stream", "-o", "streamed")[0] == 0
    add, calls = journal.Journal.add, []

    def killed(self, *given):
        calls.append(given)
        if len(calls) == 3:
            raise KilledError
        return add(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", killed)
        with pytest.raises(KilledError):
            run(*command, "--stream", "-o", "resumed")
    assert not (tmp_path / "resumed").exists()
    code, output = run(*command, "--resume", "-o", "resumed")
    assert code == 0
    assert "resum" in output
    first, *others = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("whole", "streamed", "resumed")
    )
    assert others == [first, first]


def test_compare_accepts_block_patterns(run, tmp_path):
    code, _ = run("compare", "zoo:llama", "--methods", "wanda,magnitude", "--patterns",
                  "block:16x16@0.5,2:4", *RUN[:4], "--windows", "2", "-o", "out")  # fmt: skip
    assert code == 0
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    found = {(row["method"], row["pattern"]) for row in rows}
    assert {("wanda", "block:16x16@0.5"), ("magnitude", "block:16x16@0.5")} <= found


def test_option_file_accepts_block_patterns_and_overrides(run, tmp_path):
    (tmp_path / "run.toml").write_text(
        'pattern = "block:16x16"\nsparsity = 0.5\n'
        'override = ["*.down_proj=block:32x8@0.25", "*.q_proj=2:4"]\n'
    )
    words = ("--method", "magnitude", "--skip", "*.0.*", *RUN[:4])
    code, output = run("prune", "zoo:llama", "--config", "run.toml", *words)
    assert code == 0, output
    report = json.loads((tmp_path / "llama-block16x16-0.5-magnitude/apt_report.json").read_text())
    patterns = {site["name"].rpartition(".")[2]: site["pattern"] for site in report["sites"]}
    assert patterns["down_proj"] == "block:32x8@0.25"
    assert patterns["q_proj"] == "2:4"
    assert patterns["o_proj"] == "block:16x16@0.5"
    assert run("verify", "llama-block16x16-0.5-magnitude")[0] == 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--pattern", "block:16x20@0.5"),
         "model.layers.0.self_attn.q_proj is 192 × 192, and not whole blocks of 16 × 20"),
        (("--pattern", "block:16x16"), "block:16x16 needs a share, such as block:16x16@0.5"),
        (("--pattern", "block:0x16@0.5"), "blocks of 0 by 16 weights have no weights"),
        (("--pattern", "block:16x16@1.5"), "sparsity 1.5 is outside [0, 1)"),
        ((*PATTERN, "--method", "sparseswaps"), "sparseswaps does not prune to block:16x16@0.5"),
        (("--sparsity", "0.5", "--method", "dsnot", "--override", "*.q_proj=block:16x16@0.5"),
         "dsnot does not prune to block:16x16@0.5 (model.layers.0.self_attn.q_proj)"),
        ((*PATTERN, "--permute"), "permute has no effect"),
    ],
)  # fmt: skip
def test_impossible_patterns_are_errors_of_one_line(run, words, fault):
    code, output = run("prune", "zoo:llama", *words, *RUN[:4], "-o", "out")
    line = next(line for line in output.splitlines() if line.startswith("apt-prune: "))
    assert code == 2
    assert fault in line


def test_extras_refuse_block_patterns(run):
    words = ("--also", "conv1d", "--method", "magnitude")
    code, output = run("prune", "zoo:mamba", *PATTERN, *words, *RUN[:4], "-o", "out")
    assert code == 2
    assert "conv1d cannot be pruned to block:16x16@0.5" in output


def test_moving_masks_of_blocks_is_refused(run):
    pytest.importorskip("peft")
    assert (
        run("prune", "zoo:llama", *PATTERN, "--method", "magnitude", *RUN[:4], "-o", "out")[0] == 0
    )
    code, output = run("recover", "out", "--move-masks", "--steps", "1", "-o", "trained")
    assert code == 2
    assert "masks of the pattern block:16x16@0.5 cannot move" in output


def test_text_of_a_pattern_keeps_its_count():
    for zeros in range(0, 48, 7):
        pattern = Blocks(16, 16, 0.5).with_zeros(zeros * 256, (96, 128))
        assert read_pattern(str(pattern)).required((96, 128)) == zeros * 256
