"""What models with an encoder and a decoder write: the greedy output for each sample."""

import copy
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Samples
from apt.adapter.recording import eval_mode
from apt.adapter.samples import on_device
from apt.errors import AptError
from apt.inputs.texts import cut
from apt.modes import default_modes

TARGET = "decoder_input_ids"
"""The name of the tokens of the output that a decoder reads."""

_TOKENS = 64  # that a model writes at most
_PROMPT = 4  # tokens that a model of speech writes before the text
_POSITIONS = 4096  # of a batch
_LIMITS = ("max_target_positions", "max_position_embeddings", "n_positions")


def writes(model: Any) -> bool:
    """True if a model has an encoder, and a decoder with a head that writes."""
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", lambda: False)
    return bool(getattr(config, "is_encoder_decoder", False) and can_generate())


@default_modes()
@torch.no_grad()
def greedy_outputs(model: nn.Module, samples: Samples) -> list[Tensor]:
    """The tokens that a model writes for each sample (tokens,), up to its end token.

    Each token is the one that is ranked first. An output has at most 64 tokens, after the tokens
    with which every output begins.
    """
    module: Any = model
    settings = copy.deepcopy(module.generation_config)
    settings.update(
        max_new_tokens=_most_tokens(module.config), max_length=None, num_beams=1, do_sample=False,
        num_return_sequences=1, return_dict_in_generate=True,
    )  # fmt: skip
    settings.force_unique_generate_call = True  # of Whisper: the first tokens are returned as well
    settings.return_timestamps = False
    device = next(model.parameters()).device
    outputs, places = list[Tensor](), list[Tensor]()
    inputs = samples.with_samples(
        [{name: each for name, each in sample.items() if name != TARGET} for sample in samples]
    )
    with eval_mode(model):
        for batch, indices in inputs.batches(_POSITIONS):
            if "input_ids" in batch:  # otherwise `generate` takes tokens for padding
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            given: Any = on_device(batch, device)
            rows = module.generate(**given, generation_config=settings).sequences.cpu()
            outputs += [_until_end(row, settings.eos_token_id) for row in rows]
            places.append(indices)
    return [outputs[place] for place in torch.cat(places).argsort().tolist()]


def _most_tokens(config: Any) -> int:
    """The greatest number of tokens that a model may write."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    limits = [value for name in _LIMITS if isinstance(value := getattr(text, name, None), int)]
    return max(1, min([_TOKENS, *(limit - _PROMPT for limit in limits)]))


def _until_end(ids: Tensor, end: int | list[int] | None) -> Tensor:
    """The tokens of an output (tokens,) up to the first end token behind the first token."""
    ends = torch.tensor([] if end is None else end, dtype=ids.dtype).flatten()
    found = torch.isin(ids[1:], ends).nonzero().flatten()
    return ids[: int(found[0]) + 2] if len(found) else ids


def with_outputs(samples: Samples, outputs: Sequence[Tensor]) -> Samples:
    """Samples whose decoder reads outputs: all their tokens but the last one.

    The end of an output is cut to the nearest of a few lengths, see `apt.inputs.texts.near_length`.
    """
    pairs = zip(samples, outputs, strict=True)
    return samples.with_samples([{**sample, TARGET: cut(ids[:-1])} for sample, ids in pairs])


def lacks_outputs(model: Any, samples: Samples) -> bool:
    """True if a model can write the outputs that its decoder reads, and samples do not have them.

    Raises:
        AptError: the decoder needs them, and the model cannot write them.
    """
    config = getattr(model, "config", None)
    if TARGET in samples.names or not getattr(config, "is_encoder_decoder", False):
        return False
    if writes(model):
        return True
    if TARGET not in signature(model.forward).parameters:
        return False  # the decoder reads no text: that of an object detector reads queries
    device = next(model.parameters()).device
    try:  # BART's decoder reads the input if there is no output, but T5's does not
        with torch.no_grad():
            model(**{name: each[None].to(device) for name, each in samples[0].items()})
    except ValueError as error:
        raise AptError(
            f"the decoder of {type(model).__name__} needs a second text, and it cannot write one",
            "give rows of two texts",
            ("calibration",),
        ) from error
    return False


def changes(one: Sequence[int], other: Sequence[int]) -> int:
    """The least number of items to insert, remove or replace to make two sequences equal."""
    before = list(range(len(other) + 1))
    for row, item in enumerate(one, 1):
        after = [row]
        for column, against in enumerate(other, 1):
            replaced = before[column - 1] + (item != against)
            after.append(min(replaced, before[column] + 1, after[-1] + 1))
        before = after
    return before[-1]
