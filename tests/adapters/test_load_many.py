"""Adapters from objects, folders, and one folder that holds many; Hub ids are in `test_hub.py`."""

from pathlib import Path

import pytest

from lorarecycle.adapters.load_many import load_adapters

from .hub_client import adapter


@pytest.fixture
def folders(tmp_path):
    """A folder that holds two adapters, "a" and "b", and one without."""
    for seed, name in enumerate("ba"):
        adapter(seed, name=name).save(tmp_path / "many" / name)
    (tmp_path / "many" / "notes").mkdir()
    return tmp_path / "many"


def names(loaded):
    return [one.name for one in loaded]


def test_one_object(folders):
    one = adapter()
    assert load_adapters(one)[0] is one


@pytest.mark.parametrize("kind", [str, Path])
def test_one_folder(folders, kind):
    assert names(load_adapters(kind(folders / "b"))) == ["b"]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_of_many(folders, kind):
    assert names(load_adapters(kind(folders))) == ["a", "b"]


def test_a_folder_of_many_inside_another(folders):
    assert names(load_adapters(folders.parent, subfolder="many")) == ["a", "b"]


def test_objects_and_folders_in_their_order(folders):
    mixed = iter([folders / "b", adapter(name="mine"), str(folders / "a")])
    assert names(load_adapters(mixed)) == ["b", "mine", "a"]


def test_nothing():
    with pytest.raises(ValueError, match=r"`adapters` must hold at least one adapter, got none"):
        load_adapters([])


def test_a_folder_with_none(folders):
    with pytest.raises(ValueError, match=r"`adapters` must be a folder of PEFT adapters, got .*notes with none in it"):
        load_adapters(folders / "notes")


def test_something_else():
    with pytest.raises(
        TypeError, match=r"`adapters` must hold Adapter objects, PEFT models, folders or Hub ids, got int"
    ):
        load_adapters([1])
