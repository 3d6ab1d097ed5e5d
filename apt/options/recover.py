"""The options of a recovery."""

from typing import Any

from apt.errors import AptError
from apt.options.declaration import option, options
from apt.options.shared import (
    MINUTES,
    OUTPUT,
    RUNNING,
    TEXT,
    TIME_MEANING,
    TRAINING,
    Compute,
    ComputeOptions,
    DeviceOptions,
    MaskOptions,
    MeasuringOptions,
    ModelOptions,
    OutputOptions,
)

STEPS, BATCH = 1000, 8
"""The defaults of the number of steps, and of the samples of a step."""


def check_trainable(compute: Compute, options: tuple[str, ...]) -> None:
    """Raise for a dtype that a training cannot compute in; the error names ``options``."""
    if compute == "float16":
        raise AptError(
            "a training does not compute in float16: small gradients would be zero",
            "choose float32 or bfloat16",
            options,
        )


def read_amount(text: str) -> int | str:
    """A number of tokens, or ``auto``.

    Raises:
        AptError: it is neither.
    """
    if text == "auto":
        return text
    digits = text.replace("_", "")
    if not digits.isdecimal():
        raise AptError(
            f"tokens {text} is not a number of tokens", "write 1000000, or auto", ("tokens",)
        )
    return int(digits)


@options
class RecoverOptions(ComputeOptions):
    """The options that affect the result of a recovery, beside the text.

    At most one of ``steps``, ``tokens`` and ``minutes`` is given. The rate rises over the first 3 %
    of the steps, and falls along a cosine; with ``minutes``, it falls to zero within the time.
    """

    steps: int | None = option(
        f"Number of training steps; by default {STEPS}.",
        default=None, panel=TRAINING, metavar="N", within="[1, ∞)",
    )  # fmt: skip
    tokens: int | str | None = option(
        "Number of training tokens, in place of --steps. auto trains on the text once at "
        "most, and ends when more tokens would hardly lower the loss (models that predict the next "
        "token).",
        default=None, panel=TRAINING, metavar="N|auto", within="[1, ∞)", read=read_amount,
    )  # fmt: skip
    minutes: float | None = option(
        "Time for the training, with the outputs of the dense model, in place of --steps.",
        default=None, panel=TRAINING, metavar="M", within=MINUTES, meaning=TIME_MEANING,
    )  # fmt: skip
    rate: float | None = option(
        "Highest learning rate; the default depends on the kind.",
        default=None, panel=TRAINING, metavar="R", within="(0, ∞)",
    )  # fmt: skip
    batch: int | None = option(
        f"Samples of a step, over all processes. By default {BATCH}, and with --minutes fewer if "
        "there would be less than 400 steps.",
        default=None, panel=TRAINING, metavar="N", within="[1, ∞)",
    )  # fmt: skip
    micro_batch: int = option(
        "Samples that run together. Fewer need less memory; the result is the same.",
        default=8, panel=TRAINING, metavar="N", within="[1, ∞)", formerly="samples_at_once",
    )  # fmt: skip
    validation_share: float = option(
        "Share of the samples on which the loss is measured, and not trained; at most 64.",
        default=0.05, panel=TRAINING, metavar="S", within="(0, 1)", formerly="held_back",
    )  # fmt: skip
    checks: int = option(
        "Number of times that the loss is measured, and the state is saved.",
        default=10, panel=TRAINING, metavar="N", within="[1, ∞)",
    )  # fmt: skip
    patience: int = option(
        "Measurements without a lower loss after which the training ends.",
        default=3, panel=TRAINING, metavar="N", within="[1, ∞)",
    )  # fmt: skip
    optimizer: str = option(
        "Optimizer of transformers, for example adafactor or adamw_bnb_8bit, whose "
        "states are smaller.",
        default="adamw_torch_fused", panel=TRAINING, metavar="NAME",
    )  # fmt: skip
    checkpointing: bool = option(
        "Compute activations again in the backward pass, which needs less memory.",
        default=False, panel=TRAINING, flag="--gradient-checkpointing",
    )  # fmt: skip
    rank: int | None = option(
        "Rank of the adapters of spp and lora; by default 16.",
        default=None, panel=TRAINING, metavar="N", within="[1, ∞)", used_if="options",
    )  # fmt: skip
    dropout: float = option(
        "Dropout of the inputs of the adapters of spp; 0.05 in the authors' code.",
        default=0.0, panel=TRAINING, metavar="P", within="[0, 1)", used_if="options",
    )  # fmt: skip
    blocks: int = option(
        "Number of last blocks that layers trains.",
        default=3, panel=TRAINING, metavar="N", within="[1, ∞)", used_if="options",
    )  # fmt: skip
    move_masks: bool = option(
        "Train the pruned weights too, and move the zeros of each matrix to the weights of the "
        "least effect, with exact counts (kinds distill and layers).",
        default=False, panel=TRAINING, used_if="options",
    )  # fmt: skip
    hidden: float = option(
        "Weight of the error of the last hidden states in the loss of distill, and of models that "
        "do not predict the next token.",
        default=1.0, panel=TRAINING, metavar="W", within="[0, ∞)", used_if="options",
    )  # fmt: skip
    top: int = option(
        "Logits of the dense model that distill keeps for each token (models that predict the next "
        "token).",
        default=64, panel=TRAINING, metavar="N", within="[1, ∞)", used_if="options",
    )  # fmt: skip
    window: int | None = option(
        "Train N neighbouring blocks at a time, from the first to the last, which needs less "
        "memory; by default all together.",
        default=None, panel=TRAINING, metavar="N", within="[1, ∞)",
    )  # fmt: skip

    def check(self) -> None:
        """Raise `AptError` if an option is out of range, or options contradict each other."""
        super().check()
        check_trainable(self.compute, ("compute",))
        lengths = [n for n in ("steps", "tokens", "minutes") if getattr(self, n) is not None]
        if len(lengths) > 1:
            raise AptError(f"{' and '.join(lengths)} exclude each other", "choose one", lengths)
        if isinstance(self.tokens, str) and self.tokens != "auto":
            raise AptError(f"tokens is '{self.tokens}'", "write a number, or auto", ("tokens",))
        if self.move_masks and self.window is not None:
            raise AptError(
                "move masks and window exclude each other", "choose one", ("move_masks", "window")
            )


@options
class RecoverRun(
    RecoverOptions, ModelOptions, MeasuringOptions, DeviceOptions, OutputOptions, MaskOptions
):
    """The options of ``apt-prune recover``: a whole run from a pruned model to a recovered one."""

    model: str = option(
        "A pruned or smaller model: a directory, or a name on the hub.",
        positional=True, place=True,
    )  # fmt: skip
    kind: str | None = option(
        "spp, lora, layers or distill, or another kind listed by apt-prune methods. By "
        "default distill.",
        default=None, panel=TRAINING, metavar="NAME",
    )  # fmt: skip
    dense: str | None = option(
        "The dense model, for distill and norms, and for models that do not predict the next token "
        "with any kind; by default the one that the report names.",
        default=None, panel=TRAINING, metavar="MODEL", place=True, used_if="teacher",
    )  # fmt: skip
    samples: int | None = option(
        "Samples of the text at most; by default as many as the steps use, up to 10,000, or 1,000 "
        "images or sounds.",
        default=None, panel=TEXT, metavar="N", within="[1, ∞)",
    )  # fmt: skip
    seqlen: int = option(
        "Tokens of a sample; at most the model's positions.",
        default=512, panel=TEXT, within="[2, ∞)",
    )  # fmt: skip
    seed: int = option(
        "Seed for the order of the samples and for new adapters.", default=0, panel=TEXT
    )
    save_adapter: bool = option(
        "Also write the trained adapter of spp or lora in the format of peft: the folder adapter "
        "of the output. For lora the model must have no zeros.",
        default=False, panel=OUTPUT, used_if="options",
    )  # fmt: skip
    resume: bool = option(
        "Continue an interrupted training of the same command.",
        default=False, panel=RUNNING, saved=False, effect=False,
    )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """The options as values for JSON, for the report."""
        record = super().record()
        return {
            name: record[name] for name in record if name not in ("overwrite", "resume", "output")
        }
