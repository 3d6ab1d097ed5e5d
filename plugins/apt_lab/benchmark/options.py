"""The options of a benchmark. This module imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from apt.errors import AptError


@dataclass(frozen=True)
class Setting:
    """The way in which all models are loaded.

    Attributes:
        adapter: the adapter; None for the one of the model's type.
        device: the device; ``"auto"`` uses a GPU if there is one.
        dtype: the dtype of the weights; ``"auto"`` keeps that of the checkpoint.
        threads: the number of CPU threads; None for the default of torch.
    """

    adapter: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Work:
    """The tokens that each model processes in a round.

    Attributes:
        prompt: the tokens of a prompt.
        generate: the tokens that are generated after it.
        batches: the numbers of sequences that are processed together, each in a run of its own.
    """

    prompt: int = 512
    generate: int = 64
    batches: tuple[int, ...] = (1, 8)

    def fitted(self, positions: Mapping[str, int | None], notice: Callable[[str], None]) -> "Work":
        """The same work, with a prompt that fits the positions of every model.

        All models receive the same number of tokens, since their speeds are compared.

        Args:
            positions: the positions of each model by its name; None if unlimited.
            notice: called with a line if the prompt is shortened.

        Raises:
            AptError: a model has too few positions for the generated tokens.
        """
        limits = {name: most for name, most in positions.items() if most is not None}
        if not limits:
            return self
        name = min(limits, key=limits.__getitem__)
        room = limits[name] - self.generate
        if room < 1:
            raise AptError(
                f"{name} has {limits[name]} positions, too few for a prompt and {self.generate} "
                "generated tokens",
                "generate fewer",
                ("generate",),
            )
        if self.prompt <= room:
            return self
        notice(
            f"prompt: {room} tokens (not {self.prompt}: {name} has {limits[name]} positions, and "
            f"{self.generate} tokens are generated)"
        )
        return replace(self, prompt=room)
