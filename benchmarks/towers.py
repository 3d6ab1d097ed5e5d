"""Whose towers of images `apt-prune prune --stack vision` prunes, of all types of images and text.

Of each type two things are tried. The tower of a tiny random model is pruned alone, on random
inputs, and its pattern is checked. And the processor of the type makes samples of a picture, for a
tower of the default size without weights. Both need torchvision for some types::

    python benchmarks/towers.py --json benchmarks/results/towers.json
    python benchmarks/pages.py
"""

import argparse
import multiprocessing
import warnings
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from apt_adapters.example_inputs import example_inputs
from common import save
from families import SAMPLES, Row, _sentence, adapter_for, limited, pruned
from transformers import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from apt import Samples
from apt.checkpoints.towers import TowerInputs, tower_of, towers_of
from apt.errors import AptError

STACK = "vision"
SECONDS = 60
_PICTURE = (200, 300)


def row(model_type: str) -> Row:
    """The row of a type: ``reason`` is empty if its tower is served."""
    made: Row = {"type": model_type, "tower": "", "adapter": "", "reason": ""}
    try:
        with limited(SECONDS):
            large = CONFIG_MAPPING[model_type](**tiny.NEEDED.get(model_type, {}))
            model = tiny.model(model_type, image=True, **sizes_of(large.to_dict()))
    except Exception as error:
        return {**made, "reason": f"not built: {_sentence(error)}"}
    if STACK not in towers_of(model):
        return {**made, "reason": "no tower"}
    try:
        with limited(SECONDS):
            tower = tower_of(model, STACK)
            name, adapter = adapter_for(tower.config.model_type)
            made |= {"tower": type(tower).__name__, "adapter": name}
            inputs = example_inputs(tower, SAMPLES)
            samples = [{n: t[index] for n, t in inputs.items()} for index in range(SAMPLES)]
            found = pruned(tower, adapter, Samples(samples))
        if not (found["exact"] and found["untouched"]):
            return {**made, "reason": "the pattern is not exact, or other values changed"}
        with limited(SECONDS):
            made["samples"] = samples_of(model.config, large, model_type)
    except AptError as error:
        return {**made, "reason": error.message}
    except Exception as error:
        return {**made, "reason": f"fails: {_sentence(error)}"}
    return made


def sizes_of(fields: Row) -> Row:
    """The sizes of pictures and patches that fit the other fields of a tiny tower."""
    sizes = tiny._sizes(fields).get("vision_config", {})
    patch = (fields.get("vision_config") or {}).get("patch_size")
    return {"vision_config": sizes | {"patch_size": patch}} if sizes and patch else {}


def samples_of(config: Any, large: Any, model_type: str) -> list[str]:
    """The names of the tensors that the tower of the default size takes for a picture."""
    if hasattr(config, "vision_config"):
        config.vision_config = large.vision_config
    processor = processor_of(model_type)
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 255, (*_PICTURE, 3), generator=draw, dtype=torch.uint8)
    made = processor(images=values.numpy(), return_tensors="pt")
    inputs = TowerInputs(config, STACK, torch.float32)
    sample = inputs(made)[0]
    signature(inputs._tower.forward).bind(**sample)
    return list(sample)


def processor_of(model_type: str) -> Any:
    """The processor of a type, of its default sizes."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
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


def guarded(model_type: str) -> Row:
    """The row of a type, made in a process of its own, which may crash."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: send.send(row(model_type)))
    process.start()
    send.close()
    try:
        made: Row = receive.recv()
        return made
    except EOFError:
        return {"type": model_type, "tower": "", "adapter": "", "reason": "its process has crashed"}
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    chosen = [t for t in sorted(tiny.IMAGE) if any(fnmatch(t, glob) for glob in options.only)]
    rows = []
    for model_type in chosen:
        rows.append(guarded(model_type))
        said = rows[-1]["reason"] or f"served: {', '.join(rows[-1]['samples'])}"
        print(f"{model_type:26} {rows[-1]['tower']:34} {said}", flush=True)
    print(sum(not row["reason"] for row in rows), "of", len(rows))
    save(options.json, rows)


if __name__ == "__main__":
    main()
