"""The classes of samples, and the accuracy of models that classify."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from apt.engine.samples import held_out_samples
from apt.errors import AptError
from apt.evaluation import accuracy
from apt.evaluation.outputs import outputs_of
from apt.extending import load, open_skeleton
from apt.inputs.classes import class_numbers
from apt.inputs.texts import Passage, passages
from apt.locations.model_source import find
from apt.options import PruneRun
from apt.plugin.documents import Label
from apt.plugin.registry import registry
from apt.text.datasets import documents, hub_documents, tokenize

NAMES = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A random BERT with three classes that have names."""
    path = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(find("zoo:bert", registry()).location)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=3, id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


def rows_of(*columns, count=20, label=lambda n: n % 3):
    return [
        {**{name: f"The {name} of row {n * n}, at {n}." for name in columns}, "label": label(n)}
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("a.jsonl", ("text",)), ("a.parquet", ("sentence",)), ("a.jsonl", ("review",)),
        ("a.parquet", ("sentence1", "sentence2")), ("a.jsonl", ("premise", "hypothesis")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("named", [False, True])
def test_accuracy_is_the_share_of_right_classes(classifier, tmp_path, file, columns, named):
    label = (lambda n: NAMES[n % 3]) if named else (lambda n: n % 3)
    source = write(tmp_path / file, rows_of(*columns, label=label))
    skeleton = open_skeleton(find(str(classifier), registry()), registry())
    run = PruneRun(model=str(classifier), seqlen=32)
    samples = held_out_samples(str(source), run, skeleton, registry(), 12)
    model = load(skeleton, None, "cpu").module
    found = torch.stack(outputs_of(model, samples).predictions)
    assert len(set(samples.labels.tolist())) == 3
    assert accuracy(model, samples) == float((found == samples.labels).float().mean())
    assert accuracy(model, samples[:4]) == float((found == samples.labels)[:4].float().mean())
    if len(columns) == 2:
        assert all(1 in sample["token_type_ids"] for sample in samples)


def test_a_run_and_a_comparison_have_the_accuracy(apt, classifier, tmp_path):
    source = write(tmp_path / "a.jsonl", rows_of("text"))
    common = ("--metric", "accuracy", "--metric", "predictions", "--calibration", source,
              "--samples", 8)  # fmt: skip
    done = apt("prune", classifier, "--pattern", "2:4", "--method", "wanda", *common, "--eval",
               source, "-o", "out")  # fmt: skip
    assert done.code == 0, done.err
    scores = json.loads(Path("out/apt_report.json").read_text())["scores"]
    alone = apt("eval", "out", "--metric", "accuracy", "--data", source, "--samples", 8, "--json")
    assert json.loads(alone.out)["accuracy"] == scores["after"]["accuracy"]
    done = apt("compare", classifier, "--methods", "wanda", "--patterns", "2:4", *common, "--data",
               source, "--windows", 8, "-o", "cmp", "--json")  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["scores"]["a.jsonl"] for row in rows] == [scores["before"], scores["after"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": f"Row {n}."} for n in range(20)], "accuracy needs a model that classifies"),
        (rows_of("text", label=lambda n: -1), "accuracy needs a model that classifies"),
        (rows_of("text", label=lambda n: n), "a.jsonl has the class "),
        (rows_of("text", label=lambda n: "sad"), "a.jsonl has the class 'sad', and the model has"),
    ],
)  # fmt: skip
def test_unknown_classes_are_one_line(apt, classifier, tmp_path, rows, message):
    source = write(tmp_path / "a.jsonl", rows)
    done = apt("prune", classifier, "--pattern", "2:4", "--method", "wanda", "--calibration",
               "builtin", "--samples", 8, "--eval", source, "--metric", "accuracy",
               "--metric", "similarity", "-o", "out")  # fmt: skip
    assert done.code == 2
    assert message in done.err.splitlines()[-1]
    assert not Path("out").exists()


def test_data_set_of_the_hub_gives_names_and_leaves_splits_without_classes(tmp_path):
    """A local data set of the form of GLUE's: the tests have no classes."""
    names = datasets.ClassLabel(names=["entailment", "neutral"])
    features = datasets.Features(
        {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"),
         "label": names, "idx": datasets.Value("int32")}
    )  # fmt: skip
    files = {}
    splits = {"train": [1, 0], "validation_matched": [0, 1], "test_a": [-1, -1], "test_b": [-1]}
    for split, labels in splits.items():
        rows = [
            {"premise": f"{split} {n}", "hypothesis": "so", "label": label, "idx": n}
            for n, label in enumerate(labels)
        ]
        files[split] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_list(rows, features=features).to_parquet(files[split])
    found = list(passages(hub_documents("parquet", None, "evaluation", files)))
    assert found == [
        Passage(("validation_matched 0", "so"), Label(0, "entailment")),
        Passage(("validation_matched 1", "so"), Label(1, "neutral")),
    ]
    del files["validation_matched"]
    assert [each.label for each in passages(hub_documents("parquet", None, "evaluation", files))] \
        == [None, None]  # fmt: skip


def test_name_of_a_class_counts_more_than_its_number():
    labels = [Label(0, "Entailment"), Label(2, "contradiction")]
    classes = {"contradiction": 0, "neutral": 1, "entailment": 2}
    assert class_numbers(labels, classes, "a").tolist() == [2, 0]
    plain = {f"LABEL_{number}": number for number in range(3)}
    assert class_numbers(labels, plain, "a").tolist() == [0, 2]
    assert class_numbers([*labels, None], plain, "a") is None
    with pytest.raises(AptError, match="a has the class 3, and the model has only"):
        class_numbers([Label(3)], plain, "a")


def test_image_has_the_class_of_its_row(apt, model_of, tmp_path):
    rows = []
    for n in range(8):
        file = io.BytesIO()
        Image.fromarray(np.full((20, 20, 3), 30 * n, np.uint8)).save(file, "png")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": n % 2})
    source = write(tmp_path / "a.parquet", rows)
    done = apt("eval", model_of("vit"), "--metric", "accuracy", "--data", source, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["accuracy"] in {n / 8 for n in range(9)}


def test_decoder_reads_both_texts_one_after_the_other(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [{"source": "One text.", "target": "Another."}])
    (document,) = documents(str(source), "calibration", registry())
    assert tokenize(tokenizer, [document]).equal(tokenize(tokenizer, ["One text.\n\nAnother."]))
