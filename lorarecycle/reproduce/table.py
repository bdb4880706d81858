"""Results as people read them: a Markdown table, the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .experiment import Column, Experiment, Row

REHEARSAL = "A rehearsal at small size on drawn images: these are no results."


def markdown(
    experiment: Experiment, cells: Mapping[tuple[str, str], Mapping[str, Any]], record: Mapping[str, Any]
) -> str:
    """A table.

    Args:
        experiment: gives rows, columns and the paper's figures, which a rehearsal leaves out.
        cells: (row, column) -> result; those that are missing were not run.
        record: "quick" and "machine".
    """
    quick = bool(record["quick"])
    lines = [f"# {experiment.title}", "", f"{experiment.source}. Here: {record['machine']}.", ""]
    lines += [REHEARSAL, ""] if quick else []
    lines += [experiment.note, ""] if experiment.note else []
    paper = not quick and any(figure is not None for row in experiment.rows for figure in row.paper)
    if paper:
        lines += ["In brackets: the paper.", ""]
    lines.append("| | " + " | ".join(_escape(column.name) for column in experiment.columns) + " |")
    lines.append("| --- |" + " --- |" * len(experiment.columns))
    for row in experiment.rows:
        shown = [
            _cell(row, column, i, cells.get((row.name, column.name)), paper)
            for i, column in enumerate(experiment.columns)
        ]
        lines.append(f"| {_escape(row.name)} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def _cell(row: Row, column: Column, i: int, result: Mapping[str, Any] | None, paper: bool) -> str:
    ours = "not run" if result is None else figure(result, column.shows)
    known = row.paper[i]
    return f"{ours} ({known})" if paper and known is not None else ours


def figure(result: Mapping[str, Any], shows: str) -> str:
    """A figure of a result, accuracy with its interval."""
    value = result.get(shows)
    if value is None:
        return "-"
    if shows == "accuracy":
        interval = result.get("interval")
        return f"{value:.2f}" + (f" ± {interval:.2f}" if interval is not None and interval == interval else "")
    return f"{value:.2f}" if abs(value) >= 10 or shows in ("before", "after") else f"{value:.3g}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
