"""Files that are replaced while they are read are read again."""

import pytest

from lorarecycle.runtime import settled
from lorarecycle.runtime.settled import TornFolderError, read_settled


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.setattr(settled, "_WAITS", (0.0, 0.0))
    for name in "ab":
        (tmp_path / name).write_text("old")
    return tmp_path


def replace(file, text):
    (file.parent / "new").write_text(text)
    (file.parent / "new").replace(file)


def test_a_reader_that_came_between_two_renames(pair):
    calls = []

    def read():
        first = (pair / "a").read_text()
        if not calls:
            replace(pair / "a", "newer")
            replace(pair / "b", "newer")
        calls.append(first)
        return first, (pair / "b").read_text()

    assert read_settled(pair, "ab", read) == ("newer", "newer")
    assert calls == ["old", "newer"]


def test_torn_files_are_read_again_and_refused_in_the_end(pair):
    answers = [TornFolderError("torn"), "whole"]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert read_settled(pair, "ab", read) == "whole"
    answers += [TornFolderError(f"torn {i}") for i in range(3)]
    with pytest.raises(TornFolderError, match="torn 2"):
        read_settled(pair, "ab", read)


def test_other_errors_of_files_at_rest_are_raised_at_once(pair):
    calls = []

    def read():
        calls.append(1)
        raise ValueError("no JSON")

    with pytest.raises(ValueError, match="no JSON"):
        read_settled(pair, "ab", read)
    assert len(calls) == 1


def test_files_that_never_rest(pair):
    calls = []

    def read():
        calls.append(1)
        replace(pair / "a", "x" * len(calls))

    with pytest.raises(TornFolderError, match="got ones that another process keeps replacing"):
        read_settled(pair, "ab", read)
    assert len(calls) == 3
