"""Folders of adapters as people have them: all below is found, and what is passed over is counted in one line."""

import json
import logging
import os
import re
import shutil

import pytest
import torch

from lorarecycle.adapters.dead import leave_out_dead
from lorarecycle.adapters.load_many import load_adapters, load_all

from .hub_client import adapter


def put(root, *places):
    """A different adapter at each place, named after its folder."""
    for seed, place in enumerate(places):
        adapter(seed, name=place).save(root / place)
    return root


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("places", "read", "said"),
    [
        (("a", "b"), ("a", "b"), None),
        ((".", "task2", "task3"), (".", "task2", "task3"), None),  # PEFT's save of several adapters
        (("runs/one/deep/down", "b"), ("b", "runs/one/deep/down"), None),
        (("t0/checkpoint-500", "t1/checkpoint-500"), ("t0/checkpoint-500", "t1/checkpoint-500"), None),
        (
            ("t/checkpoint-500", "t/checkpoint-1000", "t/checkpoint-90"),
            ("t/checkpoint-1000",),
            r"2 earlier checkpoints of the same runs \(t/checkpoint-500, t/checkpoint-90\)",
        ),
        (("checkpoint-5", "checkpoint-20"), ("checkpoint-20",), r"1 earlier checkpoints .*\(checkpoint-5\)"),
        (
            ("t", *(f"{t}/checkpoint-{n}" for t in ("t", "u") for n in (90, 500, 1000))),
            ("t", "u/checkpoint-1000"),
            r"5 earlier checkpoints",
        ),
        (("t", "t/checkpoint-500"), ("t",), r"1 earlier checkpoints .*t/checkpoint-500"),
        (("t", "t/checkpoints/epoch-0001", "t/checkpoints/epoch-0002"), ("t",), r"2 earlier checkpoints"),
        (("a", ".a.saving-x"), ("a",), r"1 adapters in hidden folders \(\.a\.saving-x\); rename"),
        (("a", "b/.cache"), ("a",), r"1 adapters in hidden folders \(b/\.cache\)"),
        (("a", ".hidden/deep"), ("a",), None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_a_folder_holds(tmp_path, caplog, places, read, said):
    loaded = load_all(put(tmp_path / "pool", *places))
    assert sorted(one.name for one in loaded.adapters) == sorted(read)
    assert len(loaded.notes) == len(lines(caplog)) == (said is not None)
    if said:
        for text in (loaded.notes[0], lines(caplog)[0]):
            assert re.search(said, text), text
        with pytest.raises(ValueError, match=r"`strict` allows nothing to be left out, got: .*pass strict=None"):
            load_all(tmp_path / "pool", strict=True)
    else:
        assert len(load_all(tmp_path / "pool", strict=True).adapters) == len(read)


def test_weights_that_are_no_adapter_are_counted(tmp_path, caplog):
    put(tmp_path, "a")
    shutil.copy(tmp_path / "a/adapter_model.safetensors", tmp_path / "loose.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "lora.pt").touch()
    (tmp_path / "old" / ".lora.pt").touch()
    assert [one.name for one in load_adapters(tmp_path)] == ["a"]
    assert "2 weights without adapter_config.json (loose.safetensors, old/lora.pt)" in caplog.text


@pytest.mark.parametrize(
    "name", [".a.saving-x", ".partly-written-node7-4711-1.r0.0f3a", ".Trash-1000", ".ipynb_checkpoints", ".a.Xy12z"]
)
def test_a_hidden_leftover_does_not_move_the_result(tmp_path, name):
    before = [one.digest() for one in load_adapters(put(tmp_path, "a", "b"))]
    adapter(9).save(tmp_path / name)
    assert [one.digest() for one in load_adapters(tmp_path)] == before


def test_archives_are_counted(tmp_path, caplog):
    put(tmp_path, "a")
    for name in ("b.zip", "old/c.tar.gz", ".d.zip", "train.log.gz", "tarry.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [one.name for one in load_adapters(tmp_path)] == ["a"]
    assert "2 archives (b.zip, old/c.tar.gz); unpack them to read the adapters in them" in caplog.text


def test_a_result_among_the_adapters_is_named(tmp_path, caplog):
    """As of a second `recycle POOL --output POOL/meta`."""
    put(tmp_path, "a", "b")
    adapter(5, name="meta").save(tmp_path / "meta", sources=load_adapters(tmp_path))
    assert not caplog.records
    note = "made of other adapters, and counted as one more: meta; keep results in another folder"
    assert load_all(tmp_path, strict=True).notes == (note,)
    assert len(load_all(tmp_path, stored=True).adapters) == 3
    assert f"3 adapters read; {note}." in caplog.text
    assert load_all(tmp_path / "meta").notes == ()


def test_links_are_followed_once(tmp_path):
    put(tmp_path / "pool", "a")
    os.symlink(tmp_path / "pool", tmp_path / "pool" / "a" / "again")
    put(tmp_path / "elsewhere", "b")
    os.symlink(tmp_path / "elsewhere" / "b", tmp_path / "pool" / "b")
    assert [one.name for one in load_adapters(tmp_path / "pool")] == ["a", "b"]


def test_one_of_several_says_that_there_are_more(tmp_path, caplog):
    from lorarecycle import Adapter

    put(tmp_path / "m", ".", "task2", "task3", "checkpoint-5")
    one = Adapter.load(tmp_path / "m")
    assert one.notes == (
        "not read: 2 more adapters in sub-folders (task2, task3); `subfolder=` reads one, `recycle` and "
        "`load_adapters` read all",
    )
    assert Adapter.from_pretrained(tmp_path / "m", subfolder="task2").name == "task2"  # the advice
    assert len(load_adapters(tmp_path / "m")) == 3


@pytest.mark.parametrize("damage", ["cut", "no plain LoRA", "no weights"])
def test_a_bad_adapter(tmp_path, caplog, damage):
    pool = put(tmp_path, "a", "b")
    weights, config = pool / "b/adapter_model.safetensors", pool / "b/adapter_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:50])
    elif damage == "no weights":
        weights.unlink()
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    for strict in (None, True):
        with pytest.raises((ValueError, FileNotFoundError)):
            load_all(pool, strict=strict)
    loaded = load_all(pool, strict=False)
    assert [one.name for one in loaded.adapters] == ["a"]
    assert "left out, as it cannot be read" in loaded.notes[0]
    assert str(pool / "b") in caplog.text


def test_only_bad_adapters(tmp_path):
    put(tmp_path, "a")
    (tmp_path / "a/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must hold at least one that can be read, got 1 bad: .*whole safetensors"):
        load_all(tmp_path, strict=False)


def test_a_folder_without_adapters_names_what_is_there(tmp_path):
    (tmp_path / "lora.pt").touch()
    with pytest.raises(ValueError, match=r"none in it or below; not read: 1 weights without adapter_config.json"):
        load_adapters(tmp_path)


def test_dead_adapters_are_named(tmp_path):
    alive, other = adapter(0, name="alive"), adapter(1, name="other")
    zero = {site: pair._replace(lora_B=torch.zeros_like(pair.lora_B)) for site, pair in alive.factors.items()}
    none = {site: pair._replace(scaling=0.0) for site, pair in alive.factors.items()}
    flat = {site: pair._replace(lora_A=torch.zeros_like(pair.lora_A)) for site, pair in alive.factors.items()}
    dead = [type(alive)(factors, name=name) for name, factors in (("B", zero), ("scaling", none), ("A", flat))]
    kept, notes = leave_out_dead([dead[0], alive, dead[1], other, dead[2]])
    assert kept == [alive, other]
    assert notes == ["left out, as their update is zero: 3 adapters (A, B, scaling)"]
    with pytest.raises(ValueError, match=r"must change the model, got updates of zero in all: A, B, scaling"):
        leave_out_dead(dead)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    adapter(0, name="a").save("~/pool/a")
    assert (tmp_path / "pool/a").is_dir()
    assert [one.name for one in load_adapters("~/pool")] == ["a"]
    assert [one.name for one in load_adapters(["~/pool/a"])] == ["a"]
