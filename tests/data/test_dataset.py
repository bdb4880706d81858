"""Labelled images from folders, npz files and named sets; what is missing or broken is named."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lorarecycle.data.dataset import LabelledImages, load_dataset
from lorarecycle.data.splits import class_split

CIFAR_FS = class_split("cifar_fs")


def test_select_classes_renumbers_in_the_order_given(tiny_data: LabelledImages) -> None:
    chosen = tiny_data.select_classes(["kind 3", "kind 1"])
    assert chosen.class_names == ("kind 3", "kind 1")
    assert chosen.counts == (12, 12)
    assert torch.equal(chosen.images[chosen.labels == 0], tiny_data.images[tiny_data.labels == 3])
    by_index = tiny_data.select_classes([3, 1])
    assert torch.equal(by_index.images, chosen.images)
    assert torch.equal(by_index.labels, chosen.labels)
    for wrong in (["kind 9"], [4], [-1], []):
        with pytest.raises(ValueError, match="`classes` must"):
            tiny_data.select_classes(wrong)
    with pytest.raises(ValueError, match="each once"):
        tiny_data.select_classes([1, "kind 1"])


def test_sample_and_split(tiny_data: LabelledImages) -> None:
    first = tiny_data.sample(5, torch.Generator().manual_seed(1))
    assert first.counts == (5, 5, 5, 5)
    again, rest = tiny_data.split(5, torch.Generator().manual_seed(1))
    assert torch.equal(first.images, again.images)
    assert rest.counts == (7, 7, 7, 7)
    both = torch.cat([again.images, rest.images]).flatten(1).unique(dim=0)
    assert len(both) == len(tiny_data)
    with pytest.raises(ValueError, match="`per_class` must be 1 to 12, the images of class 'kind 0', got 13"):
        tiny_data.sample(13, torch.Generator())


def test_resize(tiny_data: LabelledImages) -> None:
    assert tiny_data.resize(32) is tiny_data
    assert tiny_data.resize(24).images.shape == (48, 3, 24, 24)
    assert repr(tiny_data) == "LabelledImages(48 images 32 x 32, 4 classes)"


def test_what_does_not_fit_together_is_refused() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    assert LabelledImages(images, labels.to(torch.int16), ("a", "b")).labels.dtype == torch.int64
    with pytest.raises(ValueError, match=r"uint8 \[n, 3, H, W\]"):
        LabelledImages(images.float(), labels, ("a", "b"))
    with pytest.raises(ValueError, match=r"one integer per image \(2\)"):
        LabelledImages(images, labels[:1], ("a", "b"))
    with pytest.raises(ValueError, match="indices of the 1 class names, got 0 to 1"):
        LabelledImages(images, labels, ("a",))
    with pytest.raises(ValueError, match="all be different"):
        LabelledImages(images, labels, ("a", "a"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits of two classes, images of one grey level each."""
    for split, level in (("train", 50), ("test", 150)):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 20), (level + 10 * c + i,) * 3).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_image_folder(folder: Path) -> None:
    data = load_dataset(folder, "test", quiet=True)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.images.shape == (6, 3, 20, 20)  # their own size, as all share it
    assert data.images[:, 0, 0, 0].tolist() == [150, 151, 152, 160, 161, 162]
    assert torch.equal(load_dataset(folder / "test", quiet=True).images, data.images)
    assert load_dataset(folder, "train", size=16, quiet=True).images.shape == (6, 3, 16, 16)
    Image.new("RGB", (30, 20)).save(folder / "test" / "dog" / "wide.png")
    assert load_dataset(folder, "test", quiet=True).images.shape == (7, 3, 224, 224)


def test_bad_image_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"test must hold image files .*pass `split='test'`"):
        load_dataset(folder, quiet=True)
    with pytest.raises(FileNotFoundError, match=r"`split` must be a folder in .*got 'val'"):
        load_dataset(folder, "val", quiet=True)
    with pytest.raises(ValueError, match="got no sub-folder"):
        load_dataset(folder / "test" / "cat", quiet=True)
    (folder / "test" / "ant").mkdir()
    with pytest.raises(ValueError, match=r"ant must hold image files .*, got none\."):
        load_dataset(folder, "test", quiet=True)
    (folder / "train" / "dog" / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(ValueError, match=r"bad\.jpg must be readable"):
        load_dataset(folder, "train", quiet=True)


def test_npz(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    labels = np.array([1, 0, 1, 0], np.int16)
    parts = {f"{s}_images": images for s in ("train", "test")} | {f"{s}_labels": labels for s in ("train", "test")}
    np.savez(tmp_path / "two.npz", **parts, test_classes=np.array(["a", "b"]))
    data = load_dataset(tmp_path / "two.npz", "test")
    assert torch.equal(data.images.permute(0, 2, 3, 1), torch.from_numpy(images))
    assert data.labels.tolist() == [1, 0, 1, 0]
    assert data.class_names == ("a", "b")
    assert load_dataset(str(tmp_path / "two.npz"), "train", size=8).class_names == ("0", "1")
    np.savez(tmp_path / "one.npz", val_images=images, val_labels=labels)
    assert len(load_dataset(tmp_path / "one.npz")) == 4
    np.savez(tmp_path / "plain.npz", images=images, labels=labels)
    assert len(load_dataset(tmp_path / "plain.npz")) == 4
    for split in (None, "val"):
        with pytest.raises(ValueError, match=rf"one of \['test', 'train'\].*got {split!r}"):
            load_dataset(tmp_path / "two.npz", split)


def test_bad_npz(tmp_path: Path) -> None:
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1])
    bad: dict[str, tuple[dict[str, np.ndarray], str]] = {
        "float": ({"images": images / 255, "labels": labels}, r"uint8 \[n, H, W, 3\], got float64"),
        "grey": ({"images": images[..., :1], "labels": labels}, r"\[2, 4, 4, 1\]"),
        "unlabelled": ({"images": images}, "must be 2 integers, got none"),
        "fewer": ({"images": images, "labels": labels[:1]}, r"must be 2 integers, got int64 \[1\]"),
        "range": ({"images": images, "labels": labels, "classes": np.array(["a"])}, "1 class names"),
        "pickle": ({"images": images, "labels": np.array([0, {}], object)}, "without pickled objects"),
        "empty": ({}, r"one of \[\]"),
    }
    for name, (arrays, message) in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            load_dataset(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "whole.npz", images=images, labels=labels)
    (tmp_path / "short.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "array.npy", images)
    for name in ("short.npz", "text.npz", "array.npy"):
        with pytest.raises(ValueError, match=f"{name} must be a whole npz file"):
            load_dataset(tmp_path / name)


def test_unknown_source() -> None:
    with pytest.raises(FileNotFoundError, match=r"or one of \('cifar-fs', .*got 'imagenet'"):
        load_dataset("imagenet")


def test_digits() -> None:
    digits = load_dataset("digits", size=32)
    assert digits.images.shape == (1797, 3, 32, 32)
    assert digits.class_names == tuple("0123456789")
    small = load_dataset("digits").images
    assert small.shape == (1797, 3, 8, 8)
    assert (int(small.min()), int(small.max())) == (0, 255)
    assert torch.equal(small[:, 0], small[:, 2])
    with pytest.raises(ValueError, match="`split` of digits must be None"):
        load_dataset("digits", "train")


def test_cifar_fs_classes() -> None:
    assert {split: len(names) for split, names in CIFAR_FS.items()} == {"train": 64, "val": 16, "test": 20}
    assert len({name for names in CIFAR_FS.values() for name in names}) == 100


def test_cifar_fs_classes_are_those_of_the_real_data(real_data: Path) -> None:
    for split, names in CIFAR_FS.items():
        with np.load(real_data / "cifar_fs.npz") as file:
            assert tuple(file[f"{split}_classes"]) == names


def test_cifar_fs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = sorted(name for split in CIFAR_FS.values() for name in split)
    calls = []

    def cifar100(root: str, train: bool, download: bool) -> SimpleNamespace:
        calls.append((root, train, download))
        targets = list(range(100)) * (5 if train else 1)
        data = np.zeros((len(targets), 32, 32, 3), np.uint8) + np.array(targets, np.uint8)[:, None, None, None]
        return SimpleNamespace(data=data, targets=targets, class_to_idx={n: i for i, n in enumerate(names)})

    monkeypatch.setattr("torchvision.datasets.CIFAR100", cifar100)
    for split, classes in CIFAR_FS.items():
        data = load_dataset("cifar-fs", split, root=tmp_path, download=True)
        assert data.class_names == classes
        assert data.counts == (6,) * len(classes)
        shown = [names[level] for level in data.images[:, 0, 0, 0].tolist()]
        assert shown == [classes[label] for label in data.labels.tolist()]
    assert set(calls) == {(str(tmp_path), True, True), (str(tmp_path), False, True)}
    with pytest.raises(ValueError, match=r"one of \('train', 'val', 'test'\), got None"):
        load_dataset("cifar-fs")


def test_flowers102(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    files = {}
    for i, split in enumerate(("train", "val", "test")):
        files[split] = tmp_path / f"{split}.jpg"
        Image.new("RGB", (40 + i, 30), "red").save(files[split])

    def flowers(root: str, split: str, download: bool) -> SimpleNamespace:
        return SimpleNamespace(_image_files=[files[split]], _labels=[len(split)], classes=list(map(str, range(102))))

    monkeypatch.setattr("torchvision.datasets.Flowers102", flowers)
    data = load_dataset("flowers102", root=tmp_path, size=16, quiet=True)
    assert data.images.shape == (3, 3, 16, 16)
    assert data.labels.tolist() == [5, 3, 4]
    assert len(load_dataset("flowers102", "val", root=tmp_path, quiet=True)) == 1
    with pytest.raises(ValueError, match="got 'all'"):
        load_dataset("flowers102", "all", root=tmp_path)


def test_eurosat(tmp_path: Path) -> None:
    for name in ("Forest", "River"):
        (tmp_path / "eurosat" / "2750" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), "green").save(tmp_path / "eurosat" / "2750" / name / "0.jpg")
    data = load_dataset("eurosat", root=tmp_path, quiet=True)
    assert data.class_names == ("Forest", "River")
    assert data.images.shape == (2, 3, 64, 64)


@pytest.mark.parametrize(("name", "split"), [("cifar-fs", "test"), ("flowers102", None), ("eurosat", None)])
def test_absent_sets_say_how_to_get_them(name: str, split: str | None, tmp_path: Path) -> None:
    if name == "flowers102":
        pytest.importorskip("scipy")
    with pytest.raises(FileNotFoundError, match=f"'{name}' must be under `root`.*`download=True`"):
        load_dataset(name, split, root=tmp_path)


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(root: str, download: bool) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.EuroSAT", unreachable)
    with pytest.raises(FileNotFoundError, match=r"over a network.*no route to host"):
        load_dataset("eurosat", root=tmp_path, download=True)


def test_named_sets_win_over_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_data: Callable[..., LabelledImages]
) -> None:
    (tmp_path / "digits" / "one").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "digits" / "one" / "0.png")
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("digits")) == 1797
    assert len(load_dataset("./digits", quiet=True)) == 1
