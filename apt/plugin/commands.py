"""APT's own commands. Those of plugins come after the first group, in ``apt-prune --help``."""

from apt.plugin.specs import CommandSpec

MODELS = tuple(
    CommandSpec(name, summary, f"apt.cli.{target}")
    for name, summary, target in (
        ("prune", "Prune a model and write a Hugging Face directory.", "prune:prune"),
        (
            "shrink", "Make a smaller dense model, which plain transformers opens.",
            "shrink:shrink",
        ),
        (
            "recover", "Train the kept weights of a pruned model; every zero stays zero.",
            "recover:recover",
        ),
        (
            "reapply", "Set the weights to zero again that a fine-tuning has filled.",
            "reapply:reapply",
        ),
        (
            "pack", "Write a pruned model without its zeros: smaller on disk and in memory.",
            "packing:pack",
        ),
        (
            "unpack",
            "Write a packed model as a dense one, for plain transformers and other tools.",
            "packing:unpack",
        ),
        ("inspect", "Show the blocks and sites of a model.", "inspect:inspect"),
        (
            "verify", "Check a model on disk: its files, and the zeros of every site.",
            "verify:verify",
        ),
        ("check", "Check an adapter.", "check:check"),
        ("convert", "Convert a model to the format of transformers.", "convert:convert"),
    )
)  # fmt: skip
"""The commands for models and adapters."""

MACHINE = tuple(
    CommandSpec(name, summary, f"apt.cli.{name}:{name}")
    for name, summary in (
        ("doctor", "Show the state of this machine, packages and plugins."),
        ("adapters", "List the supported model families."),
        ("methods", "List methods, allocations and kinds of recovery."),
        ("plugins", "List the installed plugins."),
    )
)
"""The commands about what is installed."""

OWN = MODELS + MACHINE
