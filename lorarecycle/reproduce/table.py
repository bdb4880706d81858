"""Results as people read them: a Markdown table, the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .experiment import Experiment

WORDS = {
    "accuracy": "Accuracy, %",
    "tasks_per_second": "Tasks per second, the share of features that no earlier cell left included",
    "prepare_seconds": "Seconds of preparation, adapters and inverted images not included",
    "memory": "Peak memory of answering, fine-tuning included, GB; on a CPU the whole process's",
}
"""Titles of tables."""
REHEARSAL = "A rehearsal at small size on drawn images: these are no results."


def markdown(
    experiment: Experiment, cells: Mapping[tuple[str, str], Mapping[str, Any]], record: Mapping[str, Any]
) -> str:
    """A table.

    Args:
        experiment: gives rows, columns and the paper's figures, which a rehearsal leaves out.
        cells: (row, column) -> result; those that are missing were not run.
        record: "quick", "machine" and "models".
    """
    quick = bool(record["quick"])
    counts = sorted({result["n_drawn"] for result in cells.values() if "n_drawn" in result})
    tasks = [" and ".join(map(str, counts)) + " tasks"] if counts else []
    here = "; ".join([record["machine"], *record["models"], *tasks])
    lines = [f"# {experiment.title}", "", f"{experiment.source}. Here: {here}.", ""]
    lines += [REHEARSAL, ""] if quick else []
    lines += [experiment.note, ""] if experiment.note else []
    paper = not quick and any(figure is not None for row in experiment.rows for figure in row.paper)
    if paper:
        lines += ["In brackets: the paper.", ""]
    lines += _table(experiment, cells, [column.shows for column in experiment.columns], paper)
    for shows in experiment.also:
        lines += ["", f"## {WORDS.get(shows, shows)}", ""]
        lines += _table(experiment, cells, [shows] * len(experiment.columns), False)
    return "\n".join([*lines, ""])


def _table(
    experiment: Experiment, cells: Mapping[tuple[str, str], Mapping[str, Any]], shows: Sequence[str], paper: bool
) -> list[str]:
    lines = ["| | " + " | ".join(_escape(column.name) for column in experiment.columns) + " |"]
    lines.append("| --- |" + " --- |" * len(experiment.columns))
    for row in experiment.rows:
        found = [cells.get((row.name, column.name)) for column in experiment.columns]
        known = row.paper if paper else (None,) * len(found)
        shown = [_cell(result, name, figure) for result, name, figure in zip(found, shows, known, strict=True)]
        lines.append(f"| {_escape(row.name)} | {' | '.join(shown)} |")
    return lines


def _cell(result: Mapping[str, Any] | None, shows: str, known: float | str | None) -> str:
    ours = "not run" if result is None else figure(result, shows)
    return f"{ours} ({known})" if known is not None else ours


def figure(result: Mapping[str, Any], shows: str) -> str:
    """A figure of a result, accuracy with its interval."""
    value = result.get(shows)
    if value is None:
        return "-"
    if shows == "accuracy":
        interval = result.get("interval")
        fewer = f" ({result['n_tasks']} tasks)" if result.get("n_tasks", 0) < result.get("n_drawn", 0) else ""
        return f"{value:.2f}" + (f" ± {interval:.2f}" if interval is not None and interval == interval else "") + fewer
    return f"{value:.2f}" if abs(value) >= 10 or shows in ("before", "after") else f"{value:.3g}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
