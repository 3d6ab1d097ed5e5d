"""APT's own commands. ``apt-prune --help`` lists the commands of plugins between the groups."""

from apt.plugin.specs import CommandSpec


def _in_cli(name: str, summary: str, module: str = "") -> CommandSpec:
    return CommandSpec(name, summary, f"apt.cli.{module or name}:{name}")


MODELS = (
    _in_cli("prune", "Prune a model and write a Hugging Face directory."),
    _in_cli("fit", "Write the best file or packed directory of a given size, or of a given speed."),
    _in_cli("shrink", "Make a smaller dense model, which plain transformers opens."),
    _in_cli("recover", "Train the kept weights of a pruned model; every zero stays zero."),
    _in_cli("reapply", "Set the weights to zero again that a fine-tuning has filled."),
    _in_cli(
        "pack", "Write a pruned model without its zeros: smaller on disk and in memory.", "packing"
    ),
    _in_cli(
        "unpack",
        "Write a packed model as a dense one, for plain transformers and other tools.",
        "packing",
    ),
    _in_cli("export", "Write a model in the file format of other software: GGUF for llama.cpp."),
    _in_cli("inspect", "Show the blocks and sites of a model."),
    _in_cli("verify", "Check a model on disk: its files, and the zeros of every site."),
    _in_cli("check", "Check an adapter."),
    _in_cli("convert", "Convert a model to the format of transformers."),
)
"""The commands for models and adapters."""

MACHINE = (
    _in_cli("doctor", "Show the state of this machine, packages and plugins.", "installed"),
    _in_cli("adapters", "List the supported model families.", "installed"),
    _in_cli("methods", "List methods, patterns, allocations and kinds of recovery.", "installed"),
    _in_cli("plugins", "List the installed plugins.", "installed"),
)
"""The commands about the machine and the installed packages."""

OWN = MODELS + MACHINE
