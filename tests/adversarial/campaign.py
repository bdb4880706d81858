"""What campaigns over `SAVERS` share: options, what is made before processes are forked, counts that are kept."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from savers import SAVERS, forget, prepare, show


def run_cases(
    parser: argparse.ArgumentParser, cases: Iterable[str], run: Callable[[str, argparse.Namespace], Counter[str]]
) -> dict[str, Counter[str]]:
    """Parse the command line, count how all ended in each case, print the counts and write them where `--json` says."""
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--without", nargs="*", default=[], choices=list(SAVERS), help="cases to leave out")
    parser.add_argument("--json", type=Path, help="file for the counts")
    options = parser.parse_args()
    logging.disable()
    torch.set_num_threads(1)  # forked processes have no thread pool
    prepare("export" not in options.without)
    found: dict[str, Counter[str]] = {}
    try:
        for case in cases:
            if case not in options.without:
                found[case] = run(case, options)
                print(f"{case}: {show(found[case])}", flush=True)
    finally:
        forget()
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return found
