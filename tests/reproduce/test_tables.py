"""Every table and figure, rehearsed: it runs, and its record says what its file says."""

import json
from dataclasses import replace
from importlib import resources

import pytest

from lorarecycle.fewshot.methods.registry import METHODS
from lorarecycle.reproduce.experiment import experiment_names, load_experiment, read_experiment
from lorarecycle.reproduce.kinds import KINDS, find_kind
from lorarecycle.reproduce.quick import METHOD_SIZES, SIZES
from lorarecycle.reproduce.settings import check_settings, common, merge, tasks_seen
from lorarecycle.reproduce.table import figure
from lorarecycle.runtime.files import read_json

TABLES = (
    {f"table{i}" for i in range(1, 19)}
    | {f"icm{i}" for i in range(1, 7)}
    | {"figure5", "figure8", "figure9", "own", "methods"}
)
LONG = {"table3", "table4", "table17"}
"""Ten seconds and more."""


def test_every_table_is_there():
    assert set(experiment_names()) == TABLES
    names = experiment_names()
    assert names.index("table2") < names.index("table10") < names.index("figure5") < names.index("icm1")


@pytest.mark.parametrize("name", sorted(TABLES))
def test_files_hold_settings_that_are_known(name):
    experiment = load_experiment(name)
    seen = set()
    for row in experiment.rows:
        assert len(row.paper) == len(experiment.columns)
        for column in experiment.columns:
            settings = experiment.cell(row, column)
            check_settings(settings)
            assert column.shows in (find_kind(settings).shows or column.shows)
            seen.add(settings["kind"])
    assert seen <= set(KINDS)


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in sorted(TABLES - {"methods"})]
)
def test_a_rehearsal_runs_what_the_file_says(name, rehearse):
    """Rows, columns and all settings that a rehearsal does not make small are those of the file."""
    pytest.importorskip("nevergrad")
    text = resources.files("lorarecycle.reproduce").joinpath(f"experiments/{name}.json").read_text()
    content = json.loads(text)
    table = rehearse(name)()
    record = read_json(table.parent / "results.json")
    assert record["quick"] is True
    rows, columns = content["rows"], content["columns"]
    assert [(c["row"], c["column"]) for c in record["cells"]] == [(r["name"], c["name"]) for r in rows for c in columns]
    for cell in record["cells"]:
        row = next(r for r in rows if r["name"] == cell["row"])
        column = next(c for c in columns if c["name"] == cell["column"])
        layers = content.get("settings", {}), column.get("settings", {}), row.get("settings", {})
        asked = merge(common(), *layers)
        assert cell["asked"] == asked
        assert without_sizes(cell["settings"], SIZES) == without_sizes(asked, SIZES)
        assert isinstance(cell["result"][column.get("shows", "accuracy")], float)
    shown = table.read_text()
    assert "these are no results" in shown
    figures = [str(f) for r in rows for f in r.get("paper", []) if f is not None]
    assert not any(f"({figure})" in shown for figure in figures), "the paper's figures stay away from a rehearsal"


def test_losses_make_adapters_of_their_own(rehearse, tmp_path):
    """Table 6 alone in a new folder, where no other table has tuned and inverted before it."""
    experiment = load_experiment("table6")
    alone = replace(experiment, rows=(replace(experiment.rows[0], paper=(None,)),), columns=experiment.columns[:1])
    assert " not run " not in rehearse(alone, work_dir=tmp_path)().read_text()


@pytest.mark.medium
def test_methods_beside_one_another(rehearse):
    """A few rows of the table of all methods, whose cells `test_methods` answers one by one; its tables of cost."""
    experiment = load_experiment("methods")
    shown = {row.settings["method"] for row in experiment.rows}
    assert shown == {name for name, entry in METHODS.items() if not entry.needs.text_encoder}
    rows = tuple(row for row in experiment.rows if row.settings["method"] in ("nn", "full", "linear-probe"))
    table = rehearse(replace(experiment, rows=rows, columns=experiment.columns[-1:]))()
    text = table.read_text()
    for title in ("Tasks per second", "Seconds of preparation", "Peak memory of answering"):
        assert f"## {title}" in text
    assert text.count("| full fine-tuning |") == 4
    assert [tasks_seen(experiment.cell(row, experiment.columns[0])) for row in rows] == [600, 600, 100, 600]
    assert figure({"accuracy": 50.0, "n_tasks": 30, "n_drawn": 600}, "accuracy") == "50.00 (30 tasks)"


def without_sizes(settings, sizes):
    """What a rehearsal does not make small."""
    found = {}
    for key, value in settings.items():
        small = sizes.get(key)
        if key == "folder":  # of a user's own adapters: a rehearsal tunes some
            continue
        if key == "options":
            found[key] = {k: v for k, v in value.items() if k not in METHOD_SIZES}
        elif isinstance(small, dict):
            found |= {key: rest} if (rest := without_sizes(value, small)) else {}
        elif key not in sizes and not (key == "n_way" and settings.get("steps") == 2):
            found[key] = value
    return found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "experiment 'x' must be JSON"),
        ('{"colour": 1}', "must hold some of title, source, .*, got 'colour'"),
        ('{"columns": [], "rows": []}', "`columns` of experiment 'x' must be a list of objects with a name"),
        (
            '{"columns": [{"name": "a"}], "rows": [{"name": "b", "paper": [1, 2]}]}',
            "`paper` of row 'b' in 'x' must have a figure .* for each of 1 columns, got 2",
        ),
        ('{"columns": [{"name": "a"}, {"name": "a"}], "rows": [{"name": "b"}]}', "must have different names"),
        (
            '{"columns": [{"name": "a", "show": 1}], "rows": [{"name": "b"}]}',
            "must hold name, settings, shows, got 'show'",
        ),
        ('{"columns": [{"name": "a"}], "rows": [{"name": "b"}], "picture": "pie"}', "`picture` of 'x' must be one of"),
        *(
            (
                f'{{"columns": [{{"name": "a"}}], "rows": [{{"name": "b"}}], "also": {also}}}',
                "`also` of experiment 'x' must be a list of text, got",
            )
            for also in ("5", "null", '"memory"', "[1]")
        ),
    ],
)
def test_files_that_are_no_experiments(text, message):
    with pytest.raises(ValueError, match=message):
        read_experiment("x", text)
