"""Processes that save and read in one place at once, full disks, folders that cannot be written.

    python tests/adversarial/concurrency.py --seconds 20 --seed 0

- **Together**: writers save one version after the other into one place while readers read it. A read is a correct
  result or one clear error; no save fails; at the end a whole result is there and nothing else.
- **Full**: a process may write files of so many bytes only (`ulimit -f`), drawn anew each time: saving ends with one
  OSError that names the place, what was there is read as before, and nothing is left.
- **Read only**: as a user without rights there: one error that names the place.

Prints how all ended; a wrong result ends it with an error. POSIX only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from campaign import run_cases
from savers import SAVERS, Saver, outcome

from lorarecycle.runtime.files import LEFTOVER

WRITERS, READERS = 2, 2
NOBODY = 65534


def work(do: Callable[[], str], stop: Any, pipe: Connection) -> None:
    """Do something again and again; send how it ended each time, counted."""
    counts: Counter[str] = Counter()
    try:
        while not stop.is_set():
            counts[do()] += 1
    except BaseException:
        counts[f"FAILED: {traceback.format_exc(limit=-3)}"] += 1
    pipe.send(counts)


def together(saver: Saver, seconds: float, seed: int) -> Counter[str]:
    """Writers and readers at once."""
    fork = multiprocessing.get_context("fork")
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "saved"
        stop = fork.Event()

        def write(number: int) -> Callable[[], str]:
            draw, versions = random.Random(f"{seed} {number}"), count(number)

            def one() -> str:
                saver.save(folder, next(versions))
                time.sleep(draw.uniform(0, 0.02))
                return "saved"

            return one

        def read() -> str:
            return f"read: {outcome(saver, folder)}"

        jobs = [write(i) for i in range(WRITERS)] + [read] * READERS
        pipes, processes = [], []
        for job in jobs:
            mine, theirs = fork.Pipe(duplex=False)
            processes.append(fork.Process(target=work, args=(job, stop, theirs), daemon=True))
            pipes.append(mine)
            processes[-1].start()
        time.sleep(seconds)
        stop.set()
        for pipe, process in zip(pipes, processes, strict=True):
            total += pipe.recv() if pipe.poll(60) else Counter({"FAILED: a process hangs": 1})
            process.join(5)
            process.kill()
        saver.save(folder, 0)
        saver.read(folder)
        left = [str(path) for path in Path(parent).rglob(f"{LEFTOVER}*")]
        assert not left, f"left behind: {left}"
    return total


def alone(do: Callable[[], str]) -> str:
    """What a process of its own makes of `do`, whose limits and rights go with it."""
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send(do())
        except BaseException:
            theirs.send(f"FAILED: {traceback.format_exc(limit=-3)}")

    process = fork.Process(target=run, daemon=True)
    process.start()
    found = mine.recv() if mine.poll(60) else "FAILED: a process hangs"
    process.join(5)
    process.kill()
    return found


def refused(saver: Saver, folder: Path, i: int) -> str:
    """Try to save; one OSError or ValueError that names the place is right."""
    try:
        saver.save(folder, i)
    except (OSError, ValueError) as error:
        named = str(folder) in str(error) or folder.name in str(error)
        return "one clear error" if named else f"FAILED: {error!r} names no place"
    return "saved"


def full(saver: Saver, rounds: int, seed: int) -> Counter[str]:
    """Saving over an earlier version, and to a new place, with room for a part of a file."""
    draw, counts = random.Random(f"full {seed}"), Counter[str]()
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "saved"
            earlier = draw.random() < 0.5
            if earlier:
                saver.save(folder, -2)
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            room = draw.choice([0, 10, 300, 1000, 3000, 10_000, 30_000])

            def save(folder: Path = folder, room: int = room, number: int = number) -> str:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                return refused(saver, folder, number)

            found = alone(save)
            counts[f"full: {found}"] += 1
            after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            if found == "one clear error" and after != before:
                counts["FAILED: files were changed or left on a full disk"] += 1
            left = list(Path(parent).rglob(f"{LEFTOVER}*"))
            if left:
                counts[f"FAILED: left behind: {left}"] += 1
            if earlier:
                saver.read(folder)
    return counts


def read_only(saver: Saver) -> Counter[str]:
    """Saving into a folder, and beside one, without the right to."""
    counts: Counter[str] = Counter()
    for there in (True, False):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "saved"
            if there:
                saver.save(folder, -2)
                folder.chmod(0o555)
            Path(parent).chmod(0o555)

            def save(folder: Path = folder) -> str:
                if os.getuid() == 0:
                    os.setuid(NOBODY)
                return refused(saver, folder, 1)

            found = alone(save)
            counts[f"read only: {found if found != 'saved' else 'FAILED: saved'}"] += 1
            Path(parent).chmod(0o755)
            if there:
                folder.chmod(0o755)
    return counts


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="that processes run together, in each case")
    parser.add_argument("--full", type=int, default=30, help="full disks in each case")

    def run(case: str, options: argparse.Namespace) -> Counter[str]:
        saver = SAVERS[case]
        counts = together(saver, options.seconds, options.seed)
        return counts + full(saver, options.full, options.seed) + read_only(saver)

    found = run_cases(parser, [case for case in SAVERS if case != "run"], run)
    failed = [name for counts in found.values() for name in counts if "FAILED" in name]
    if failed:
        raise SystemExit(failed[0])


if __name__ == "__main__":
    main()
