"""The commands and programs of `golden.py`.

Each command runs in a folder of its own, named after it, beside the folders of the others: a
command that needs the output of another names it as ``../NAME/out``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL = "--samples 4 --seqlen 64 --seed 1"
PRUNE = f"prune zoo:llama {SMALL} -o out"
SHRINK = f"shrink zoo:llama {SMALL} -o out"
RECOVER = "recover ../admm-2to4/out --seqlen 64 --batch 2 --steps 8 -o out"
COMPARE = f"compare zoo:llama {SMALL} --windows 2 -o out"
TEXT = "../text.txt"
FAMILIES = ("falcon_h1", "gpt2", "gpt_neox", "jamba", "qwen3_moe")
"""Model types of which a small random model is made in ``../models``."""


@dataclass(frozen=True)
class Kill:
    """The moment at which a command is killed, before it is given again with ``--resume``.

    Attributes:
        text: a part of a line that ``--json`` prints on standard error.
        count: the number of such lines that are printed first.
        resume: the option with which it is given again.
    """

    text: str
    count: int
    resume: str = " --resume"


KILLS = {
    "stream-killed": Kill('"event": "block"', 2),
    "stream-disk-killed": Kill('"event": "block"', 3),
    "stream-shrink-killed": Kill('"event": "block"', 2),
    "search-killed": Kill("search: 3 candidates", 1, ""),
    "recover-layers-killed": Kill('"event": "training step"', 5),
    "recover-distill-killed": Kill('"event": "training step"', 5),
    "compare-killed": Kill('"event": "row"', 2, ""),
}
"""The commands that are killed, by name."""


def commands() -> dict[str, str]:
    """All commands by name, in their order."""
    return {
        **_pruned(),
        **_streamed(),
        **_families(),
        **_smaller(),
        **_recovered(),
        **_others(),
        **_refused(),
    }


def _pruned() -> dict[str, str]:
    """Methods, efforts, patterns, allocations, and options of ``prune``."""
    methods = "alps sm mm ms dsnot-exact ss sparseswaps dsnot wanda magnitude"
    allocations = "owl alphapruning alphapruning-matrix alphapruning-mid atp auto auto-block"
    options = {
        "4to8": "--pattern 4:8",
        "auto8": "--pattern auto:8 --sparsity 0.5",
        "only": "--sparsity 0.5 --only *.mlp.*",
        "skip": "--sparsity 0.5 --skip *.self_attn.* --skip *.layers.0.*",
        "override": "--sparsity 0.5 --override *.down_proj=2:4 --override *.q_proj=0.3",
        "layer-wise": "--pattern 2:4 --layer-wise",
        "at-once": "--pattern 2:4 --at-once",
        "corrections": "--pattern 2:4 --alpha 0.5 --beta 0.125",
        "error-aware": "--sparsity 0.5 --method wanda --error-aware --ordered",
        "tuning": "--pattern 2:4 --tuning-epochs 2 --tuning-rate 0.1 --tuning-tokens 128",
        "random-tokens": "--pattern 2:4 --random-tokens 1",
        "own-samples": "--pattern 2:4 --own-samples 2",
        "damping": "--sparsity 0.5 --damping 0.1 --row-importance 0",
        "block-size": "--sparsity 0.5 --method mm --block-size 64",
        "int4": "--pattern 2:4 --quantize int4 --group 64",
        "int8": "--sparsity 0.5 --quantize int8 --group row",
        "float32": "--pattern 2:4 --dtype float32",
        "no-bos": "--pattern 2:4 --no-bos",
        "text": f"--pattern 2:4 --calibration {TEXT} --eval {TEXT} --metric accuracy "
        "--metric perplexity",
        "masks": "--pattern 2:4 --save-masks --max-shard-size 1MB",
        "packed": "--pattern 2:4 --pack packed",
        "json": "--pattern 2:4 --eval builtin --json",
        "config-saved": "--sparsity 0.6 --allocation atp --effort fast --skip *.o_proj "
        "--tuning-epochs 1 --save-config options.toml",
        "unused-damping": "--pattern 2:4 --method magnitude --damping 0.1",
        "too-long": "--pattern 2:4 --method wanda --seqlen 100000",
        "nothing-to-resume": "--pattern 2:4 --method wanda --stream --resume",
        "verbose": "--pattern 2:4 --method wanda --verbose --log-file messages.log",
    }
    return {
        "admm-0.5": f"{PRUNE} --sparsity 0.5",
        "admm-2to4": f"{PRUNE} --pattern 2:4",
        **{
            f"admm-{effort}-{name}": f"{PRUNE} {pattern} --effort {effort}"
            for effort in ("fast", "best")
            for name, pattern in (("0.5", "--sparsity 0.5"), ("2to4", "--pattern 2:4"))
        },
        **{f"{m}-0.5": f"{PRUNE} --sparsity 0.5 --method {m}" for m in methods.split()},
        **{f"{m}-2to4": f"{PRUNE} --pattern 2:4 --method {m}" for m in methods.split()},
        **{
            f"allocation-{name}": f"{PRUNE} --sparsity 0.6 --method wanda --allocation {name}"
            for name in (*allocations.split(), "auto-search")
        },
        **{
            f"per-{unit}": f"{PRUNE} --sparsity 0.6 --method wanda --per {unit}"
            for unit in ("row", "layer", "block", "model")
        },
        **{name: f"{PRUNE} {words}" for name, words in options.items()},
        "config": "prune --config ../config-saved/options.toml -o out2",
        "dry-run": f"{PRUNE} --pattern 2:4 --dry-run",
        "dry-run-json": f"{PRUNE} --pattern auto:8 --sparsity 0.5 --dry-run --json",
        "default-output": f"prune zoo:llama {SMALL} --sparsity 0.7 --method ss",
    }


def _streamed() -> dict[str, str]:
    """Runs that read and write block by block, and runs that are killed and resumed."""
    stream = f"{PRUNE} --stream --pattern 2:4"
    return {
        "stream": stream,
        "stream-disk": f"{stream} --activations disk --save-masks",
        "stream-0.5": f"{PRUNE} --stream --sparsity 0.5 --eval builtin --max-shard-size 1MB",
        "stream-dry-run": f"{stream} --dry-run --json",
        "stream-killed": stream,
        "stream-disk-killed": f"{stream} --activations disk --eval {TEXT}",
    }


def _families() -> dict[str, str]:
    """The families of the zoo, small random models of others, and the adapter ``auto``."""
    return {
        **{
            f"{family}-2to4": f"prune zoo:{family} {SMALL} --pattern 2:4 -o out"
            for family in ("opt", "bloom", "mamba", "mamba2")
        },
        **{
            f"{family}-wanda": f"prune ../models/{family} {SMALL} --sparsity 0.5 --method wanda "
            "-o out"
            for family in FAMILIES
        },
        "auto-adapter": f"{PRUNE} --pattern 2:4 --adapter auto",
        "opt-stream": f"prune zoo:opt {SMALL} --sparsity 0.5 --stream -o out",
        "mamba-stream": f"prune zoo:mamba {SMALL} --pattern 2:4 --stream -o out",
        "moe-stream": f"prune ../models/qwen3_moe {SMALL} --pattern 2:4 --stream -o out",
        "mamba-also": f"prune zoo:mamba {SMALL} --sparsity 0.5 --also A_log --also conv1d "
        "--override *.A_log=0.7 -o out",
    }


def _smaller() -> dict[str, str]:
    """Runs of ``shrink``."""
    groups = "flap group-wanda group-magnitude llm-pruner llm-pruner-second llm-pruner-mix"
    options = {
        "width": "--keep 0.75 --width-only",
        "depth": "--keep 0.75 --depth-only",
        "size": "--size channels=256 --size heads=4",
        "blocks": "--blocks 3",
        "drop": "--drop 1 --drop 2",
        "multiple": "--keep 0.6 --width-only --multiple-of 16 --no-compensate",
        "shrink-json": "--keep 0.75 --eval builtin --json",
        "shrink-best": "--keep 0.75 --effort best --own-samples 1",
        "shrink-dry-run": "--keep 0.75 --dry-run",
        "shrink-saved": "--size channels=256 --drop 1 --effort fast --save-config options.toml",
        "search": "--keep 0.75 --search --evaluations 8",
        "search-killed": "--keep 0.75 --search --evaluations 8",
        "stream-shrink": "--keep 0.75 --stream",
        "stream-shrink-killed": "--keep 0.75 --stream",
    }
    return {
        **{name: f"{SHRINK} {words}" for name, words in options.items()},
        **{
            f"groups-{method}": f"{SHRINK} --keep 0.75 --width-only --method {method}"
            for method in (*groups.split(), "llm-pruner-vector")
        },
        **{
            f"blocks-{method}": f"{SHRINK} --blocks 3 --method {method}"
            for method in ("loss", "block-influence", "last")
        },
        **{
            f"smaller-{family}": f"shrink zoo:{family} {SMALL} --keep 0.75 -o out"
            for family in ("opt", "bloom", "mamba", "mamba2")
        },
        "shrink-config": "shrink --config ../shrink-saved/options.toml -o out2",
        "shrink-pruned": f"prune ../width/out {SMALL} --pattern 2:4 --method wanda -o out",
    }


def _recovered() -> dict[str, str]:
    """Runs of ``recover`` and of ``reapply``."""
    checked = f"{RECOVER} --checks 4"
    return {
        "recover-spp": f"{RECOVER} --kind spp --rank 4 --dropout 0.1 --rate 2e-2",
        "recover-lora": f"{RECOVER} --kind lora",
        "recover-layers": f"{RECOVER} --kind layers --blocks 1 --rate 1e-3 --eval builtin "
        "--save-masks --json",
        "recover-distill": f"{RECOVER} --samples-at-once 1 --seed 2",
        "recover-hidden": f"{RECOVER} --hidden 0.5 --top 8 --rate 1e-3 --gradient-checkpointing "
        "--held-back 0.2 --checks 2",
        "recover-moved": f"{RECOVER} --kind layers --move-masks --rate 1e-3",
        "recover-window": f"{RECOVER} --window 2 --rate 1e-3",
        "recover-tokens": f"{RECOVER.replace('--steps 8', '--tokens 1024')} --kind layers",
        "recover-smaller": f"{RECOVER.replace('admm-2to4', 'width')} --calibration {TEXT} "
        "--rate 1e-3",
        "recover-mamba": RECOVER.replace("admm-2to4", "mamba-2to4") + " --kind layers",
        "recover-layers-killed": f"{checked} --kind layers",
        "recover-distill-killed": checked,
        "reapply": "reapply ../masks/out zoo:llama -o out",
        "reapply-directory": "reapply ../admm-2to4/out ../recover-layers/out -o out --json "
        "--max-shard-size 1MB",
        "law": "law ../recover-layers/out ../recover-distill/out ../recover-tokens/out "
        "--resamples 4",
        "law-json": "law ../recover-layers/out ../recover-distill/out --tokens 1000 --json",
    }


def _others() -> dict[str, str]:
    """The commands about pruned models."""
    return {
        "compare": f"{COMPARE} --methods magnitude,wanda,admm:fast,wanda/owl --patterns 0.5,2:4",
        "compare-json": f"{COMPARE} --methods ss --patterns 0.7 --data {TEXT} --data builtin "
        "--metric divergence --metric perplexity --with ../admm-2to4/out --json",
        "compare-killed": f"{COMPARE} --methods magnitude,wanda,ss --patterns 0.5",
        "report": "report ../admm-2to4/out ../width/out ../compare/out -o page.html",
        "report-text": f"report ../recover-layers/out --text {TEXT} --prompts 2 -o page.html",
        "report-json": "report ../stream/out ../search/out --json",
        "pack": "pack ../admm-2to4/out -o out",
        "pack-json": "pack ../admm-0.5/out -o out --json",
        "pack-int4": "pack ../admm-2to4/out -o out --quantize int4 --group 64",
        "pack-int8": "pack ../admm-0.5/out -o out --quantize int8 --group row",
        "pack-rounded": "pack ../int4/out -o out",
        "pack-compressed": "pack ../int4/out -o out --format compressed-tensors",
        "unpack": "unpack ../pack-int4/out -o out",
        "unpack-json": "unpack ../pack/out -o out --json",
        "convert": "convert zoo:mamba -o out --dtype float32",
        "convert-json": "convert ../admm-0.5/out -o out --json",
        "eval": "eval ../admm-2to4/out --seqlen 64 --samples 4",
        "eval-dense": "eval ../admm-2to4/out --dense zoo:llama --seqlen 64 --samples 4 --json "
        f"--metric perplexity --metric accuracy --metric divergence --metric agreement "
        f"--data {TEXT}",
        "eval-tasks": "eval ../admm-2to4/out --tasks local_piqa,local_boolq --limit 2 "
        "--dense zoo:llama --json",
        "eval-stream": "eval zoo:llama --stream --seqlen 64 --samples 4 --no-bos",
        "eval-packed": "eval ../pack-int4/out --seqlen 64 --samples 4 --json",
        "verify": "verify ../admm-2to4/out",
        "verify-json": "verify ../override/out --json",
        "verify-pattern": "verify ../skip/out --sparsity 0.5 --skip *.self_attn.* --json",
        "verify-wrong": "verify ../admm-0.5/out --pattern 2:4",
        "verify-smaller": "verify ../depth/out --json",
        "verify-packed": "verify ../pack/out",
        "verify-recovered": "verify ../recover-spp/out",
        "inspect": "inspect zoo:llama",
        "inspect-json": "inspect zoo:mamba2 --pattern 2:4 --skip *.out_proj --stream --json",
        "check": "check opt --json",
        "methods": "methods --json",
        "adapters": "adapters --json",
    }


def _refused() -> dict[str, str]:
    """Commands with mistakes."""
    mistakes = {
        "effort": "--method wanda --effort best",
        "alpha": "--alpha 2",
        "epochs": "--tuning-epochs -1",
        "random": "--random-tokens x",
        "method": "--method wando",
        "method-other": "--method joint",
        "allocation": "--pattern 2:4 --allocation owl",
        "per": "--sparsity 0.5 --per block --allocation owl",
        "both": "--sparsity 0.5 --pattern 2:4",
        "pattern": "--pattern 4:2",
        "only": "--only nothing.*",
        "group": "--quantize int4 --group 3",
        "seqlen": "--seqlen 1",
        "disk": "--activations disk",
        "dtype": "--dtype int3",
        "shard": "--max-shard-size 5",
        "metric": "--eval builtin --metric divergence",
        "text": "--calibration nowhere.txt",
    }
    return {
        **{f"refused-{name}": f"{PRUNE} {words}" for name, words in mistakes.items()},
        "refused-json": f"{PRUNE} --alpha 2 --json",
        "refused-exists": "pack ../admm-2to4/out -o ../width/out",
        "refused-keep": f"{SHRINK} --keep 2",
        "refused-size": f"{SHRINK} --size rooms=2",
        "refused-dense": "recover zoo:llama --kind spp -o out",
        "refused-steps": f"{RECOVER} --steps 0",
        "refused-rank": f"{RECOVER} --kind layers --rank 4",
        "refused-amounts": f"{RECOVER} --steps 2 --minutes 1",
        "refused-compare": f"{COMPARE} --methods nonsense",
        "refused-option": f"{PRUNE} --smaples 4",
    }


def models(folder: Path) -> None:
    """Write the small random models of `FAMILIES` with the tokenizer of ``zoo:llama``."""
    import torch
    import transformers

    from apt.testing import embedded

    shared = {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    more: dict[str, dict[str, Any]] = {
        "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "head_dim": 16,
                      "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                  "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
                  "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
                      "head_dim": 16},
    }  # fmt: skip
    _, tokenizer = embedded("llama")
    for family in FAMILIES:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **shared, **more.get(family, {}))
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)


def _pruned_in_memory(**arguments: Any) -> Callable[[Path], None]:
    def program(folder: Path) -> None:
        import apt
        from apt.testing import embedded

        model, tokenizer = embedded("llama")
        tokens = apt.calibration_tokens(tokenizer, samples=4, seqlen=64, seed=1)
        options = {**arguments, "options": apt.PruneOptions(**arguments.get("options", {}))}
        pruned, report = apt.prune_copy(model, tokens, tokenizer=tokenizer, seed=1, **options)
        pruned.save_pretrained(folder / "out")
        report.write(folder)

    return program


def _shrunk_in_memory(**arguments: Any) -> Callable[[Path], None]:
    def program(folder: Path) -> None:
        import apt
        from apt.testing import embedded

        model, tokenizer = embedded("llama")
        tokens = apt.calibration_tokens(tokenizer, samples=4, seqlen=64, seed=1)
        size = apt.ShrinkOptions(**arguments)
        smaller, report = apt.shrink(model, tokens, size=size, tokenizer=tokenizer, seed=1)
        smaller.save_pretrained(folder / "out")
        report.write(folder)

    return program


def _recovered_in_memory(kind: str, rate: float | None = None) -> Callable[[Path], None]:
    def program(folder: Path) -> None:
        import json
        from dataclasses import asdict

        import apt
        from apt.testing import embedded

        model, tokenizer = embedded("llama")
        tokens = apt.calibration_tokens(tokenizer, samples=4, seqlen=64, seed=1)
        pruned, _ = apt.prune_copy(model, tokens, pattern="2:4", method="wanda")
        options = apt.RecoverOptions(steps=8, batch=2, rate=rate)
        training = apt.recover(pruned, tokens, kind=kind, dense=model, options=options, seed=1)
        pruned.save_pretrained(folder / "out")
        (folder / "training.json").write_text(json.dumps(asdict(training)))

    return program


def _own_text(folder: Path) -> None:
    import json

    import apt
    from apt.testing import embedded

    model, tokenizer = embedded("llama")
    own = apt.own_text(model, samples=2, seqlen=32, seed=1)
    held_out = apt.evaluation_tokens(tokenizer, "builtin", samples=4, seqlen=64)
    values = {"own": own.tolist(), "perplexity": apt.perplexity(model, held_out),
              "accuracy": apt.accuracy(model, held_out)}  # fmt: skip
    (folder / "values.json").write_text(json.dumps(values))


PROGRAMS: dict[str, Callable[[Path], None]] = {
    "program-prune": _pruned_in_memory(pattern="2:4"),
    "program-fast": _pruned_in_memory(pattern="0.5", options={"effort": "fast", "alpha": 0.5}),
    "program-wanda": _pruned_in_memory(pattern="0.5", method="wanda", allocation="owl"),
    "program-auto": _pruned_in_memory(pattern="auto:8@0.5", options={"own_samples": 1}),
    "program-alpha": _pruned_in_memory(pattern="0.5", options={"alpha": 2}),
    "program-width": _shrunk_in_memory(keep=0.75),
    "program-blocks": _shrunk_in_memory(blocks=3),
    "program-layers": _recovered_in_memory("layers"),
    "program-distill": _recovered_in_memory("distill"),
    "program-spp": _recovered_in_memory("spp", 1e-2),
    "program-text": _own_text,
}
"""Programs by name; each one gets its folder."""
