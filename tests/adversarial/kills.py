"""Kills processes while they save, at random moments, and reads what is there: a correct result or one clear error.

    python tests/adversarial/kills.py --kills 50 --seed 0

Each round forks a process that saves one version after the other into one place (adapters, bare PEFT parameters,
generators, exported models, a run's folder), reads meanwhile, kills it and reads again. At the end one more save has to
leave a whole result and nothing else. Prints how the reads ended; a wrong result ends it with an error. POSIX only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

from campaign import run_cases
from savers import SAVERS, Saver, outcome

from lorarecycle.runtime.files import LEFTOVER

READS = 3
"""While the saver lives."""


def save_for_ever(saver: Saver, folder: Path) -> None:
    """What the process does that is killed."""
    for i in count():
        saver.save(folder, i)


def campaign(case: str, kills: int, seed: int) -> Counter[str]:
    """Kill `kills` savers; how the reads ended."""
    saver = SAVERS[case]
    draw = random.Random(f"{case} {seed}")
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "saved"
        for _ in range(kills):
            process: Any = multiprocessing.get_context("fork").Process(
                target=save_for_ever, args=(saver, folder), daemon=True
            )
            process.start()
            moments = sorted(draw.uniform(0, 0.3) for _ in range(READS + 1))
            try:
                if case != "run":  # whose folder goes and comes
                    for moment in moments[:-1]:
                        time.sleep(moment / READS)
                        counts[f"while saving: {outcome(saver, folder)}"] += 1
                time.sleep(moments[-1])
                assert process.is_alive(), f"the saver ended by itself with {process.exitcode}"
            finally:
                process.kill()
                process.join()
            counts[f"after the kill: {outcome(saver, folder)}"] += 1
        saver.save(folder, -1)
        saver.read(folder)
        left = [str(path) for path in Path(parent).rglob(f"{LEFTOVER}*")]
        assert not left, f"left behind: {left}"
    return counts


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="savers to kill in each case")
    run_cases(parser, SAVERS, lambda case, options: campaign(case, options.kills, options.seed))


if __name__ == "__main__":
    main()
