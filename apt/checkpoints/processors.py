"""The image processor and the feature extractor of a model."""

from importlib.util import find_spec
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor

from apt.errors import AptError, describe
from apt.locations.model_source import Source


def load_image_processor(source: Source) -> Any:
    """The image processor of a model.

    Raises:
        AptError: Pillow is not installed, or the model has no image processor.
    """
    _check_package("images", "pillow", "PIL", "vision")
    return _loaded(AutoImageProcessor, source, "image processor")


def load_feature_extractor(source: Source) -> Any:
    """The feature extractor of a model of sound.

    Raises:
        AptError: soundfile is not installed, or the model has no feature extractor.
    """
    _check_package("sounds", "soundfile", "soundfile", "speech")
    return _loaded(AutoFeatureExtractor, source, "feature extractor")


def _check_package(kind: str, package: str, module: str, extra: str) -> None:
    if find_spec(module) is None:
        message = f"to read {kind} needs the package {package}"
        raise AptError(message, f"pip install 'apt-prune[{extra}]'")


def _loaded(kind: Any, source: Source, name: str) -> Any:
    try:
        return kind.from_pretrained(source.location, **source.options())
    except Exception as error:  # loaders raise errors of many types
        raise AptError(
            f"the {name} of {source.reference} does not load: {describe(error)}",
            "is its preprocessor_config.json there?",
        ) from error
