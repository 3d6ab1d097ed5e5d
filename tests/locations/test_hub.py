"""Models and text on the hub: its settings, and the messages if it does not answer."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from apt.checkpoints.load import load_tokenizer, read_config
from apt.errors import AptError
from apt.locations import hub
from apt.locations.hub import Hub
from apt.locations.model_source import find
from apt.plugin.registry import registry
from apt.text.datasets import documents
from tests.helpers import TEXT

COMMIT = "a" * 40


@pytest.fixture
def nowhere(monkeypatch):
    """The address of the hub is one that does not answer."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


@pytest.fixture
def downloads(checkpoint, tmp_path, monkeypatch):
    """A folder of downloads, as huggingface_hub keeps them, with a branch ``pruned`` of a model."""
    repository = tmp_path / "cache" / "models--someone--model"
    shutil.copytree(checkpoint("llama"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "pruned").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(  # of transformers 4
        "transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False
    )
    return tmp_path / "cache"


def test_loaders_get_revision_and_local_files_only():
    assert Hub().options() == {}
    asked = Hub("v1", local=True)
    assert asked.options() == {"revision": "v1", "local_files_only": True}


@pytest.mark.parametrize("command", ["inspect", "eval", "eval --stream", "convert -o new", "prune"])
def test_revision_in_the_cache_is_read(apt, nowhere, downloads, command):
    name, *more = command.split()
    small = () if name == "convert" else ("--samples", 2, "--seqlen", 64)
    text = {"eval": ("--data", TEXT), "prune": ("--calibration", TEXT)}.get(name, ())
    options = ("--revision", "pruned")
    method = ("--method", "wanda", "-o", "out") if name == "prune" else ()
    run = apt(name, "someone/model", *more, *small, *text, *options, *method)
    assert run.code == 0, run.err
    if name == "prune":
        assert '"revision": "pruned"' in Path("out/apt_report.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("inspect", "facebook/opt-125m"),
            "'facebook/opt-125m' is not a local directory and has not",
        ),
        (("inspect", "llama"), "did you mean 'zoo:llama', the embedded model?"),
        (("eval", "zoo:llama", "--tokenizer", "someone/else"), "no such tokenizer: 'someone/else'"),
        (("eval", "zoo:llama", "--data", "c4"), "data set 'c4' is on the hub"),
        (("eval", "zoo:llama", "--data", "wikitext2"), "data set 'wikitext2' is on the hub"),
        (("eval", "zoo:llama", "--data", "ptb"), "data set 'ptb' is on the hub"),
        (("eval", "zoo:llama", "--data", "someone/text"), "data set 'someone/text' is on the hub"),
    ],
    ids=str,
)
def test_unreachable_hub_is_an_error_of_one_line(apt, nowhere, arguments, message):
    run = apt(*arguments)
    assert run.code == 2
    assert message in run.err
    assert "http://127.0.0.1:9 does not answer" in run.err
    assert len(run.err.splitlines()) == 1


def test_offline_mode_is_named_in_the_error(apt, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.reachable.cache_clear()
    run = apt("inspect", "facebook/opt-125m")
    hub.reachable.cache_clear()
    assert run.code == 2
    assert "the network is switched off by HF_HUB_OFFLINE" in run.err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "does not load: It looks like the config file"),
        ("config.json", '{"model_type": "none"}', "does not load: .* model type `none`"),
        ("tokenizer.json", "{", "has no tokenizer that loads"),
    ],
)
def test_damaged_download_is_not_reported_as_missing(nowhere, downloads, file, text, message):
    path = next(downloads.rglob("snapshots")) / COMMIT / file
    path.write_text(text)
    asked = Hub("pruned")
    source = find("someone/model", registry(), hub=asked)
    with pytest.raises(AptError, match=message):
        (load_tokenizer if file == "tokenizer.json" else read_config)(source)


def test_code_of_another_tokenizer_runs_with_consent(checkpoint, monkeypatch):
    def loaded(name, **options):
        asked.append(options["trust_remote_code"])
        raise ValueError("it is not wanted here")

    asked = []
    monkeypatch.setattr("apt.checkpoints.load.AutoTokenizer.from_pretrained", loaded)
    for allowed in (False, True):
        source = find(str(checkpoint("llama")), registry(), trust_remote_code=allowed)
        with pytest.raises(AptError, match="has no tokenizer that loads"):
            load_tokenizer(source, str(checkpoint("opt")))
    assert asked == [False, True]


def test_revision_of_a_directory_is_refused(checkpoint):
    with pytest.raises(AptError, match="a revision is for models of the hub"):
        find(str(checkpoint("llama")), registry(), hub=Hub("v1"))


def test_local_text_needs_no_hub(nowhere, tmp_path):
    (tmp_path / "a.txt").write_text("words")
    assert list(documents(str(tmp_path / "a.txt"), "evaluation", registry())) == ["words"]
    assert hub.reachable.cache_info().currsize == 0
