"""`--plan`: a line for each stage, its cost or that nobody knows it; the order of cells by cost."""

import re
from dataclasses import replace

import pytest

from lorarecycle.reproduce import planning
from lorarecycle.reproduce.costs import works
from lorarecycle.reproduce.experiment import Row, load_experiment
from lorarecycle.reproduce.settings import common, merge


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """A machine whose speed nobody times."""
    monkeypatch.setattr(planning, "flops_per_second", lambda *a: 1e9)


def stages(world, *layers):
    """Stage -> work of a cell, of the settings of the tables but for a tiny model."""
    settings = merge(common(), {"base": "tiny"}, *layers)
    return {work.stage: work for work in works(world, settings, "key")}


def test_what_methods_learn_beforehand_is_counted(rehearse):
    world = rehearse("table7").world
    for method, amount in (("caml", 1000), ("pmf", 100), ("zero-shot-recycle", 200), ("recycle-weights", 100)):
        found = stages(world, {"method": method})
        assert found["prepare methods"].amount == amount
        assert found["prepare methods"].flops > 0
    trained = stages(world, {"method": "zero-shot-mole"})["prepare methods"].flops
    tried = stages(world, {"method": "zero-shot-lorahub"})["prepare methods"].flops
    assert tried / 400 < trained / 50 < 3 * tried / 400, "a step has a backward pass too"
    assert set(stages(world, {"method": "nn"})) == {"features"}


def test_steps_that_are_measured_are_planned_as_they_run(rehearse):
    """Of a cell's own steps and batch, the prior's among them; fewer tokens cost less."""
    world = rehearse("table4").world

    def flops(kind, steps, **other):
        measure = {"kind": kind, "measure": {"steps": steps, "batch_size": 10}}
        return stages(world, measure, other)["measure steps"].flops

    for kind in ("inversion", "training"):
        assert flops(kind, 10) / flops(kind, 2) == pytest.approx((2 + 4 * 10) / (2 + 4 * 2))
    inversion = {"prior": None, "prune": {}}
    alone = flops("inversion", 2, surrogates={"inversion": inversion})
    assert flops("inversion", 2, surrogates={"inversion": {"prune": {}}}) > alone, "a prior network costs something"
    assert flops("inversion", 2, surrogates={"inversion": {**inversion, "prune": {"0": 0.5}}}) < alone
    assert flops("training", 2, meta={"sparsity": 0.75}) == pytest.approx(flops("training", 2) / 4)
    assert flops("training", 2, meta={"episodes_per_step": 2}) == pytest.approx(2 * flops("training", 2))
    assert flops("training", 2, learn="everything") > flops("training", 2)


def test_models_that_learn_whole_are_planned_for_each_cell(rehearse, tmp_path):
    """A meta-LoRA is kept for all shots; a model all of whose weights learn is not."""
    experiment = load_experiment("table7")
    columns = tuple(
        replace(experiment.columns[0], name=str(k), settings={"set": "cub", "tasks": {"n_shot": k}}) for k in (1, 5)
    )
    for learn, steps in (("lora", 2), ("everything", 4)):
        rows = (Row("a", {"learn": learn}, (None, None)),)
        run = rehearse(replace(experiment, rows=rows, columns=columns), work_dir=tmp_path)
        assert re.search(rf"meta-train +{steps} steps", planning.plan_run(run))


@pytest.mark.medium
def test_pictures_make_what_they_show(rehearse, tmp_path):
    """A hundred adapters are asked for, two are shown: two are tuned and inverted."""
    run = rehearse("figure5", work_dir=tmp_path)
    cell = run.cells[0]
    assert cell.asked["adapters"]["count"] == 100
    found = stages(run.world, cell.asked, {"base": "tiny"})
    assert found["tune adapters"].amount == 2
    assert found["invert adapters"].amount == 2 * 5 * 20
    run()
    assert len(list((tmp_path / "adapters").glob("*/task-*"))) == 2
    assert len(list((tmp_path / "surrogates").glob("*/*.safetensors"))) == 2 * len(run.experiment.rows)


@pytest.mark.parametrize("name", ["icm1", "icm2"])
def test_what_nobody_knows_is_said(name, rehearse, tmp_path):
    text = planning.plan_run(rehearse(name, work_dir=tmp_path))
    assert re.search(r"fit generators +3 generators +not estimated", text)
    assert "and what is not estimated" in text
    assert "tune adapters" in text
    assert not re.search(r" 0 cells", text)


def test_first_adapters_of_many_are_planned_once(rehearse, tmp_path):
    """One row's two adapters are the first two of the other's five: five are tuned and inverted, in whatever order."""
    experiment = load_experiment("table7")
    few, many = ({"adapters": {"count": count}, "set": "cub", "base": "tiny"} for count in (2, 5))
    for order in ((few, many), (many, few)):
        rows = tuple(Row(str(i), settings, (None,)) for i, settings in enumerate(order))
        run = rehearse(replace(experiment, rows=rows, columns=experiment.columns[:1]), work_dir=tmp_path)
        run.cells = [
            replace(cell, settings=merge(cell.settings, cell.row.settings), key=cell.row.name) for cell in run.cells
        ]  # as many adapters as asked for, which a rehearsal makes few
        text = planning.plan_run(run)
        images = run.cells[0].settings["adapters"]["n_way"] * 6
        assert re.search(r"tune adapters +5 adapters", text)
        assert re.search(rf"invert adapters +{5 * images} images", text)


def test_what_is_made_in_part_costs_the_rest():
    """The order counts what more adapters cost beyond those that are there."""
    endless = {"fit": float("inf")}
    cells = [("a", {"tune": 6.0}), ("b", {"tune": 1.0, "x": 3.0}), ("c", {"tune": 2.0}), ("d", endless), ("e", endless)]
    assert list(planning._greedy(cells)) == ["c", "b", "a", "d", "e"]


def test_cells_in_the_order_of_their_cost(rehearse, tmp_path):
    """What an earlier cell made costs nothing: the rows of the plain model come together, what tunes adapters last."""
    experiment = load_experiment("methods")
    wanted = ("average", "full", "nn", "laplacian-shot")
    rows = tuple(row for row in experiment.rows if row.settings["method"] in wanted and "options" not in row.settings)
    run = rehearse(replace(experiment, rows=rows, columns=experiment.columns[:2]), work_dir=tmp_path)
    order = [cell.settings["method"] for cell in planning.cheapest_first(run)]
    assert order[:4] == ["nn", "laplacian-shot", "nn", "laplacian-shot"] or order[:4] == ["nn", "nn", *order[:2]]
    assert sorted(order) == sorted(2 * wanted)
    assert {*order[:4]} == {"nn", "laplacian-shot"}
