"""The towers of a multimodal model: its encoders of images and of sounds, each as its own model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import Parameter, signature
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apt.adapter import Sample
from apt.adapter.recording import grid_name, in_one_sequence, stubbed
from apt.checkpoints.architecture import Reads, reads_of
from apt.checkpoints.processors import load_feature_extractor, load_image_processor
from apt.checkpoints.skeletons import skeleton_module
from apt.errors import AptError, describe
from apt.inputs.sounds import features_of
from apt.locations.model_source import Source

_NAMES = {
    "vision": ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower"),
    "audio": ("audio_tower", "audio_encoder", "speech_encoder"),
}
"""The names of the modules of towers, as in `transformers.PreTrainedModel.get_encoder`."""
_READS = {
    "vision": Reads(False, text=None, image="pixel_values"),
    "audio": Reads(False, text=None, sound="input_features"),
}
_EDGE = 64  # of an example of a picture
_FEATURES = {"vision": "get_image_features", "audio": "get_audio_features"}
_MASKS = ("attention_mask", "feature_attention_mask", "input_features_mask")
"""The names of the mask of a feature extractor, and of the arguments that take it."""


Examples = Callable[[int], Mapping[str, Tensor]]


class Tower(nn.Module):
    """A tower at its place in a model without other parts: its tensors have their full names.

    Attributes:
        path: the path of the tower in the model.
        reads: what it reads.
        base_model: the tower.
        examples: makes inputs of some samples (samples, …) by their names; none if it cannot.
    """

    path: ClassVar[str]
    reads: ClassVar[Reads]

    def __init__(self, tower: PreTrainedModel, examples: Examples) -> None:
        super().__init__()
        vars(self)["base_model"] = tower  # it is no second submodule
        self.examples = examples
        *names, last = self.path.split(".")
        owner: nn.Module = self
        for name in names:
            owner.add_module(name, inner := nn.Module())
            owner = inner
        owner.add_module(last, tower)

    def __getattr__(self, name: str) -> Any:
        """The other attributes are those of the tower."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if (tower := vars(self).get("base_model")) is None:
                raise
            return getattr(tower, name)

    def forward(self, **inputs: Tensor) -> Any:
        """Run the tower on a batch of samples."""
        return self.base_model(**in_one_sequence(inputs))


def towers_of(model: Any) -> dict[str, str]:
    """The paths of the towers of a multimodal model, by their names; empty for other models."""
    if not isinstance(model, PreTrainedModel) or not reads_of(type(model), model.config).windows:
        return {}
    paths, found = {id(module): path for path, module in model.named_modules()}, dict[str, str]()
    owners: Any = (model, model.base_model)
    for stack, names in _NAMES.items():
        if stack == "audio" and _features_of(model, stack) is not None:
            names = (*names, "encoder")
        parts = [part for name in names for owner in owners if (part := getattr(owner, name, None))]
        for part in parts:
            if isinstance(part, PreTrainedModel) and not _reads_text(part):
                found.setdefault(stack, paths[id(part)])
    return found


def _reads_text(model: PreTrainedModel) -> bool:
    forward: Any = model.forward
    return "input_ids" in signature(forward).parameters


def tower_of(model: nn.Module, stack: str, examples: Examples = lambda samples: {}) -> Tower:
    """A tower of a model, by its name in `towers_of`."""
    path = towers_of(model)[stack]
    tower: Any = model.get_submodule(path)
    kind: Any = type(tower)
    return _class(kind, path, stack)(tower, examples)


def examples_of(source: Source, config: Any) -> Examples:
    """Makes inputs of the tower of a source from noise, by the processor of the model."""

    def examples(samples: int) -> Mapping[str, Tensor]:
        draw = np.random.default_rng(0)
        inputs = TowerInputs(config, source.tower, torch.float32, source.trust_remote_code)
        try:
            made = [inputs(processed_noise(source, draw))[0] for _ in range(samples)]
            return {name: torch.stack([each[name] for each in made]) for name in made[0]}
        except Exception:  # without a processor, other inputs are tried
            return {}

    return examples


def processed_noise(source: Source, draw: np.random.Generator) -> Mapping[str, Any]:
    """What the processor of a model makes of noise in place of a picture or a sound."""
    if source.tower == "audio":
        extractor = load_feature_extractor(source)
        return features_of(extractor, draw.normal(size=extractor.sampling_rate).astype("float32"))
    values = draw.integers(0, 255, (_EDGE, _EDGE, 3), dtype=np.uint8)
    made: Mapping[str, Any] = load_image_processor(source)(images=values, return_tensors="pt")
    return made


@cache
def _class(kind: type[nn.Module], path: str, stack: str) -> type[Tower]:
    """The class of a tower, which has the name of the tower's own class."""
    return type(kind.__name__, (Tower,), {"path": path, "reads": _READS[stack]})


class _CalledError(Exception):
    """Ends a run of a model at the call of its tower; has the arguments of the call."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments


@dataclass(frozen=True)
class TowerInputs:
    """Makes the samples of a tower from what the processor of the model makes.

    The model itself makes them: it runs up to the call of its tower, without weights. If it cannot,
    the tower takes the processor's tensors of the names of its arguments.

    Args:
        config: the configuration of the model.
        stack: the name of the tower.
        dtype: the dtype in which the tower computes.
    """

    config: Any
    stack: str
    dtype: torch.dtype
    trust_remote_code: bool = False

    def __call__(self, made: Mapping[str, Any]) -> list[Sample]:
        """The samples of one picture or sound: one, or one for each tile of a picture.

        Args:
            made: the tensors (1, …) by their names.

        Raises:
            AptError: no samples can be made.
        """
        given = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        mask = next((given[name] for name in _MASKS if name in given), None)
        given = {name: mask for name in _MASKS if mask is not None} | given
        taken = {n: v for n, v in self._taken(given).items() if isinstance(v, Tensor)}
        needed = _needed(self._arguments) if taken else list(self._arguments)
        if missing := [name for name in needed if name not in taken]:
            message = f"{type(self._tower).__name__} takes {missing[0]}, which cannot be made"
            raise AptError(message, "this tower cannot be pruned")
        cast = {n: v.to(self.dtype) if v.is_floating_point() else v for n, v in taken.items()}
        return [_without_padding(sample) for sample in _split(cast)]

    def _taken(self, given: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """The arguments with which the model calls its tower."""
        features = _features_of(self._model, self.stack)
        by_name = {name: given[name] for name in self._arguments if name in given}
        taken = {} if features is None else signature(features).parameters
        if features is None or any(name not in given for name in _needed(taken)):
            return by_name
        names = [name for name in taken if name in given]

        def called(*args: Any, **kwargs: Any) -> Any:
            raise _CalledError(dict(zip(self._arguments, args, strict=False)) | kwargs)

        with stubbed([self._tower], called), torch.no_grad():
            try:
                features(**{name: given[name] for name in names})
            except _CalledError as call:
                return call.arguments
            except Exception as error:  # a model of any origin can fail in any way
                message = f"{type(self._model).__name__} does not reach its tower"
                raise AptError(
                    f"{message}: {describe(error)}", "this tower cannot be pruned"
                ) from error
        return by_name

    @cached_property
    def _model(self) -> nn.Module:
        """The model with zeros for its weights, which take no memory."""
        model = skeleton_module(self.config, trust_remote_code=self.trust_remote_code)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                setattr(module, name, nn.Parameter(zeros, requires_grad=False))
        return model

    @cached_property
    def _tower(self) -> nn.Module:
        return self._model.get_submodule(towers_of(self._model)[self.stack])

    @cached_property
    def _arguments(self) -> Mapping[str, Any]:
        return signature(self._tower.forward).parameters


def _needed(arguments: Mapping[str, Parameter]) -> list[str]:
    """The names of the arguments without a default."""
    several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return [n for n, p in arguments.items() if p.default is p.empty and p.kind not in several]


def _features_of(model: Any, stack: str) -> Any:
    """The method that calls a tower and returns its features; None if the model has none."""
    owners = (model.base_model, model)
    return next((f for each in owners if (f := getattr(each, _FEATURES[stack], None))), None)


def _split(taken: Mapping[str, Tensor]) -> list[Sample]:
    """The samples of a call of a tower."""
    grid = grid_name(taken)
    count = len(taken[grid]) if grid else len(next(iter(taken.values())))
    if grid and count == 1:  # the patches of all pictures are one sequence
        return [{n: v[0] if len(v) == 1 else v for n, v in taken.items()}]
    if any(len(value) != count for value in taken.values()):
        message = f"the samples of a tower have different lengths: {', '.join(taken)}"
        raise AptError(message, "this tower cannot be pruned")
    return [{name: value[index] for name, value in taken.items()} for index in range(count)]


def _without_padding(sample: Sample) -> Sample:
    """A sample without the patches that its mask leaves out; frames of a sound all stay."""
    masks = [v.bool() for n, v in sample.items() if n.endswith("mask") and v.ndim == 1]
    lengths = [len(value) for value in sample.values() if value.is_floating_point()]
    if not masks or masks[0].all() or len(masks[0]) not in lengths:
        return sample
    real = masks[0]
    return {n: v[real] if v.ndim and len(v) == len(real) else v for n, v in sample.items()}
