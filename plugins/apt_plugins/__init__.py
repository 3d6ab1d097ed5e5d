"""The methods, allocations, text sources and metrics that ship with APT."""

from apt.hookspecs import AllocationSpec, CalibrationSpec, EvaluatorSpec, MethodSpec, hookimpl

_APT = "arXiv 2410.15567"


@hookimpl
def apt_methods() -> list[MethodSpec]:
    """The default method, the paper's four methods, and baselines."""
    return [
        MethodSpec(
            "admm", "mask by over-relaxed ADMM with restarts, weights solved jointly",
            "apt.solver:admm", 100, "after arXiv 2410.15567 and 2406.07831",
            error_aware=True, efforts=True,
        ),
        MethodSpec(
            "ss", "mask and weights by single removal: SparseGPT", "apt.solver:ss", 30,
            "arXiv 2301.00774",
        ),
        MethodSpec("sm", "SparseGPT's mask, weights solved jointly", "apt.solver:sm", 60, _APT,
                   blocks=True),
        MethodSpec("ms", "mask of joint removal (n:m), weights column by column", "apt.solver:ms",
                   40, _APT),
        MethodSpec("mm", "mask of joint removal (n:m), weights solved jointly", "apt.solver:mm",
                   50, _APT, blocks=True),
        MethodSpec("magnitude", "the smallest |w|, no update", "apt_plugins.baselines:magnitude",
                   10, "arXiv 1506.02626"),
        MethodSpec("wanda", "the smallest |w|·‖x‖, no update", "apt_plugins.baselines:wanda", 20,
                   "arXiv 2306.11695", per="row"),
        MethodSpec("sparseswaps", "Wanda's mask, improved by single swaps; no update",
                   "apt_plugins.sparseswaps:sparseswaps", 25, "arXiv 2512.10922", per="row"),
        MethodSpec("alps", "mask by ADMM, a few steps of joint weights", "apt_plugins.alps:alps",
                   70, "arXiv 2406.07831"),
    ]  # fmt: skip


@hookimpl
def apt_allocations() -> list[AllocationSpec]:
    """The same sparsity for all sites, or less for blocks with more outliers."""
    return [
        AllocationSpec("uniform", "the same for every site", "apt_plugins.allocations:uniform"),
        AllocationSpec("owl", "less for blocks with more outliers", "apt_plugins.allocations:owl",
                       "arXiv 2310.05175"),
    ]  # fmt: skip


@hookimpl
def apt_evaluators() -> list[EvaluatorSpec]:
    """Perplexity and accuracy."""
    return [
        EvaluatorSpec("perplexity", "exp of the mean loss per token", "apt.evaluation:perplexity"),
        EvaluatorSpec(
            "accuracy", "share of tokens that are ranked first", "apt.evaluation:accuracy", "higher"
        ),
    ]  # fmt: skip


@hookimpl
def apt_calibrations() -> list[CalibrationSpec]:
    """The embedded corpus, and the three usual data sets of the literature."""
    return [
        CalibrationSpec(
            "builtin", "summaries of Wikipedia articles, embedded", "apt_plugins.texts:builtin",
            "Wikipedia, CC BY-SA 4.0",
        ),
        CalibrationSpec("wikitext2", "WikiText-2, raw", "apt_plugins.texts:wikitext2",
                        "hub: Salesforce/wikitext"),
        CalibrationSpec("ptb", "Penn Treebank", "apt_plugins.texts:ptb",
                        "hub: ptb-text-only/ptb_text_only"),
        CalibrationSpec("c4", "C4, English", "apt_plugins.texts:c4", "hub: allenai/c4"),
    ]  # fmt: skip
