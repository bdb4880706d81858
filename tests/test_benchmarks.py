"""The benchmark scripts start: what they import is there, and their arguments parse."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.medium

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = [path.name for path in sorted(BENCHMARKS.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert "usage:" in capsys.readouterr().out


@pytest.fixture
def gpu(monkeypatch):
    """The script of `make gpu` as a module, as if there were a GPU."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "CUDA", True)
    return module


def test_a_command_of_make_gpu_ends_at_its_limit(gpu):
    row = gpu.run("sleep", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert row["status"] == 124
    assert row["seconds"] < 30
    assert gpu.run("fail", [sys.executable, "-c", "raise SystemExit(3)"], 30)["status"] == 3


def test_the_page_of_make_gpu_says_what_ran_and_what_did_not(gpu):
    machine = {"device": "Some Card", "cuda": "13.0", "commit": "abc", "versions": {"torch": "2.11", "xformers": None}}
    commands = [
        {"name": name, "status": status, "seconds": 3, "commit": "abc"} for name, status in (("tests", 1), ("ops", 124))
    ]
    job = {"what": "a job", "rows": [{"preset": "paper", "seconds": {"images": 1.5}, "peak_memory_GB": 2.0}]}
    page = gpu.page({"machine": machine, "commands": commands, "job": job})
    for line in (
        "# Some Card",
        "| tests | failed | 3 | abc |",
        "| ops | stopped at its limit | 3 | abc |",
        "| paper | images | 1.5 |",
        "| paper | peak memory, GB | 2.00 |",
        "xformers is not installed",
    ):
        assert line in page


def test_every_part_of_make_gpu_has_commands_whose_files_exist(gpu, tmp_path):
    for part in gpu.LIMITS:
        for _, command in gpu.commands(part, tmp_path):
            files = [word for word in command if word.endswith(".py") or word.startswith("tests/")]
            assert files
            assert all((BENCHMARKS.parent / file).exists() for file in files), files
