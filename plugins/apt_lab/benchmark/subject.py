"""The measured model, in the process that measures it."""

import gc
import platform
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from apt.checkpoints.architecture import quantised_with
from apt.checkpoints.formats import local_copy
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import local_directory
from apt.compute import compute_dtype, dtype_name
from apt.devices import is_accelerator, name_of, peak_allocated, reset_peak, synchronize
from apt.errors import AptError, NotStoredError
from apt.evaluation.generated import writes as writes_outputs
from apt.evaluation.generation import prompts
from apt.extending import Opened, Source, choose_device, load, open_skeleton, read_dtype, registry
from apt.output.report import peak_memory, versions
from apt.packing.directory import stored_tensors
from apt.runtime.entries import is_packed
from apt.text.self_generated import writes
from apt_lab.benchmark.generation import speed, speed_on_samples
from apt_lab.benchmark.inputs import RandomInputs
from apt_lab.benchmark.measures import Facts, Speed, Turn
from apt_lab.options import BenchRun


class Subject:
    """A measured model. Between two turns its weights are not in memory.

    Args:
        source: the model.
        run: the options.

    Raises:
        AptError: the model does not load, it cannot generate text, or there is no such device.
    """

    def __init__(self, source: Source, run: BenchRun) -> None:
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        self._device, self._dtype = choose_device(run.device), read_dtype(run.dtype)
        skeleton = open_skeleton(source, registry(), run.adapter, packed=True)
        _check(skeleton)
        self._inputs = None if skeleton.reads.windows else RandomInputs(skeleton)
        self._idle = peak_memory()["cpu"]
        self._skeleton = _downloaded(skeleton) if source.on_hub else skeleton

    def facts(self) -> Facts:
        """The facts that do not change from round to round."""
        skeleton = self._skeleton
        return Facts(
            parameters=sum(parameter.numel() for parameter in skeleton.module.parameters()),
            weight_bytes=sum(path.stat().st_size for path in _weight_files(skeleton)),
            positions=skeleton.adapter.positions(skeleton.config),
            idle_bytes=self._idle,
            device=self._device,
            device_name=_device_name(self._device),
            threads=torch.get_num_threads(),
            versions=versions(),
            reads="" if skeleton.reads.windows else skeleton.reads.words,
            writes=skeleton.reads.windows or writes_outputs(skeleton.module),
        )

    def turn(self, run: BenchRun, seed: int) -> Turn:
        """Load the model, measure each batch, and release the model.

        Args:
            run: the options.
            seed: the seed of the prompts.
        """
        reset_peak(self._device)
        start = perf_counter()
        model = load(self._skeleton, self._dtype, self._device)
        synchronize(self._device)
        seconds = perf_counter() - start
        with model.adapter.running(model.module):
            speeds = tuple(self._speed(model, run, batch, seed) for batch in run.batch)
        peak = {"cpu": peak_memory()["cpu"]}
        if is_accelerator(self._device):
            peak[torch.device(self._device).type] = peak_allocated(self._device)
        dtype = dtype_name(model.dtype)
        dense = quantised_with(model.config) is None
        slow = dense and compute_dtype(model.dtype, self._device) != model.dtype
        del model
        gc.collect()
        if is_accelerator(self._device):
            torch.accelerator.empty_cache()
        return Turn(seconds, dtype, speeds, peak, slow)

    def _speed(self, model: Opened, run: BenchRun, batch: int, seed: int) -> Speed:
        """The speed of one batch of random inputs."""
        module = model.module
        if self._inputs is None:
            return speed(module, prompts(module, batch, run.prompt, seed), run.generate)
        inputs = {
            name: each.to(self._device, model.dtype if each.is_floating_point() else each.dtype)
            for name, each in self._inputs.make(batch, run.prompt, run.generate, seed).items()
        }
        return speed_on_samples(module, inputs, run.generate if writes_outputs(module) else None)


def _check(skeleton: Opened) -> None:
    """Raise if the adapter does not fit the model, or the model cannot generate text."""
    for _, block in skeleton.adapter.blocks(skeleton.module):
        skeleton.adapter.sites(block)
    if skeleton.reads.windows and not writes(skeleton.module):
        raise AptError(
            f"{type(skeleton.module).__name__} of {skeleton.source.reference} cannot generate text",
            "its decoding speed cannot be measured",
        )


def _downloaded(skeleton: Opened) -> Opened:
    """A model of the hub, to be read from its local copy, so that no load uses the network."""
    source = skeleton.source
    try:
        Shards(local_directory(skeleton))
    except NotStoredError:  # its weights are in another format
        local_copy(source)
    return replace(skeleton, source=replace(source, hub=replace(source.hub, local=True)))


def _weight_files(skeleton: Opened) -> list[Path]:
    source = skeleton.source
    if source.gguf:
        return source.files()
    directory = local_directory(skeleton)
    if is_packed(directory):
        return stored_tensors(directory).files
    try:
        return Shards(directory).files
    except NotStoredError:
        return list(directory.glob("pytorch_model*.bin"))


def _device_name(device: str) -> str:
    if is_accelerator(device):
        return name_of(device)
    return platform.processor() or platform.machine()
