"""Example inputs of models of any kind, from the arguments of their forward and the configuration.

The values are random. Several shapes are tried where a configuration does not tell the shape, and
the first inputs on which a model runs are taken.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from inspect import Parameter, signature
from itertools import chain, islice, product
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter.recording import eval_mode, run_body
from apt.errors import AptError, describe

Inputs = dict[str, Tensor]
_TOKENS, _TARGETS = 16, 6  # of a text; other numbers than those of images and sounds
_SOUND = 6400  # values of a sound
_FRAMES = (48, 100, 24)  # of a spectrogram
_FIRST_TOKEN = 5  # tokens before it are often special
_MOST_TRIED = 24  # shapes of the same arguments
_BINS = (
    "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size",
    "n_mels", "input_dim", "num_mels", "input_feat_size", "mel_bins", "input_size",
    "num_mel_filters", "feat_dim", "in_channels", "spec_num_mel_bins", "hidden_size",
)  # fmt: skip
_SIZES = ("image_size", "img_size", "input_size", "pretrain_image_size")
_SEGMENT = 8  # of time series


def example_inputs(model: nn.Module, samples: int = 2, seed: int = 0) -> Inputs:
    """Inputs on which the body of a model runs, (samples, …) by the names of its arguments.

    A tower of a multimodal model makes its own inputs, if its processor is there.

    Raises:
        AptError: the model runs on none of the inputs that were tried.
    """
    failure: Exception | None = None
    for inputs in chain(_own(model, samples), _candidates(model, samples, seed)):
        try:
            run_quietly(model, inputs)
        except Exception as error:  # a model of any origin can fail in any way
            failure = failure or error
            continue
        return inputs
    reason = f": {describe(failure)}" if failure else ""
    raise AptError(
        f"adapter auto has no example inputs for {type(model).__name__}{reason}",
        "it needs an adapter of its own, see docs/adapters.md",
    )


def run_quietly(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Run the body of a model in eval mode, with the same random numbers every time."""
    with same_numbers(), torch.no_grad(), eval_mode(model):
        run_body(model, inputs)


class same_numbers:
    """Inside the context, random numbers start from the same seed; then they go on as before."""

    def __enter__(self) -> None:
        self._state = torch.get_rng_state()
        torch.manual_seed(0)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._state)


def _own(model: nn.Module, samples: int) -> Iterator[Inputs]:
    """The inputs that a tower makes; none of other models."""
    made = model.examples(samples) if hasattr(model, "examples") else {}  # type: ignore[operator]
    if made:
        parameter = next(model.parameters())
        yield {name: _placed(value, parameter) for name, value in made.items()}


def _candidates(model: Any, samples: int, seed: int) -> Iterator[Inputs]:
    bodies = [signature(each.forward).parameters for each in (model.base_model, model)]
    if "grid_thw" not in bodies[0]:
        bodies = [names for names in bodies if "hidden_states" not in names]
    arguments: Mapping[str, Parameter] = next(
        (names for names in bodies if not names.keys().isdisjoint(_MAKERS)), {}
    )
    draw = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    config = getattr(model.base_model, "config", None) or getattr(model, "config", None)
    make = {name: maker for name in arguments if (maker := _MAKERS.get(name)) is not None}
    needed = [
        name
        for name, argument in arguments.items()
        if argument.default is Parameter.empty
        and argument.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    ]
    for chosen in _choices(list(make), needed):
        shapes = [make[name](config, name) for name in chosen]
        for combined in islice(product(*shapes), _MOST_TRIED):
            inputs = {
                name: _placed(value(samples, draw), parameter)
                for name, value in zip(chosen, combined, strict=True)
            }
            yield from _masked(inputs, arguments)


def _masked(inputs: Inputs, arguments: Collection[str]) -> Iterator[Inputs]:
    """The inputs, then with masks of sounds of which all frames count."""
    yield inputs
    names = ("input_features_mask", "padding_mask", "audio_mel_mask")
    masks = [name for name in names if name in arguments]
    sound = next((inputs[name] for name in _SOUNDS if name in inputs), None)
    if sound is None:
        return
    for name in masks:
        for length in sound.shape[1:]:
            mask = torch.ones(len(sound), length, dtype=torch.long, device=sound.device)
            mask = mask * (name != "audio_mel_mask")  # of padding
            yield inputs | {name: mask}
            yield inputs | {name: mask.bool()}


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A value on the device of a parameter, and in its dtype if it is not a number of a token."""
    dtype = parameter.dtype if value.is_floating_point() else value.dtype
    return value.to(parameter.device, dtype)


def _choices(known: list[str], needed: list[str]) -> Iterator[list[str]]:
    """The sets of arguments that are tried: the main ones, the needed ones, and single kinds."""
    main = [name for name in known if name in _MAIN or name in needed]
    seen = list[list[str]]()
    texts = [n for n in main if "ids" in n or n in needed]
    others = [n for n in main if n not in ("input_ids", "decoder_input_ids") or n in needed]
    for chosen in (main, texts, others, known, *([n] for n in main)):
        if chosen and chosen not in seen and set(needed) & set(known) <= set(chosen):
            seen.append(chosen)
            yield chosen


Value = Callable[[int, torch.Generator], Tensor]
"""Makes a tensor for a number of samples."""


def _parts(config: Any) -> Iterator[Mapping[str, Any]]:
    """The fields of a configuration, then those of its parts."""
    record = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(record, Mapping):
        return
    yield record
    for value in record.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _numbers(config: Any, *names: str) -> list[int]:
    """The values of fields in a configuration and in its parts, without duplicates."""
    found = [
        value
        for part in _parts(config)
        for name in names
        if isinstance(value := part.get(name), int) and not isinstance(value, bool)
    ]
    return list(dict.fromkeys(found))


def _ids(length: int) -> Callable[[Any, str], list[Value]]:
    def made(config: Any, name: str) -> list[Value]:
        vocabularies = _numbers(config, "vocab_size", "text_vocab_size", "n_words", "encoder_vocab")
        most = min([v for v in vocabularies if v > 1], default=64)
        positions = [n for n in _numbers(config, "max_position_embeddings") if n > 1]
        shortest = min([length, *positions])

        def values(samples: int, draw: torch.Generator, length: int = shortest) -> Tensor:
            first = _FIRST_TOKEN if most > 2 * _FIRST_TOKEN else 0
            return torch.randint(first, min(most, 250), (samples, length), generator=draw)

        made: list[Value] = [values, lambda samples, draw: values(samples, draw, 8 * length)]

        def several(samples: int, draw: torch.Generator, channels: int) -> Tensor:
            return values(samples, draw)[..., None].repeat(1, 1, channels)

        for channels in _numbers(config, "num_channels") if name.startswith("decoder") else ():
            made.append(partial(several, channels=channels))
        return made

    return made


def _images(config: Any, name: str) -> list[Value]:
    channels = _numbers(config, "num_channels", "in_channels", "in_chans", "n_channels") or [3]
    channels = channels[:2]
    sizes = list[tuple[int, int]]()
    for part in _parts(config):
        for field in _SIZES:
            value = part.get(field)
            if isinstance(value, int) and not isinstance(value, bool):
                sizes.append((value, value))
            elif isinstance(value, list | tuple) and len(value) == 2:
                sizes.append((int(value[0]), int(value[1])))
    sizes = [size for size in dict.fromkeys(sizes) if max(size) > 1]
    several = _numbers(config, "num_frames", "frames_per_clip", "num_image_with_embedding")
    frames = several[0] if several else 2
    made = list[Value]()
    for size in [*sizes[:3], (64, 64), (128, 128), (224, 224)]:
        for channel in channels:
            made.append(_random(channel, *size))
    for size in [*sizes[:2], (64, 64)]:
        made.append(_random(frames, channels[0], *size))
    return made + _patches(config, name)


def _patches(config: Any, name: str) -> list[Value]:
    """The values of the 16 patches of an image, for models that read them as a sequence."""
    channels = (_numbers(config, "in_channels", "num_channels", "in_chans") or [3])[0]
    frames = [*_numbers(config, "temporal_patch_size", "patch_temporal"), 1]
    sizes = _numbers(config, "patch_size")
    return [_random(_TOKENS, channels * n * size**2) for size in sizes for n in frames]


def _grid(config: Any, name: str) -> list[Value]:
    return [lambda samples, draw: torch.tensor([[1, 4, 4]]).repeat(samples, 1)]


def _places(config: Any, name: str) -> list[Value]:
    """The column and the row of each of the 16 patches of an image."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)
    return [lambda samples, draw: places.repeat(samples, 1, 1)]


def _random(*shape: int) -> Value:
    return lambda samples, draw: torch.randn(samples, *shape, generator=draw)


def _sound(config: Any, name: str) -> list[Value]:
    bins = _numbers(config, "num_mel_bins")
    lengths = _numbers(config, "max_length")
    spectrograms = [_random(length, b) for b in bins for length in lengths]
    return [*spectrograms, _random(_SOUND), _random(1, _SOUND), _random(2, _SOUND)]


def _spectrogram(config: Any, name: str) -> list[Value]:
    bins = list(dict.fromkeys([*[b for b in _numbers(config, *_BINS) if b > 1][:3], 80, 128]))
    fixed = [2 * n for n in _numbers(config, "max_source_positions")]
    made = list[Value]()
    for length in (*fixed[:1], *_FRAMES):
        for b in bins:
            made += [_random(b, length), _random(length, b)]
    time, frequency = _numbers(config, "spec_size"), _numbers(config, "num_mel_bins")
    return [_random(1, t, f) for t in time for f in frequency] + [*made, _random(_SOUND)]


def _series(config: Any, name: str) -> list[Value]:
    """Values of the past of time series."""
    history = (_numbers(config, "context_length") or [_SEGMENT])[0]
    lags = max((max(v) for p in _parts(config) if (v := p.get("lags_sequence"))), default=0)
    channels = (_numbers(config, "num_input_channels", "input_size") or [1])[0]
    length = history + lags
    return [_random(length, channels), _random(length)]


def _time_features(config: Any, name: str) -> list[Value]:
    history = (_numbers(config, "context_length") or [_SEGMENT])[0]
    lags = max((max(v) for p in _parts(config) if (v := p.get("lags_sequence"))), default=0)
    width = (_numbers(config, "num_time_features") or [0])[0]
    future = (_numbers(config, "prediction_length") or [_SEGMENT])[0]
    length = future if name.startswith("future") else history + lags
    if name.endswith("values"):
        return [_random(length)]
    return [_random(length, width)]


def _ones(of: Callable[[Any, str], list[Value]]) -> Callable[[Any, str], list[Value]]:
    def ones(samples: int, draw: torch.Generator, value: Value) -> Tensor:
        return torch.ones_like(value(samples, draw))

    return lambda config, name: [partial(ones, value=value) for value in of(config, name)]


def _zeros(*shape: int) -> Callable[[Any, str], list[Value]]:
    return lambda config, name: [
        lambda samples, draw: torch.zeros(samples, *shape, dtype=torch.long)
    ]


def _widths(count: int, *names: str, fixed: int = 0) -> Callable[[Any, str], list[Value]]:
    """Random rows of the width that a configuration has in one of some fields."""
    return lambda config, name: [
        _random(count, width) for width in (_numbers(config, *names) or [fixed or 4])
    ]


_SOUNDS = ("input_values", "input_features", "audio_mel")
_MAIN = ("input_ids", "decoder_input_ids", "pixel_values", *_SOUNDS, "future_values",
    "future_time_features")  # fmt: skip
_MAKERS: Mapping[str, Callable[[Any, str], list[Value]]] = {
    "input_ids": _ids(_TOKENS),
    "decoder_input_ids": _ids(_TARGETS),
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "input_values": _sound,
    "input_features": _spectrogram,
    "audio_mel": _spectrogram,
    "grid_thw": _grid,
    "hidden_states": _patches,
    "spatial_shapes": lambda config, name: [lambda samples, draw: torch.full((samples, 2), 4)],
    "pixel_attention_mask": lambda config, name: [
        lambda samples, draw: torch.ones(samples, _TOKENS, dtype=torch.long)
    ],
    "pixel_position_ids": _places,
    "bbox": lambda config, name: [
        *_zeros(_TOKENS, 4)(config, name),
        _random(_TOKENS, 8),
        _random(_TOKENS, 4),
    ],
    "encoder_hidden_states": _widths(5, "encoder_hidden_size", "hidden_size"),
    "query_embeds": _widths(6, "hidden_size"),
    "token_type_ids": _zeros(_TOKENS),
    "xpath_tags_seq": _zeros(_TOKENS, 50),
    "xpath_subs_seq": _zeros(_TOKENS, 50),
    "visual_feats": _widths(5, "visual_feat_dim"),
    "visual_pos": _widths(5, "visual_pos_dim"),
    "past_values": _series,
    "past_observed_mask": _ones(_series),
    "past_time_features": _time_features,
    "future_values": _time_features,
    "future_time_features": _time_features,
    "states": _widths(5, "state_dim"),
    "actions": _widths(5, "act_dim"),
    "returns_to_go": _widths(5, fixed=1),
    "timesteps": _zeros(5),
    "inputs": lambda config, name: [
        *_widths(5, "d_model")(config, name),
        *_ids(_TOKENS)(config, name),
    ],
}
"""For the arguments that are known, the values that are tried."""
