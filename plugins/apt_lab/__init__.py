"""The commands that measure and compare models, through the hook `apt_commands`."""

from apt.hookspecs import CommandSpec, hookimpl


@hookimpl
def apt_commands() -> list[CommandSpec]:
    """The commands that measure, compare and show what APT and other tools have pruned."""
    return [
        CommandSpec(
            "eval", "Measure a model over consecutive windows of text, or let it answer tasks.",
            "apt_lab.commands.evaluate:evaluate",
        ),
        CommandSpec(
            "compare", "Compare methods and patterns on one model.",
            "apt_lab.commands.compare:compare",
        ),
        CommandSpec(
            "bench", "Measure speed and memory of one or several models.",
            "apt_lab.commands.bench:bench",
        ),
        CommandSpec(
            "report",
            "Write one HTML page about pruned models and comparisons, which needs no network.",
            "apt_lab.commands.report:report",
        ),
        CommandSpec(
            "law", "Predict how many training tokens a recovery needs.",
            "apt_lab.commands.law:law",
        ),
    ]  # fmt: skip
