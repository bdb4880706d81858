"""Folders that can keep a run are known by trying, and others are refused with the reason."""

import errno
import os
import threading

import pytest

from lorarecycle.runtime import shared_folder
from lorarecycle.runtime.shared_folder import require_seen, require_shared_folder


def test_a_plain_folder_will_do_and_nothing_is_left(tmp_path):
    require_shared_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def create_without_asking(path, flags, mode=0o777, *, opener=os.open):
    return opener(path, flags & ~os.O_EXCL, mode)


def copy_instead(source, target):
    with open(source, "rb") as one, open(target, "wb") as other:
        other.write(one.read())


def refuse(*args):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize(
    ("name", "instead", "message"),
    [
        ("open", create_without_asking, r"must refuse to create a file that is there \(O_EXCL\).*it was created again"),
        ("replace", copy_instead, "must replace one file by another in one step, got the new content was not there"),
        ("replace", refuse, "must replace one file by another in one step, got Operation not supported"),
        ("fsync", refuse, "must be written to, got Operation not supported; choose a folder on another file system"),
    ],
)
def test_what_does_not_work_is_named(tmp_path, monkeypatch, name, instead, message):
    monkeypatch.setattr(shared_folder.os, name, instead)
    with pytest.raises(ValueError, match=message):
        require_shared_folder(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_file_that_comes_late_is_waited_for(tmp_path):
    writer = threading.Timer(0.3, (tmp_path / "run.json").write_text, ["{}"])
    writer.start()
    require_seen(tmp_path / "run.json")
    writer.join()


def test_processes_that_do_not_share_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "SEEN_WITHIN", 0.1)
    with pytest.raises(
        ValueError, match="must be one folder for all processes, got .* does not see run.json of rank 0"
    ):
        require_seen(tmp_path / "run.json")
