"""The pipeline: adapters in any form, work_dir, resuming after kill -9, and every kind of bad input."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorarecycle import Adapter, Backbone, FewShotClassifier, RecycleConfig, Surrogate, recycle
from lorarecycle.adapters.adapter import LoRAFactors
from lorarecycle.pipeline import load_adapters
from lorarecycle.runtime import files

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
    assert sorted(p.name for p in work.iterdir()) == ["losses.csv", "meta_lora", "run.json", "surrogates"]
    assert len(list((work / "surrogates").iterdir())) == 3
    assert Adapter.load(work / "meta_lora").digest() == first.digest()
    card = (work / "meta_lora" / "README.md").read_text()
    for adapter in adapters:
        assert adapter.digest() in card
    monkeypatch.setattr("lorarecycle.pipeline.invert_together", lambda *a, **k: pytest.fail("inverted again"))
    assert recycle(adapters, base=tiny_backbone, work_dir=work, **FAST).digest() == first.digest()


def test_adapters_that_share_batches(tiny_backbone, adapters, tmp_path, monkeypatch):
    """A surrogate that is missing is made anew beside those it shared batches with, and ends with the same bits."""
    from lorarecycle import pipeline as recycling

    groups, original = [], recycling.invert_together

    def spy(backbone, group, *args, **kwargs):
        groups.append([adapter.name for adapter in group])
        return original(backbone, group, *args, **kwargs)

    monkeypatch.setattr(recycling, "invert_together", spy)
    settings = {**FAST, "inversion": {**FAST["inversion"], "adapters_per_batch": 2}, "base": tiny_backbone}
    work = tmp_path / "work"
    first = recycle(adapters, work_dir=work, **settings)
    assert groups == [["adapter-0", "adapter-1"], ["adapter-2"]]
    second = sorted((work / "surrogates").iterdir())[1]
    images = Surrogate.load(second).images
    second.unlink()
    shutil.rmtree(work / "meta_lora")
    groups.clear()
    assert recycle(adapters, work_dir=work, **settings).digest() == first.digest()
    assert groups == [["adapter-0", "adapter-1"]]
    assert torch.equal(Surrogate.load(second).images, images)


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
    (work / "surrogates" / f"{files.LEFTOVER}x").write_text("half a surrogate")
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


def nan_adapter(folder: Path, adapter: Adapter) -> Path:
    """A PEFT folder with a NaN in it."""
    adapter.save(folder)
    tensors, _ = files.load_tensors(folder / "adapter_model.safetensors")
    next(v for k, v in tensors.items() if "lora_B" in k)[0, 0] = float("nan")
    files.save_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


def test_bad_adapters(tiny_backbone, adapters, build_vit, make_adapter, tmp_path):
    def fails(pool, message, base=tiny_backbone, kind=ValueError, **options):
        with pytest.raises(kind, match=message):
            recycle(pool, base=base, work_dir=tmp_path / "never", **{**FAST, **options})
        assert not (tmp_path / "never").exists(), "no work before the checks"

    fails([], "`adapters` must hold at least one adapter, got none")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "must be a folder of PEFT adapters, got .*empty with none in it")
    fails(tmp_path / "nowhere", "nowhere", kind=FileNotFoundError)
    wide = make_adapter(Backbone(build_vit(embed_dim=48), name="tiny"), seed=9)
    fails([*adapters, wide], "must fit backbone 'tiny': at blocks.0.attn.q it is for a weight")
    deep = make_adapter(Backbone(build_vit(depth=4), name="tiny"), seed=9)
    fails([*adapters, deep], "no site 'blocks.3.attn.q' among 3 blocks")
    random = {**FAST["meta"], "init": "random"}
    fails([adapters[0].with_head(None), adapters[1]], "must have a classification head", meta=random)
    fails([a.with_head(None) for a in adapters], "must have a classification head")
    fails([adapters[0], replace(adapters[1], base_model="other")], "must be tuned on one base, got 2: 'other'")
    nameless = [replace(a, base_model="") for a in adapters]
    fails(nameless, "`base` must be given", base=None)
    fails(
        [adapters[0], replace(adapters[1], mean=(0.1, 0.2, 0.3))],
        "must be tuned under the input normalisation",
    )
    fails(adapters, "`n_way` must be at most the classes of every adapter", meta={**FAST["meta"], "n_way": 4})
    fails(adapters, "`images_per_class` must be at least", meta={**FAST["meta"], "n_query": 15})
    fails(adapters, r"`layers` must be some of 0 to 2, got \(3,\)", meta={**FAST["meta"], "layers": (3,)})
    fails(adapters, "`layers` must name at least one block", meta={**FAST["meta"], "layers": ()})
    fails(adapters, "`guide_size` must be a multiple of the patch 8, got 30", meta={**FAST["meta"], "guide_size": 30})
    fails(adapters, "no token would be left", inversion={"prune": {0: 1.0}})
    fails(adapters, "`inversion` must name settings of InversionConfig", kind=TypeError, inversion={"step": 1})
    fails(adapters, "`prior` must be a timm model", inversion={"prior": "nonsense", "steps": 1})
    fails([nan_adapter(tmp_path / "nan", adapters[0]), adapters[1]], "must be finite, got 1 NaN")
    truncated = adapters[0].save(tmp_path / "truncated") / "adapter_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-9])
    fails([truncated.parent, adapters[1]], "must be a whole safetensors file")
    pickled = adapters[0].save(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    (pickled / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    fails([pickled, adapters[1]], "safetensors", kind=(ValueError, FileNotFoundError))


def test_nan_and_zero_sized_factors_are_refused_in_memory():
    bad = LoRAFactors(torch.full((1, 4), float("inf")), torch.ones(4, 1), 1.0)
    with pytest.raises(ValueError, match="must be finite, got 4 NaN or infinite values"):
        Adapter({"blocks.0.attn.q": bad})
    with pytest.raises(ValueError, match="must hold at least one site"):
        Adapter({})
    with pytest.raises(ValueError, match=re.escape("must be keyed by sites such as 'blocks.3.attn.q'")):
        Adapter({"blocks.0.attn.w": LoRAFactors(torch.ones(1, 4), torch.ones(4, 1), 1.0)})


def test_a_config_object_and_its_parts(tiny_backbone, adapters):
    config = RecycleConfig(seed=3)
    by_parts = recycle(adapters, base=tiny_backbone, config=config, **FAST)
    assert by_parts.digest() == recycle(adapters, base=tiny_backbone, seed=3, **FAST).digest()
    assert by_parts.digest() != recycle(adapters, base=tiny_backbone, **FAST).digest()


def test_an_adapter_without_a_head_takes_part_in_the_warm_start(
    tiny_backbone, adapters, make_adapter, tmp_path, caplog
):
    fast = {**FAST, "meta": {**FAST["meta"], "init": "adapters"}}
    headless = make_adapter(tiny_backbone, seed=9, head=False, name="bare")
    without = recycle(adapters, base=tiny_backbone, **fast)
    with_it = recycle([*adapters, headless], base=tiny_backbone, work_dir=tmp_path / "work", **fast)
    assert with_it.digest() != without.digest()
    assert "no head in bare: used for the warm start, not inverted" in caplog.text
    assert len(list((tmp_path / "work" / "surrogates").iterdir())) == 3
    assert headless.digest() in (tmp_path / "work" / "meta_lora" / "README.md").read_text()
    with pytest.raises(ValueError, match="'bare' must have a classification head"):
        recycle([*adapters, headless], base=tiny_backbone, **{**FAST, "meta": {**FAST["meta"], "init": "random"}})


def test_a_prior_given_as_a_module(tiny_backbone, adapters, caplog):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    torch.nn.init.normal_(network[0].weight, generator=torch.Generator().manual_seed(0))
    with_prior = recycle(adapters, base=tiny_backbone, prior=network, **FAST)
    assert "no effect" not in caplog.text
    recycle(adapters, base=tiny_backbone, prior=network, **FAST | {"inversion": {**FAST["inversion"], "steps": 0}})
    assert "`prior` has no effect without steps of inversion" in caplog.text
    assert with_prior.digest() != recycle(adapters, base=tiny_backbone, **FAST).digest()
