"""What a run leaves out is in its plan, in the log and in the command's output; `strict` makes it an error."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lorarecycle import Adapter, Backbone, FewShotClassifier, Head, load_dataset, make_plan, recycle, warm_start
from lorarecycle.cli.main import main
from lorarecycle.data.folder import readable
from lorarecycle.pipeline import prepare
from lorarecycle.vit.base import doubts

SMALL = {"inversion": {"pictures": 5}, "meta": {"steps": 0}, "quiet": True}
PLAN = {"inversion": {"pictures": 5}, "meta": {"steps": 0}}


@pytest.fixture
def adapters(tiny_backbone, make_adapter):
    return [make_adapter(tiny_backbone, seed=i, size=0.1) for i in range(4)]


def dead(adapter):
    zero = {site: pair._replace(lora_B=torch.zeros_like(pair.lora_B)) for site, pair in adapter.factors.items()}
    return replace(adapter, factors=zero, name="dead")


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- requirements that the chosen work does not have -----------------------------------------------


@pytest.mark.parametrize("heads", [(), (0,), (0, 1, 2, 3)], ids=["none", "one", "all"])
def test_the_default_recipe_needs_no_heads(tiny_backbone, adapters, heads):
    mixed = [one if i in heads else one.with_head(None) for i, one in enumerate(adapters)]
    plan = make_plan(mixed, base=tiny_backbone, **PLAN)
    assert not plan.needs.heads
    assert not [note for note in plan.notes if "head" in note]
    one, other = (recycle(set_, base=tiny_backbone, **SMALL) for set_ in (adapters, mixed))
    for site in one.sites:  # but for rounding: heads are part of the order in which adapters are summed
        torch.testing.assert_close(one.delta(site), other.delta(site), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "width", "pool"), [(2, 32, "token"), (3, 64, "token+mean"), (1, 32, "mean")], ids=str
)
def test_heads_that_nothing_uses(tiny_backbone, adapters, classes, width, pool):
    """Too few classes for an episode, or another feature than the class token: the default recipe reads no head."""
    heads = [Head(torch.ones(classes, width), None, tuple(map(str, range(classes))), pool) for _ in adapters]
    others = [one.with_head(head) for one, head in zip(adapters, heads, strict=True)]
    assert not make_plan(others, base=tiny_backbone, **PLAN).needs.heads
    made = recycle(others, base=tiny_backbone, **SMALL)
    bare = recycle([one.with_head(None) for one in adapters], base=tiny_backbone, **SMALL)
    for site in made.sites:
        torch.testing.assert_close(made.delta(site), bare.delta(site), rtol=0, atol=1e-6)


def test_recipes_that_need_heads_say_so(tiny_backbone, adapters):
    bare = [one.with_head(None) for one in adapters]
    with pytest.raises(
        ValueError, match=r"must have a classification head .*use preset='weights', which needs no heads"
    ):
        make_plan(bare, base=tiny_backbone, preset="paper", prior=torch.nn.BatchNorm2d(3))
    make_plan(bare, base=tiny_backbone, preset="weights")  # the advice


def test_a_given_base_decides(tiny_backbone, adapters, caplog):
    places = ("google/vit", "/content/drive/vit", "C:\\models\\vit", "google/vit")
    named = [replace(one, base_model=place) for one, place in zip(adapters, places, strict=True)]
    with pytest.raises(ValueError, match=r"tuned on one base, got 3: .*give `base` where these are names of one model"):
        recycle(named, **SMALL)
    made = recycle(named, base=tiny_backbone, **SMALL)  # the advice
    assert made.weights_digest() == recycle(adapters, base=tiny_backbone, **SMALL).weights_digest()
    told = [line for line in lines(caplog) if "counts, though" in line]
    assert len(told) == 1
    for i in range(4):
        assert f"adapter-{i}" in told[0]


# --- left out, counted, named ----------------------------------------------------------------------


def test_dead_adapters_in_the_plan_and_the_log(tiny_backbone, adapters, caplog):
    plan = make_plan([*adapters, dead(adapters[0])], base=tiny_backbone, **PLAN)
    note = "left out, as their update is zero: 1 adapters (dead)"
    assert note in plan.notes
    assert note in plan.describe()
    made = recycle([*adapters, dead(adapters[0])], base=tiny_backbone, **SMALL)
    assert note in lines(caplog)
    assert made.weights_digest() == recycle(adapters, base=tiny_backbone, **SMALL).weights_digest()
    with pytest.raises(ValueError, match=r"`strict` allows nothing to be left out, got: left out, as their update"):
        recycle([*adapters, dead(adapters[0])], base=tiny_backbone, strict=True, **SMALL)
    recycle(adapters, base=tiny_backbone, strict=True, **SMALL)


def test_dead_adapters_do_not_thin_out_a_warm_start(tiny_backbone, adapters, caplog):
    plain = warm_start(adapters, base=tiny_backbone)
    assert warm_start([*adapters, dead(adapters[0])], base=tiny_backbone).digest() == plain.digest()
    assert "1 adapters (dead)" in caplog.text
    with pytest.raises(ValueError, match=r"`strict` allows nothing"):
        warm_start([*adapters, dead(adapters[0])], base=tiny_backbone, strict=True)


def test_copies_are_named(tiny_backbone, adapters, tmp_path, caplog):
    for name in ("a", "copy of a", "b"):
        adapters[name == "b"].save(tmp_path / name)
        config = json.loads((tmp_path / name / "lorarecycle.json").read_text())
        (tmp_path / name / "lorarecycle.json").write_text(json.dumps({**config, "name": name}))
    note = "equal weights, of which each copy counts: a = copy of a"
    assert note in make_plan(tmp_path, base=tiny_backbone, **PLAN).notes
    warm_start(tmp_path, base=tiny_backbone, strict=True)  # nothing is left out
    assert note in lines(caplog)
    assert not [line for line in make_plan(adapters, base=tiny_backbone, **PLAN).notes if "equal weights" in line]
    shutil.copytree(tmp_path / "b", tmp_path / "b - Copy")  # the name in it stays
    assert f"{note}; b (2 times)" in make_plan(tmp_path, base=tiny_backbone, **PLAN).notes


def test_notes_of_files_reach_the_plan_once(tiny_backbone, adapters, tmp_path, caplog):
    for one in adapters[:2]:
        one.save(tmp_path / "pool" / one.name)
    adapters[2].save(tmp_path / "pool" / ".left.over")
    plan = make_plan(tmp_path / "pool", base=tiny_backbone, **PLAN)
    assert "1 adapters in hidden folders (.left.over)" in plan.describe()
    assert len([line for line in lines(caplog) if ".left.over" in line]) == 1
    caplog.clear()
    recycle(tmp_path / "pool", base=tiny_backbone, **SMALL)
    assert len([line for line in lines(caplog) if ".left.over" in line]) == 1


@pytest.mark.parametrize("flaw", ["cut", "other width", "other normalisation"])
def test_skipping_bad_adapters(tiny_backbone, adapters, make_adapter, build_vit, tmp_path, flaw):
    for one in adapters[:3]:
        one.save(tmp_path / one.name)
    bad = tmp_path / "adapter-2"
    if flaw == "cut":
        (bad / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    elif flaw == "other width":
        make_adapter(Backbone(build_vit(embed_dim=48)), name="adapter-2").save(bad)
    else:
        replace(adapters[2], mean=(0.1, 0.2, 0.3)).save(bad)
    with pytest.raises(ValueError):
        make_plan(tmp_path, base=tiny_backbone, **PLAN)
    job = prepare(tmp_path, base=tiny_backbone, strict=False, **PLAN)
    assert sorted(one.name for one in job.adapters) == ["adapter-0", "adapter-1"]
    assert any("left out, as it" in note and "adapter-2" in note for note in job.plan().notes)


# --- other bases of equal shape --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"base_model": "google/vit-base-patch16-224-in21k"}, "another base, 'google/vit-base-patch16-224-in21k' (x)"),
        (
            {"base_class": "dinov3.models.vision_transformer.DinoVisionTransformer"},
            "an architecture not known here, dinov3.models.vision_transformer.DinoVisionTransformer (x)",
        ),
        (
            {"base_class": "transformers.models.dinov2.modeling_dinov2.Dinov2Model"},
            "another family, transformers.models.dinov2.modeling_dinov2.Dinov2Model (x)",
        ),
        ({"resize": "squash"}, "images prepared by resize='squash' (x)"),
        ({"base_model": "tiny", "base_class": "transformers.models.vit.modeling_vit.ViTModel"}, None),
        ({"base_class": "timm.models.vision_transformer.VisionTransformer", "resize": "crop"}, None),
        ({"base_model": ""}, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_another_base_is_named(tiny_vit, make_adapter, tiny_data, caplog, facts, message):
    backbone = Backbone(tiny_vit, name="tiny", family="vit")
    adapter = replace(make_adapter(backbone, name="x"), **facts)
    told = doubts(backbone, [adapter])
    assert len(told) == (message is not None)
    FewShotClassifier(backbone, adapter).fit(tiny_data.images, tiny_data.labels)
    assert [line for line in lines(caplog) if "counts, though" in line] == told
    if message is not None:
        assert message in told[0]
        assert "the base 'tiny' (vit, resize='crop') counts" in told[0]
        assert told[0] in make_plan([adapter], base=backbone, **PLAN).notes


def test_one_folder_under_two_names_is_one_base(tiny_vit, make_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    backbone = Backbone(tiny_vit, name="base")
    adapter = replace(make_adapter(backbone), base_model=str(tmp_path / "base"))
    assert not doubts(backbone, [adapter])


# --- images and commands ---------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    for c, name in enumerate(("cat", "dog")):
        for i in range(2):
            (tmp_path / "p" / name / "more").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (90 * c + 20 * i,) * 3).save(tmp_path / "p" / name / "more" / f"{i}.png")
    return tmp_path / "p"


@pytest.mark.parametrize(
    "name", ["cat/._0.png", "cat/notes.txt", "cover.png", "owl/README", "__MACOSX/x.png", "dog/0.psd"]
)
def test_strict_data_sets(photos, name):
    load_dataset(photos, strict=True, quiet=True)
    (photos / name).parent.mkdir(exist_ok=True)
    (photos / name).write_bytes(b"\0\5\x16\7")
    assert load_dataset(photos, quiet=True).counts == (2, 2)
    with pytest.raises(
        ValueError, match=r"`strict` allows nothing to be left out, got: .*4 images of 2 classes; left out: 1"
    ):
        load_dataset(photos, strict=True, quiet=True)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"], ids=str)
def test_bad_files_of_a_data_set(photos, content, caplog):
    (photos / "cat" / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png must be readable"):
        load_dataset(photos, quiet=True)
    assert load_dataset(photos, strict=False, quiet=True).counts == (2, 2)
    assert "unreadable (cat/bad.png)" in caplog.text


def test_bad_queries_are_skipped(photos, caplog):
    good, bad = photos / "cat/more/0.png", photos / "bad.png"
    bad.write_bytes(b"no image")
    assert readable([bad, good, photos / "none.png"]) == [good]
    assert "2 of 3 files left out" in caplog.text
    with pytest.raises(ValueError, match=r"must hold an image that can be read, got 1 bad"):
        readable([bad])


@pytest.mark.medium
def test_commands_say_what_they_leave_out(photos, tmp_path, capsys, caplog):
    demo = Backbone.load("demo")
    pool = tmp_path / "pool"
    from lorarecycle.vit.lora import LoRA

    for i in range(3):
        made = LoRA.random(demo, r=1, generator=torch.Generator().manual_seed(i)).to_adapter(name=f"a{i}", like=demo)
        lively = {site: pair._replace(lora_B=pair.lora_B + 0.1 * (i > 0)) for site, pair in made.factors.items()}
        replace(made, factors=lively).save(pool / f"a{i}")
    replace(made, factors=lively).save(pool / "a2" / "checkpoint-9")
    settings = ["--inversion.pictures", "5", "--meta.steps", "0", "--device", "cpu", "--dtype", "float32"]
    command = ["recycle", str(pool), "--output", str(tmp_path / "meta"), "--layout", "vit-classifier", *settings]
    assert main(command) == 0
    shown = capsys.readouterr().err
    assert "1 adapters (a0)" in shown
    assert "a2/checkpoint-9" in shown.replace("\n    ", " ")
    config = json.loads((tmp_path / "meta" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "ViTForImageClassification"
    assert main([*command, "--strict"]) == 2
    assert "`strict` allows nothing to be left out" in capsys.readouterr().err
    (pool / "a1" / "adapter_model.safetensors").write_bytes(b"")
    assert main(command) == 2
    capsys.readouterr()
    assert main([*command, "--skip-bad"]) == 0
    assert "a1" in capsys.readouterr().err
    assert main(["recycle", str(pool), "--layout", "no-such"]) == 2
    assert "`layout` must be one of" in capsys.readouterr().err
    query = [str(photos / "cat/more/0.png"), str(photos / "bad.png")]
    (photos / "bad.png").write_bytes(b"no image")
    predict = ["predict", "--base", "demo", "--support", str(photos), "--query", *query, "--device", "cpu"]
    assert main(predict) == 2
    capsys.readouterr()
    assert main([*predict, "--skip-bad"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == query[:1]
    assert "bad.png" in caplog.text


# --- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["NA in a Series", "NA among objects", "NA in strings", "NaT", "NaN", "nullable integers"]
)
def test_absent_labels_of_pandas(tiny_backbone, tiny_data, kind):
    pandas = pytest.importorskip("pandas")
    labels = {
        "NA in a Series": pandas.Series(["a", pandas.NA, "b"]),
        "NA among objects": pandas.Series(["a", pandas.NA, "b"], dtype=object),
        "NA in strings": pandas.Series(["a", None, "b"], dtype="string"),
        "NaT": pandas.Series([pandas.Timestamp("2020-01-01"), pandas.NaT, pandas.NaT]).astype(object),
        "NaN": pandas.Series(["a", float("nan"), "b"]),
        "nullable integers": pandas.Series([1, None, 2], dtype="Int64"),
    }[kind]
    with pytest.raises(ValueError, match=r"`y\[1\]` must be a label, got (<NA>|NaT|NaN|nan)"):
        FewShotClassifier(tiny_backbone).fit(tiny_data.images[:3], labels)
    with pytest.raises(ValueError, match=r"`y\[1\]` must be a label"):
        FewShotClassifier(tiny_backbone).fit(tiny_data.images[:3], list(labels))


@pytest.mark.parametrize("labels", [{"1.png": "a", "2.png": "b", "3.png": "a"}, {"a", "b", "c"}], ids=["dict", "set"])
def test_what_has_no_order_is_no_labels(tiny_backbone, tiny_data, labels):
    with pytest.raises(
        TypeError, match=r"`y` must be labels in the order of the images, got a (dict|set); pass a list"
    ):
        FewShotClassifier(tiny_backbone).fit(tiny_data.images[:3], labels)


def test_a_bad_parameter_leaves_a_fitted_classifier_whole(tiny_backbone, tiny_data):
    fitted = FewShotClassifier(tiny_backbone).fit(tiny_data.images, tiny_data.labels)
    before = fitted.predict(tiny_data.images)
    for bad in ({"distance": "manhattan"}, {"backbone": "no-such-model"}, {"batch_size": 0}):
        fitted.set_params(**bad)
        assert (fitted.predict(tiny_data.images) == before).all()
        with pytest.raises(ValueError):
            fitted.fit(tiny_data.images, tiny_data.labels)
        assert (fitted.predict(tiny_data.images) == before).all()
        fitted.set_params(distance="euclidean", backbone=tiny_backbone, batch_size=64)


def test_adapters_survive_a_change_of_notes(adapters):
    one = replace(adapters[0], notes=["a note"])
    assert one.notes == ("a note",)
    assert one.digest() == adapters[0].digest()
    assert isinstance(one, Adapter)
