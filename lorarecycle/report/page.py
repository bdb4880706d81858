"""The page: runs in, one HTML file out that needs no network, no script and no other file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path

from ..runtime.files import write_text
from ..runtime.version import __version__
from ..vit.backbone import Backbone
from ..work_dir import load_base
from . import facts, results
from .maps import FeatureMap, map_surrogates
from .run import Run, read_run
from .sheet import contact_sheet

LARGEST = 5_000_000
"""Bytes of a page; it shows fewer images where it would be larger."""
IMAGES = 160
"""Images of a page, shared by its runs."""

logger: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Shown:
    run: Run
    map: FeatureMap | None
    why: str
    prefix: str


def write_report(
    runs: Sequence[Run | str | PathLike[str]],
    output: str | PathLike[str],
    *,
    backbone: Backbone | None = None,
) -> Path:
    """Write one self-contained HTML page about one run, or about several side by side.

    Args:
        runs: folders that `recycle(work_dir=...)` filled, or `Run`s.
        output: HTML file to write.
        backbone: the plain model, for maps of features; the one that each run names when None. Where it cannot be
            had, the page says so in the place of its maps.

    Returns:
        the file, of at most 5 MB.

    Raises:
        ValueError: no runs.
        FileNotFoundError: a folder that is not of a finished run.
    """
    found = [run if isinstance(run, Run) else read_run(run) for run in runs]
    if not found:
        raise ValueError("`runs` must hold at least one run, got none.")
    shown = []
    for i, run in enumerate(found):
        feature_map, why = _map(run, backbone)
        shown.append(_Shown(run, feature_map, why, f"run{i}"))
    most = IMAGES
    while len(page := _page(shown, most // len(shown)).encode()) > LARGEST and most > len(shown):
        most //= 2
    return write_text(output, page.decode())


def _map(run: Run, backbone: Backbone | None) -> tuple[FeatureMap | None, str]:
    name = str(run.record["base"]["name"])
    try:
        model = backbone or load_base(run.record)
        found = map_surrogates(run, model)
    except (ValueError, OSError, ImportError) as error:
        logger.warning("no map of features: %s", error)
        return None, f"No map: the model {name} could not be had here. Name it with --base, --weights and --image-size."
    return found, "" if found else "No map: the run made fewer than 8 images."


def _page(shown: Sequence[_Shown], images: int) -> str:
    runs = [one.run for one in shown]
    title = f"Recycling report: {', '.join(run.name for run in runs)}"
    several = len(runs) > 1
    parts = ["<header>", f"<h1>{escape(title)}</h1>"]
    for run in runs:
        named = f"<b>{escape(run.name)}</b>: " * several
        parts.append(f'<p class="lead">{named}{results.verdict(run)}</p>')
    parts += [facts.tiles(runs[0]) if not several else "", "</header>"]
    if several:
        parts.append(
            _section("Side by side", "Settings in which the runs differ, and what came out.", facts.comparison(runs))
        )

    def section(name: str, explanation: str, make: Callable[[_Shown], str]) -> None:
        articles = [f"<article>{f'<h3>{escape(one.run.name)}</h3>' * several}{make(one)}</article>" for one in shown]
        parts.append(_section(name, explanation, f'<div class="runs">{"".join(articles)}</div>'))

    if any(run.accuracy for run in runs):
        section(
            "How well it answers",
            "A task shows a few photos of new classes and asks about other photos of them.",
            lambda one: results.accuracy(one.run),
        )
        section(
            "What it takes for what",
            "Share of its answers in % for each true class, with the fewest photos. Green is right.",
            lambda one: results.confusion(one.run),
        )
    section(
        "The images it trained on",
        "Made without any training data. Click one for more.",
        lambda one: contact_sheet(one.run, one.prefix, images),
    )
    section("Training", "The meta-LoRA's loss at each step; lower is better.", lambda one: facts.training(one.run))
    section(
        "Map of features",
        "The images above, placed so that images with like features lie close together (t-SNE).",
        lambda one: results.feature_map(one.map, one.why),
    )
    section(
        "Which adapters matter",
        "How far the mean of all adapters moves when one is left out.",
        lambda one: facts.adapters(one.run),
    )
    section("What was done", "The plan, and what it took.", lambda one: facts.stages(one.run))
    section("How to repeat it", "Command, versions and hashes.", lambda one: facts.repeating(one.run))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="lorarecycle {__version__}"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{''.join(parts)}"
        f'<p class="quiet">lorarecycle {__version__}</p></main></body></html>\n'
    )


def _section(name: str, explanation: str, content: str) -> str:
    return f'<section><h2>{name}</h2><p class="quiet">{explanation}</p>{content}</section>'
