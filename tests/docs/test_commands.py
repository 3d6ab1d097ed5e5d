"""Each `apt-prune` command of the documents is run, on small models and little text.

Pages that other tests run are left out: the tutorial and both guides of adapters.
"""

import re
import shlex
import shutil

import pytest

from tests.helpers import ROOT, TEXT
from tests.helpers.families import STACKED
from tests.helpers.releases import EXTRAS

PAGES = {
    "README.md": 15, "docs/allocation.md": 9, "docs/choosing.md": 4, "docs/encoders.md": 7,
    "docs/fitting.md": 14,
    "docs/mamba.md": 2, "docs/migrating.md": 4, "docs/packing.md": 8, "docs/recovery.md": 11,
    "docs/shrinking.md": 12 if STACKED else 7, "docs/usage.md": 23 if STACKED else 22,
}  # fmt: skip
"""The number of commands that are run for each page, so that a page without commands fails."""
NOT_HERE = {
    "MULTIMODAL": "needs a checkpoint with a tower; engine/test_towers.py",
    "vision-2of4": "the same",
    "--tasks": "needs questions that are not installed; apt_lab/test_tasks.py",
    "state-spaces/mamba-130m": "needs a checkpoint of mamba_ssm; checkpoints/test_load.py",
    "pruned-hf": "the same",
    "doctor --test": "a minute; engine/test_self_test.py",
    **({} if STACKED else {"zoo:moe": "needs transformers 5"}),
    "--speed": "a speed that this model has on this machine; engine/test_fit_speed.py",
    "--kind norms": "needs a rounded model; recovery/test_recover.py",
    "MODEL.gguf": "needs a mixture as a GGUF file; engine/test_in_place_files.py",
    "CLASSIFIER": "needs a data set of the hub; inputs/test_classes.py",
    "EMBEDDER": "the same; inputs/test_scored_pairs.py",
    "w4a16": "its group divides no matrix of so small a model; packing/test_compressed_tensors.py",
}
WORDS = {
    "facebook/opt-125m": "opt", "MODEL": "llama", "DENSE": "llama", "SMALL": "llama",
    "./trained": "llama", "MODEL-keep-0.75": "llama", "DIR": "start", "c4": "text.txt",
    "wikitext2": "text.txt", "ptb": "text.txt", "120MiB": "600kB",
    "my-text.jsonl": "text.txt", "text.jsonl": "builtin", "channels=1024": "channels=256",
    "heads=6": "heads=4",
}  # fmt: skip
INSTEAD = {
    "--minutes": "--steps 12", "--blocks": "--blocks 3", "--evaluations": "--evaluations 2",
    "--samples": "", "--seqlen": "", "--batch": "", "--bits": "--bits 32", "--windows": "",
}  # fmt: skip
TIMED = {"prune": "--minutes 1e-6", "fit": ""}  # of fit: engine/test_fit_minutes.py
SMALL = "--samples 2 --seqlen 16 --calibration text.txt"
TRAIN = "--samples 60 --batch 4 --seqlen 32 --steps 12 --checks 2 --calibration builtin"
ADDED = {
    "prune": f"{SMALL} --overwrite",
    "fit": f"{SMALL} --overwrite",
    "shrink": f"{SMALL} --overwrite",
    "compare": f"{SMALL} --windows 2 --data text.txt",
    "eval": "--samples 2 --seqlen 16",
    "bench": "--rounds 1 --prompt 8 --generate 2 --batch 1 --threads 1",
    "recover": f"{TRAIN} --overwrite",
    "pack": "--overwrite",
    "unpack": "--overwrite",
    "report": "--overwrite",
    "reapply": "--overwrite",
}


def commands(page):
    """The commands of a page, as lists of words."""
    text = (ROOT / page).read_text()
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            left_out = any(word in line for word in NOT_HERE) or (
                words[1:2] == ["bench"] and page != "README.md"
            )
            if words[:1] == ["apt-prune"] and not left_out:
                yield words[1:]


def shortened(words):
    """A command for small models, with few samples, steps and rounds."""
    found, rest = [], iter(words)
    for word in rest:
        if word in INSTEAD:
            next(rest)
            search = word == "--minutes" and "--search" in words
            instead = TIMED.get(words[0], INSTEAD[word]) if word == "--minutes" else INSTEAD[word]
            instead = "--evaluations 2" if search else instead
            found += instead.split()
        else:
            found.append(WORDS.get(word, word))
    if "--quantize" in found:
        found += ["--scale-group", "64"]  # which divides the matrices of the model
    if "spp" in found:
        found += ["--rate", "2e-2"]  # for a few steps
    given = iter(ADDED.get(words[0], "").split())
    for name in given:
        values = [] if name == "--overwrite" else [next(given)]
        taken = name in found or (name == "--steps" and "--tokens" in found)
        if not taken and not (name == "--overwrite" and "--resume" in found):
            found += [name, *values]
    return found


@pytest.fixture
def models(page, apt, checkpoint):
    """The files that the commands of the pages need in their folder."""
    for name in ("llama", "opt"):
        if page in TRAINED:
            assert apt("convert", f"zoo:{name}", "-o", name).code == 0
        else:
            shutil.copytree(checkpoint(name), name)
    shutil.copytree("opt", "big-model")
    shutil.copy(TEXT, "text.txt")
    options = ("--method", "magnitude", *SMALL.split(), "--save-masks")
    for model, output in (("llama", "start"), ("opt", "opt-2of4")):
        assert apt("prune", model, "--pattern", "2:4", *options, "-o", output).code == 0
    shutil.copytree("llama", "fine-tuned")
    for name in ("a", "b", "c", "pruned-by-another-tool"):
        shutil.copytree("opt-2of4", name)


# Random models, which take less time, cannot be recovered, and have no blocks to spare.
TRAINED = ("README.md", "docs/recovery.md", "docs/shrinking.md")
# Outputs of earlier commands of a page that its next command must not find.
FRESH = {"recover": "pruned-recovered", "reapply": "sparse"}
PREPARED = {
    "docs/recovery.md": {"pruned": "start", "dropped": "start"},
    "docs/usage.md": {"pruned": "opt-2of4"},
}


@pytest.mark.usefixtures("forked_workers", "little_to_measure_on")
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=EXTRAS if p == "docs/mamba.md" else ()) for p in PAGES]
)
def test_commands_of_a_page_succeed(page, apt, models):
    for name, source in PREPARED.get(page, {}).items():
        shutil.copytree(source, name)
    found = list(commands(page))
    for words in found:
        command = shortened(words)
        if page == "docs/recovery.md" and words[0] in FRESH:
            shutil.rmtree(FRESH[words[0]], ignore_errors=True)
        run = apt(*command)
        assert run.code == 0, f"{' '.join(words)}\n{' '.join(command)}\n{run.err}"
    assert len(found) == PAGES[page]
