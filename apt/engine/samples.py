"""The samples of models that do not read windows of text."""

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from apt.adapter import Samples
from apt.checkpoints.architecture import Reads
from apt.checkpoints.formats import find_source_file
from apt.checkpoints.load import load_tokenizer
from apt.checkpoints.opened import Opened
from apt.checkpoints.processors import load_feature_extractor, load_image_processor
from apt.checkpoints.towers import TowerInputs
from apt.engine.text import Text
from apt.errors import AptError
from apt.evaluation.generated import writes
from apt.inputs.images import ImageReader
from apt.inputs.sounds import SoundReader
from apt.inputs.texts import TextReader
from apt.locations.text_sources import apportioned, text_sources
from apt.options import MeasuringOptions
from apt.plugin.registry import Registry
from apt.text.ids import check_vocabulary
from apt.text.mixes import SourceSamples, in_turn
from apt.text.special_tokens import special_ids

_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
_UNLIMITED = 10**6  # a larger ``model_max_length`` of a tokenizer means no limit


def read_samples(
    options: Any,
    skeleton: Opened,
    registry: Registry,
    *,
    samples: int,
    windows: int | None,
    measures: bool,
    fewer: bool = False,
) -> Text:
    """The calibration samples of a run, and the samples to measure on.

    Args:
        samples: the number of calibration samples, from all sources together.
        windows: the greatest number of samples to measure on; None for ``samples``.
        measures: True if this rank measures.
        fewer: True if a source may have fewer samples.

    Raises:
        AptError: a source cannot be read, or does not have what the model takes.
    """
    reader = _reader(options, skeleton)
    sources = text_sources(options.calibration)
    counts = apportioned(samples, sources) if len(sources) > 1 else [samples]
    drawn = [
        reader.read(source.name, "calibration", count, options.seed, registry, fewer=fewer)
        for source, count in zip(sources, counts, strict=True)
    ]
    order = in_turn([len(part) for part in drawn])
    mix = drawn[0].with_samples([each for part in drawn for each in part])[order]
    owners = torch.cat([torch.full((len(part),), index) for index, part in enumerate(drawn)])
    check_samples_vocabulary(mix, skeleton, options.model)
    held_out = None
    if options.evaluation is not None and measures:
        count = windows or samples
        held_out = reader.read(options.evaluation, "evaluation", count, 0, registry, fewer=True)
    taken = tuple(
        SourceSamples(source.name, source.share, len(part))
        for source, part in zip(sources, drawn, strict=True)
    )
    special = special_ids(reader.tokenizer) if reader.tokenizer is not None else ()
    return Text(reader.tokenizer, mix, held_out, None, special, taken, owners[order])


def check_samples_vocabulary(samples: Samples, skeleton: Opened, reference: str) -> None:
    """Raise if a token has no embedding in the model."""
    for sample in samples:
        if "input_ids" in sample:
            check_vocabulary(sample["input_ids"], skeleton.module, reference)


def _reader(options: Any, skeleton: Opened) -> TextReader | ImageReader | SoundReader:
    """The reader for what a model takes.

    Raises:
        AptError: the model takes what cannot be read, or has no processor for it.
    """
    match skeleton.reads:
        case Reads(text=str(), image=None, sound=None):
            return _text_reader(options, skeleton)
        case Reads(text=text, image=str(name), sound=None):
            processor = load_image_processor(skeleton.source)
            beside = _beside_images(options, skeleton) if text else None
            made = _tower_inputs(skeleton)
            return ImageReader(processor, name, beside, _classes(skeleton), made)
        case Reads(text=None, image=None, sound=str(name)):
            transcripts = partial(_text_reader, options, skeleton)
            extractor = load_feature_extractor(skeleton.source)
            made = _tower_inputs(skeleton)
            return SoundReader(
                extractor, name, transcripts if skeleton.reads.target else None, made
            )
    raise AptError(
        f"{skeleton.source.reference} takes {skeleton.reads.words}, which this command cannot read",
        "prune it from a program, with samples of named tensors: apt.prune(model, samples)",
    )


def _tower_inputs(skeleton: Opened) -> TowerInputs | None:
    """Makes the samples of a tower; None for a whole model."""
    if skeleton.whole is None:
        return None
    config: Any = skeleton.whole.config
    source = skeleton.source
    return TowerInputs(config, source.tower, skeleton.runs_in, source.trust_remote_code)


def _text_reader(options: Any, skeleton: Opened) -> TextReader:
    """The reader of texts alone."""
    tokenizer = load_tokenizer(skeleton.source, options.tokenizer)
    most = tokenizer.model_max_length, getattr(skeleton.config, "max_target_positions", _UNLIMITED)
    longest = min(options.seqlen, _longest_sentence(skeleton), *most)
    model = skeleton.module if skeleton.reads.target else None
    alone = model is None and not type(skeleton.module).__name__.endswith(_CLASSIFIERS)
    return TextReader(
        tokenizer, longest, model, classes=_classes(skeleton), alone=alone,
        first=_takes_first_token(skeleton),
    )  # fmt: skip


def _classes(skeleton: Opened) -> dict[str, int]:
    """The numbers of the classes of a model that classifies samples, by their names; else empty."""
    head = type(skeleton.module).__name__
    if not head.endswith(_CLASSIFIERS) or getattr(skeleton.config, "num_labels", 1) < 2:
        return {}
    return {str(name): int(number) for name, number in skeleton.config.label2id.items()}


def _beside_images(options: Any, skeleton: Opened) -> TextReader:
    """The reader of the texts of images.

    A tokenizer without a mask of the padding, such as SigLIP's, is that of a model that was trained
    on padded texts and reads the padding.
    """
    reader = _text_reader(options, skeleton)
    masked = "attention_mask" in reader.tokenizer.model_input_names
    return replace(reader, model=None, padded=not masked)


def _longest_sentence(skeleton: Opened) -> int:
    """The greatest number of tokens that sentence-transformers gives to the model."""
    with suppress(TypeError, KeyError, ValueError):
        return int(_json_file(skeleton, "sentence_bert_config.json")["max_seq_length"])
    return _UNLIMITED


def _takes_first_token(skeleton: Opened) -> bool:
    """True if the vector of a text is the state of its first token in sentence-transformers."""
    with suppress(TypeError, KeyError, AttributeError, StopIteration):
        modules = _json_file(skeleton, "modules.json")
        place = next(each["path"] for each in modules if each["type"].endswith("Pooling"))
        pooling = _json_file(skeleton, f"{place}/config.json")
        return pooling.get("pooling_mode_cls_token") is True or pooling.get("pooling_mode") == "cls"
    return False


def _json_file(skeleton: Opened, name: str) -> Any:
    """The content of a file of a model, which may be on the hub; None if it cannot be read."""
    with suppress(AptError, OSError, ValueError):
        if path := find_source_file(skeleton.source, name):
            return json.loads(path.read_text("utf-8"))
    return None


def metrics_for(skeleton: Opened, options: Any, registry: Registry) -> tuple[str, ...]:
    """The metrics of a run: the given ones, or the default ones for what the model returns.

    Raises:
        AptError: a metric is for another kind of models.
    """
    reads, names = skeleton.reads, options.metrics
    if not reads.windows and names in (MeasuringOptions.metrics, ()):
        if writes(skeleton.module):
            return "token-changes", "predictions"
        masked = "MaskedLM" in type(skeleton.module).__name__
        return ("pseudo-perplexity", "predictions") if masked else ("similarity", "neighbours")
    kind = "windows" if reads.windows else "samples"
    for spec in map(registry.evaluators.get, names):
        if spec.reads not in (kind, "both"):
            fitting = [
                each.name
                for each in registry.evaluators.specs.values()
                if each.reads in (kind, "both")
            ]
            raise AptError(
                f"{type(skeleton.module).__name__} has no {spec.name}",
                f"choose one of {', '.join(fitting)}",
                ("metrics",),
            )
    return tuple(names)


def held_out_samples(
    source: str, options: Any, skeleton: Opened, registry: Registry, samples: int
) -> Samples:
    """At most ``samples`` samples of the evaluation split of a source.

    Raises:
        AptError: the source cannot be read, or does not have what the model takes.
    """
    reader = _reader(options, skeleton)
    return reader.read(source, "evaluation", samples, 0, registry, fewer=True)
