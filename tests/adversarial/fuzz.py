"""Reads mutated files of every kind: each outcome is a correct result or one clear error, within limits.

    python tests/adversarial/fuzz.py --inputs 10000 --seed 0
    python tests/adversarial/fuzz.py --only "surrogate:17"      # one input again, with its traceback

A good set of files is made for each target of `targets.py`; every input is a copy with one file mutated
(`mutations.py`). Correct is what the good files give, or what the mutated ones say, where that is legal. A clear error
is a ValueError or OSError (so also FileNotFoundError) of one paragraph that names the file or its folder. All else is a
failure: other errors, more than `SECONDS` or `MEMORY`, a process that dies, files left or changed, code of a pickle
that is run. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mutations import MARKER, mutate_file
from targets import TARGETS, Target

from lorarecycle.runtime import settled

SECONDS = 10.0
"""For one input."""
MEMORY = 1 << 30
"""Bytes of address space for one input, beside what the process has."""
LONGEST = 1200
"""Characters of a clear error."""


class Found(NamedTuple):
    """What became of one input."""

    name: str
    """of the input, "surrogate:17" """
    outcome: str
    """a key of the counts"""
    detail: str = ""
    """of a failure"""


def judge(target: Target, good: Path, original: Any, folder: Path, name: str) -> Found:
    """Mutate one file of a fresh copy, read it, judge the outcome."""
    draw = random.Random(name)
    shutil.copytree(good, folder)
    files = sorted(path for path in folder.glob(target.files) if path.is_file() and path.suffix != ".md")
    chosen = draw.choice(files)
    mutate_file(chosen, draw)
    before = listing(folder)
    try:
        found = target.read(folder)
        facts = target.facts(found)
        if facts == original:
            outcome = Found(name, "the same result")
        else:
            target.legal(folder, found)
            outcome = Found(name, "another legal value")
    except (ValueError, OSError) as error:
        unclear = what_is_unclear(error, chosen)
        outcome = Found(name, unclear or "one clear error", f"{type(error).__name__}: {error}"[:600] if unclear else "")
    except BaseException as error:
        kind = "a wrong result" if isinstance(error, AssertionError) else f"{type(error).__name__}"
        outcome = Found(name, f"FAILED: {kind}", traceback.format_exc(limit=-3)[-900:])
    if listing(folder) != before and "run" not in name and not outcome.outcome.startswith("FAILED"):
        outcome = Found(
            name, "FAILED: files were left or changed", str(sorted(set(listing(folder)) ^ set(before)))[:300]
        )
    if Path(MARKER).exists():
        Path(MARKER).unlink()
        outcome = Found(name, "FAILED: code of a pickle was run")
    return outcome


def what_is_unclear(error: Exception, file: Path) -> str:
    """ "" where an error is of the project's kind: one of its classes, one paragraph, the file or folder named."""
    text = str(error)
    if isinstance(error, UnicodeError) or type(error).__module__.startswith(("json", "zipfile", "numpy", "PIL")):
        return f"FAILED: a bare {type(error).__name__}"
    if file.name not in text and str(file.parent) not in text:
        return "FAILED: an error that names no file"
    if len(text) > LONGEST:
        return "FAILED: an error too long to read"
    return "" if any(word in text for word in ("must", "cannot", "no ", "got")) else "FAILED: an error without a rule"


def listing(folder: Path) -> list[tuple[str, int]]:
    """All files with their sizes."""
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))


def work(target_name: str, numbers: list[int], seed: int, good: Path, original: Any, pipe: Connection) -> None:
    """A process: judges inputs one by one, within its memory."""
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    settled._WAITS = (0.0,)  # nobody replaces these files meanwhile
    with tempfile.TemporaryDirectory() as parent:
        os.chdir(parent)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for number in numbers:
            folder = Path(parent) / "case"
            found = judge(TARGETS[target_name], good, original, folder, input_name(target_name, seed, number))
            shutil.rmtree(folder)
            pipe.send(found)


def input_name(target: str, seed: int, number: int) -> str:
    """What draws the mutation, and what `--only` takes."""
    return f"{target}:{number}" if not seed else f"{target}:{number}@{seed}"


def fuzz(name: str, count: int, seed: int) -> list[Found]:
    """Judge `count` inputs of a target."""
    target, fork = TARGETS[name], multiprocessing.get_context("fork")
    results: list[Found] = []
    with tempfile.TemporaryDirectory() as parent:
        good = Path(parent) / "good"
        good.mkdir()
        target.make(good)
        original = target.facts(target.read(good))
        assert original == target.facts(target.read(good)), f"{name} does not read the same twice"
        while len(results) < count:
            mine, theirs = fork.Pipe(duplex=False)
            rest = list(range(len(results), count))
            process: Any = fork.Process(target=work, args=(name, rest, seed, good, original, theirs), daemon=True)
            process.start()
            theirs.close()
            while len(results) < count:
                current = input_name(name, seed, len(results))
                if not mine.poll(SECONDS):
                    results.append(Found(current, f"FAILED: more than {SECONDS:g} s"))
                    break
                try:
                    results.append(mine.recv())
                except EOFError:
                    process.join(1)
                    results.append(Found(current, f"FAILED: the process died with {process.exitcode}"))
                    break
            process.kill()
            process.join()
            mine.close()
    return results


def again(name: str) -> int:
    """Judge one input in this process, and show what happened."""
    target = TARGETS[name.partition(":")[0]]
    with tempfile.TemporaryDirectory() as parent:
        good, case = Path(parent) / "good", Path(parent) / "case"
        good.mkdir()
        target.make(good)
        found = judge(target, good, target.facts(target.read(good)), case, name)
        print(*found, sep="\n")
        for path in sorted(case.rglob("*")):
            kind = path.read_bytes()[:300] if path.is_file() and path.stat().st_size < 10**7 else "no file"
            if not (good / path.name).exists() or (good / path.name).read_bytes()[:300] != kind:
                print(path.name, kind)
        try:
            target.read(case)
        except Exception:
            traceback.print_exc()
    return int(found.outcome.startswith("FAILED"))


def main() -> int:
    """Run the campaign; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="in all, the same number for each target")
    parser.add_argument("--seed", type=int, default=0, help="of all mutations")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS), help="all by default")
    parser.add_argument("--without", nargs="*", default=[], choices=list(TARGETS), help="targets to leave out")
    parser.add_argument("--only", help="one input by its name")
    parser.add_argument("--json", type=Path, help="file for the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked processes have no thread pool
    logging.disable()
    if options.only:
        return again(options.only)
    total: dict[str, Counter[str]] = {}
    failures: list[Found] = []
    chosen = [name for name in options.targets if name not in options.without]
    for name in chosen:
        start = time.monotonic()
        results = fuzz(name, -(-options.inputs // len(chosen)), options.seed)
        total[name] = Counter(
            "failed" if found.detail or "FAILED" in found.outcome else found.outcome for found in results
        )
        bad = [found for found in results if found.outcome.startswith("FAILED")]
        failures += bad
        shown = ", ".join(f"{outcome} {n}" for outcome, n in sorted(total[name].items()))
        print(f"{name}: {shown} ({time.monotonic() - start:.0f} s)", flush=True)
        kinds = Counter(found.outcome for found in bad)
        for kind, n in kinds.most_common():
            first = next(found for found in bad if found.outcome == kind)
            print(f"  {n} x {kind}; first {first.name}\n    " + first.detail.replace("\n", "\n    "), flush=True)
    if options.json:
        options.json.write_text(json.dumps({name: dict(counts) for name, counts in total.items()}, indent=2) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
