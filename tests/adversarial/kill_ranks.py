"""Kills a random rank of a run under torchrun at a random moment, and looks whether the run ends as an unbroken one.

    python tests/adversarial/kill_ranks.py --runs 30 --seed 0

Each run starts two ranks with `--max-restarts 5`, waits until it has come to a random place and a random while longer,
and sends SIGKILL to one of them. The run must end by itself, with the bits of the unbroken run of two ranks, and leave
no claim and no half-written file. Prints a line for each run and one for all. Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from lorarecycle.runtime.files import LEFTOVER, hash_file

JOB = Path(__file__).parents[1] / "distributed" / "job.py"
RANKS = 2
ADAPTERS = 6
PLACES = ("no folder", *(f"{n} adapters inverted" for n in range(ADAPTERS + 1)), "training", "saving", "done")
"""Where a run can be, in this order."""
WHILE = 0.1
"""Of the time that an unbroken run takes: the longest wait after the place was reached."""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A run of two ranks; what it says goes to `folder/log`."""
    folder.mkdir()
    options = ["--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "5"]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, str(JOB), str(folder), "long"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def ranks(agent: int) -> list[int]:
    """Process numbers of the ranks that torchrun has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
            except (OSError, IndexError, ValueError):
                continue
            if parent == agent and str(JOB).encode() in command:
                found.append(int(entry.name))
    return sorted(found)


def place(folder: Path) -> str:
    """Where a run is, one of `PLACES`."""
    work = folder / "work-long"
    for name, path in (
        ("done", folder / "long.safetensors"),
        ("saving", work / "losses.csv"),
        ("training", work / "meta_checkpoint.safetensors"),
    ):
        if path.exists():
            return name
    made = len(list((work / "surrogates").glob("0*.safetensors"))) if work.exists() else -1
    return PLACES[made + 1]


def broken_run(folder: Path, draw: random.Random, seconds: float) -> tuple[str, str]:
    """Where the run was when a rank was killed, and how it ended."""
    target, longer, victim = draw.randrange(len(PLACES) - 1), draw.uniform(0, WHILE) * seconds, draw.randrange(RANKS)
    agent, where = start(folder), "the start"
    try:
        while agent.poll() is None and (len(ranks(agent.pid)) < RANKS or PLACES.index(place(folder)) < target):
            time.sleep(0.05)
        time.sleep(longer)
        where, alive = place(folder), ranks(agent.pid)
        if alive:
            os.kill(alive[victim % len(alive)], signal.SIGKILL)
        else:
            where = "after the end"
        code = agent.wait(timeout=60 + 20 * seconds)
    except subprocess.TimeoutExpired:
        agent.terminate()
        agent.wait()
        return where, "never ended"
    left = [path for pattern in (f"{LEFTOVER}*", "claims") for path in folder.rglob(pattern)]
    if code:
        return where, f"ended with {code}: {(folder / 'log').read_text()[-400:]}"
    return where, f"left behind {left[0].name}" if left else hash_file(folder / "long.safetensors")


def main() -> None:
    """Run the campaign; the exit status says whether all runs ended as they should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments")
    options = parser.parse_args()
    draw, counts = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as parent:
        began = time.monotonic()
        agent = start(Path(parent) / "whole")
        if agent.wait(timeout=600):
            sys.exit((Path(parent) / "whole" / "log").read_text())
        seconds = time.monotonic() - began
        whole = hash_file(Path(parent) / "whole" / "long.safetensors")
        print(f"unbroken: {seconds:.0f} s", flush=True)
        places = Counter[str]()
        for i in range(options.runs):
            began = time.monotonic()
            where, ended = broken_run(Path(parent) / f"run-{i}", draw, seconds)
            ended = "same bits, nothing left" if ended == whole else ended
            places[where] += 1
            counts[ended if len(ended) < 64 else ended[:64]] += 1
            print(f"run {i}: killed at {where!r}, {ended}, {time.monotonic() - began:.0f} s", flush=True)
    print("killed at: " + ", ".join(f"{where} ({n})" for where, n in places.items()))
    print(", ".join(f"{ended}: {n} of {options.runs}" for ended, n in counts.items()))
    sys.exit(counts["same bits, nothing left"] < options.runs)


if __name__ == "__main__":
    main()
