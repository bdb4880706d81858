"""The pipeline: adapters in any form, work_dir, resuming after kill -9, and every kind of bad input."""

import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorarecycle import (
    Adapter,
    Backbone,
    BatchNormPrior,
    FewShotClassifier,
    RecycleConfig,
    Surrogate,
    recycle,
    warm_start,
)
from lorarecycle.adapters.adapter import LoRAFactors
from lorarecycle.adapters.load_many import load_adapters
from lorarecycle.data.images import normalize
from lorarecycle.runtime import files, owner
from lorarecycle.work_dir import canonical_order

FAST = {
    "inversion": {"prior": None, "images_per_class": 4, "steps": 4, "prune": {1: 0.5}},
    "meta": {"steps": 6, "n_way": 3, "n_query": 3},
    "quiet": True,
}


@pytest.fixture
def adapters(tiny_backbone, make_adapter):
    return [make_adapter(tiny_backbone, seed=i, r=1 + i) for i in range(3)]


def test_one_meta_lora_comes_out(tiny_backbone, adapters, tiny_data):
    meta_lora = recycle(adapters, base=tiny_backbone, name="mine", **FAST)
    assert meta_lora.head is None
    assert meta_lora.name == "mine"
    assert set(meta_lora.ranks.values()) == {16}
    assert meta_lora.base_model == "tiny"
    classifier = FewShotClassifier(tiny_backbone, meta_lora).fit(tiny_data.images[::12], list("abcd"))
    assert set(classifier.predict(tiny_data.images)) <= set("abcd")


def test_adapters_in_every_form(tiny_backbone, adapters, tmp_path):
    for i, adapter in enumerate(adapters):
        adapter.save(tmp_path / "many" / f"adapter-{i}")
    (tmp_path / "many" / "notes.txt").write_text("not an adapter")
    mixed = [adapters[0], tmp_path / "many" / "adapter-1", str(tmp_path / "many" / "adapter-2")]
    for pool in (tmp_path / "many", str(tmp_path / "many"), mixed, (a for a in mixed)):
        for found, given in zip(load_adapters(pool), adapters, strict=True):
            assert found.ranks == given.ranks
            for site in given.sites:
                torch.testing.assert_close(found.delta(site), given.delta(site))
    assert load_adapters(tmp_path / "many" / "adapter-0")[0].name == adapters[0].name
    assert recycle(tmp_path / "many", base=tiny_backbone, **FAST).head is None


def test_a_finished_work_dir_is_read_again(tiny_backbone, adapters, tmp_path, monkeypatch):
    work = tmp_path / "work"
    first = recycle(adapters, base=tiny_backbone, work_dir=work, **FAST)
    assert sorted(p.name for p in work.iterdir()) == [
        "losses.csv",
        "meta_checkpoint.safetensors",
        "meta_lora",
        "run.json",
        "summary.json",
        "surrogates",
    ]
    summary = files.read_json(work / "summary.json")
    assert [row["name"] for row in summary["adapters"]] == [a.name for a in canonical_order(adapters)]
    assert not summary["resumed"]
    assert {"warm start", "images", "meta-training"} <= set(summary["took"])
    assert len(list((work / "surrogates").iterdir())) == 3
    assert Adapter.load(work / "meta_lora").digest() == first.digest()
    card = (work / "meta_lora" / "README.md").read_text()
    for adapter in adapters:
        assert adapter.digest() in card
    assert [Surrogate.load(p).adapter for p in sorted((work / "surrogates").iterdir())] == [
        a.name for a in canonical_order(adapters)
    ]
    monkeypatch.setattr("lorarecycle.image_stage.Inverter", lambda *a, **k: pytest.fail("inverted again"))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("trained again"))
    assert recycle(adapters, base=tiny_backbone, work_dir=work, **FAST).digest() == first.digest()
    assert files.read_json(work / "summary.json") == summary, "the seconds of the work, not of reading it again"


def test_images_of_another_adapter_are_refused(tiny_backbone, adapters, tmp_path):
    work = tmp_path / "work"
    first = recycle(adapters, base=tiny_backbone, work_dir=work, **FAST)
    shutil.rmtree(work / "meta_lora")
    one, other, _ = sorted((work / "surrogates").iterdir())
    shutil.copy(other, one)
    with pytest.raises(ValueError, match=rf"{one.name} must hold images made of adapter .*; remove the file"):
        recycle(adapters, base=tiny_backbone, work_dir=work, **FAST)
    one.unlink()
    assert recycle(adapters, base=tiny_backbone, work_dir=work, **FAST).digest() == first.digest()


def test_pictures_of_other_settings_are_refused(tiny_backbone, adapters, tmp_path):
    few, meta = {"pictures": 5}, {"steps": 1}
    for name, inversion in (("a", few), ("b", {**few, "latent_size": 16})):
        recycle(adapters, base=tiny_backbone, work_dir=tmp_path / name, inversion=inversion, meta=meta, quiet=True)
    there, other = (tmp_path / name / "surrogates" / "pictures.safetensors" for name in "ab")
    shutil.copy(other, there)
    again = {"base": tiny_backbone, "work_dir": tmp_path / "a", "inversion": few, "meta": meta, "quiet": True}
    message = r"pictures.safetensors must hold painted pictures by the settings of this run, .*latent_size \(16 there"
    with pytest.raises(ValueError, match=message):
        recycle(adapters, **again)
    there.unlink()
    recycle(adapters, **again)


@pytest.mark.slow
def test_kill_9_at_any_moment_ends_with_the_same_bits(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from timm.models.vision_transformer import VisionTransformer
            from lorarecycle import Adapter, Backbone, Head, recycle
            from lorarecycle.vit.lora import LoRA

            torch.set_num_threads(1)
            torch.manual_seed(0)
            vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
            backbone = Backbone(vit, name="tiny")
            adapters = []
            for i in range(3):
                g = torch.Generator().manual_seed(i)
                lora = LoRA.random(backbone, generator=g)
                for p in lora.lora_B.values():
                    p.data = torch.randn(p.shape, generator=g) * 0.3
                head = Head(torch.randn(3, 32, generator=g))
                adapters.append(lora.to_adapter(name=f"a{i}", like=backbone, head=head))
            print("ready", flush=True)
            meta_lora = recycle(
                adapters, base=backbone, work_dir=sys.argv[1], quiet=True,
                inversion={"prior": None, "images_per_class": 4, "steps": 40},
                meta={"steps": 230, "n_way": 3, "n_query": 3},
            )
            print(meta_lora.digest(), flush=True)
            """
        )
    )

    def start(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    whole = start(tmp_path / "whole").communicate()[0]
    work = tmp_path / "killed"

    def first_surrogate() -> bool:
        return any((work / "surrogates").glob("0*.safetensors"))

    for reached in (first_surrogate, (work / "meta_checkpoint.safetensors").exists):
        process = start(work)
        deadline = time.monotonic() + 100
        while not reached() and process.poll() is None:
            assert time.monotonic() < deadline, "the run never got there"
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (work / "meta_lora").exists(), "killed before the end"
    leftover = f"{files.LEFTOVER}{socket.gethostname()}-{process.pid}-{owner.machine()}.x"
    (work / "surrogates" / leftover).write_text("half a surrogate")
    assert start(work).communicate()[0] == whole
    assert not list(work.rglob(f"{files.LEFTOVER}*"))


def test_another_run_is_refused_and_nothing_overwritten(tiny_backbone, adapters, tmp_path):
    work = tmp_path / "work"
    recycle(adapters, base=tiny_backbone, work_dir=work, **FAST)
    before = {p: p.read_bytes() for p in work.rglob("*") if p.is_file()}
    for change in ({"seed": 1}, {"meta": {**FAST["meta"], "steps": 7}}):
        with pytest.raises(ValueError, match="must be of this run, got one that differs in config"):
            recycle(adapters, base=tiny_backbone, work_dir=work, **{**FAST, **change})
    with pytest.raises(ValueError, match="differs in adapters"):
        recycle(adapters[:2], base=tiny_backbone, work_dir=work, **FAST)
    other = tiny_backbone.clone()
    other.vit.cls_token.data = other.vit.cls_token + 1
    with pytest.raises(ValueError, match="differs in base"):
        recycle(adapters, base=other, work_dir=work, **FAST)
    assert before == {p: p.read_bytes() for p in work.rglob("*") if p.is_file()}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="must be new, empty or of this run"):
        recycle(adapters, base=tiny_backbone, work_dir=foreign, **FAST)


@pytest.mark.medium
def test_disk_full_leaves_the_earlier_files_whole(tiny_backbone, adapters, tmp_path, monkeypatch):
    work, original, written = tmp_path / "work", files.save_tensors, []

    def full_at_the_second(path, *args):
        if written:
            raise OSError(28, f"cannot write {path}: No space left on device")
        written.append(path)
        return original(path, *args)

    monkeypatch.setattr("lorarecycle.inversion.surrogate.save_tensors", full_at_the_second)
    with pytest.raises(OSError, match="No space left on device"):
        recycle(adapters, base=tiny_backbone, work_dir=work, **FAST)
    monkeypatch.undo()
    resumed = recycle(adapters, base=tiny_backbone, work_dir=work, **FAST)
    assert resumed.digest() == recycle(adapters, base=tiny_backbone, **FAST).digest()


LABELS = {**FAST["meta"], "guide_weight": 0.0}
"""Settings that look at labels."""


@pytest.fixture
def refused(tiny_backbone, tmp_path):
    """Makes sure that a run is refused before it leaves anything."""

    def check(adapters, message, kind=ValueError, base=tiny_backbone, **options):
        with pytest.raises(kind, match=message):
            recycle(adapters, base=base, work_dir=tmp_path / "never", **{**FAST, **options})
        assert not (tmp_path / "never").exists(), "no work before the checks"

    return check


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"meta": {**LABELS, "n_way": 4}}, "`n_way` must be at most the classes of every adapter"),
        ({"meta": {**LABELS, "n_query": 15}}, "`images_per_class` must be at least"),
        ({"meta": {**FAST["meta"], "layers": (3,)}}, r"`layers` must be some of 0 to 2, got \(3,\)"),
        ({"meta": {**FAST["meta"], "layers": ()}}, "`layers` must name at least one block"),
        ({"meta": {**FAST["meta"], "guide_size": 30}}, "`guide_size` must be a multiple of the patch 8, got 30"),
        ({"inversion": {"prune": {0: 1.0}}}, "no token would be left"),
        ({"inversion": {"prune": {3: 0.5}}}, "`prune` must name layers 0 to 2, got 3"),
        ({"inversion": {"image_size": 30}}, "`image_size` must be a positive multiple of the patch size 8"),
        ({"inversion": {"prior": "nonsense", "steps": 1}}, "`prior` must be a timm model"),
        ({"preset": "fast"}, "`preset` must be one of"),
        ({"seed": -1}, "`seed` must be in"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_bad_settings(refused, adapters, settings, message):
    refused(adapters, message, **settings)


def test_unknown_settings(refused, adapters):
    refused(adapters, "`inversion` must name settings of InversionConfig", TypeError, inversion={"step": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 48}, "must fit backbone 'tiny': at blocks.0.attn.q it is for a weight"),
        ({"depth": 4}, "no site 'blocks.3.attn.q' among 3 blocks"),
    ],
    ids=["wide", "deep"],
)
def test_an_adapter_of_another_model(refused, adapters, make_adapter, build_vit, options, message):
    refused([*adapters, make_adapter(Backbone(build_vit(**options), name="tiny"), seed=9)], message)


def test_no_adapters(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused([], "`adapters` must hold at least one adapter, got none")
    refused(tmp_path / "empty", "must be a folder of PEFT adapters, got .*empty with none in it")
    refused(tmp_path / "nowhere", "nowhere", FileNotFoundError)


def test_no_head_where_heads_count(refused, adapters):
    random = {**FAST["meta"], "init": "random"}
    refused([adapters[0].with_head(None), adapters[1]], "got none in adapter-0; .*preset='weights'", meta=random)
    refused([a.with_head(None) for a in adapters], "must have a classification head")


def test_bases_that_differ(refused, adapters, tiny_backbone, caplog):
    mixed = [adapters[0], replace(adapters[1], base_model="other")]
    refused(mixed, "must be tuned on one base, got 2: 'other'", base=None)
    refused([replace(a, base_model="") for a in adapters], "`base` must be given", base=None)
    recycle(mixed, base=tiny_backbone, **FAST)
    assert "counts, though files of adapters say otherwise: another base, 'other' (adapter-1)" in caplog.text


def test_another_normalisation(refused, adapters):
    refused([adapters[0], replace(adapters[1], mean=(0.1, 0.2, 0.3))], "tuned under the input normalisation")


def nan_folder(folder: Path, adapter: Adapter) -> None:
    tensors, _ = files.load_tensors(adapter.save(folder) / "adapter_model.safetensors")
    next(v for k, v in tensors.items() if "lora_B" in k)[0, 0] = float("nan")
    files.save_tensors(folder / "adapter_model.safetensors", tensors)


def truncated_folder(folder: Path, adapter: Adapter) -> None:
    path = adapter.save(folder) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def pickled_folder(folder: Path, adapter: Adapter) -> None:
    (adapter.save(folder) / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_folder, "must be finite, got 1 NaN"),
        (truncated_folder, "must be a whole safetensors file"),
        (pickled_folder, "safetensors"),
    ],
)
def test_damaged_adapters(refused, adapters, tmp_path, spoil, message):
    spoil(tmp_path / "damaged", adapters[0])
    refused([tmp_path / "damaged", adapters[1]], message, (ValueError, FileNotFoundError))


def test_nan_and_zero_sized_factors_are_refused_in_memory():
    bad = LoRAFactors(torch.full((1, 4), float("inf")), torch.ones(4, 1), 1.0)
    with pytest.raises(ValueError, match="must be finite, got 4 NaN or infinite values"):
        Adapter({"blocks.0.attn.q": bad})
    with pytest.raises(ValueError, match="must hold at least one site"):
        Adapter({})
    with pytest.raises(ValueError, match=re.escape("must be keyed by sites such as 'blocks.3.attn.q'")):
        Adapter({"blocks.0.attn.w": LoRAFactors(torch.ones(1, 4), torch.ones(4, 1), 1.0)})


@pytest.mark.medium
def test_a_config_object_and_its_parts(tiny_backbone, adapters):
    config = RecycleConfig(seed=3)
    by_parts = recycle(adapters, base=tiny_backbone, config=config, **FAST)
    assert by_parts.digest() == recycle(adapters, base=tiny_backbone, seed=3, **FAST).digest()
    assert by_parts.digest() != recycle(adapters, base=tiny_backbone, **FAST).digest()


@pytest.mark.medium
def test_an_adapter_without_a_head_takes_part_in_the_warm_start(
    tiny_backbone, adapters, make_adapter, tmp_path, caplog
):
    fast = {**FAST, "meta": {**FAST["meta"], "init": "adapters"}}
    headless = make_adapter(tiny_backbone, seed=9, head=False, name="bare")
    without = recycle(adapters, base=tiny_backbone, **fast)
    with_it = recycle([*adapters, headless], base=tiny_backbone, work_dir=tmp_path / "work", **fast)
    assert with_it.digest() != without.digest()
    assert "without a head, so without images of their own: bare" in caplog.text
    assert len(list((tmp_path / "work" / "surrogates").iterdir())) == 3
    assert headless.digest() in (tmp_path / "work" / "meta_lora" / "README.md").read_text()
    with pytest.raises(ValueError, match="must have a classification head .* got none in bare"):
        recycle([*adapters, headless], base=tiny_backbone, **{**FAST, "meta": {**FAST["meta"], "init": "random"}})


@pytest.mark.medium
def test_a_run_goes_on_with_its_own_prior(tiny_backbone, adapters, tmp_path, monkeypatch):
    """Other weights under the prior's name are refused while images are missing, and not asked for afterwards."""
    settings = {
        **FAST,
        "inversion": {**FAST["inversion"], "prior": "somewhere.safetensors"},
        "work_dir": tmp_path / "run",
    }
    for seed in range(2):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        monkeypatch.setattr("lorarecycle.job.load_prior", lambda *a, n=network: BatchNormPrior(n))
        if seed == 0:
            first = recycle(adapters, base=tiny_backbone, **settings)
            monkeypatch.setattr("lorarecycle.job.load_prior", lambda *a: pytest.fail("all images are there"))
            assert recycle(adapters, base=tiny_backbone, **settings).digest() == first.digest()
            next((tmp_path / "run" / "surrogates").iterdir()).unlink()
    with pytest.raises(ValueError, match="must be of this run, got one that differs in prior"):
        recycle(adapters, base=tiny_backbone, **settings)


@pytest.mark.medium
def test_a_prior_given_as_a_module(tiny_backbone, adapters, caplog):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    torch.nn.init.normal_(network[0].weight, generator=torch.Generator().manual_seed(0))
    with_prior = recycle(adapters, base=tiny_backbone, prior=network, **FAST)
    assert "no effect" not in caplog.text
    recycle(adapters, base=tiny_backbone, prior=network, **FAST | {"inversion": {**FAST["inversion"], "steps": 0}})
    assert "`prior` has no effect: no image is optimised" in caplog.text
    assert with_prior.digest() != recycle(adapters, base=tiny_backbone, **FAST).digest()


@pytest.mark.medium
def test_names_and_order_change_nothing(tiny_backbone, adapters, tmp_path):
    """Neither the order of adapters nor names of adapters, classes and files enter the random streams."""
    settings = {**FAST, "meta": {**FAST["meta"], "guide_weight": 0.5}}
    renamed = [
        replace(a, name=f"z{9 - i}", head=replace(a.head, class_names=tuple(f"{i}{c}" for c in "xyz")))
        for i, a in enumerate(adapters)
    ]
    for i, adapter in enumerate(renamed[::-1]):
        adapter.save(tmp_path / f"folder-{i}")
    first = recycle(adapters, base=tiny_backbone, **settings)
    second = recycle(tmp_path, base=tiny_backbone, **settings)
    other = recycle(adapters, base=tiny_backbone, seed=1, **settings)
    for site in first.sites:
        torch.testing.assert_close(first.delta(site), second.delta(site), rtol=0, atol=2e-4)
    assert max((first.delta(site) - other.delta(site)).abs().max() for site in first.sites) > 5e-3, "another seed"


@pytest.mark.medium
def test_a_run_of_renamed_adapters_goes_on(tiny_backbone, adapters, tmp_path, monkeypatch):
    first = recycle(adapters, base=tiny_backbone, work_dir=tmp_path, **FAST)
    monkeypatch.setattr("lorarecycle.image_stage.Inverter", lambda *a, **k: pytest.fail("inverted again"))
    renamed = [replace(a, name=f"other-{a.name}") for a in adapters[::-1]]
    assert recycle(renamed, base=tiny_backbone, work_dir=tmp_path, **FAST).digest() == first.digest()


def test_adapters_that_change_nothing_are_left_out(tiny_backbone, adapters, caplog):
    zero = {s: LoRAFactors(f.lora_A, torch.zeros_like(f.lora_B), f.scaling) for s, f in adapters[0].factors.items()}
    dead = replace(adapters[0], factors=zero, name="dead")
    found = recycle([*adapters, dead], base=tiny_backbone, **FAST)
    assert "left out, as their update is zero: 1 adapters (dead)" in caplog.text
    assert found.digest() == recycle(adapters, base=tiny_backbone, **FAST).digest()
    with pytest.raises(ValueError, match="`adapters` must change the model, got updates of zero in all: dead"):
        recycle([dead], base=tiny_backbone, **FAST)


PICTURES = {"inversion": {"pictures": 12}, "meta": {"steps": 3}, "quiet": True}


def test_pictures_need_no_heads_and_serve_any_number_of_adapters(tiny_backbone, adapters, tmp_path, monkeypatch):
    """One adapter, adapters without heads, with few classes: nothing that the work does not need is asked for."""
    monkeypatch.setattr(
        "lorarecycle.image_stage.Inverter", lambda *a, **k: pytest.fail("nothing depends on an adapter")
    )
    one = recycle(adapters[0].with_head(None), base=tiny_backbone, work_dir=tmp_path / "one", **PICTURES)
    many = recycle([a.with_head(None) for a in adapters], base=tiny_backbone, work_dir=tmp_path / "many", **PICTURES)
    assert one.digest() != many.digest()
    pictures = [tmp_path / name / "surrogates" / "pictures.safetensors" for name in ("one", "many")]
    one_set, other_set = (Surrogate.load(path).images for path in pictures)
    assert torch.equal(one_set, other_set)
    assert len(one_set) == 12
    monkeypatch.setattr("lorarecycle.image_stage.painted_surrogate", lambda *a, **k: pytest.fail("painted again"))
    again = recycle([a.with_head(None) for a in adapters], base=tiny_backbone, work_dir=tmp_path / "many", **PICTURES)
    assert again.digest() == many.digest()


@pytest.mark.parametrize("masks", [{"meta": {"steps": 3, "sparsity": 0.5}}, {"inversion": {"prune": {1: 0.5}}}])
def test_pictures_are_masked_by_the_warm_start(tiny_backbone, adapters, tmp_path, masks):
    settings = {**PICTURES, **masks}
    settings["inversion"] = {**PICTURES["inversion"], **masks.get("inversion", {})}
    recycle(adapters, base=tiny_backbone, work_dir=tmp_path, dtype="float32", **settings)
    found = Surrogate.load(tmp_path / "surrogates" / "pictures.safetensors")
    masked = found.masked(0.5) if found.kept is None else found
    guide = tiny_backbone.merge(warm_start(adapters, base=tiny_backbone))
    x = normalize(found.images, guide.mean, guide.std)
    if found.scores is not None:
        torch.testing.assert_close(found.scores, guide.encode(x, scores=True).scores, rtol=1e-3, atol=1e-5)
    else:
        assert torch.equal(found.kept, guide.encode(x, prune={1: 0.5}).kept)
    assert masked.kept.shape == (12, 8)


def test_the_warm_start_alone_needs_no_images(tiny_backbone, adapters, tmp_path):
    found = recycle(adapters, base=tiny_backbone, work_dir=tmp_path, meta={"steps": 0}, quiet=True)
    assert not list((tmp_path / "surrogates").iterdir())
    direct = warm_start(adapters, base=tiny_backbone)
    for site in found.sites:
        torch.testing.assert_close(found.delta(site), direct.delta(site), rtol=1e-4, atol=1e-6)
