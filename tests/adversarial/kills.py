"""Kills processes while they save, at random moments, and reads what is there: a correct result or one clear error.

    python tests/adversarial/kills.py --kills 50 --seed 0

Each round forks a process that saves one of four adapters after the other into one folder (or bare PEFT parameters, or
a run's folder), reads meanwhile, kills it and reads again. At the end one more save has to leave a whole folder and
nothing else. Prints how the reads ended; a wrong result ends it with an error. POSIX only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors
from lorarecycle.generate.parameters import PeftAdapter
from lorarecycle.runtime.files import LEFTOVER
from lorarecycle.runtime.settled import TornFolderError
from lorarecycle.work_dir import RECORD, WorkDir

READS = 3
"""While the saver lives."""


def make_adapter(seed: int, scaling: float, parts: str, pool: str | None) -> Adapter:
    """A small adapter whose files differ from those of the others in every way that an adapter's can."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"blocks.{block}.attn.{part}": LoRAFactors(
            torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator), scaling
        )
        for block in range(3)
        for part in parts
    }
    head = Head(torch.randn(3, 64, generator=generator), torch.zeros(3), ("a", "b", "c"), pool) if pool else None
    return Adapter(factors, head=head, name=f"adapter {seed}")


ADAPTERS = [make_adapter(0, 1, "qv", None), make_adapter(1, 8, "qv", "pooled"), make_adapter(2, 1, "qk", "token")]
ADAPTERS += [make_adapter(3, 2, "qkv", "mean")]
BARE = [
    PeftAdapter({"x.lora_A.weight": torch.full((4, 64), float(i))}, {"peft_type": "LORA", "r": 4, "lora_alpha": i})
    for i in range(1, 5)
]


def save_adapters(folder: Path, rounds: int | None = None) -> None:
    """Save one after the other, for ever when `rounds` is None."""
    for _, adapter in zip(range(rounds) if rounds else cycle([0]), cycle(ADAPTERS), strict=False):
        adapter.save(folder)


def load_adapter(folder: Path) -> None:
    """Raise AssertionError where it is none of those that were saved."""
    found = Adapter.load(folder)
    assert found.digest() in {adapter.digest() for adapter in ADAPTERS}, f"another adapter in {folder}"


def save_bare(folder: Path, rounds: int | None = None) -> None:
    """As `save_adapters`, of bare PEFT parameters."""
    for _, adapter in zip(range(rounds) if rounds else cycle([0]), cycle(BARE), strict=False):
        adapter.save(folder)


def load_bare(folder: Path) -> None:
    """As `load_adapter`."""
    found = PeftAdapter.load(folder)
    assert found.config["lora_alpha"] == found.tensors["x.lora_A.weight"].max(), f"a mixture in {folder}"


def open_run(folder: Path, rounds: int | None = None) -> None:
    """Open the folder of a new run again and again."""
    for _ in range(rounds) if rounds else cycle([0]):
        WorkDir(folder).open({"config": 1})
        if rounds is None:
            shutil.rmtree(folder)


def find_run(folder: Path) -> None:
    """A record is whole or absent."""
    if (folder / RECORD).exists():
        WorkDir(folder).open({"config": 1})


CASES: dict[str, tuple[Callable[..., None], Callable[[Path], None]]] = {
    "adapter": (save_adapters, load_adapter),
    "bare PEFT": (save_bare, load_bare),
    "run": (open_run, find_run),
}


def outcome(read: Callable[[Path], None], folder: Path) -> str:
    """How a read ended; a wrong result or another error than the clear ones is raised."""
    try:
        read(folder)
    except TornFolderError as error:
        if str(folder) not in str(error):
            raise AssertionError("an error that does not name the folder") from error
        return "refused"
    except FileNotFoundError as error:
        if folder.exists() and any(folder.glob("adapter*")):
            raise AssertionError("files are missing from a folder that was saved") from error
        return "not there yet"
    return "correct"


def campaign(case: str, kills: int, seed: int) -> Counter[str]:
    """Kill `kills` savers; how the reads ended."""
    save, read = CASES[case]
    draw = random.Random(f"{case} {seed}")
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "saved"
        for _ in range(kills):
            saver: Any = multiprocessing.get_context("fork").Process(target=save, args=(folder,), daemon=True)
            saver.start()
            moments = sorted(draw.uniform(0, 0.3) for _ in range(READS + 1))
            try:
                if case != "run":  # whose folder goes and comes
                    for moment in moments[:-1]:
                        time.sleep(moment / READS)
                        counts[f"while saving: {outcome(read, folder)}"] += 1
                time.sleep(moments[-1])
                assert saver.is_alive(), f"the saver ended by itself with {saver.exitcode}"
            finally:
                saver.kill()
                saver.join()
            counts[f"after the kill: {outcome(read, folder)}"] += 1
        save(folder, 1)
        read(folder)
        left = [str(path) for path in Path(parent).rglob(f"{LEFTOVER}*")]
        assert not left, f"left behind: {left}"
    return counts


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="savers to kill in each case")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked processes have no thread pool
    for case in CASES:
        counts = campaign(case, options.kills, options.seed)
        print(f"{case}: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))


if __name__ == "__main__":
    main()
