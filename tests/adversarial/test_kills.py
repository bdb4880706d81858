"""The campaign of kills, short."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_killed_savers_leave_a_correct_result_or_one_clear_error():
    script = Path(__file__).with_name("kills.py")
    command = [sys.executable, str(script), "--kills", "3", "--without", "export"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(cases) == {"adapter", "bare PEFT", "generator", "run"}
    assert all("correct" in counts for counts in cases.values()), cases
