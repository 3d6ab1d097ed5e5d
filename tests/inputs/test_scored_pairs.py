"""Pairs of texts with scores, and the metric ``spearman`` of models that read each text alone."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants
from scipy.stats import spearmanr
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig
from transformers import BertForSequenceClassification as Classifier

from apt.engine.samples import held_out_samples
from apt.extending import load, open_skeleton
from apt.locations import hub
from apt.locations.model_source import find
from apt.options import PruneRun
from apt.plugin.documents import Texts, texts_of
from apt.plugin.registry import registry
from tests.helpers import TEXT

COUNT = 12


def rows(score="score"):
    """Pairs of sentences; the first words of the second one are those of the first one."""
    words = TEXT.read_text().split()
    sentences = [words[n * 9 : n * 9 + 8] for n in range(COUNT)]
    return [
        {
            "sentence1": " ".join(sentence),
            "sentence2": " ".join(sentence[: n % 7] + sentences[n - 1][n % 7 :]),
            score: float(n % 7) / 2,
        }
        for n, sentence in enumerate(sentences)
    ]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows())), "utf-8")
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A directory of the embedded encoder."""
    path = tmp_path_factory.mktemp("encoder") / "bert"
    shutil.copytree(find("zoo:bert", registry()).location, path)
    return path


def expected(directory, vector):
    """The rank correlation by transformers and scipy; ``vector`` is that of the last states."""
    model = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).base_model.eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def vector_of(text):
        with torch.no_grad():
            return vector(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0])

    found = [
        torch.cosine_similarity(vector_of(row["sentence1"]), vector_of(row["sentence2"]), dim=0)
        for row in rows()
    ]
    return spearmanr(torch.stack(found), [row["score"] for row in rows()]).statistic


def measured(apt, model, data):
    run = apt("eval", model, "--metric", "spearman", "--data", data, "--json", "--dtype", "float32")
    assert run.code == 0, run.err
    return json.loads(run.out)["spearman"]


def test_spearman_is_that_of_the_cosines_of_both_texts(apt, encoder, pairs, monkeypatch):
    monkeypatch.setattr("apt.inputs.texts.near_length", lambda length: length)  # whole texts
    assert measured(apt, encoder, pairs) == pytest.approx(expected(encoder, lambda x: x.mean(0)))


def write_pooling(path, config):
    """Write how sentence-transformers makes a vector."""
    (path / "1_Pooling").mkdir()
    module = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (path / "modules.json").write_text(json.dumps([{"path": "", "type": "Transformer"}, module]))
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("config", [{"pooling_mode_cls_token": True}, {"pooling_mode": "cls"}])
def test_first_token_is_the_vector_where_the_directory_says_so(
    apt, encoder, pairs, tmp_path, monkeypatch, config
):
    monkeypatch.setattr("apt.inputs.texts.near_length", lambda length: length)
    path = shutil.copytree(encoder, tmp_path / "first")
    write_pooling(path, config)
    assert measured(apt, path, pairs) == pytest.approx(expected(encoder, lambda x: x[0]))


def test_scores_of_a_parquet_file_and_of_glue_are_read(apt, encoder, pairs, tmp_path):
    path = tmp_path / "glue.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows("label")), path)
    assert measured(apt, encoder, path) == pytest.approx(measured(apt, encoder, pairs))


def test_run_is_calibrated_on_the_first_texts(apt, encoder, pairs):
    options = ("--calibration", pairs, "--samples", 4, "--method", "wanda", "--pattern", "2:4")
    run = apt("prune", encoder, *options, "--eval", pairs, "--metric", "spearman", "-o", "out")
    assert run.code == 0, run.err
    scores = json.loads(Path("out/apt_report.json").read_text())["scores"]
    assert all(-1 <= scores[which]["spearman"] <= 1 for which in ("before", "after"))


def samples_of(directory, source):
    options = PruneRun(model=str(directory), pattern="2:4")
    skeleton = open_skeleton(find(str(directory), registry()), registry())
    return held_out_samples(str(source), options, skeleton, registry(), 50)


def test_model_of_the_hub_has_its_vector_and_its_length(encoder, pairs, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--someone--encoder"
    snapshot = shutil.copytree(encoder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(  # of transformers 4
        "transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False
    )
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.reachable.cache_clear()
    assert not samples_of("someone/encoder", pairs).first
    write_pooling(snapshot, {"pooling_mode_cls_token": True})
    (snapshot / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    samples = samples_of("someone/encoder", pairs)
    assert samples.first
    assert samples.shape[1] == 6
    hub.reachable.cache_clear()


def test_parts_of_the_samples_keep_their_pairs(encoder, pairs):
    samples = samples_of(encoder, pairs)
    part = samples[3:5]
    assert part.pairs.scores.tolist() == samples.pairs.scores[3:5].tolist()
    other = samples.pairs.others[4]["input_ids"]
    assert torch.equal(part.pairs.others[1]["input_ids"], other)
    assert part.digest() != samples[4:6].digest()
    assert samples.with_samples(list(samples)).digest() != samples.digest()


def test_reranker_reads_both_texts_together(tmp_path, pairs, encoder):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32, num_labels=1,
    )  # fmt: skip
    Classifier(config).save_pretrained(tmp_path / "reranker")
    tokenizer.save_pretrained(tmp_path / "reranker")
    samples = samples_of(tmp_path / "reranker", pairs)
    assert samples.pairs is None
    assert {"input_ids", "token_type_ids"} <= set(samples.names)
    assert all(len(sample["token_type_ids"].unique()) == 2 for sample in samples)
    model = load(open_skeleton(find(str(tmp_path / "reranker"), registry()), registry()))
    assert model.module.config.num_labels == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("score"), "spearman needs a model that reads each text alone"),
        (lambda row: row.update(score=2.5), "all scores or all cosines of 12 pairs are equal"),
    ],
)
def test_pairs_without_an_order_are_errors_of_one_line(apt, encoder, tmp_path, change, message):
    changed = rows()
    for row in changed:
        change(row)
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, changed)), "utf-8")
    run = apt("eval", encoder, "--metric", "spearman", "--data", path)
    assert run.code == 2
    assert message in run.err.splitlines()[-1]


def test_only_numbers_are_scores():
    row = {"sentence1": "a", "sentence2": "b"}
    for value, score in ((3, 3.0), (0.5, 0.5), (True, None), ("3", None), (None, None)):
        assert texts_of({**row, "score": value}).score == score
    assert texts_of({**row, "label": 1}).score is None
    assert texts_of({**row, "score": float("nan")}).score is None
    assert texts_of({**row, "score": float("inf"), "label": 0.5}).score is None
    assert texts_of({**row, "label": 2.25}).score == 2.25
    assert Texts(("a",)).score is None
