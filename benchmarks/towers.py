"""Whose towers of images `apt-prune prune --stack vision` prunes, of all types of images and text.

Of each type a tiny random model is made, whose tower takes pictures of up to 8 × 8 patches of the
default size. The image processor of the type makes inputs of noise, and the tower is pruned on
them. Some processors need torchvision::

    python benchmarks/towers.py --json benchmarks/results/towers.json
    python benchmarks/pages.py
"""

import argparse
import tempfile
import warnings
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from apt_adapters.example_inputs import example_inputs
from common import save
from families import Row, _sentence, adapter_for, in_own_process, limited, pruned
from transformers import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from apt import Samples
from apt.checkpoints.towers import TowerInputs, examples_of, processed_noise, tower_of, towers_of
from apt.errors import AptError
from apt.locations.model_source import Source

STACK = "vision"
SECONDS, SAMPLES = 60, 2
EDGE = 8  # the most patches of an edge of a picture
_DEEP: Row = {"depth": 12, "deepstack_visual_indexes": [1, 2, 3]}
SPECIAL: dict[str, Row] = {
    "aria": {"image_size": 490},
    "cohere_compass": _DEEP,
    "cosmos3_omni": _DEEP,
    "gemma4": tiny.config("gemma4_vision").to_dict(),  # there is none by default
    "llama4": {"intermediate_size": 128},  # of four patches of width 32
    "mllama": {"num_global_layers": 2, "intermediate_layers_indices": [1]},
    "molmo2": {"image_num_pos": 27**2},
    "qwen3_vl": _DEEP,
    "qwen3_vl_moe": _DEEP,
    "qwen3_omni_moe_thinker": {**_DEEP, "depth": 24},
}
"""Fields of towers: the default ones do not fit few blocks, or each other."""
PROCESSORS = {
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm46v",
    "qwen2_5_omni_thinker": "qwen2_vl",
    "qwen3_omni_moe_thinker": "qwen2_vl",
    "qwen3_vl_moe": "qwen3_vl",
}
"""The types whose processor another type has, which transformers does not list."""


def row(model_type: str) -> Row:
    """The row of a type: ``reason`` is empty if its tower is served."""
    made: Row = {"type": model_type, "tower": "", "adapter": "", "reason": ""}
    try:
        with limited(SECONDS):
            model = made_model(model_type)
    except Exception as error:
        return {**made, "reason": f"not built: {_sentence(error)}"}
    if STACK not in towers_of(model):
        return {**made, "reason": "it has no tower that APT finds"}
    try:
        with limited(SECONDS), tempfile.TemporaryDirectory() as folder:
            fitted(processor_of(model_type), model.config).save_pretrained(folder)
            source = Source(folder, folder, tower=STACK)
            tower = tower_of(model, STACK, examples_of(source, model.config))
            name, adapter = adapter_for(tower.config.model_type)
            made |= {"tower": type(tower).__name__, "adapter": name}
            inputs = example_inputs(tower, SAMPLES)
            made["samples"] = list(inputs)
            if not tower.examples(1):
                noise = processed_noise(source, np.random.default_rng(0))
                TowerInputs(model.config, STACK, torch.float32)(noise)  # raises
            samples = [{n: t[index] for n, t in inputs.items()} for index in range(SAMPLES)]
            found = pruned(tower, adapter, Samples(samples))
        if not (found["exact"] and found["untouched"]):
            return {**made, "reason": "the pattern is not exact, or other values changed"}
        made |= {"share": found["share"], "pattern": found["pattern"]}
    except AptError as error:
        return {**made, "reason": error.message}
    except Exception as error:
        return {**made, "reason": f"fails: {_sentence(error)}"}
    return made


def made_model(model_type: str) -> Any:
    """A tiny random model of a type, with patches of the default size."""
    fields = CONFIG_MAPPING[model_type](**tiny.NEEDED.get(model_type, {})).to_dict()
    vision = fields.get("vision_config") or {}
    size, patch = vision.get("image_size"), vision.get("patch_size")
    parts = {"patch_size": patch} if tiny._is_int(patch) else {}
    if parts and tiny._is_int(size):
        parts["image_size"] = min(size, patch * EDGE)
    if parts and tiny._is_int(vision.get("window_size")):
        parts["window_size"] = patch * EDGE // 2
    parts |= SPECIAL.get(model_type, {})
    return tiny.model(model_type, image=True, **({"vision_config": parts} if parts else {}))


def fitted(processor: Any, config: Any) -> Any:
    """A processor with the sizes of a tower; the default ones of a type may not fit each other."""
    vision = getattr(config, "vision_config", None)
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    if tiny._is_int(patch) and tiny._is_int(getattr(processor, "patch_size", None)):
        processor.patch_size = patch
    square = {"height": size, "width": size}
    if tiny._is_int(size) and getattr(processor.size, "height", None):
        processor.size = square
    if tiny._is_int(size) and getattr(processor, "crop_size", None):
        processor.size, processor.crop_size = {"shortest_edge": size}, square
    if tiny._is_int(size) and tiny._is_int(getattr(processor, "max_image_size", None)):
        processor.max_image_size = size
    return processor


def processor_of(model_type: str) -> Any:
    """The processor of a type, of its default sizes."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(PROCESSORS.get(model_type, model_type))
    if not names:
        raise AptError("transformers has no image processor for the type")
    names = names.values() if isinstance(names, dict) else names
    failure: Exception | None = None
    for name in (name for name in names if name):
        try:
            return getattr(transformers, name)()
        except Exception as error:  # of a package that is not installed
            failure = error
    raise AptError(f"its image processor is not made: {_sentence(failure or ValueError(names))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    chosen = [t for t in sorted(tiny.IMAGE) if any(fnmatch(t, glob) for glob in options.only)]
    rows = list[Row]()
    for model_type in chosen:
        failed = {"type": model_type, "tower": "", "adapter": ""}
        rows.append(last := in_own_process(partial(row, model_type), failed, 3 * SECONDS))
        save(options.json, rows)  # the run may be ended
        said = last["reason"] or f"served: {last['share']:.1%} {', '.join(last['samples'])}"
        print(f"{model_type:26} {last['tower']:34} {said}", flush=True)
    print(sum(not row["reason"] for row in rows), "of", len(rows))


if __name__ == "__main__":
    main()
