"""The journal of a run that can be resumed."""

import pytest

from apt.errors import AptError
from apt.files.journal import Journal

INPUTS = {"model": "a", "options": {"seed": 0, "shape": (2, 3)}}


@pytest.fixture
def place(tmp_path):
    """The file of a journal with two results."""
    journal = Journal(tmp_path / "journal.jsonl", "the run", "delete it")
    journal.begin(INPUTS)
    journal.remember("first", lambda: 1.5)
    journal.remember("second", lambda: [1, 2])
    return journal.path


def opened(path):
    journal = Journal(path, "the run", "delete it")
    journal.read()
    return journal


@pytest.mark.parametrize("memory", [False, True])
def test_remember_computes_a_result_once(tmp_path, memory):
    journal, computed = Journal(None if memory else tmp_path / "journal"), []
    journal.begin({})
    for _ in range(2):
        assert journal.remember("key", lambda: computed.append(1) or len(computed)) == 1
    assert computed == [1]
    journal.clear()
    assert journal.lines == []
    assert not list(tmp_path.iterdir())


def test_remembered_results_are_read_by_the_next_process(place):
    journal = opened(place)
    journal.check(INPUTS)
    assert journal.serves(INPUTS)
    assert journal.remember("first", lambda: 1 / 0) == 1.5
    assert journal.values("second") == [[1, 2]]
    journal.remember("third", lambda: 3)
    assert opened(place).values("third") == [3]


def test_journal_of_a_run_with_other_inputs_is_refused(place):
    other = {**INPUTS, "options": {"seed": 1}}
    assert not opened(place).serves(other)
    message = r"^the run is another run: options\.seed, options\.shape differ; .* delete it$"
    with pytest.raises(AptError, match=message):
        opened(place).check(other)


def test_has_work_is_true_only_after_keep(place):
    assert not opened(place).has_work
    opened(place).keep({"block": "a"})
    assert opened(place).has_work
    assert opened(place).values("block") == ["a"]


def test_incomplete_last_line_is_removed(place):
    whole = place.read_bytes()
    place.write_bytes(whole[:-5])
    journal = opened(place)
    assert journal.values("first") == [1.5]
    assert journal.remember("second", lambda: [1, 2]) == [1, 2]
    assert place.read_bytes() == whole
    place.write_bytes(whole[:7])
    assert opened(place).lines == []


@pytest.mark.parametrize("number", [1, 2])
def test_changed_line_is_an_error(place, number):
    lines = place.read_bytes().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].translate(bytes.maketrans(b"25", b"36"))  # the values
    place.write_bytes(b"".join(lines))
    with pytest.raises(AptError, match="was changed; delete it$"):
        opened(place)


EARLIER = [b'{"inputs": "an earlier version"}\n', b'{"fingerprint": "a later one"}\n']


@pytest.mark.parametrize("content", [b"my notes\n", *EARLIER, b"\xff"])
def test_other_file_is_refused_and_unchanged(tmp_path, content):
    place = tmp_path / "notes"
    place.write_bytes(content)
    with pytest.raises(AptError, match="notes is not the journal of the run"):
        opened(place)
    assert place.read_bytes() == content


def test_links_are_refused(place):
    link = place.with_name("link")
    link.symlink_to(place)
    with pytest.raises(AptError, match="is a link"):
        opened(link)
    link.unlink()
    link.hardlink_to(place)
    with pytest.raises(AptError, match="is a link"):
        opened(link)
    with pytest.raises(AptError, match="is a link or not a regular file"):
        opened(place.parent)
