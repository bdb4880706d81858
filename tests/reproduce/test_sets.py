"""Sets of experiments: whole ones are parted by lists of classes, and no class or image is in two parts."""

import pytest
import torch

from lorarecycle.data.lazy import Dataset, LazyImages
from lorarecycle.reproduce.sets import Sets, check_apart


def test_whole_sets_are_parted_by_the_lists_of_classes(tmp_path, make_data):
    """A folder with all classes, as they are published, in the split of the literature."""
    from PIL import Image

    plants = ("Potato___healthy", "Apple___healthy")
    named = ("chequered", "braided", "banded", "gauzy", "(x)", "-")  # two of them without a letter to compare
    for folder, classes in (("dtd", named), ("crop_diseases", plants)):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / folder / name / "a.png")
    sets = Sets(tmp_path)
    assert sets.open("dtd", "train").class_names == ("chequered", "braided")
    assert sets.open("dtd", "test").class_names == ("banded",)
    assert sets.open("dtd", "val").class_names == ("gauzy",)
    with pytest.raises(ValueError, match="'crop-diseases', all of whose classes are for tests"):
        sets.open("crop-diseases", "train")


def test_plants_are_parted_by_our_list(tmp_path, caplog):
    """A copy of PlantVillage that has a part of its own and spells classes its own way."""
    from PIL import Image

    names = ("Tomato___YellowLeaf__Curl_Virus", "Pepper_bell___healthy", "Corn___Common_rust", "Tomato___mosaic_virus")
    for name in names:
        (tmp_path / "crop_diseases" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "crop_diseases" / name / "a.png")
    sets = Sets(tmp_path)
    assert set(sets.open("crop-diseases-by-plant", "train").class_names) == {names[1], names[2]}
    assert set(sets.open("crop-diseases-by-plant", "test").class_names) == {names[0], names[3]}
    assert "2 of 25 train classes are there, without Apple___Apple_scab" in caplog.text


def test_numbered_classes_may_share_names_but_no_images(make_data):
    def numbered(seed):
        data = make_data(n_classes=3, seed=seed)
        return Dataset(LazyImages(data.images.__getitem__, torch.arange(len(data))), data.labels, ("0", "1", "2"))

    check_apart(numbered(0), numbered(1), "numbers")
    with pytest.raises(ValueError, match=r"got \d+ images of the classes 0, 1, 2 both in the part that adapters"):
        check_apart(numbered(0), numbered(0), "numbers")
