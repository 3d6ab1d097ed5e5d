"""Pruning a checkpoint on disk block by block: no more of a model in memory than one block.

The output begins as a copy of the checkpoint, and what is pruned is written over its own bytes; so
shards, dtypes, metadata and every other file stay as they were. Dense weights are always read from
the input: a block that was cut short is pruned again from the start, with the same result.
"""

import copy
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from apt.activations import DiskStore
from apt.allocate import UNIFORM
from apt.checkpoint import check_space, open_up
from apt.disk import OnDisk, sites_of
from apt.errors import AptError, first_line
from apt.estimate import activations_on_disk
from apt.events import Observer, SitePruned, telling
from apt.formats import find_file
from apt.journal import Workplace
from apt.models import Model, load_tokenizer
from apt.pipeline import prune_blocks
from apt.ranks import Ranks
from apt.report import FILE, Report, versions
from apt.run import Prepared, check_vocabulary, texts
from apt.shards import Shards
from apt.text import digest

# Weights in other formats would be dense ones beside the pruned.
_LEFT_BEHIND = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_PIECE = 2**24


def execute_streamed(
    prepared: Prepared,
    observe: Observer,
    status: Callable[[str], None],
    *,
    resume: bool,
    ranks: Ranks | None = None,
) -> Report:
    """Prune block by block from disk to disk; see `apt.run.execute`.

    Args:
        prepared: the checked run.
        observe: called with the pipeline's events.
        status: told what is being done outside the pipeline.
        resume: go on with an interrupted run of the same command.
        ranks: the processes that do this together. The first keeps the journal and writes; all
            read, so that the output lies where every one of them can read it.

    Raises:
        AptError: the checkpoint cannot be streamed, or it, the text or the disk is at fault.
    """
    started, options, shell = time.perf_counter(), prepared.options, prepared.shell
    ranks, source = ranks or Ranks(), _directory(prepared)
    shards = Shards(source)
    names = _names(shell, shards)
    work = Workplace(options.output)
    if ranks.first and not resume:
        weights = sum(path.stat().st_size for path in _files(source, shards))
        check_space(work.output, weights + _shelved(prepared))
    status("reading text")
    tokens, _ = texts(prepared, load_tokenizer(shell.source, options.tokenizer))
    status("hashing the model")
    origin = {
        "reference": options.model,
        "type": shell.config.model_type,
        "adapter": shell.spec.name,
        "sha256": _hash(shards),
    }
    calibration = {
        "source": options.calibration, "shape": list(tokens.shape), "sha256": digest(tokens)
    }  # fmt: skip
    fingerprint = _fingerprint(prepared, origin, calibration) | {"ranks": ranks.size}
    with _told(options.output), _entered(work, fingerprint, resume, ranks):
        if ranks.first and not work.has("copied"):
            status("copying the checkpoint")
            _copy(source, work.out, shards)
            work.add({"copied": True})
        ranks.wait()
        if work.has("finished"):
            sites = [site for line in work.lines for site in sites_of(line)]
        else:
            status("loading what is not in blocks")
            module = _assembled(shell, shards, names, prepared.device)
            check_vocabulary(tokens, module, shell.source.reference)
            blocks = dict(shell.adapter.blocks(module))
            disk = OnDisk(
                prepared.plan, blocks, prepared.device, names, shards, Shards(work.out), work, ranks
            )
            store = DiskStore(work.activations) if options.activations == "disk" else None
            sites = _prune(prepared, module, tokens, disk, store, observe, ranks)
        skipped = [site.name for site in prepared.plan.sites if site.pattern is None]
        seconds = time.perf_counter() - started
        record = options.record() | prepared.mode.record()
        report = Report(
            record, origin, calibration, sites, skipped, seconds, ranks=ranks.gather(ranks.work)
        )
        if not ranks.first:
            return report
        if not work.has("finished"):
            status("verifying")
            disk.verify()
            report.write(work.out)
            open_up(work.out)
        work.finish()
    return report


def _fingerprint(
    prepared: Prepared, origin: dict[str, Any], calibration: dict[str, Any]
) -> dict[str, Any]:
    """All that the result depends on."""
    record = prepared.options.record() | prepared.mode.record()
    return {
        "model": origin,
        "calibration": calibration,
        "options": {k: v for k, v in record.items() if k not in ("overwrite", "resume")},
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def _shelved(prepared: Prepared) -> int:
    """Bytes of the activations that will be on disk."""
    options, shell = prepared.options, prepared.shell
    if options.activations != "disk":
        return 0
    dtype = getattr(shell.config, "dtype", None) or torch.float32
    tokens = options.samples * options.seqlen
    return activations_on_disk(shell, prepared.plan, tokens, dtype)


@contextmanager
def _entered(
    work: Workplace, fingerprint: dict[str, Any], resume: bool, ranks: Ranks
) -> Iterator[None]:
    """The first rank holds the workplace; the others know what its journal says."""
    with work.entered(fingerprint, resume) if ranks.first else nullcontext():
        work.lines = ranks.share(work.lines)
        yield


@contextmanager
def _told(output: Path) -> Iterator[None]:
    """Say what to do where the disk is full or fails."""
    try:
        yield
    except OSError as error:
        raise AptError(
            f"cannot write {output}: {first_line(error)}",
            "mend that, then give the same command with --resume",
        ) from error


def _prune(
    prepared: Prepared,
    module: nn.Module,
    tokens: Tensor,
    disk: OnDisk,
    store: DiskStore | None,
    observe: Observer,
    ranks: Ranks,
) -> list[SitePruned]:
    return prune_blocks(
        module,
        prepared.shell.adapter,
        prepared.plan,
        tokens,
        prepared.method.load(),
        **vars(prepared.mode),
        resident=disk,
        store=store,
        ranks=ranks,
        observe=telling(observe, prepared.registry.site_pruned),
    )


def check_streamable(prepared: Prepared) -> None:
    """Raise where a run cannot be streamed, before any work is done."""
    options, shell = prepared.options, prepared.shell
    if shell.checkpoint is not None or shell.source.gguf:
        raise AptError("only checkpoints of transformers can be streamed", "apt convert it first")
    for given, what in (
        (options.evaluation is not None, "--eval"),
        (options.allocation != UNIFORM, "--allocation"),
        (options.dtype != "auto", "--dtype"),
    ):
        if given:
            raise AptError(f"{what} needs the whole model in memory", "leave out --stream or it")
    _names(shell, Shards(_directory(prepared)))


def _directory(prepared: Prepared) -> Path:
    """Where the checkpoint lies on this machine."""
    location = prepared.shell.source.location
    found = find_file(location, "config.json")
    if found is None:
        raise AptError(f"{location} has no config.json", "is the checkpoint complete?")
    if not Path(location).is_dir():
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(location))
    return found.parent


def _names(shell: Model, shards: Shards) -> dict[str, str]:
    """From the model's weights to the checkpoint's, where that has them."""
    prefix = f"{getattr(shell.module, 'base_model_prefix', '')}."
    names = {}
    for name in shell.module.state_dict():
        for known in (name, name.removeprefix(prefix)):
            if known in shards:
                names[name] = known
                break
    for block, module in shell.adapter.blocks(shell.module):
        for name, parameter in module.named_parameters():
            key = names.get(f"{block}.{name}")
            if key is None or shards.entries[key].shape != tuple(parameter.shape):
                raise AptError(
                    f"{shell.source.reference} cannot be streamed: it does not hold {block}.{name} "
                    "as the model has it",
                    "prune it without --stream",
                )
    return names


def _files(source: Path, shards: Shards) -> Iterator[Path]:
    """The files that the output has as well; of safetensors files, those that the index names."""
    weights = {entry.file for entry in shards.entries.values()}
    for folder, _, names in os.walk(source):
        for name in names:
            path = Path(folder) / name
            if path.suffix in _LEFT_BEHIND or name == FILE or not path.is_file():
                continue
            if path.suffix != ".safetensors" or path in weights:
                yield path


def _copy(source: Path, target: Path, shards: Shards) -> None:
    """Copy the checkpoint."""
    for path in _files(source, shards):
        into = target / path.relative_to(source)
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into)
        with into.open("rb") as file:
            os.fsync(file.fileno())


def _hash(shards: Shards) -> str:
    """SHA-256 over the files of the weights."""
    found = hashlib.sha256()
    for path in sorted({entry.file for entry in shards.entries.values()}):
        found.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
    return found.hexdigest()


def _assembled(shell: Model, shards: Shards, names: dict[str, str], device: str) -> nn.Module:
    """The model with its blocks on the meta device and everything else in memory.

    What a model makes for itself, tables of positions for instance, comes from one of a single
    block, whose list of blocks is then replaced.
    """
    blocks = shell.adapter.blocks(shell.module)
    parent = blocks[0][0].rpartition(".")[0]
    single: Any = AutoModelForCausalLM.from_config(
        _of_one_block(shell.config), trust_remote_code=shell.source.trust_remote_code
    ).eval()
    made = {n: b.to(device) for n, b in shell.adapter.blocks(single)[0][1].named_buffers()}
    outer = {
        n: names[n] for n in single.state_dict() if n in names and not n.startswith(f"{parent}.")
    }
    single.set_submodule(parent, nn.ModuleList())
    vars(single.config).update(vars(shell.config))
    single.load_state_dict(
        {n: shards.read(key) for n, key in outer.items()}, strict=False, assign=True
    )
    single.tie_weights()
    _check_whole(shell, single, outer)
    single.to(device)
    single.set_submodule(parent, shell.module.get_submodule(parent))
    for name, block in blocks:
        _give_buffers(shell, name, block, made)
    module: nn.Module = single
    return module


def _of_one_block(config: Any) -> Any:
    short = copy.deepcopy(config)
    short.num_hidden_layers = 1
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(short, name, value[:1])
    return short


def _give_buffers(shell: Model, name: str, block: nn.Module, made: dict[str, Tensor]) -> None:
    """Buffers that a checkpoint does not hold are what a block makes for itself."""
    for path, buffer in list(block.named_buffers()):
        if not buffer.is_meta:
            continue
        if path not in made or made[path].shape != buffer.shape:
            raise AptError(
                f"{shell.source.reference} cannot be streamed: nothing says what {name}.{path} is",
                "prune it without --stream",
            )
        owner, _, own = path.rpartition(".")
        block.get_submodule(owner).register_buffer(own, made[path].clone(), persistent=False)


def _check_whole(shell: Model, module: nn.Module, given: Collection[str]) -> None:
    """Raise where a weight outside the blocks came neither from the checkpoint nor from a tie."""
    tied = {p.data_ptr() for n, p in module.state_dict().items() if n in given}
    for name, tensor in module.state_dict().items():
        if name not in given and tensor.data_ptr() not in tied:
            raise AptError(f"{shell.source.reference} lacks {name}", "is the checkpoint complete?")
