"""The folder of a run: taken where it holds nothing of another one."""

import os
import socket

import pytest

from lorarecycle.runtime.files import LEFTOVER
from lorarecycle.work_dir import RECORD, WorkDir


@pytest.mark.parametrize("inside", ["surrogates", f"surrogates/{LEFTOVER}{socket.gethostname()}-1-x", f"{LEFTOVER}x"])
def test_a_run_that_was_killed_before_its_record_was_there(tmp_path, inside):
    work = tmp_path / "work"
    (work / inside).mkdir(parents=True)
    WorkDir(work).open({"config": 1})
    assert (work / RECORD).is_file()
    assert (work / "surrogates").is_dir()
    with pytest.raises(ValueError, match="must be of this run, got one that differs in config"):
        WorkDir(work).open({"config": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"must be of this run, got one that differs in adapters, config \(see .*run\.json\)"),
        ("", r"run\.json must be JSON, got text that does not parse"),
        ("[" * 100_000, r"run\.json must be JSON, got brackets nested too deep"),
        ('{"config": 1, "adapters": [1], "base": 2}', r"must be of this run, got one that differs in "),
    ],
    ids=["list", "empty", "deep", "odd values"],
)
def test_records_that_hold_something_else(tmp_path, text, message):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / RECORD).write_text(text)
    with pytest.raises(ValueError, match=message):
        WorkDir(tmp_path / "work").open({"config": 1})
    assert (tmp_path / "work" / RECORD).read_text() == text


@pytest.mark.parametrize("inside", ["surrogates/00000-a.safetensors", "surrogates/mine/thesis.tex", "thesis.tex"])
def test_files_of_others_are_refused(tmp_path, inside):
    file = tmp_path / "work" / inside
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(ValueError, match="must be new, empty or of this run, got one with other files in it"):
        WorkDir(tmp_path / "work").open({})
    assert file.read_text() == "precious"
    assert not (tmp_path / "work" / RECORD).exists()


def test_the_record_comes_before_anything_else(tmp_path, monkeypatch):
    seen = []
    original = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: seen.append((tmp_path / "w" / "surrogates").exists()) or original(a, b)
    )
    WorkDir(tmp_path / "w").open({})
    assert seen == [False]


@pytest.mark.parametrize("place", ["", "claims", "surrogates"])
def test_files_in_the_place_of_folders(tmp_path, place):
    work, name = tmp_path / "work", tmp_path / "work" / place
    if place:
        WorkDir(work).open({})
        if name.exists():
            name.rmdir()
    name.touch()
    with pytest.raises(ValueError, match=f"`work_dir` {work} must be a folder of this run, got a file at {name}"):
        WorkDir(work).open({})
