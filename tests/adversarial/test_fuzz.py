"""The campaign of mutated files, short."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_mutated_files_give_a_correct_result_or_one_clear_error():
    pytest.importorskip("transformers")
    pytest.importorskip("pyarrow")
    pytest.importorskip("onnxruntime")  # which the script imports
    script = Path(__file__).with_name("fuzz.py")
    left_out = ["export"]  # making it takes longer than all others together
    command = [sys.executable, str(script), "--inputs", "72", "--seed", "3", "--without", *left_out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert len(counts) == 18, done.stdout
    assert sum("one clear error" in outcomes for outcomes in counts.values()) > 14, done.stdout
    assert sum("the same result" in outcomes for outcomes in counts.values()) > 4, done.stdout
