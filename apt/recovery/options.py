"""The options of a recovery."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from apt.errors import AptError
from apt.plugin.specs import RecoverySpec

_OF_KINDS = ("rank", "dropout", "blocks", "move_masks", "hidden", "top")


@dataclass(frozen=True)
class RecoverOptions:
    """The options that the result of a recovery depends on, beside the text.

    Exactly one of ``steps``, ``tokens`` and ``minutes`` decides how long it trains; 1,000 steps if
    none is given.

    Args:
        steps: the number of optimizer steps.
        tokens: the number of training tokens; ``"auto"`` trains until the law of ``apt-prune law``
            predicts that more tokens hardly lower the loss.
        minutes: the time for the training, including the outputs of the dense model.
        rate: the highest learning rate; by default that of the kind. It rises over the first 3 % of
            the steps, and falls along a cosine.
        batch: the number of samples of a step, over all processes.
        samples_at_once: the number of samples that a process runs at once. A step of more samples
            adds their gradients.
        held_back: the share of the samples that is held back to measure the loss.
        checks: the number of times that the loss is measured and the state is saved.
        patience: the number of measurements without a lower loss after which training stops.
        optimizer: the name of an optimizer of transformers' ``TrainingArguments``, such as
            ``"adamw_torch"``, ``"adafactor"`` or ``"adamw_bnb_8bit"``.
        checkpointing: True to compute activations again in the backward pass, which saves memory.
        rank: the rank of adapters (kinds spp and lora); by default that of the kind.
        dropout: the dropout of the inputs of the adapters (kind spp); the authors' code has 0.05.
        blocks: the number of last blocks that the kind layers trains.
        move_masks: True if masks may change during the training, with exact counts, see
            recovery.md, "Masks that move" (kinds layers and distill).
        hidden: the weight of the error of the last hidden states, beside that of the logits (kind
            distill).
        top: the number of logits of the dense model that are kept for each token (kind distill).
        window: the number of neighbouring blocks that are trained at a time, from the first to the
            last, see recovery.md, "Memory"; None to train all together.
    """

    steps: int | None = None
    tokens: int | str | None = None
    minutes: float | None = None
    rate: float | None = None
    batch: int = 8
    samples_at_once: int = 8
    held_back: float = 0.05
    checks: int = 10
    patience: int = 3
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    rank: int | None = None
    dropout: float = 0.0
    blocks: int = 3
    move_masks: bool = False
    hidden: float = 1.0
    top: int = 64
    window: int | None = None

    def check(self) -> None:
        """Raise if an option is out of range.

        Raises:
            AptError: an option is out of range, or more than one says how long to train.
        """
        given = [n for n in ("steps", "tokens", "minutes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise AptError(f"{' and '.join(given)} exclude each other", "choose one", given)
        if isinstance(self.tokens, str) and self.tokens != "auto":
            raise AptError(f"tokens is '{self.tokens}'", "write a number, or auto", ("tokens",))
        for name in (
            "steps",
            "tokens",
            "batch",
            "samples_at_once",
            "checks",
            "patience",
            "rank",
            "blocks",
            "top",
            "window",
        ):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise AptError(f"{name} is {value}; it must be at least 1", "", (name,))
        if self.move_masks and self.window is not None:
            raise AptError(
                "move_masks and window exclude each other", "choose one", ("move_masks", "window")
            )
        for name in ("minutes", "rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise AptError(f"{name} is {value}; it must be above 0", "", (name,))
        if not 0 < self.held_back < 1:
            raise AptError(
                f"held_back is {self.held_back}; it must be between 0 and 1", "", ("held_back",)
            )
        if not 0 <= self.dropout < 1:
            raise AptError(f"dropout is {self.dropout}; it must be in [0, 1)", "", ("dropout",))
        if not 0 <= self.hidden < float("inf"):
            raise AptError(f"hidden is {self.hidden}; it must not be negative", "", ("hidden",))

    def check_used(self, spec: RecoverySpec, known: Iterable[RecoverySpec]) -> None:
        """Raise for an option that a kind of recovery does not use.

        Args:
            spec: the kind.
            known: all kinds, to name those that use the option.

        Raises:
            AptError: an option has another value than its default, and ``spec`` does not use it.
        """
        default, used = RecoverOptions(), _OF_KINDS if spec.options is None else spec.options
        for name in _OF_KINDS:
            if name not in used and getattr(self, name) != getattr(default, name):
                others = ", ".join(kind.name for kind in known if name in (kind.options or ()))
                raise AptError(
                    f"recovery {spec.name} does not use {name}", f"kinds with it: {others}", (name,)
                )

    def record(self) -> dict[str, Any]:
        """The options as values for JSON."""
        return asdict(self)
