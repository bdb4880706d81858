"""The benchmark scripts start: what they import is there, and their arguments parse."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.medium

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = [path.name for path in sorted(BENCHMARKS.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    done = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage:" in done.stdout
