"""Experiment files: a table's rows and columns, each a change of settings, with the paper's figures beside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from ..runtime.files import naming
from .settings import Settings, common, merge

FIELDS = ("title", "source", "note", "settings", "sets", "columns", "rows", "also", "picture")
PICTURES = ("shots", "grid", "t-sne")
_KINDS = {str: "text", dict: "an object"}
_FIGURES = (int, float, str, type(None))


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    settings: Settings
    shows: str
    """Which figure of a cell's result."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    settings: Settings
    paper: tuple[float | str | None, ...]
    """The paper's figures, one a column; None where it has none."""


@dataclass(frozen=True)
class Experiment:
    """A table or a figure.

    Attributes:
        name: "table2", or the file's name.
        title, source, note: for people.
        settings: that all cells share, over those of `common.json`.
        sets: of the user's own, name -> `{"path", "train", "val", "test"}`; see `Sets`.
        columns, rows: at least one each.
        also: other figures of the cells, each in a table of its own below.
        picture: "shots" draws accuracy against shots, "grid" and "t-sne" the images of the cells; None for none.
    """

    name: str
    title: str
    source: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    settings: Settings
    note: str = ""
    sets: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    picture: str | None = None

    def cell(self, row: Row, column: Column) -> Settings:
        """The settings of a cell: the row's over the column's over the experiment's over the common ones."""
        return merge(common(), self.settings, column.settings, row.settings)


def experiment_names() -> tuple[str, ...]:
    """The tables and figures that are here, in the papers' order."""
    files = resources.files(__package__).joinpath("experiments").iterdir()
    names = [file.name.removesuffix(".json") for file in files if file.name.endswith(".json")]
    return tuple(sorted(set(names) - {"common"}, key=_order))


def load_experiment(source: str | PathLike[str]) -> Experiment:
    """An experiment by the name of its table, or from a file of one's own.

    Args:
        source: a name of `experiment_names`, or a JSON file.

    Raises:
        ValueError: an unknown name (the known are listed), or a file that is no experiment.
        FileNotFoundError: no such file.
    """
    name, text = str(source).lower(), experiment_text(source)
    if name in experiment_names():
        return read_experiment(name, text)
    with naming(source):
        return read_experiment(Path(source).stem, text)


def experiment_text(source: str | PathLike[str]) -> str:
    """The content of an experiment's file; arguments and errors as in `load_experiment`."""
    path, name = Path(source).expanduser(), str(source).lower()
    if name in experiment_names():
        return resources.files(__package__).joinpath(f"experiments/{name}.json").read_text(encoding="utf-8")
    if path.suffix != ".json":
        raise ValueError(
            f"`table` must be one of {', '.join(experiment_names())}, or a JSON file, got {str(source)!r}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"`table` must be a file that is there, got {path}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be JSON in UTF-8, got other bytes ({error}); fetch the file again.") from error


def read_experiment(name: str, text: str) -> Experiment:
    """An experiment from the content of its file.

    Raises:
        ValueError: no JSON, a field that is missing or unknown, figures of the paper that are not one a column.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"experiment {name!r} must be JSON, got {str(error)[:200]}.") from error
    if not isinstance(content, dict) or not set(content) <= set(FIELDS):
        unknown = sorted(set(content) - set(FIELDS)) if isinstance(content, dict) else [type(content).__name__]
        raise ValueError(f"experiment {name!r} must hold some of {', '.join(FIELDS)}, got {unknown[0][:80]!r}.")
    for key, kind in {"title": str, "source": str, "note": str, "settings": dict, "sets": dict}.items():
        if not isinstance(content.get(key, kind()), kind):
            raise ValueError(f"`{key}` of experiment {name!r} must be {_KINDS[kind]}, got {str(content[key])[:80]!r}.")
    columns = tuple(
        Column(c["name"], dict(c.get("settings", {})), _text({"shows": "accuracy", **c}, "shows", name))
        for c in _objects(content, "columns", name, ("name", "settings", "shows"))
    )
    rows = []
    for r in _objects(content, "rows", name, ("name", "settings", "paper")):
        paper = r.get("paper", [None] * len(columns))
        if not isinstance(paper, list) or not all(isinstance(figure, _FIGURES) for figure in paper):
            raise ValueError(
                f"`paper` of row {r['name']!r} in {name!r} must be a list of numbers, text or null, got "
                f"{str(paper)[:80]!r}."
            )
        if len(paper) != len(columns):
            raise ValueError(
                f"`paper` of row {r['name']!r} in {name!r} must have a figure (or null) for each of {len(columns)} "
                f"columns, got {len(paper)}."
            )
        rows.append(Row(r["name"], dict(r.get("settings", {})), tuple(paper)))
    also = content.get("also", [])
    if not isinstance(also, list) or not all(isinstance(figure, str) and figure for figure in also):
        raise ValueError(f"`also` of experiment {name!r} must be a list of text, got {str(also)[:80]!r}.")
    picture = content.get("picture")
    if picture is not None and picture not in PICTURES:
        raise ValueError(f"`picture` of {name!r} must be one of {', '.join(PICTURES)}, got {str(picture)[:80]!r}.")
    return Experiment(
        name,
        content.get("title", name),
        content.get("source", ""),
        columns,
        tuple(rows),
        dict(content.get("settings", {})),
        content.get("note", ""),
        dict(content.get("sets", {})),
        tuple(also),
        picture,
    )


def _objects(content: Mapping[str, Any], key: str, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    found = content.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise ValueError(
            f"`{key}` of experiment {name!r} must be a list of objects with a name, got {str(found)[:80]!r}."
        )
    for one in found:
        unknown = sorted(set(one) - set(fields))
        if unknown:
            raise ValueError(f"`{key}` of experiment {name!r} must hold {', '.join(fields)}, got {unknown[0][:80]!r}.")
        if not isinstance(one.get("settings", {}), dict):
            raise ValueError(
                f"`settings` of each of `{key}` of experiment {name!r} must be an object, got "
                f"{str(one['settings'])[:80]!r}."
            )
    names = [_text(one, "name", name) for one in found]
    if len(set(names)) != len(names):
        raise ValueError(f"`{key}` of experiment {name!r} must have different names, got {names}.")
    return found


def _text(content: Mapping[str, Any], key: str, name: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{key}` of each row and column of {name!r} must be some text, got {str(value)[:80]!r}.")
    return value


def _order(name: str) -> tuple[str, int]:
    word = name.rstrip("0123456789")
    return {"table": "0", "figure": "1"}.get(word, word), int(name[len(word) :] or 0)
