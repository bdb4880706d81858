"""Files are whole or absent, and what killed writers left goes, and only that."""

import errno
import os
import socket
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lorarecycle.runtime import files, owner
from lorarecycle.runtime.folders import atomic_folder


def dead_pid():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(pid, host=None, rest=None):
    """Name of what a process was writing, of this machine unless told otherwise."""
    rest = f"{owner.machine()}.r0.abc" if rest is None else rest
    return f"{files.LEFTOVER}{host or socket.gethostname()}-{pid}-{rest}"


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = files.write_text(tmp_path / "a.txt", "earlier")

    def full(temporary):
        temporary.write_text("half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"cannot write .*a\.txt: No space left on device; an earlier file is unchanged"):
        files.write_atomic(path, full)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_no_folder(tmp_path):
    def interrupted(temporary):
        temporary.write_text("half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "deep" / "er" / "a.txt", interrupted)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write .*a\.txt: (Not a directory|File exists); an earlier"):
        files.write_text(tmp_path / "file" / "a.txt", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_library_leaves_beside_its_file_goes_too(tmp_path):
    def write(temporary):
        (temporary.parent / ".tmp123").write_text("some library's own")
        temporary.write_text("text")

    files.write_atomic(tmp_path / "a.txt", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_disk_full_while_saving_tensors(tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    path = files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: .*No space left on device"):
        files.save_tensors(path, {"x": torch.zeros(3)})
    assert files.load_tensors(path)[0]["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_rights_follow_the_umask(tmp_path, mask, rights):
    before = os.umask(mask)
    try:
        written = [
            files.write_text(tmp_path / "a.txt", "text"),
            files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)}),  # the library makes it 0600
        ]
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in written] == [rights, rights]


def test_only_leftovers_of_dead_processes_of_this_host_go(tmp_path):
    dead = dead_pid()
    (tmp_path / leftover(dead)).write_text("half")
    (tmp_path / leftover(dead, rest=f"{owner.machine()}.def")).mkdir()
    (tmp_path / leftover(dead, rest=f"{owner.machine()}.def") / "inner").write_text("half")
    others = {
        leftover(os.getpid()),  # alive: this one
        leftover(1),  # alive and somebody else's, where the tests do not run as root
        leftover(dead, host="another-host"),
        leftover(dead, rest="123.abc"),  # of another container or machine under this host's name
        leftover(dead, rest="123.r3.abc"),
        leftover(dead, rest="abc"),  # of an earlier version, which did not tell machines of one name apart
        f"{files.LEFTOVER}abc",  # nobody knows whose
    }
    for name in others:
        (tmp_path / name).write_text("half")
    kept = files.write_json(tmp_path / "kept.json", {"a": 1})
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "kept.json"}
    assert files.read_json(kept) == {"a": 1}
    files.remove_leftovers(tmp_path / "absent")
    files.remove_leftovers(kept)


def test_a_power_loss_loses_no_name(tmp_path, monkeypatch):
    """The file is flushed before it is put in place, and then every folder in which a name is new."""
    flushed, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino) or sync(handle))
    path = files.write_text(tmp_path / "new" / "deep" / "a.txt", "text")
    assert flushed == [place.stat().st_ino for place in (path, *list(path.parents)[:3])]
    flushed.clear()
    with atomic_folder(tmp_path / "more" / "deep" / "out") as folder:
        files.write_text(folder / "a.txt", "text")
    places = [tmp_path / "more" / "deep" / "out", tmp_path / "more" / "deep", tmp_path / "more", tmp_path]
    assert flushed[-4:] == [place.stat().st_ino for place in places]


@pytest.mark.parametrize("folder", [True, False])
def test_places_are_tried_before_any_work(tmp_path, monkeypatch, folder):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    good = ("new", "deep/new", "there" if folder else "file")
    for name in good:
        files.require_place(tmp_path / name, "--output", folder=folder)
    if folder:
        with pytest.raises(NotADirectoryError, match=r"`--output` must be a folder or new, got the file .*; choose"):
            files.require_place(tmp_path / "file", "--output", folder=True)
    else:
        with pytest.raises(IsADirectoryError, match=r"`--output` must be a file, got the folder .*there; name a file"):
            files.require_place(tmp_path / "there", "--output")
    message = r"`--output` must be a place that can be written to, got .*: {}; choose another\."
    with pytest.raises(NotADirectoryError, match=message.format("Not a directory")):
        files.require_place(tmp_path / "file" / "inner", "--output", folder=folder)
    with pytest.raises(OSError, match=message.format("File name too long")):
        files.require_place(tmp_path / ("x" * 300), "--output", folder=folder)

    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for name in good:
        with pytest.raises(PermissionError, match=message.format("Permission denied")):
            files.require_place(tmp_path / name, "--output", folder=folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_very_old_leftovers_go_whoever_wrote_them(tmp_path):
    names = {
        key: leftover(pid, host=host) for key, pid, host in (("other", 1, "another-host"), ("own", os.getpid(), None))
    }
    for name in (*names.values(), leftover(2, host="another-host")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inner").write_text("half")
    for path in [*tmp_path.rglob("*")]:
        if path.parent.name == names["other"] or path.parent == tmp_path:
            os.utime(path, (0, 0))
    os.utime(tmp_path / names["own"] / "inner", (0, 0))
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names["own"], leftover(2, host="another-host")}


def test_a_killed_writer_is_swept_and_a_living_one_is_not(tmp_path):
    script = """
import sys, time
from lorarecycle.runtime import files
def write(temporary):
    temporary.write_text("half of it")
    print("writing", flush=True)
    time.sleep(60)
files.write_atomic(sys.argv[1], write)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "a.txt")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        (hidden,) = tmp_path.iterdir()
        assert hidden.name.startswith(leftover(process.pid, rest=""))
        files.remove_leftovers(tmp_path)
        assert (hidden / "a.txt").read_text() == "half of it"
        process.kill()
    files.write_text(tmp_path / "b.txt", "whole")  # any writer sweeps what lies beside
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(6, dtype=torch.uint8).view(2, 3).T}
    path = files.save_tensors(tmp_path / "t.safetensors", tensors, {"step": 3})
    found, meta = files.load_tensors(path)
    assert meta["step"] == "3"
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """The safetensors library writes metadata in an order that differs from call to call."""
    facts = dict.fromkeys("bacdef", "é\n\x7f")
    contents = set()
    for _ in range(3):
        path = files.save_tensors(tmp_path / "t.safetensors", {"é": torch.ones(3), "e": torch.ones(0)}, facts)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    tensors, found = files.load_tensors(path)
    assert tensors["é"].tolist() == [1, 1, 1]
    assert sorted(found) == [*"abcdef", "format"]


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        files.load_tensors(tmp_path / "absent.safetensors")
    path = files.save_tensors(tmp_path / "t.safetensors", {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"t\.safetensors must be a whole safetensors file"):
        files.load_tensors(path)
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        files.load_tensors(path)
    with zipfile.ZipFile(path, "w") as file:  # npz, say: none of `torch.save`
        file.writestr("images.npy", bytes(80))
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        files.load_tensors(path)
    text = tmp_path / "t.json"
    text.write_text("{nothing")
    with pytest.raises(ValueError, match=r"t\.json must be JSON"):
        files.read_json(text)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_named(tmp_path, zipped):
    """And the advice is followed."""
    from safetensors.torch import save_file

    path = tmp_path / "model.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"model\.pth must be a safetensors file, got one of `torch\.save`.*`safetensors"
    ):
        files.load_tensors(path)
    save_file(torch.load(path, weights_only=True)["state_dict"], path)
    assert files.load_tensors(path)[0]["a"].tolist() == [1, 1]


def test_files_and_folders_are_written_without_torch(tmp_path):
    code = """
import sys
from lorarecycle.runtime import files, folders
files.write_text(sys.argv[1] + "/a.txt", "text")
with folders.atomic_folder(sys.argv[1] + "/b") as folder:
    (folder / "c.txt").write_text("text")
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, cwd=Path.home()
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b" / "c.txt").read_text() == "text"


def test_a_machine_of_the_same_name_keeps_its_unfinished_files(tmp_path):
    """On a shared disk: its process numbers mean nothing here, even where its kernel numbers containers as this one."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "pid:[7]"
    digits = "".join(filter(str.isdigit, space))
    earlier = tmp_path / leftover(dead_pid(), rest=f"{digits}.abc")  # as the version before named it
    earlier.mkdir()
    (earlier / "00000-a.safetensors").write_text("another machine is writing this")
    files.remove_leftovers(tmp_path)
    assert (earlier / "00000-a.safetensors").exists()


def test_names_say_host_process_machine_and_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with files.hidden_folder(tmp_path) as folder:
        assert folder.name.startswith(leftover(os.getpid(), rest=f"{owner.machine()}.r3."))
        assert files._is_abandoned(folder.name) is False


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_that_renames_in_one_folder_only(tmp_path, monkeypatch, code):
    rename = os.replace

    def within(source, target):
        if Path(source).parent != Path(target).parent:
            raise OSError(code, os.strerror(code))
        rename(source, target)

    monkeypatch.setattr(os, "replace", within)
    monkeypatch.setattr(os, "rename", within)
    path = files.write_text(tmp_path / "a.txt", "one")
    files.write_text(path, "two")
    assert path.read_text() == "two"
    for text in ("1", "2"):
        with atomic_folder(tmp_path / "f", last=["b.json"]) as folder:
            for name in ("a.txt", "b.json"):
                files.write_text(folder / name, text)
        assert [p.read_text() for p in sorted((tmp_path / "f").iterdir())] == [text, text]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "f"]
