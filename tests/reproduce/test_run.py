"""A run on real files: found by name, resumed cell by cell, pictured; what is said of bad input before it starts."""

import json
import re

import numpy as np
import pytest
import torch

from lorarecycle.adapters.adapter import Head
from lorarecycle.cli.main import main
from lorarecycle.reproduce import prepare as preparing
from lorarecycle.reproduce import run as running
from lorarecycle.reproduce.accuracy import validation_set
from lorarecycle.reproduce.experiment import load_experiment
from lorarecycle.reproduce.planning import plan_run
from lorarecycle.reproduce.prepare import prepare_run, reproduce
from lorarecycle.reproduce.sets import Sets
from lorarecycle.reproduce.table import figure, markdown
from lorarecycle.runtime.files import read_json, write_json
from lorarecycle.vit.backbone import Backbone

MACHINE = {"base": "demo", "device": "cpu", "dtype": "float32", "quiet": True}
SMALL = {
    "set": "shapes",
    "adapters": {"of": ["shapes"], "count": 2, "n_way": 3, "tune": {"epochs": 1}},
    "tasks": {"n_way": 3, "n_query": 3, "n_tasks": 4},
    "surrogates": {"inversion": {"steps": 1, "images_per_class": 4, "prior": None}},
    "meta": {"steps": 1, "n_way": 3, "n_query": 2},
}


@pytest.fixture
def root(tmp_path, make_data):
    """A folder of data: one npz file with three parts, whose classes have names."""
    arrays = {}
    for seed, part in enumerate(("train", "val", "test")):
        data = make_data(n_classes=4, seed=seed)
        arrays[f"{part}_images"] = data.images.permute(0, 2, 3, 1).numpy()
        arrays[f"{part}_labels"] = data.labels.numpy().astype(np.int16)
        arrays[f"{part}_classes"] = np.array([f"{part} {c}" for c in range(4)])
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "shapes.npz", **arrays)
    return tmp_path / "data"


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment's file with some fields changed."""

    def write(**changes):
        content = {
            "title": "Shapes",
            "sets": {"shapes": {"path": "shapes.npz"}},
            "settings": SMALL,
            "columns": [{"name": f"{k}-shot", "settings": {"tasks": {"n_shot": k}}} for k in (1, 2)],
            "rows": [
                {"name": "plain", "settings": {"method": "nn"}, "paper": [12.5, None]},
                {"name": "warm", "settings": {"method": "warm-start"}},
                {"name": "recycled"},
            ],
            "picture": "shots",
        }
        write_json(tmp_path / "shapes.json", {**content, **changes})
        return tmp_path / "shapes.json"

    return write


@pytest.mark.medium
def test_a_file_of_one_s_own_runs_and_goes_on(root, experiment, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    settings = {"data": root, "work_dir": tmp_path / "work", **MACHINE}
    prepared = prepare_run(experiment(), **settings)
    assert len(prepared.todo()) == 6
    plan = plan_run(prepared)
    assert "Shapes: 6 cells, 6 different ones, 0 done" in plan
    assert re.search(r"tune adapters +2 adapters", plan)
    assert re.search(r"invert adapters +24 images", plan)
    table = prepared()
    text = table.read_text()
    record = read_json(table.parent / "results.json")
    first = record["cells"][0]["result"]
    assert f"| plain | {first['accuracy']:.2f} ± {first['interval']:.2f} (12.5) |" in text
    assert "In brackets: the paper." in text
    assert (table.parent / "shapes.png").read_bytes().startswith(b"\x89PNG")
    assert [a.name for a in sorted((tmp_path / "work" / "adapters").glob("*/*"))] == ["task-0", "task-1"]

    cells = sorted((tmp_path / "work" / "cells").iterdir())
    monkeypatch.setattr(running, "find_kind", lambda s: pytest.fail("done again"))
    assert prepare_run(experiment(), **settings)().exists()
    monkeypatch.undo()
    lost = read_json(cells[0])
    cells[0].unlink()
    again = prepare_run(experiment(), **settings)
    assert len(again.todo()) == 1
    assert "5 done" in plan_run(again)
    again()
    found = read_json(cells[0])["result"]
    assert found["accuracy"] == lost["result"]["accuracy"], "equal settings, equal figures"
    assert read_json(cells[0])["facts"] == lost["facts"]

    more = {**SMALL, "tasks": {**SMALL["tasks"], "n_tasks": 5}}
    assert len(prepare_run(experiment(settings=more), **settings).todo()) == 6, "other settings, other cells"
    assert len(prepare_run(experiment(), n_tasks=5, **settings).todo()) == 6
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "__version__", "99.0")
        with pytest.raises(ValueError, match="`work_dir` must be a new folder .* 99.0"):
            prepare_run(experiment(), **settings)
    with pytest.raises(ValueError, match="`work_dir` must be a new folder or one of the same kind of run"):
        prepare_run(experiment(), data=root, work_dir=tmp_path / "work", **{**MACHINE, "dtype": "bfloat16"})


def test_adapters_of_a_folder_are_looked_at_first(root, experiment, tmp_path, make_adapter, caplog):
    """They must fit, have heads where a method needs them, and cannot show the images that they were tuned on."""
    demo, place = Backbone.load("demo"), root / "adapters"
    settings = {**SMALL, "adapters": {"folder": "adapters"}}
    make_adapter(demo, head=False).save(place / "a")
    file = {"data": root, "work_dir": tmp_path / "work", **MACHINE}
    for kind in ("accuracy", "losses"):
        rows = [{"name": "a", "settings": {"kind": kind}}]
        columns = [{"name": "c", "shows": "accuracy" if kind == "accuracy" else "before"}]
        with pytest.raises(ValueError, match="must hold adapters with classification heads .*, got none in adapter-0"):
            prepare_run(experiment(settings=settings, rows=rows, columns=columns), **file)
    rows = [{"name": "a", "settings": {"method": "caml"}}]
    with pytest.raises(ValueError, match="must hold adapters with classification heads for method 'caml', got none"):
        prepare_run(experiment(settings=settings, rows=rows), **file)  # its surrogates are inverted from them
    rows = [{"name": "a", "settings": {"method": "warm-start"}}]
    assert len(prepare_run(experiment(settings=settings, rows=rows), **file).todo()) == 2
    rows = [{"name": "a", "settings": {"method": "mole"}}]
    tuned = prepare_run(experiment(settings=settings, rows=rows), **file).cells[0]
    assert validation_set(tuned.settings) == "shapes", "rates are chosen on the set's own validation classes"
    sets = {"shapes": {"path": "shapes.npz", "test": "test"}}
    aside = {**settings, "validation": "cub"}
    with pytest.raises(FileNotFoundError, match="set 'cub' must be under"):
        prepare_run(experiment(settings=aside, rows=rows, sets=sets), **file)
    rows = [{"name": "a", "settings": {"surrogates": {"images": "real"}}}]
    with pytest.raises(ValueError, match="`surrogates.images` must be 'inverted' for adapters of a folder"):
        prepare_run(experiment(settings=settings, rows=rows), **file)
    for names in (("x", "test 1", "y"), ("LABEL_0", "1", "2")):
        head = Head(torch.zeros(3, demo.embed_dim), class_names=names)
        make_adapter(demo, head=False).with_head(head).save(place / "a")
        make_adapter(demo, head=False, seed=1).with_head(head).save(place / "b")
        caplog.clear()
        assert prepare_run(experiment(settings=settings), **file).todo()
        said = "1 classes of set 'shapes' have the name of one that an adapter of adapters was tuned on (test 1)"
        assert (said in caplog.text) == ("test 1" in names), "a number says nothing"


@pytest.mark.parametrize(
    "changes",
    [{"learn": "joint"}, {"meta": {"guide_weight": 1.0}}, {"meta": {"steps": 0}}],
    ids=["joint", "guide", "none"],
)
def test_what_draws_no_episodes_needs_no_images_for_them(root, experiment, tmp_path, changes):
    settings = {**SMALL, **changes, "meta": {**SMALL["meta"], "n_query": 15, **changes.get("meta", {})}}
    rows = [{"name": "a"}]
    assert prepare_run(
        experiment(settings=settings, rows=rows), data=root, work_dir=tmp_path / "work", **MACHINE
    ).todo()


def test_cells_of_adapters_ask_for_no_test_set(root, experiment, tmp_path):
    """Losses of inverted images: the set that is named to be tested on is not there, and nobody wants it."""
    settings = {**SMALL, "set": "cub", "kind": "losses", "area": "foreground"}
    file = experiment(settings=settings, rows=[{"name": "a"}], columns=[{"name": "before", "shows": "before"}])
    assert len(prepare_run(file, data=root, work_dir=tmp_path / "work", **MACHINE).todo()) == 1


@pytest.mark.medium
def test_models_are_looked_for_before_anything_runs(root, experiment, tmp_path, monkeypatch):
    """Weights are those of the base that they are given with; a model that is not to be had is told at once."""
    asked = []

    def load(base, weights, **machine):
        asked.append((base, weights))
        if base == "lvvit_m" and weights is None:
            raise FileNotFoundError("no weights of lvvit_m")
        return Backbone.load("demo")

    monkeypatch.setattr(preparing, "_load", load)
    rows = [{"name": n, "settings": {"method": "nn", "base": n}} for n in ("deit", "lvvit_m")]
    file = experiment(rows=rows, columns=[{"name": "1-shot"}])
    where = {"data": root, "work_dir": tmp_path / "work", "device": "cpu", "quiet": True}
    with pytest.raises(FileNotFoundError, match="row 'lvvit_m', column '1-shot': no weights of lvvit_m"):
        prepare_run(file, **where)
    with pytest.raises(FileNotFoundError, match="row 'lvvit_m', column '1-shot': no weights of lvvit_m"):
        prepare_run(file, skip_missing=True, **where)  # which is for sets alone
    asked.clear()
    prepare_run(file, base="lvvit_m", weights="lv.safetensors", **where)
    assert asked == [("deit", None), ("lvvit_m", "lv.safetensors")]
    with pytest.raises(ValueError, match="`weights` must come with `base`, the model that they are for, got w alone"):
        prepare_run(file, weights="w", **where)
    own = [{"name": "a", "settings": {"method": "nn", "weights": "own.safetensors"}}]
    with pytest.raises(ValueError, match="`weights` must be left out of this experiment, none of whose cells"):
        prepare_run(experiment(rows=own), base="lvvit_m", weights="lv.safetensors", **where)
    asked.clear()
    prepare_run(experiment(rows=[*own, *rows[1:]]), base="lvvit_m", weights="lv.safetensors", **where)
    assert asked == [("lvvit_m", "own.safetensors"), ("lvvit_m", "lv.safetensors")]
    file = experiment(rows=rows, columns=[{"name": "1-shot"}])
    idle = {"base": "vit", "prior": "resnet50", "prior_weights": "p", "skip_missing": False}
    for name in ("base", "prior", "prior_weights"):
        given = {**where, "base": "lvvit_m", "weights": "lv.safetensors", name: idle[name]}
        if name == "base":
            given["weights"] = None
            monkeypatch.setattr(preparing, "_load", lambda base, weights, **machine: Backbone.load("demo"))
        with pytest.raises(ValueError, match=f"`{name}` must be left out of this experiment, none of whose cells"):
            prepare_run(file, **given)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "no text"), ValueError),
        (json.JSONDecodeError("no JSON", "x", 0), ValueError),
        (ModuleNotFoundError("no timm"), ImportError),
    ],
)
def test_every_error_says_its_cell(root, experiment, tmp_path, monkeypatch, error, kind):
    """Also errors whose own kind takes more than a message."""

    def load(*a, **k):
        raise error

    monkeypatch.setattr(preparing, "_load", load)
    with pytest.raises(kind, match=r"row 'plain', column '1-shot': .*no (text|JSON|timm)") as raised:
        prepare_run(experiment(), data=root, work_dir=tmp_path / "work", **MACHINE)
    assert raised.value.__cause__ is error


def test_texts_are_read_as_utf_8(root, experiment, tmp_path):
    language = {"texts": ["a"], "method": "plain"}
    settings = {**SMALL, "kind": "language", "language": language}
    file = experiment(settings=settings, rows=[{"name": "r"}], columns=[{"name": "c", "shows": "a ppl"}], picture=None)
    where = {"data": root, "work_dir": tmp_path / "work", "device": "cpu", "dtype": "float32", "quiet": True}
    assert not prepare_run(file, skip_missing=True, **where).todo(), "a text is this table's set"
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_bytes(b"\xff" * 2000)
    with pytest.raises(ValueError, match="row 'r', column 'c': text 'a' .* must be in UTF-8, got other bytes"):
        prepare_run(file, skip_missing=True, **where)
    (root / "texts" / "a.txt").write_text("abcde" * 400)
    assert prepare_run(file, **where).todo()
    with pytest.raises(ValueError, match="`base` must be left out of this experiment, none of whose cells uses it"):
        prepare_run(file, **where, base="demo")  # its model is one of characters


def test_tasks_of_few_shots_are_not_those_of_generators(root, experiment, tmp_path):
    """Their facts name tasks too, but others."""
    settings = {**SMALL, "kind": "generation", "generator": {"method": "plain", "per_class": 2}}
    parts = {"train": [f"{part} {c}" for part in ("train", "val") for c in range(4)]}
    arrays = np.load(root / "shapes.npz")
    whole = {key: np.concatenate([arrays[f"{p}_{key}"] for p in ("train", "val")]) for key in ("images", "classes")}
    labels = np.concatenate([arrays["train_labels"], arrays["val_labels"] + 4])
    np.savez(root / "whole.npz", labels=labels, **whole)
    changes = {"settings": settings, "rows": [{"name": "a"}], "columns": [{"name": "c"}], "picture": None}
    file = experiment(**changes, sets={"shapes": {"path": "whole.npz", **parts}})
    assert prepare_run(file, data=root, work_dir=tmp_path / "work", **MACHINE).todo()
    with pytest.raises(ValueError, match="`n_tasks` must be left out of this experiment, none of whose cells uses it"):
        prepare_run(file, data=root, work_dir=tmp_path / "work", n_tasks=5, **MACHINE)


@pytest.mark.medium
def test_cells_that_fail_do_not_stop_the_others(root, experiment, tmp_path, monkeypatch, caplog):
    prepared = prepare_run(experiment(), data=root, work_dir=tmp_path / "work", **MACHINE)
    real = running.find_kind

    def fail(settings):
        kind = real(settings)
        if settings["method"] != "nn":
            return kind._replace(run=lambda *a: (_ for _ in ()).throw(KeyError("too little")))
        return kind

    monkeypatch.setattr(running, "find_kind", fail)
    with pytest.raises(RuntimeError, match="4 cells failed; warm, 1-shot: KeyError: 'too little'"):
        prepared()
    assert "| warm | not run | not run |" in (tmp_path / "work" / "shapes" / "table.md").read_text()
    monkeypatch.setattr(running, "draw_shots", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RuntimeError, match="4 cells failed"):  # a picture that fails hides no cell
        prepared()
    assert "the picture failed too: disk full" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(prepared, "todo", list)
    assert prepared().exists(), "the failures of an earlier run are not told again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {**SMALL, "set": "circles"}}, r"`set` must be one of shapes, cifar-fs, .*, got 'circles'"),
        ({"rows": [{"name": "a", "settings": {"method": "best"}}]}, "`method` must be one of nn, .*, got 'best'"),
        ({"settings": {**SMALL, "colour": 1}}, "`settings` must hold some of kind, base, .*, got 'colour'"),
        ({"settings": {**SMALL, "kind": "art"}}, "`kind` must be one of accuracy, .*, got 'art'"),
        ({"settings": {**SMALL, "learn": "nothing"}}, "`learn` must be one of lora, everything, joint, got 'nothing'"),
        ({"settings": {**SMALL, "meta": {"colour": 1}}}, "`meta` must name settings of MetaConfig .* got colour"),
        ({"settings": {**SMALL, "tasks": {"n_way": 9}}}, "set 'shapes' must have 9 classes of at least 16 images"),
        ({"settings": {**SMALL, "tasks": {"n_query": 12}}}, "must have 5 classes of at least 13 images .*, got 0"),
        (
            {"settings": {**SMALL, "meta": {**SMALL["meta"], "n_query": 4}}},
            r"meta.n_shot \+ meta.n_query = 5 images of a class, got 4",
        ),
        (
            {
                "settings": {
                    **SMALL,
                    "surrogates": {"images": "real"},
                    "meta": {**SMALL["meta"], "n_query": 4},
                    "adapters": {**SMALL["adapters"], "per_class": 3},
                }
            },
            r"meta.n_shot \+ meta.n_query = 5 images of a class, got 3",
        ),
        (
            {"settings": {**SMALL, "meta": {"n_way": 4}}},
            "`n_way` must be at most the classes of every adapter, got n_way=4",
        ),
        (
            {"settings": {**SMALL, "learn": "everything", "meta": {"n_query": 2, "guide_weight": 0.5}}},
            "`meta.guide_weight` must be 0 where `learn` is 'everything', got 0.5",
        ),
        (
            {
                "settings": {**SMALL, "tasks": {"n_way": 4}},
                "rows": [{"name": "a", "settings": {"method": "caml", "options": {"max_way": 3}}}],
            },
            "`options.max_way` must be at least `tasks.n_way` for method 'caml', got 3 and 4",
        ),
        (
            {
                "sets": {"shapes": {"path": "shapes.npz"}, "again": {"path": "shapes.npz", "test": "train"}},
                "settings": {**SMALL, "set": "again"},
            },
            "the sets 'shapes' and 'again' must have each class in one part only, got 48 images of the classes train 0",
        ),
        ({"columns": [{"name": "a", "shows": "beauty"}]}, "`shows` must be one of accuracy, .*, got 'beauty'"),
        ({"settings": {**SMALL, "adapters": {"per_class": 0}}}, "`adapters.per_class` must be at least 1, .* got 0"),
        (
            {"settings": {**SMALL, "adapters": {"folder": "gone", "per_class": 5}}},
            "`adapters.per_class` must be .* left out for adapters of a folder, got 5",
        ),
        ({"settings": {**SMALL, "adapters": {"folder": "gone"}}}, "`adapters.folder` must be a folder of adapters"),
        (
            {"rows": [{"name": "a", "settings": {"method": "zero-shot"}}]},
            "row 'a', column '1-shot': `text_encoder` must be given for method 'zero-shot'",
        ),
        (
            {"settings": {**SMALL, "options": {"steps": 3}}},
            "`options` of method 'lora-recycle' may hold `distance` only",
        ),
        ({"settings": {**SMALL, "options": {"seed": 3}}}, "`options` must leave `seed` to the cell's own, got 3"),
        ({"settings": {**SMALL, "tasks": {"distance": "cosine"}}}, "`tasks` must leave 'distance' out, got 'cosine'"),
        (
            {
                "settings": {**SMALL, "kind": "generation", "generator": {"method": "soup", "config": {"epoch": 3}}},
                "columns": [{"name": "a"}],
            },
            "`config` of a generator must hold settings of soup, cond-p-diff, icm-lora but `seed`, .* got 'epoch'",
        ),
        (
            {"settings": {**SMALL, "kind": "losses"}, "columns": [{"name": "a", "shows": "before"}]},
            "row 'a', column 'a': `area` must be given for cells of 'losses', one of foreground, background, got none",
        ),
        (
            {
                "settings": {**SMALL, "kind": "losses", "area": "foreground", "surrogates": {"images": "real"}},
                "columns": [{"name": "a", "shows": "before"}],
            },
            "`surrogates` must be images inverted by the adapters' own heads for cells of 'losses'",
        ),
        (
            {"sets": {"shapes": {"path": "gone.npz"}}},
            "`source` must be a folder, a npz or parquet file, .* got 'gone.npz'",
        ),
        (
            {"sets": {"shapes": {"path": "shapes.npz", "train": "train", "test": "train"}}},
            "set 'shapes' must have each class in one part only, got 'train 0' both in the part that adapters",
        ),
        (
            {"sets": {"shapes": {"path": "shapes.npz", "train": ["a", "b"], "test": ["b"]}}},
            "shapes must have each class in one part only, got 'b' in train and test",
        ),
    ],
)
def test_bad_input_is_told_before_anything_runs(root, experiment, tmp_path, monkeypatch, changes, message):
    for name in ("tune", "invert", "meta_train"):
        monkeypatch.setattr(f"lorarecycle.reproduce.stages.{name}", lambda *a, **k: pytest.fail("it ran"))
    if "rows" not in changes:
        changes = {**changes, "rows": [{"name": "a"}]}
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        prepare_run(experiment(**changes), data=root, work_dir=tmp_path / "work", **MACHINE)
    assert not (tmp_path / "work").exists()


def test_names_and_folders(tmp_path, root, capsys):
    with pytest.raises(ValueError, match=r"`table` must be one of table1, .*figure5, .*icm1, .* got 'table99'"):
        load_experiment("table99")
    with pytest.raises(FileNotFoundError, match="`table` must be a file that is there"):
        load_experiment(tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match="`data` must be a folder that holds the sets"):
        prepare_run("table7", data=tmp_path / "gone", **MACHINE)
    with pytest.raises(ValueError, match="`data` must be the folder that holds the sets, got none"):
        prepare_run("table7", **MACHINE)
    with pytest.raises(FileNotFoundError, match=r"set 'cifar-fs' must be under .* as one of cifar_fs.npz"):
        prepare_run("table7", data=root, work_dir=tmp_path / "work", **MACHINE)
    with pytest.raises(ValueError, match="`sets.a` must hold `path` and maybe train, val, test"):
        Sets(root, {"a": {"colour": 1}})
    with pytest.raises(ValueError, match="'eurosat', all of whose classes are for tests"):
        Sets(root).open("eurosat", "train")
    assert main(["reproduce", "table99", "--data", str(root)]) == 2
    assert "`table` must be one of table1" in capsys.readouterr().err


def test_sets_that_are_missing_may_be_left_out(tmp_path, root):
    """MiniImageNet is rarely at hand: its cells are marked, the others would run."""
    prepared = prepare_run("table7", data=root, work_dir=tmp_path / "work", skip_missing=True, **MACHINE)
    assert not prepared.todo()
    text = prepared().read_text()
    assert "| with cross-task interpolation | not run (89.69) | not run (97.05) |" in text
    assert all("must be under" in cell["not run"] for cell in read_json(prepared.folder / "results.json")["cells"])


@pytest.mark.medium
def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "list"]) == 0
    assert "table14    Table 14: zero-shot classification" in capsys.readouterr().out
    assert main(["reproduce", "table7", "--copy", "mine.json"]) == 0
    assert main(["reproduce", "table9", "--copy", "mine.json"]) == 2
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert main(["reproduce", "table9", "--copy", "~/mine.json"]) == 2
    assert main(["reproduce", "--copy", "other.json"]) == 2
    assert "`--copy` must come with the table" in capsys.readouterr().err
    content = json.loads((tmp_path / "mine.json").read_text())
    assert content["rows"][0]["settings"] == {"meta": {"interpolation": 0.0}}
    flags = ["--quick", "--device", "cpu", "--dtype", "float32", "--quiet", "--work-dir", "work"]
    assert main(["reproduce", "mine.json", *flags, "--plan"]) == 0
    assert "A rehearsal at small size." in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
    assert main(["reproduce", "mine.json", *flags]) == 0
    assert "| without cross-task interpolation |" in capsys.readouterr().out
    for cell in (tmp_path / "work" / "cells").iterdir():
        cell.unlink()
    monkeypatch.setattr("lorarecycle.reproduce.accuracy.evaluate", lambda *a, **k: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", "mine.json", *flags])
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert "with cross-task interpolation, 1-shot: ZeroDivisionError: division by zero" in lines
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert reproduce("mine.json", quick=True, device="cpu", dtype="float32", quiet=True, work_dir="work").exists()


def test_figures_in_words():
    experiment = load_experiment("table4")
    assert figure({"accuracy": 89.694, "interval": float("nan")}, "accuracy") == "89.69"
    assert figure({"gflops": 50.588}, "gflops") == "50.59"
    assert figure({"memory": None}, "memory") == "-"
    record = {"quick": False, "machine": "m", "models": ["tiny"]}
    text = markdown(experiment, {}, record)
    assert "| {6: 0.75} | not run (81.08) | not run (95.52) | not run (7.15) |" in text
    assert "Here: m; tiny.\n" in text
    some = {(experiment.rows[0].name, experiment.columns[0].name): {"accuracy": 50.0, "n_tasks": 600, "n_drawn": 600}}
    assert "Here: m; tiny; 600 tasks.\n" in markdown(experiment, some, record)
    assert "(81.08)" not in markdown(experiment, {}, {**record, "quick": True})
