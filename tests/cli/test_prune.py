"""The commands for a pruning from end to end, on embedded and random models."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apt.output.report import Report
from apt.plugin.registry import registry
from tests.helpers import TEXT
from tests.helpers.families import FAMILIES

SMALL = ("--samples", 4, "--seqlen", 64, "--calibration", TEXT)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# A sparsity is for one trained model, and for random ones below.
@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        *((family, ("--pattern", "2:4")) for family in FAMILIES),
        ("opt", ("--sparsity", "0.5", "--per", "layer")),
    ],
    ids=str,
)
def test_zoo_models_are_pruned_and_open_in_plain_transformers(apt, family, pattern):
    words = (*pattern, *SMALL, "--norm-epochs", 0)
    run = apt("prune", "--adapter", family, *words, "-o", "out")
    assert run.code == 0, run.err
    assert f"model: zoo:{family} (default)" in run.err
    before = weights(AutoModelForCausalLM.from_pretrained(
        registry().adapters.get(family).zoo_path(), dtype="auto"
    ))  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    report = json.loads(Path("out/apt_report.json").read_text())
    after = weights(model)
    sites = {  # the slices of a stack are sites
        name if (name := f"{site['name']}.weight") in after else site["name"].rpartition(".")[0]
        for site in report["sites"]
    }
    assert set(after) == set(before)
    for name, value in after.items():
        if name in sites:
            assert value.count_nonzero() <= value.numel() / 2
        elif name.endswith(("v_proj.bias", "fc1.bias")) and "2:4" in pattern:  # in another order
            assert torch.equal(value.sort().values, before[name].sort().values), name
        else:
            assert torch.equal(value, before[name]), name
    assert AutoTokenizer.from_pretrained("out")("a b").input_ids
    assert apt("verify", "out", *pattern).code == 0
    assert apt("verify", "out", "--pattern", "1:4").code == 1


@pytest.mark.parametrize("variant", ["llama", "mistral", "opt-350m", "bloom", "falcon-mamba"])
def test_random_models_are_pruned_from_a_directory(apt, checkpoint, variant):
    path = checkpoint(variant)
    assert apt("prune", path, "--sparsity", 0.6, *SMALL, "-o", "out").code == 0
    verified = apt("verify", "out", "--sparsity", 0.6)
    assert verified.code == 0, verified.out
    assert "sites meet 0.6; 59.9" in verified.out or "; 60.0" in verified.out


def test_each_default_is_printed_in_one_line(apt):
    run = apt("prune", "--adapter", "opt", "--samples", 2, "--eval", "builtin")
    assert run.code == 0, run.err
    lines = [line for line in run.err.splitlines() if "(default)" in line]
    assert [line.split(":")[0] for line in lines] == [
        "model", "pattern", "calibration", "output", "method",
    ]  # fmt: skip
    assert "seqlen: 512, the number of the model's positions (not 2048)" in run.err
    assert Path("opt-2of4-admm/model.safetensors").is_file()
    assert "perplexity on builtin:" in run.out
    assert "verified on disk" in run.out


def test_report_has_all_entries_for_a_rerun(apt, checkpoint):
    apt(
        "prune",
        checkpoint("mamba"),
        "--method",
        "SS",
        *SMALL,
        "-o",
        "out",
        "--skip",
        "*.0.*.dt_proj",
    )
    report = json.loads(Path("out/apt_report.json").read_text())
    assert report["options"]["method"] == "ss"
    assert report["options"]["seqlen"] == 64
    assert report["calibration"]["shape"] == [4, 64]
    assert len(report["model"]["sha256"]) == len(report["calibration"]["sha256"]) == 64
    assert report["versions"]["transformers"]
    assert report["peak_memory_bytes"]["cpu"] > 0
    assert report["skipped"] == ["backbone.layers.0.mixer.dt_proj"]
    site = report["sites"][0]
    assert site["sparsity"] == 0.5
    assert site["damping"] == 0.01
    assert 0 < site["relative_error"] < 1
    assert site["tokens"] == 256


def test_verify_finds_a_single_extra_weight(apt, checkpoint):
    apt("prune", checkpoint("llama"), *SMALL, "-o", "out")
    tensors = load_file("out/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    row = tensors[name][3]
    row[8:12] = 1
    save_file(tensors, "out/model.safetensors", {"format": "pt"})
    run = apt("verify", "out", "--pattern", "2:4")
    assert run.code == 1
    assert "model.layers.1.mlp.up_proj: row 3 keeps 4 of inputs 8 to 11; 1 of" in run.out
    assert "model.safetensors was changed or removed since it was written" in run.out
    run = apt("verify", "out", "--pattern", "2:4", "--skip", "*.1.mlp.up_proj")
    assert (run.code, "20 of 20 sites meet 2:4" in run.out) == (1, True)
    Path("out/apt_report.json").unlink()
    assert apt("verify", "out", "--pattern", "2:4", "--skip", "*.1.mlp.up_proj").code == 0


def test_verify_skips_the_sites_that_the_run_skipped(apt, checkpoint):
    apt("prune", checkpoint("bloom"), *SMALL, "-o", "out", "--skip", "*.dense")
    run = apt("verify", "out", "--pattern", "2:4")
    assert run.code == 0
    assert "left dense: transformer.h.0.self_attention.dense" in run.err


@pytest.mark.parametrize("text", ["{", "[]", '{"skipped": [], "options": null}'])
def test_damaged_report_is_a_one_line_error(apt, checkpoint, tmp_path, text):
    path = Path(shutil.copytree(checkpoint("opt"), tmp_path / "model"))
    (path / "apt_report.json").write_text(text)
    run = apt("verify", path, "--pattern", "2:4")
    assert run.code == 2
    assert "apt_report.json is damaged" in run.err


@pytest.mark.parametrize(
    ("options", "alpha", "ordered"),
    [
        ((), 0.25, True),
        (("--layer-wise",), 0.0, False),
        (("--at-once",), 0.25, False),
        (("--method", "ss"), 0.0, False),
        (("--method", "ss", "--error-aware"), 0.25, True),
    ],
    ids=str,
)
def test_default_mode_depends_on_the_method(apt, checkpoint, options, alpha, ordered):
    run = apt("prune", checkpoint("llama"), *SMALL, "-o", "out", *options)
    assert run.code == 0
    chosen = json.loads(Path("out/apt_report.json").read_text())["options"]
    assert (chosen["alpha"], chosen["beta"], chosen["ordered"]) == (alpha, alpha, ordered)
    assert chosen["error_aware"] is bool(alpha)
    assert chosen["effort"] == "default"
    assert chosen["tuning_epochs"] == (1 if alpha and "ss" not in options else 0)


@pytest.mark.parametrize(("effort", "epochs"), [("fast", 0), ("best", 8)])
def test_effort_sets_the_tuning_of_blocks(apt, checkpoint, effort, epochs):
    run = apt("prune", checkpoint("llama"), *SMALL, "-o", "out", "--effort", effort)
    assert run.code == 0
    chosen = json.loads(Path("out/apt_report.json").read_text())["options"]
    assert chosen["tuning_epochs"] == epochs


def test_each_setting_of_an_error_aware_run_has_an_option(apt, checkpoint):
    options = {
        "alpha": 0.5, "beta": 0, "row_importance": 0, "tuning_epochs": 2, "tuning_rate": 0.01,
        "tuning_tokens": 0, "random_tokens": 1, "own_samples": 1,
    }  # fmt: skip
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert apt("prune", checkpoint("llama"), *SMALL, "-o", "out", *given).code == 0
    chosen = json.loads(Path("out/apt_report.json").read_text())["options"]
    assert {name: chosen[name] for name in options} == options


def test_options_of_error_aware_runs_are_refused_in_layer_wise_runs(apt):
    run = apt("prune", "zoo:llama", *SMALL, "--layer-wise", "--input-correction", 0.5)
    assert run.code == 2
    assert "input correction has no effect in a layer-wise run" in run.err


def test_wanda_is_verified_by_row(apt):
    apt("prune", "zoo:opt", *SMALL, "-o", "out", "--method", "wanda", "--sparsity", "0.37")
    assert apt("verify", "out", "--sparsity", "0.37").code == 0
    assert apt("verify", "out", "--sparsity", "0.40").code == 1


def test_eval_prints_perplexity_and_json(apt):
    run = apt("eval", "zoo:llama", "--samples", 8, "--seqlen", 128)
    assert run.code == 0
    assert "zoo:llama: perplexity" in run.out
    record = json.loads(apt("eval", "zoo:llama", "--samples", 8, "--seqlen", 128, "--json").out)
    assert record["windows"] == 8
    assert f"{record['perplexity']:.3f}" in run.out


def test_inspect_and_dry_run_show_the_plan_and_write_nothing(apt):
    for run in (
        apt("inspect", "zoo:mamba", "--skip", "*.in_proj"),
        apt("prune", "zoo:mamba", "--skip", "*.in_proj", "--dry-run"),
    ):
        assert run.code == 0, run.err
        assert "MambaForCausalLM, adapter mamba" in run.out
        assert "mixer.dt_proj" in run.out
        assert "dense" in run.out
        assert "of memory" in run.out
    assert list(Path().iterdir()) == []


def test_listings_name_all_specs_and_their_distributions(apt):
    for command, names in (("adapters", "llama opt bloom mamba"), ("methods", "ss sm ms mm")):
        run = apt(command)
        assert run.code == 0
        rows = {line.split()[0]: line for line in run.out.splitlines()}
        assert all("apt-prune 0.1.0" in rows[name] for name in names.split())


@pytest.fixture
def nan_model(checkpoint, tmp_path):
    path = Path(shutil.copytree(checkpoint("opt"), tmp_path / "nan-model"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.decoder.layers.0.fc1.weight"][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


TOKENS = [str(word) for word in SMALL]  # where the method refuses, once there are some
BAD = [
    (["prune"], "no MODEL is given"),
    (["prune", "./nowhere"], "no such model"),
    (["prune", "--adapter", "lama"], "no adapter 'lama'; did you mean 'llama'"),
    (["prune", "zoo:llama", "--method", "wand"], "no method 'wand'; did you mean 'wanda'"),
    (["prune", "zoo:llama", "--calibration", "builtn"], "no data set 'builtn'; did you mean"),
    (["prune", "zoo:llama", "--adapter", "mamba"], "MambaAdapter does not fit LlamaForCausalLM"),
    (["prune", "zoo:llama", "--sparsity", "1"], "sparsity 1 is outside [0, 1)"),
    (["prune", "zoo:llama", "--sparsity", "-1"], "sparsity -1 is outside [0, 1)"),
    (["prune", "zoo:llama", "--sparsity", "nan"], "sparsity nan is outside [0, 1)"),
    (["prune", "zoo:llama", "--sparsity", "half"], "'half' is neither a sparsity"),
    (
        ["prune", "zoo:llama", "--sparsity", "2:4"],
        "sparsity 2:4 is a pattern; give it so (--pattern)",
    ),
    (["prune", "zoo:llama", "--sparsity", "0.5", "--pattern", "2:4"], "both given"),
    (["prune", "zoo:llama", "--pattern", "4:2"], "pattern 4:2 keeps 4 of 2"),
    (["prune", "zoo:llama", "--pattern", "0:4"], "0 < N < M"),
    (["prune", "zoo:llama", "--pattern", "2:5"], "192 inputs, not a multiple of 5"),
    (["prune", "zoo:llama", *TOKENS, "--pattern", "32:64", "--method", "mm"], "use mask S"),
    (["prune", "zoo:llama", "--per", "column"], "is not one of row, layer, block, model"),
    (["prune", "zoo:llama", "--samples", "10000"], "too little text: builtin gives"),
    (["prune", "zoo:llama", "--samples", "0"], "(--samples, --own-samples)"),
    (
        ["prune", "zoo:llama", "--output", "full"],
        "full exists and has files that APT did not write: x",
    ),
    (["prune", "zoo:llama", "--output", "full/x"], "full/x exists and is not a directory"),
    (["prune", "zoo:llama", "--dtype", "int8"], "dtype 'int8' is not one of auto"),
    (["prune", "zoo:llama", "--device", "tpu"], "device 'tpu' is not available"),
    (["prune", "zoo:llama", "--device", "cuda:99"], "device 'cuda:99' is not available"),
    (
        ["prune", "zoo:llama", "--block-size", "64"],
        "admm does not use block size; those that use it: sm, mm",
    ),
    (["prune", "zoo:llama", "--effort", "fast", "--method", "ss"], "ss does not use effort"),
    (["prune", "zoo:llama", "--effort", "most"], "effort 'most' is not one of fast, default, best"),
    (["prune", "zoo:llama", "--damping=-1"], "damping is -1; it must be from 0 to"),
    (
        ["prune", "zoo:llama", *TOKENS, "--block-size", "6", "--method", "sm"],
        "block size 6 is not a multiple of 4",
    ),
    (["prune", "zoo:llama", "--only", "*.fc1"], "'*.fc1' matches no site"),
    (["prune", "zoo:llama", "--skip", "*"], "no site is left to prune"),
    (["prune", "zoo:llama", "--override", "x"], "has no GLOB=PATTERN"),
    (["eval", "zoo:llama", "--data", "nowhere.txt"], "no such data set"),
    (["eval", "zoo:nothing"], "no adapter 'nothing'"),
    (["verify", "nowhere", "--pattern", "2:4"], "no such directory"),
    (["verify", "full", "--pattern", "2:4"], "has no config.json"),
    (["verify", "full"], "no report gives a pattern"),
    (["eval", "zoo:llama", "--metric", "accuracy1"], "did you mean 'accuracy'"),
    (["prune", "zoo:llama", "--sparsity", "0.5", "--allocation", "owll"], "did you mean 'owl'"),
    (["prune", "zoo:llama", "--pattern", "2:4", "--allocation", "owl"], "owl cannot be used"),
    (["inspect", "full"], "has no config.json"),
    (["install", "vim"], "this is APT, which prunes transformers"),
    (["-y", "install", "vim"], "for packages, run /usr/bin/apt install"),
    (["update"], "for packages, run /usr/bin/apt update"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    BAD,
    ids=lambda v: " ".join(Path(word).name for word in v) if isinstance(v, list) else "",
)
def test_bad_input_is_a_one_line_error_and_nothing_is_written(apt, arguments, message):
    Path("full").mkdir()
    Path("full/x").write_text("x")
    run = apt(*arguments)
    assert run.code == 2, run.err
    line = [text for text in run.err.splitlines() if text.startswith("apt: ")]
    assert len(line) == 1
    assert message in line[0]
    assert run.err.rstrip().endswith(line[0])
    assert sorted(str(p) for p in Path().rglob("*")) == ["full", "full/x"]


def test_error_names_a_weight_that_is_not_finite(apt, nan_model):
    run = apt("prune", nan_model, *SMALL)
    assert run.code == 2
    assert "model.decoder.layers.0.fc1.weight" in run.err
    assert "Traceback" not in run.err


def test_table_cells_are_not_markup(capsys):
    from apt.cli.output import out, table

    made = table("a")
    made.add_row("pip install 'apt-prune[gguf]'")
    out.print(made)
    assert "'apt-prune[gguf]'" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["looking for ./llama[v2]", "no markup: [/"])
def test_status_texts_are_not_markup(text, monkeypatch):
    from rich.console import Console

    from apt.cli import output, progress

    terminal = Console(file=StringIO(), force_terminal=True)
    for module in (output, progress):
        monkeypatch.setattr(module, "err", terminal)
    with progress.Progress(text) as shown:
        shown.status(text)
    assert text in terminal.file.getvalue()


def test_debug_shows_the_traceback(apt):
    from apt.errors import AptError

    with pytest.raises(AptError):
        apt("prune", "./nowhere", "--debug")


def test_ctrl_c_ends_with_status_130(apt, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("apt.engine.prune_task.PruneTask.read_text", interrupt)
    run = apt("prune", "zoo:llama", *SMALL)
    assert run.code == 130
    assert run.err.endswith("apt: interrupted; nothing was written\n")
    assert list(Path().iterdir()) == []
    Path("out").mkdir()
    Path("out/weights").write_text("of an earlier run")
    Report({}, {"reference": "m"}, {}).write(Path("out"))
    run = apt("prune", "zoo:llama", *SMALL, "-o", "out", "--overwrite")
    assert run.err.endswith("apt: interrupted; nothing was written\n")


@pytest.mark.parametrize("families", [True, False], ids=["with families", "alone"])
@pytest.mark.parametrize("command", ["--help", "methods", "adapters", "plugins"])
def test_listings_do_not_import_torch(command, families, monkeypatch):
    if families and command in ("adapters", "plugins"):
        pytest.skip("their modules import torch, and are loaded")
    if not families:
        named = {dist.name for dist in distributions() if dist.name.startswith("apt-")}
        monkeypatch.setenv("APT_DISABLE_PLUGINS", " ".join(named - {"apt-prune"}))
    code = f"import sys, apt.cli; sys.argv = ['apt', {command!r}]\n"
    code += "try: apt.cli.main()\nexcept SystemExit: pass\n"
    check = "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True)
    assert "prune" in done.stdout
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr


def test_python_m_apt_runs_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "apt", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("apt 0.")


def test_verify_accepts_a_run_with_owl_and_two_metrics(apt):
    run = apt("prune", "zoo:llama", "--sparsity", 0.6, "--allocation", "owl", "--method", "wanda",
              "--samples", 4, "--seqlen", 64, "--eval", "builtin", "--metric", "perplexity",
              "--metric", "accuracy", "-o", "out")  # fmt: skip
    assert run.code == 0, run.err
    assert "perplexity on builtin:" in run.out
    assert "accuracy on builtin: 0." in run.out
    report = json.loads(Path("out/apt_report.json").read_text())
    assert len({site["pattern"] for site in report["sites"]}) > 1
    assert report["scores"]["after"]["perplexity"] > report["scores"]["before"]["perplexity"]
    run = apt("verify", "out")
    assert run.code == 0, run.out
    assert "sites meet their pattern in the report (0.6)" in " ".join(run.out.split())
    assert apt("verify", "out", "--override", "*=0.7").code == 1
    assert apt("verify", "out", "--sparsity", 0.6, "--per", "row").code == 1
