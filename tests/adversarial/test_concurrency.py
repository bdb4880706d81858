"""The campaign of processes that save and read at once, short."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_processes_in_one_place_full_disks_and_read_only_folders():
    script = Path(__file__).with_name("concurrency.py")
    command = [sys.executable, str(script), "--seconds", "0.5", "--full", "3", "--without", "export"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(cases) == {"adapter", "bare PEFT", "generator"}
    for counts in cases.values():
        assert "read: correct" in counts
        assert "full: one clear error" in counts
        assert "read only: one clear error 2" in counts
