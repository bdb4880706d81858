"""Folders appear whole, or their earlier files stay."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from lorarecycle.runtime import folders
from lorarecycle.runtime.files import LEFTOVER
from lorarecycle.runtime.folders import atomic_folder


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_new_folder_appears_in_one_step(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "out"
    monkeypatch.setattr(os, "replace", None)  # not file by file
    with atomic_folder(target) as folder:
        assert folder.parent == target.parent
        assert folder.name.startswith(LEFTOVER)
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")
        assert not target.exists()
    assert content(target) == {"a": "1", "b": "2"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_in_a_folder_that_is_there_files_come_in_the_order_asked_for(tmp_path, monkeypatch):
    (tmp_path / "config").write_text("old")
    (tmp_path / "stale").write_text("old")
    (tmp_path / "notes").write_text("mine")
    order = []
    original = os.replace

    def replace(source, destination):
        order.append(Path(destination).name)
        assert (tmp_path / "stale").exists() == (order[-1] not in ("list", "config")), "removed too early or too late"
        original(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with atomic_folder(
        tmp_path, first="z", last=("list", "config", "absent"), stale=["stale", "config", "never-there"]
    ) as folder:
        assert folder.parent == tmp_path
        for name in ("config", "list", "a", "z"):
            (folder / name).write_text("new")
        assert (tmp_path / "config").read_text() == "old"
    assert order == ["z", "a", "list", "config"]
    assert content(tmp_path) == {"notes": "mine", "config": "new", "list": "new", "a": "new", "z": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("too far off"), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_left_when_the_block_fails(tmp_path, error, there):
    target = tmp_path / "deep" / "out"
    if there:
        target.mkdir(parents=True)
        (target / "a").write_text("old")

    def write():
        with atomic_folder(target, stale=["a"]) as folder:
            (folder / "b").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    if there:
        assert content(target) == {"a": "old"}
    else:
        assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_target_and_other_errors_pass(tmp_path):
    def write(error):
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("half")
            raise error(folder)

    message = r"cannot write .*out: No space left on device; earlier files are unchanged"
    with pytest.raises(OSError, match=message) as caught:
        write(lambda folder: OSError(errno.ENOSPC, "No space left on device"))
    assert LEFTOVER not in str(caught.value)
    with pytest.raises(PermissionError, match=r"cannot write .*out: not allowed; earlier files are unchanged"):
        write(lambda folder: PermissionError(errno.EACCES, "not allowed", str(folder / "a")))
    with pytest.raises(FileNotFoundError, match=r"^no image file cat.png$"):
        write(lambda folder: FileNotFoundError("no image file cat.png"))


def test_a_link_to_a_folder_elsewhere(tmp_path):
    """The hidden folder lies where the files will be: they are renamed within one file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk)
    with atomic_folder(tmp_path / "out") as folder:
        assert folder.resolve().parent == disk
        (folder / "a").write_text("1")
    assert content(disk) == {"a": "1"}
    assert (tmp_path / "out").is_symlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "other" / "new")
    with atomic_folder(tmp_path / "dangling") as folder:
        (folder / "a").write_text("1")
    assert content(tmp_path / "other" / "new") == {"a": "1"}


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system here")
def test_a_link_to_another_file_system(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        if os.stat(disk).st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is on the same file system")
        (tmp_path / "out").symlink_to(disk)
        (tmp_path / "new").symlink_to(Path(disk) / "new")
        for target, expected in (("new", {"a": "1"}), ("out/new", {"a": "1"}), ("out", {"a": "1"})):
            with atomic_folder(tmp_path / target) as folder:
                (folder / "a").write_text("1")
            assert {p.name: p.read_text() for p in (tmp_path / target).iterdir() if p.is_file()} == expected


def test_a_mount_that_cannot_rename_folders(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", refuse)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert content(tmp_path / "out") == {"a": "1"}
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="earlier files are unchanged"), atomic_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_process_that_was_quicker(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "b").write_text("theirs")
    assert content(tmp_path / "out") == {"a": "1", "b": "theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_half_way_says_what_is_new(tmp_path, monkeypatch):
    (tmp_path / "b").write_text("old")
    original = os.replace

    def fail_at_b(source, destination):
        if Path(destination).name == "b":
            raise OSError(errno.EIO, "Input/output error")
        original(source, destination)

    monkeypatch.setattr(os, "replace", fail_at_b)

    def write():
        with atomic_folder(tmp_path) as folder:
            (folder / "a").write_text("new")
            (folder / "b").write_text("new")

    with pytest.raises(OSError, match=r"Input/output error; a are new, other files as before; write again"):
        write()
    assert content(tmp_path) == {"a": "new", "b": "old"}


def test_a_folder_in_the_way_of_a_file_is_found_before_anything_is_replaced(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()

    def write():
        with atomic_folder(tmp_path) as folder:
            (folder / "a").write_text("new")
            (folder / "b").write_text("new")

    with pytest.raises(OSError, match=r"b there is a folder; earlier files are unchanged"):
        write()
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_target_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/inner"):
        with (
            pytest.raises(OSError, match=rf"cannot write into the folder .*{output}: .*; choose another"),
            atomic_folder(tmp_path / output),
        ):
            pass
    with pytest.raises(ValueError, match=r"`stale` must be names of files in the folder, got '\.\./x'"):
        atomic_folder(tmp_path, stale=["../x"]).__enter__()
    assert content(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_rights_follow_the_umask(tmp_path, mask, file, folder):
    before = os.umask(mask)
    try:
        for _ in range(2):  # new, then there
            with atomic_folder(tmp_path / "out") as hidden:
                (hidden / "a").write_text("1")
                (hidden / "a").chmod(0o600)  # as some libraries do
                (hidden / "b").write_text("1")
            for name in "ab":
                assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == file
            assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder
    finally:
        os.umask(before)


def test_everything_is_flushed_before_it_is_put_in_place(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(folders, "flush", lambda path: events.append(("flush", path.name)))
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(("replace", Path(b).name)) or original(a, b))
    with atomic_folder(tmp_path) as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("1")
    assert events == [("flush", "a"), ("flush", "b"), ("replace", "a"), ("replace", "b")]


@pytest.mark.parametrize("there", [True, False])
def test_a_killed_writer_leaves_nothing_to_see_and_is_swept_by_the_next(tmp_path, there):
    target = tmp_path / "out"
    if there:
        target.mkdir()
        (target / "a").write_text("old")
    script = """
import os, sys
from lorarecycle.runtime.folders import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "a").write_text("half")
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -9
    left = list((target if there else tmp_path).glob(f"{LEFTOVER}*"))
    assert len(left) == 1
    assert target.exists() == there
    with atomic_folder(target) as folder:
        assert not left[0].exists()
        (folder / "b").write_text("new")
    assert content(target) == ({"a": "old", "b": "new"} if there else {"b": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_writers_of_one_folder_take_turns(tmp_path, monkeypatch):
    """Each puts all its files in place before the next one starts."""
    pytest.importorskip("fcntl")
    target, order, original = tmp_path / "out", [], os.replace
    target.mkdir()

    def slow(source, destination):
        order.append(threading.get_ident())
        time.sleep(0.03)
        original(source, destination)

    monkeypatch.setattr(os, "replace", slow)

    def write():
        with atomic_folder(target) as folder:
            for name in "abc":
                (folder / name).write_text(str(threading.get_ident()))

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(order) == 9
    assert len(set(content(target).values())) == 1
    assert all(len(set(order[i : i + 3])) == 1 for i in (0, 3, 6))
