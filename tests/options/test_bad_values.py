"""Programs get the same error as the shell, without the flag."""

from functools import partial

import pytest

import apt as library
from apt.options import (
    FitRun,
    PruneOptions,
    PruneRun,
    ReapplyRun,
    RecoverOptions,
    RecoverRun,
    ShrinkOptions,
    ShrinkRun,
    flags_of,
)
from tests.helpers import TEXT
from tests.helpers.commands import words
from tests.helpers.families import random_model, random_tokens

RUNS = {
    "prune": PruneRun, "fit": FitRun, "shrink": ShrinkRun, "recover": RecoverRun,
    "reapply": ReapplyRun,
}  # fmt: skip
TEXTS = {"samples": 2, "seqlen": 16, "calibration": str(TEXT)}
USUAL = {
    "prune": {"pattern": "2:4", "output": "out", **TEXTS},
    "fit": {"output": "out.gguf", **TEXTS},
    "shrink": {"output": "out", **TEXTS},
    "recover": {"output": "out", **TEXTS},
    "reapply": {"output": "out"},
}
BAD = [
    ("prune", {"samples": -1}, "samples is -1; it must be at least 0"),
    ("prune", {"samples": 0}, "there are no samples to calibrate on"),
    ("prune", {"seqlen": 1}, "seqlen is 1; it must be at least 2"),
    ("prune", {"damping": 2e6}, "damping is 2000000; it must be from 0 to 1e+06"),
    ("prune", {"damping": float("nan")}, "damping is nan"),
    ("prune", {"input_correction": 1.5}, "input correction is 1.5; it must be from 0 to 1"),
    ("prune", {"drift_correction": -0.1}, "drift correction is -0.1"),
    ("prune", {"tuning_epochs": 2000}, "tuning epochs is 2000"),
    ("prune", {"tuning_rate": 2.0}, "tuning rate is 2; it must be from 0 to 1"),
    ("prune", {"tuning_tokens": -1}, "tuning tokens is -1"),
    ("prune", {"random_tokens": 200.0}, "it is a number of copies for each sample"),
    ("prune", {"own_samples": -1}, "own samples is -1"),
    ("prune", {"row_importance": 3.0}, "row importance is 3; it must be from 0 to 2"),
    ("prune", {"block_size": 0}, "block size is 0; it must be at least 1"),
    ("prune", {"effort": "better"}, "effort 'better' is not one of fast, default, best"),
    ("prune", {"quantize": "int3"}, "quantize 'int3' is not one of int8, int4"),
    ("prune", {"activations": "tape"}, "activations 'tape' is not one of memory, cpu, disk"),
    ("prune", {"activations": "disk"}, "stream the run as well"),
    ("prune", {"dtype": "float8"}, "dtype 'float8' is not one of auto"),
    ("prune", {"device": "gpu"}, "device 'gpu' is not available here"),
    ("prune", {"per": "row"}, "per row needs a sparsity"),
    ("prune", {"per": "room", "pattern": None, "sparsity": "0.5"}, "per 'room' is not one of row"),
    ("prune", {"sparsity": "0.5"}, "sparsity and pattern are both given"),
    ("prune", {"sparsity": "1", "pattern": None}, "sparsity 1 is outside [0, 1)"),
    ("prune", {"pattern": "4:2"}, "4:2"),
    ("prune", {"pattern": "half"}, "is neither a sparsity"),
    ("prune", {"pattern": "auto:8"}, "pattern auto:8 needs a sparsity"),
    ("prune", {"overrides": ("q_proj",)}, "override q_proj has no GLOB=PATTERN"),
    ("prune", {"overrides": ("nothing*=0.5",)}, "nothing*"),
    ("prune", {"only": ("nothing*",)}, "nothing*"),
    ("prune", {"skip": ("*",)}, ""),
    ("prune", {"method": "wand"}, "no method 'wand'; did you mean 'wanda'?"),
    ("prune", {"method": "wanda", "effort": "best"}, "method wanda does not use effort"),
    ("prune", {"method": "wanda", "block_size": 8}, "method wanda does not use block size"),
    ("prune", {"allocation": "owll"}, "no allocation 'owll'; did you mean 'owl'?"),
    ("prune", {"allocation": "owl"}, "allocation owl"),
    ("prune", {"also": ("C",)}, "C"),
    ("prune", {"metrics": ("perplexty",), "evaluation": str(TEXT)}, "did you mean 'perplexity'?"),
    (
        "prune",
        {"metrics": ("divergence",), "evaluation": str(TEXT)},
        "compares with the dense model",
    ),
    ("prune", {"seed": 2**70}, "is out of range"),
    ("prune", {"max_shard_size": "5"}, "'5' is not a file size; write 5GB or 500MB"),
    ("prune", {"adapter": "lama"}, "no adapter 'lama'; did you mean 'llama'?"),
    ("prune", {"adapter": "mamba"}, "does not fit LlamaForCausalLM"),
    ("prune", {"model": "./nowhere"}, "no such model: './nowhere' does not exist"),
    ("prune", {"calibration": "nowhere.txt"}, "nowhere.txt"),
    ("prune", {"tokenizer": "./nowhere"}, "./nowhere"),
    ("shrink", {"keep": 1.5}, "keep is 1.5; it must be above 0 and below 1"),
    ("shrink", {"budget": "time"}, "budget 'time' is not one of parameters, latency"),
    ("shrink", {"blocks": 99}, "number of blocks can be 1 to 3, not 99"),
    ("shrink", {"sizes": {"heads": 9}}, "heads"),
    ("shrink", {"sizes": {"states": 5}}, "the model has no states to remove"),
    ("shrink", {"drop": (9,)}, "there is no block 9: they are 0 to 2"),
    ("shrink", {"mode": "depth", "sizes": {"heads": 2}}, "mode 'depth' is for a share to keep"),
    ("shrink", {"multiple_of": 0}, "multiple of is 0; it must be at least 1"),
    ("shrink", {"evaluations": 0}, "evaluations is 0; it must be at least 1"),
    ("shrink", {"method": "flapp"}, "did you mean 'flap'?"),
    ("recover", {"steps": 0}, "steps is 0; it must be at least 1"),
    ("recover", {"steps": 5, "minutes": 1.0}, "steps and minutes exclude each other"),
    ("recover", {"rate": -1.0}, "rate is -1; it must be above 0"),
    ("recover", {"kind": "lorra"}, "did you mean 'lora'?"),
    ("recover", {"kind": "layers", "rank": 4}, "recovery layers does not use rank"),
    ("recover", {"validation_share": 1.0}, "validation share is 1"),
    ("recover", {"patience": 0}, "patience is 0; it must be at least 1"),
    ("recover", {"dropout": 1.0}, "dropout is 1; it must be at least 0 and below 1"),
    ("recover", {"move_masks": True, "window": 1}, "move masks and window exclude each other"),
    ("reapply", {"masks": "./nowhere"}, "nowhere"),
    ("fit", {}, "size and bits are missing"),
    ("fit", {"size": "4MB", "bits": 4.0}, "size and bits are both given"),
    ("fit", {"size": "little"}, "little is not a size; write 73MiB"),
    ("fit", {"bits": 33.0}, "bits is 33; it must be above 0 and at most 32"),
    ("fit", {"size": "4MB", "samples": 0}, "fit needs calibration text"),
    ("fit", {"size": "4MB", "output": "out"}, "fits already: with dense weights it has at most"),
    ("fit", {"size": "4MB", "output": "out", "target": "gguf"}, "the output out is not a .gguf"),
    ("fit", {"size": "4MB", "target": "packed"}, "and out.gguf is the name of a file"),
    ("fit", {"size": "4MB", "target": "gguff"}, "no export format 'gguff'"),
    ("fit", {"size": "4MB", "may": "zeros"}, "fit has no zeros to choose for gguf"),
    ("fit", {"size": "4MB", "may": "bit"}, "may 'bit' is not one of zeros, bits"),
    ("fit", {"memory": "little", "output": "out"}, "little is not a size; write 73MiB"),
    ("fit", {"memory": "4MB"}, "memory has no effect for gguf"),
    ("fit", {"speed": 0.0}, "speed is 0; it must be above 0"),
    ("fit", {"speed": 60.0, "size": "4MB"}, "size and speed are both given; give one of them"),
    ("fit", {"speed": 60.0, "memory": "4MB"}, "memory and speed are both given"),
    ("fit", {"size": "4MB", "cache_tokens": 9}, "cache tokens has no effect without memory"),
    ("fit", {"size": "4MB", "table_from": "nowhere.gguf"}, "nowhere.gguf has no table of losses"),
    ("fit", {"size": "4kB"}, "does not fit into 4,000 bytes"),
    ("fit", {"size": "4MB", "may": "width"}, "may width does not choose the bits; add them"),
    ("fit", {"size": "4MB", "may": "bits,less"}, "may 'less' is not one of zeros, bits, width"),
    ("fit", {"size": "4MB", "may": "bits,zeros"}, "fit has no zeros to choose for gguf"),
]


def of_function(command, given):
    """The error of the function for a model in memory; None if it lacks these options."""
    if command == "fit":  # it has no such function
        return None
    model, tokens = random_model("llama"), random_tokens(2, 16)
    options = {"prune": PruneOptions, "shrink": ShrinkOptions, "recover": RecoverOptions}[command]
    arguments = {"prune": {"method", "allocation", "also"}, "shrink": {"method"}}
    arguments = arguments.get(command, {"kind"})
    if not given.keys() <= arguments | {one.name for one in options.OPTIONS}:
        return None
    named = {name: given[name] for name in given.keys() & arguments}
    made = options(**{name: given[name] for name in given.keys() - arguments})
    act = {
        "prune": partial(library.prune, pattern="2:4", options=made),
        "shrink": partial(library.shrink, size=made),
        "recover": partial(library.recover, options=made),
    }
    with pytest.raises(library.AptError) as caught:
        act[command](model, tokens, **named)
    return str(caught.value)


@pytest.mark.parametrize(("command", "bad", "message"), BAD, ids=lambda value: str(value)[-60:])
def test_program_and_shell_give_the_same_error(command, bad, message, apt, checkpoint):
    kind, given = RUNS[command], {"model": str(checkpoint("llama"))} | USUAL[command] | bad
    if command == "reapply":
        given = {"masks": "masks", **given}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(library.AptError) as caught:
        library.run(kind(**given))
    assert message in str(caught.value)
    run = apt(command, *words(kind, given))
    assert run.code == 2
    assert run.err.splitlines()[-1] == f"apt: {caught.value}{flags_of(caught.value.options)}"
    if command != "reapply":
        assert of_function(command, bad) in (None, str(caught.value))
