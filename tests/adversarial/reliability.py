"""The long campaigns by one command, and their figures as benchmarks/results/reliability.md and .json.

    make adversarial
    python tests/adversarial/reliability.py --inputs 10000 --kills 50 --seconds 20

Ends with an error where a campaign does; the figures are written all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
TITLES = {
    "fuzz": "Mutated files",
    "kills": "Savers killed at random moments",
    "concurrency": "Writers and readers at once, full disks, read-only folders",
}


def run(script: str, arguments: list[str], folder: Path) -> tuple[dict[str, Any], int, float, str]:
    """Counts, exit status, seconds and output of a campaign."""
    file, start = folder / f"{script}.json", time.monotonic()
    command = [sys.executable, str(HERE / f"{script}.py"), *arguments, "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    counts = json.loads(file.read_text()) if file.is_file() else {}
    return counts, done.returncode, time.monotonic() - start, done.stdout + done.stderr[-2000:]


def machine() -> str:
    """The processor, as Linux calls it."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{len(names) or os.cpu_count()} cores of {names[0] if names else platform.processor() or 'an unknown CPU'}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def commit() -> str:
    """The commit that is checked out, with a mark where files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def table(counts: dict[str, dict[str, int]]) -> list[str]:
    """Markdown, a row for each case."""
    outcomes = sorted({outcome for row in counts.values() for outcome in row})
    lines = ["| case | " + " | ".join(outcomes) + " |", "| --- |" + " ---: |" * len(outcomes)]
    lines += ["| " + " | ".join([case, *(str(row.get(o, 0)) for o in outcomes)]) + " |" for case, row in counts.items()]
    total = Counter[str]()
    for row in counts.values():
        total.update(row)
    return [*lines, "| all | " + " | ".join(str(total[outcome]) for outcome in outcomes) + " |"]


def main() -> int:
    """Run the campaigns and write the figures; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="mutated files")
    parser.add_argument("--kills", type=int, default=50, help="in each case")
    parser.add_argument("--seconds", type=float, default=20, help="that processes run together, in each case")
    parser.add_argument("--full", type=int, default=30, help="full disks in each case")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    options = parser.parse_args()
    seed = ["--seed", str(options.seed)]
    jobs = {
        "fuzz": ["--inputs", str(options.inputs), *seed],
        "kills": ["--kills", str(options.kills), *seed],
        "concurrency": ["--seconds", str(options.seconds), "--full", str(options.full), *seed],
    }
    of = commit()
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(2) as pool:
        fuzz = pool.submit(run, "fuzz", jobs["fuzz"], Path(parent))
        found = {name: run(name, jobs[name], Path(parent)) for name in ("kills", "concurrency")}
        found = {"fuzz": fuzz.result(), **found}
    lines = ["# Reliability: faults that were tried", ""]
    lines += [
        f"`make adversarial`, {machine()}, Python {platform.python_version()}, commit {of}. A read or a save ends with"
    ]
    lines += ["a correct result or one clear error; `failed` counts all else. How: the first lines of each script.", ""]
    for name, (counts, status, seconds, _) in found.items():
        command = f"python tests/adversarial/{name}.py {' '.join(jobs[name])}"
        ended = "no failure" if status == 0 else "**failures**"
        lines += [f"## {TITLES[name]}", "", f"`{command}`: {seconds:.0f} s, {ended}.", "", *table(counts), ""]
    RESULTS.joinpath("reliability.md").write_text("\n".join(lines), encoding="utf-8")
    content = {
        name: {"arguments": jobs[name], "status": status, "seconds": round(seconds), "counts": counts}
        for name, (counts, status, seconds, _) in found.items()
    }
    record = {"machine": machine(), "commit": of, "python": platform.python_version(), **content}
    RESULTS.joinpath("reliability.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, (_, status, _, output) in found.items():
        print(f"--- {name}\n{output}" if status else f"--- {name}: no failure")
    return int(any(status for _, status, _, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
