"""Labelled images from folders, npz files and named sets; what is missing or broken is named."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lorarecycle.data.dataset import LabelledImages
from lorarecycle.data.load import load_dataset
from lorarecycle.data.sets import open_dataset
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


@pytest.mark.parametrize("wrong", [["kind 9"], [4], [-1], [], [1, "kind 1"]], ids=str)
def test_select_classes_wants_classes_that_there_are_each_once(
    tiny_data: LabelledImages, wrong: list[str | int]
) -> None:
    with pytest.raises(ValueError, match="`classes` must"):
        tiny_data.select_classes(wrong)


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


PAIR = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)


def test_labels_become_int64() -> None:
    assert LabelledImages(PAIR, torch.tensor([0, 1], dtype=torch.int16), ("a", "b")).labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (PAIR.float(), [0, 1], ("a", "b"), r"uint8 \[n, 3, H, W\], got torch.float32"),
        (PAIR[0], [0, 1], ("a", "b"), r"uint8 \[n, 3, H, W\], got torch.uint8 \[3, 4, 4\]"),
        (PAIR, [0], ("a", "b"), r"one integer per image \(2\)"),
        (PAIR, [0.0, 1.0], ("a", "b"), r"one integer per image \(2\), got torch.float32"),
        (PAIR, [0, 1], ("a",), "indices of the 1 class names, got 0 to 1"),
        (PAIR, [-1, 1], ("a", "b"), "indices of the 2 class names, got -1 to 1"),
        (PAIR, [0, 1], ("a", "a"), "all be different"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    images: torch.Tensor, labels: list[float], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledImages(images, torch.tensor(labels), names)


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


def test_an_unreadable_image_of_a_folder_is_named(folder: Path) -> None:
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


def test_npz_where_the_system_tells_no_memory(tmp_path, monkeypatch):
    monkeypatch.delattr("os.sysconf")
    monkeypatch.setattr("lorarecycle.runtime.npz.PIECE", 7)  # an array comes in pieces
    images = np.random.default_rng(0).integers(0, 255, (4, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(4), classes=np.array([b"a", b"b", b"c", b"d"]))
    data = load_dataset(tmp_path / "a.npz")
    assert data.class_names == ("a", "b", "c", "d")
    np.testing.assert_array_equal(data.images.permute(0, 2, 3, 1).numpy(), images)


def test_a_class_may_be_called_as_a_parquet_file_is(tmp_path):
    for name in ("a", "b.parquet"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / "1.png")
    for found in (load_dataset(tmp_path / "set"), open_dataset(tmp_path / "set")):
        assert tuple(found.class_names) == ("a", "b.parquet")


@pytest.mark.parametrize("split", [None, "val"])
def test_the_part_of_a_npz_must_be_there(tmp_path: Path, split: str | None) -> None:
    np.savez(tmp_path / "two.npz", train_images=IMAGES, train_labels=LABELS, test_images=IMAGES, test_labels=LABELS)
    with pytest.raises(ValueError, match=rf"one of \['test', 'train'\].*got {split!r}"):
        load_dataset(tmp_path / "two.npz", split)


IMAGES, LABELS = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES / 255, "labels": LABELS}, r"uint8 \[n, H, W, 3\], got float64"),
        ({"images": IMAGES[..., :1], "labels": LABELS}, r"\[2, 4, 4, 1\]"),
        ({"images": IMAGES}, "must be 2 integers, got none"),
        ({"images": IMAGES, "labels": LABELS[:1]}, r"must be 2 integers, got int64 \[1\]"),
        ({"images": IMAGES, "labels": LABELS, "classes": np.array(["a"])}, "a name for each label up to 1"),
        ({"images": IMAGES, "labels": LABELS, "classes": np.array(["a", "a"])}, "must all be different"),
        ({"images": IMAGES, "labels": LABELS - 1}, r"must be 0 or more, got -1"),
        ({"images": IMAGES, "labels": np.array([0, {}], object)}, "without pickled objects"),
        ({"images": IMAGES, "labels": np.zeros(2, [("a", "i4")])}, "labels of type"),
        (
            {"images": IMAGES, "labels": LABELS, "classes": np.array(3)},
            r"a name for each label up to 1.*got int64 \[\]",
        ),
        ({"images": IMAGES, "labels": np.array([0, 10**8])}, "must be below 1000000 where no `classes` names them"),
        ({}, r"must hold `images` and `labels`, .* got \[\]"),
        ({"x_train": IMAGES, "y_train": LABELS}, r"got \['x_train', 'y_train'\]; save it again under those names"),
    ],
    ids=[
        "float",
        "grey",
        "unlabelled",
        "fewer",
        "range",
        "twice",
        "below",
        "pickle",
        "structure",
        "one name",
        "huge",
        "empty",
        "other names",
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "bad.npz")


def test_a_npz_that_unpacks_to_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((100, 64, 64, 3), np.uint8), labels=np.zeros(100, int))
    monkeypatch.setattr("lorarecycle.runtime.memory.os.sysconf", lambda name: 1000)  # 1 MB in all
    with pytest.raises(ValueError, match=r"bomb\.npz must unpack to less than the 0 GB of memory here"):
        load_dataset(tmp_path / "bomb.npz")


@pytest.mark.parametrize("shape", [(10**12, 8, 8, 3), (2**62, 4), (-1, 8, 8, 3)], ids=str)
def test_a_npz_that_promises_more_than_it_holds(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "more.npz", labels=LABELS)
    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    member = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(64)
    with zipfile.ZipFile(tmp_path / "more.npz", "a") as file:
        file.writestr("images.npy", member)
    with pytest.raises(ValueError, match=r"more\.npz must be a whole npz file"):
        load_dataset(tmp_path / "more.npz")


def test_other_arrays_of_a_npz_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "more.npz", images=IMAGES, labels=LABELS, notes=np.array([{}], object))
    assert len(load_dataset(tmp_path / "more.npz")) == 2


@pytest.mark.parametrize("kind", ["short", "text", "array"])
def test_damaged_npz(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, images=IMAGES, labels=LABELS)
    if kind == "short":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "text":
        path.write_text("no arrays")
    else:
        with path.open("wb") as file:
            np.save(file, IMAGES)
    with pytest.raises(ValueError, match=r"bad\.npz must be a whole npz file"):
        load_dataset(path)


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
