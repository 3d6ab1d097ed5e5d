"""The methods, allocations, text sources and metrics that ship with APT."""

from typing import Any

from apt.hookspecs import (
    AllocationSpec,
    CalibrationSpec,
    EvaluatorSpec,
    ExportSpec,
    MethodSpec,
    PatternSpec,
    QuantisedFormatSpec,
    RecoverySpec,
    ShrinkMethodSpec,
    hookimpl,
)

_APT = "arXiv 2410.15567"


@hookimpl
def apt_methods() -> list[MethodSpec]:
    """The default method, the paper's four methods, and baselines."""
    return [
        MethodSpec(
            "admm", "mask by over-relaxed ADMM with restarts, weights solved jointly",
            "apt.solver:admm", 100, "after arXiv 2410.15567 and 2406.07831",
            error_aware=True, efforts=True, patterns=None,
        ),
        MethodSpec(
            "ss", "mask and weights by single removal: SparseGPT", "apt.solver:ss", 30,
            "arXiv 2301.00774", patterns=None,
        ),
        MethodSpec("sm", "SparseGPT's mask, weights solved jointly", "apt.solver:sm", 60, _APT,
                   blocks=True, patterns=None),
        MethodSpec("ms", "mask of joint removal (n:m), weights column by column", "apt.solver:ms",
                   40, _APT),
        MethodSpec("mm", "mask of joint removal (n:m), weights solved jointly", "apt.solver:mm",
                   50, _APT, blocks=True),
        MethodSpec("magnitude", "the smallest |w|, no update", "apt_plugins.baselines:magnitude",
                   10, "arXiv 1506.02626", factors=False, patterns=None),
        MethodSpec("wanda", "the smallest |w|·‖x‖, no update", "apt_plugins.baselines:wanda", 20,
                   "arXiv 2306.11695", per="row", factors=False, patterns=None),
        MethodSpec("sparseswaps", "Wanda's mask, improved by single swaps; no update",
                   "apt_plugins.sparseswaps:sparseswaps", 25, "arXiv 2512.10922", per="row",
                   factors=False),
        MethodSpec("dsnot", "Wanda's mask, refined by growing and pruning; no update",
                   "apt_plugins.dsnot:dsnot", 24, "arXiv 2310.08915", per="row", factors=False),
        MethodSpec("dsnot-exact", "DSnoT's mask, weights solved jointly",
                   "apt_plugins.dsnot:dsnot_exact", 35, "after arXiv 2310.08915", per="row"),
        MethodSpec("alps", "mask by ADMM, a few steps of joint weights", "apt_plugins.alps:alps",
                   70, "arXiv 2406.07831", patterns=None),
    ]  # fmt: skip


@hookimpl
def apt_patterns() -> list[PatternSpec]:
    """A share of the weights, and n:m."""
    return [
        PatternSpec("share", "a share of the weights, at any position: 0.5 or 50%",
                    "apt.patterns:Unstructured", "0.5"),
        PatternSpec("n:m", "n of every m consecutive inputs are kept: 2:4", "apt.patterns:NM",
                    "2:4", "arXiv 2104.08378"),
        PatternSpec("auto:m", "n:m with an n for each site: auto:8@0.5", "apt.patterns:MixedNM",
                    "auto:8@0.5"),
    ]  # fmt: skip


@hookimpl
def apt_shrink_methods() -> list[ShrinkMethodSpec]:
    """The default choice of groups and of blocks, and baselines."""
    groups, blocks = "apt_plugins.group_choices", "apt_plugins.block_choices"
    experts = "apt_plugins.expert_choices"
    aware: dict[str, Any] = {"error_aware": True, "efforts": True}
    model_wide: dict[str, Any] = {"efforts": True, "chooses": "groups", "streams": False}
    dropped: dict[str, Any] = {**aware, "chooses": "blocks"}
    routed: dict[str, Any] = {"chooses": "experts", "compensate": True, "efforts": True}
    pruner = "arXiv 2305.11627"
    return [
        ShrinkMethodSpec("joint", "groups by greedy joint removal, weights solved exactly",
                         "apt.solver:joint_removal", 100, "after arXiv 2410.15567",
                         efforts=True, compensate=True, random_tokens=0.25),
        ShrinkMethodSpec("group-magnitude", "groups of the smallest Σ w², no update",
                         f"{groups}:magnitude", 10, efforts=True),
        ShrinkMethodSpec("group-wanda", "groups of the smallest Σ ‖w_j‖² ‖x_j‖², no update",
                         f"{groups}:wanda", 30, "after arXiv 2306.11695", efforts=True),
        ShrinkMethodSpec("flap", "groups of the smallest Σ ‖w_j‖² Var(x_j), no update",
                         f"{groups}:flap", 40, "arXiv 2312.11983", **model_wide),
        ShrinkMethodSpec("llm-pruner", "groups of the smallest Σ |w ∂L/∂w|, no update",
                         f"{groups}:llm_pruner", 20, pruner, **model_wide),
        ShrinkMethodSpec("llm-pruner-vector", "groups of the smallest Σ |Σ w ∂L/∂w|, no update",
                         f"{groups}:llm_pruner_vector", 15, pruner, **model_wide),
        ShrinkMethodSpec("llm-pruner-second", "groups of the smallest Σ (w ∂L/∂w)², no update",
                         f"{groups}:llm_pruner_second", 22, pruner, **model_wide),
        ShrinkMethodSpec("llm-pruner-mix",
                         "groups of the smallest Σ |w ∂L/∂w − ½ (w ∂L/∂w)²|, no update",
                         f"{groups}:llm_pruner_mix", 21, pruner, **model_wide),
        ShrinkMethodSpec("expert-joint", "experts whose tokens the others serve best, jointly",
                         "apt.pruning.expert_choice:joint_experts", 90, **routed),
        ShrinkMethodSpec("reap", "experts of the smallest mean of g ‖f(x)‖", f"{experts}:reap", 40,
                         "arXiv 2510.13999", **routed),
        ShrinkMethodSpec("expert-effect", "experts of the smallest Σ ‖g f(x)‖² / ‖h‖²",
                         f"{experts}:by_effect", 100, **routed),
        ShrinkMethodSpec("expert-frequency", "experts of the fewest tokens",
                         f"{experts}:by_frequency", 30, "arXiv 2206.00277", **routed),
        ShrinkMethodSpec("expert-merge", "the experts of reap, averaged into others that are alike",
                         f"{experts}:reap", 35, "after arXiv 2604.04356 and 2410.08589",
                         merges=True, **routed),
        ShrinkMethodSpec("last", "the last blocks", f"{blocks}:last", 10, "arXiv 2411.15558",
                         **dropped),
        ShrinkMethodSpec("angular", "consecutive blocks over which the stream turns least",
                         f"{blocks}:angular", 100, "arXiv 2403.17887", **dropped),
        ShrinkMethodSpec("block-influence", "the blocks that change the stream's direction least",
                         f"{blocks}:block_influence", 30, "arXiv 2403.03853", **dropped),
        ShrinkMethodSpec("loss", "one by one, the block without which the loss is lowest",
                         f"{blocks}:by_loss", 40, "arXiv 2402.09025", **dropped, streams=False),
    ]  # fmt: skip


@hookimpl
def apt_exports() -> list[ExportSpec]:
    """GGUF."""
    return [
        ExportSpec(
            "gguf", "for llama.cpp and Ollama, with metadata and tokenizer",
            "apt_plugins.gguf_files.export:export", ".gguf",
            (
                "f32", "bf16", "f16", "q8_0", "q6_K", "q5_1", "q5_K", "q5_0", "q4_1", "q4_K",
                "q4_0", "iq4_nl", "mxfp4", "iq4_xs", "q3_K", "q2_K",
            ),
            ("gguf",), "pip install 'apt-prune[gguf]'", "apt_plugins.gguf_files.export:check",
            "apt_plugins.gguf_files.file_form:file_form",
        )
    ]  # fmt: skip


@hookimpl
def apt_quantised_formats() -> list[QuantisedFormatSpec]:
    """GGUF, and directories of safetensors files in the common formats of quantised weights."""
    return [
        QuantisedFormatSpec(
            "gguf", "files of llama.cpp and Ollama, in all their types of numbers",
            "apt_plugins.gguf_files.quantised:open_file",
        ),
        QuantisedFormatSpec(
            "safetensors",
            "FP8, MXFP4, compressed-tensors, AWQ, GPTQ, bitsandbytes in 4 bits, and MLX",
            "apt_plugins.quantised_directories.opening:open_directory",
        ),
    ]  # fmt: skip


@hookimpl
def apt_allocations() -> list[AllocationSpec]:
    """The same sparsity for all sites, published allocations, and APT's own."""
    published, budgeted = "apt_plugins.allocations", "apt_plugins.budget"
    return [
        AllocationSpec("uniform", "the same for every site", f"{published}:uniform"),
        AllocationSpec("owl", "less for blocks with more outliers", f"{published}:owl",
                       "arXiv 2310.05175"),
        AllocationSpec("alphapruning", "less for blocks with heavy-tailed spectra",
                       f"{published}:alphapruning", "arXiv 2410.10912"),
        AllocationSpec("alphapruning-matrix", "less for matrices with heavy-tailed spectra",
                       f"{published}:alphapruning_matrix", "arXiv 2410.10912"),
        AllocationSpec("alphapruning-mid", "alphapruning by the upper halves of the spectra",
                       f"{published}:alphapruning_mid", "arXiv 2410.10912"),
        AllocationSpec("atp", "more from block to block, in an arithmetic progression",
                       f"{published}:atp", "arXiv 2502.14770", streams=False),
        AllocationSpec("auto", "by what the last weight of each site costs the model's output",
                       f"{budgeted}:auto", "after arXiv 2410.14649"),
        AllocationSpec("auto-search", "auto, refined by evolutionary search on the loss",
                       "apt_plugins.level_search:auto_search", "after arXiv 2410.14649",
                       streams=False),
        AllocationSpec("auto-block", "the same, with equal sparsities of the blocks",
                       f"{budgeted}:auto_block", "after arXiv 2410.14649"),
    ]  # fmt: skip


@hookimpl
def apt_recoveries() -> list[RecoverySpec]:
    """Adapters that keep zeros, the last layers, and distillation."""
    kinds = "apt_plugins.recoveries"
    return [
        RecoverySpec("spp", "adapters that multiply the kept weights", f"{kinds}:spp",
                     "arXiv 2405.16057", 4e-3, zeros=True,
                     options=("rank", "dropout", "save_adapter")),
        RecoverySpec("lora", "LoRA with a masked update", f"{kinds}:lora",
                     "arXiv 2106.09685", 1e-3, options=("rank", "save_adapter")),
        RecoverySpec("layers", "the head, the final norm and the last blocks", f"{kinds}:layers",
                     "arXiv 2411.15558", 1e-4, dense=True, options=("blocks", "move_masks")),
        RecoverySpec("distill", "the kept weights of all blocks, towards the dense model",
                     f"{kinds}:distill", "after arXiv 1503.02531", 2e-4, teacher=True,
                     options=("hidden", "top", "move_masks")),
        RecoverySpec("norms", "norms and biases alone, towards the dense model", f"{kinds}:norms",
                     "after arXiv 2309.02784", 2e-3, teacher=True, options=("top",)),
    ]  # fmt: skip


@hookimpl
def apt_evaluators() -> list[EvaluatorSpec]:
    """Perplexity and accuracy, divergence from the dense model and agreement with it."""
    return [
        EvaluatorSpec(
            "perplexity", "exp of the mean loss per token", "apt.evaluation:perplexity",
            mean="geometric",
        ),
        EvaluatorSpec(
            "accuracy", "share of tokens, or of classes of samples, that are ranked first",
            "apt.evaluation:accuracy", "higher", mean="arithmetic", reads="both",
        ),
        EvaluatorSpec(
            "divergence", "mean Kullback-Leibler divergence from the dense model, in nats",
            "apt.evaluation:divergence", dense=True, mean="arithmetic",
        ),
        EvaluatorSpec(
            "agreement", "share of tokens that the dense model ranks first too",
            "apt.evaluation:agreement", "higher", dense=True, mean="arithmetic",
        ),
        EvaluatorSpec(
            "pseudo-perplexity", "exp of the mean loss of masked tokens",
            "apt.evaluation.outputs:pseudo_perplexity", reads="samples",
        ),
        EvaluatorSpec(
            "similarity", "mean cosine of the vectors to those of the dense model",
            "apt.evaluation.outputs:similarity", "higher", dense=True, mean="arithmetic",
            reads="samples",
        ),
        EvaluatorSpec(
            "neighbours", "share of the ten nearest samples that are the dense model's too",
            "apt.evaluation.outputs:neighbours", "higher", dense=True, reads="samples",
        ),
        EvaluatorSpec(
            "predictions", "share of predicted tokens or classes that are the dense model's too",
            "apt.evaluation.outputs:same_predictions", "higher", dense=True, mean="arithmetic",
            reads="samples",
        ),
        EvaluatorSpec(
            "spearman", "rank correlation of the cosines of pairs of texts with their scores",
            "apt.evaluation.outputs:spearman", "higher", reads="samples",
        ),
        EvaluatorSpec(
            "token-changes", "changed tokens of what the model writes, for each dense token",
            "apt.evaluation.outputs:token_changes", dense=True, reads="samples",
        ),
    ]  # fmt: skip


@hookimpl
def apt_calibrations() -> list[CalibrationSpec]:
    """The embedded texts, kinds of text on the hub, and the usual data sets of the literature."""
    texts, generated = "apt_plugins.texts", "apt_plugins.generated_texts"
    others = "apt_plugins.pictures_and_sounds"
    wikipedia = "Wikipedia, CC BY-SA 4.0"
    return [
        CalibrationSpec("builtin", "summaries of Wikipedia articles, embedded",
                        f"{texts}:builtin", wikipedia,
                        images=f"{others}:pictures", sounds=f"{others}:sounds"),
        CalibrationSpec("builtin:wiki", "the same as builtin", f"{texts}:builtin", wikipedia),
        CalibrationSpec("builtin:chat", "conversations about Wikipedia articles, generated",
                        f"{generated}:chat", wikipedia),
        CalibrationSpec("builtin:code", "modules of Python's standard library, embedded",
                        f"{texts}:code", "CPython 3.11.7, PSF-2.0"),
        CalibrationSpec("builtin:math", "problems of mathematics with solutions, generated",
                        f"{generated}:mathematics", "APT, Apache-2.0"),
        CalibrationSpec("chat", "UltraChat 200k: conversations", f"{texts}:hub_chat",
                        "hub: HuggingFaceH4/ultrachat_200k"),
        CalibrationSpec("code", "Evol-CodeAlpaca: tasks with solutions", f"{texts}:hub_code",
                        "hub: theblackcat102/evol-codealpaca-v1"),
        CalibrationSpec("math", "GSM8K: word problems with solutions", f"{texts}:hub_math",
                        "hub: openai/gsm8k"),
        CalibrationSpec("wiki", "WikiText-103, raw", f"{texts}:hub_wiki",
                        "hub: Salesforce/wikitext"),
        CalibrationSpec("wikitext2", "WikiText-2, raw", "apt_plugins.texts:wikitext2",
                        "hub: Salesforce/wikitext"),
        CalibrationSpec("ptb", "Penn Treebank", "apt_plugins.texts:ptb",
                        "hub: ptb-text-only/ptb_text_only"),
        CalibrationSpec("c4", "C4, English", "apt_plugins.texts:c4", "hub: allenai/c4"),
    ]  # fmt: skip
