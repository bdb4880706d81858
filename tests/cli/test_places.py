"""A place that cannot be written to is said by the name of its option, before any work."""

import errno
from pathlib import Path

import pytest

from lorarecycle.cli.main import main

COMMANDS = {
    "tune": ["tune", "digits", "--base", "demo", "--output"],
    "recycle": ["recycle", "nowhere", "--output"],
    "recycle, work folder": ["recycle", "nowhere", "--output", "{good}", "--work-dir"],
    "warm-start": ["warm-start", "nowhere", "--output"],
    "convert": ["convert", "nowhere.pt", "--base", "demo", "--output"],
    "task-vector": ["task-vector", "--data", "digits", "--base", "demo", "--output"],
    "generate fit": ["generate", "fit", "nowhere", "--output"],
    "generate sample": ["generate", "sample", "nowhere", "--task-vector", "nowhere", "--output"],
    "reproduce": ["reproduce", "table1", "--quick", "--work-dir"],
    "reproduce, copy": ["reproduce", "table1", "--copy"],
    "demo": ["demo", "--output"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("reason", ["Not a directory", "Permission denied"])
def test_where_nothing_can_be_written(command, reason, tmp_path, capsys, monkeypatch):
    (tmp_path / "ours").mkdir()
    (tmp_path / "file").write_text("mine")
    if reason == "Permission denied":
        make = Path.mkdir

        def refuse(self, *args, **options):
            if self.parent == tmp_path:
                raise PermissionError(errno.EACCES, reason, str(self))
            make(self, *args, **options)

        monkeypatch.setattr(Path, "mkdir", refuse)
    place = tmp_path / ("file/out" if reason == "Not a directory" else "out")
    command = [part.format(good=tmp_path / "ours" / "out") for part in COMMANDS[command]]
    assert main([*command, str(place)]) == 2
    expected = f"`{command[-1]}` must be a place that can be written to, got {place}: {reason}; choose another.\n"
    assert capsys.readouterr().err == f"lorarecycle: error: {expected}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "ours"]
