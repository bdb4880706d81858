"""Folders of classes: read as torchvision reads them, and what is left out is counted in one line of the log."""

import logging
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image, features
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from lorarecycle.data.folder import ClassFolders, read_image
from lorarecycle.data.load import load_dataset


def fill(root: Path, *names: str) -> Path:
    """Images of one grey level each under those names, other files empty."""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * level,) * 3).save(root / name)
    return root


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    names = ("cat/1.png", "cat/more/2.png", "cat/more/3.JPG", "dog/1.png", "dog/a/b/c/4.webp", "emu/5.tif")
    return fill(tmp_path / "clean", *names)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("lorarecycle")]


def test_images_in_sub_folders_belong_to_the_class(clean: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ours, theirs = ClassFolders(clean), ImageFolder(clean)
    assert ours.classes == theirs.classes == ["cat", "dog", "emu"]
    assert ours.samples == theirs.samples
    assert ours.targets == theirs.targets
    assert ours.class_to_idx == theirs.class_to_idx
    assert load_dataset(clean, quiet=True).counts == (3, 2, 1)
    assert not lines(caplog)


def test_links_that_lead_back_are_left_out(
    clean: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them would be walked for ever; links elsewhere are followed, as in torchvision."""
    before = ClassFolders(clean).samples
    (clean / "cat" / "all").symlink_to(clean)
    (clean / "dog" / "a" / "up").symlink_to(clean / "dog")
    (clean / "cat" / "more" / "self").symlink_to(".")
    assert ClassFolders(clean).samples == before
    assert lines(caplog) == [f"{clean}: 6 images of 3 classes; left out: 3 links to a folder above."]
    (clean / "dog" / "far").symlink_to(clean.parent)
    monkeypatch.chdir(clean)
    assert ClassFolders(".").targets == [0, 0, 0, 1, 1, 2], "from a folder below the link's target, too"
    fill(clean.parent / "elsewhere", "6.png")
    (clean / "emu" / "more").symlink_to(clean.parent / "elsewhere")
    assert ClassFolders(clean).targets == [0, 0, 0, 1, 1, 2, 2]


def test_a_class_may_hold_folders_alone(clean: Path) -> None:
    (clean / "cat" / "1.png").unlink()
    data = load_dataset(clean, quiet=True)
    assert data.class_names == ("cat", "dog", "emu")
    assert data.counts == (2, 2, 1)


@pytest.mark.parametrize(
    ("litter", "count"),
    [
        ("cat/._1.png", 1),
        ("cat/.DS_Store", 1),
        (".DS_Store", 1),
        ("cat/Thumbs.db", 1),
        ("cat/desktop.ini", 1),
        ("cat/more/._2.png", 1),
        ("cat/.thumbnails/1.png", 1),
        ("cat/@eaDir/1.png/small.jpg", 1),
        (".ipynb_checkpoints/1.png", 1),
        ("__MACOSX/cat/._1.png", 1),
        ("cat/__MACOSX/1.png", 1),
    ],
)
def test_hidden_files_are_passed_over(clean: Path, litter: str, count: int, caplog: pytest.LogCaptureFixture) -> None:
    (clean / litter).parent.mkdir(parents=True, exist_ok=True)
    (clean / litter).write_bytes(b"\0\5\x16\7Mac OS X")
    assert load_dataset(clean, quiet=True).counts == (3, 2, 1)
    assert lines(caplog) == [f"{clean}: 6 images of 3 classes; left out: {count} hidden."]


def test_every_kind_that_is_left_out_is_counted_in_one_line(clean: Path, caplog: pytest.LogCaptureFixture) -> None:
    (clean / "ant" / "inner").mkdir(parents=True)
    (clean / "bee").mkdir()
    for name in ("bee/1.heic", "bee/2.HEIC", "dog/notes.txt", "dog/a/README", "dog/._1.png", ".git"):
        (clean / name).touch()
    fill(clean, "cover.png")
    folder = ClassFolders(clean)
    assert folder.classes == ["cat", "dog", "emu"]
    assert folder.targets == [0, 0, 0, 1, 1, 2]
    assert folder.class_to_idx == {"cat": 0, "dog": 1, "emu": 2}
    assert folder.imgs == folder.samples
    assert lines(caplog) == [
        f"{clean}: 6 images of 3 classes; left out: 2 .heic, 1 .txt, 2 hidden, 1 image files beside the class folders, "
        "2 without images (ant, bee), 1 without suffix; `pillow_heif.register_heif_opener()` makes HEIC readable."
    ]
    assert folder.skipped[".heic"] == 2
    assert load_dataset(clean, quiet=True).class_names == ("cat", "dog", "emu")


@pytest.mark.parametrize("suffix", [".gif", ".avif", ".jpe", ".jfif", ".pbm", ".jp2"])
def test_what_pillow_reads_is_read(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    for name in ("cat", "dog"):
        fill(tmp_path, f"{name}/1.jpg")
        Image.new("1" if suffix == ".pbm" else "RGB", (20, 20)).save(tmp_path / name / f"2{suffix}")
    assert load_dataset(tmp_path, quiet=True).counts == (2, 2)
    assert not lines(caplog)


def test_heic_is_read_once_pillow_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "cat/1.png")
    (tmp_path / "cat" / "2.heic").touch()
    assert len(ClassFolders(tmp_path)) == 1
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")  # as pillow-heif does when it is registered
    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: None, None))
    assert len(ClassFolders(tmp_path)) == 2


@pytest.mark.parametrize(
    ("parts", "proposed"),
    [
        (("train", "test"), "train"),
        (("Training", "Validation"), "Training"),
        (("val",), "val"),
        (("dev", "test"), "dev"),
    ],
)
def test_parts_are_not_taken_for_classes(tmp_path: Path, parts: tuple[str, ...], proposed: str) -> None:
    fill(tmp_path, *(f"{part}/{name}/1.png" for part in parts for name in ("cat", "dog")))
    found = ", ".join(sorted(parts))
    message = rf"folders of classes in {found}; pass `split='{proposed}'`, or the folder .*{proposed} itself"
    with pytest.raises(ValueError, match=message):
        ClassFolders(tmp_path)
    assert ClassFolders(tmp_path, proposed).classes == ["cat", "dog"]
    assert ClassFolders(tmp_path / proposed).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "names",
    [
        ("train/1.png", "test/1.png"),
        ("train/side/1.png", "bus/1.png"),
        ("train/side/1.png", "train/2.png"),
        ("cat/young/1.png", "dog/young/1.png"),
    ],
    ids=str,
)
def test_classes_may_be_called_like_parts(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert ClassFolders(fill(tmp_path, *names)).classes == ImageFolder(tmp_path).classes


@pytest.mark.parametrize(
    ("names", "split", "error", "message"),
    [
        (("1.png", "2.png"), None, ValueError, "got no sub-folder and 2 image files; move the images of each class"),
        (("train/cat/1.png",), "val", FileNotFoundError, r"`split` must be a folder in .*, got 'val'"),
        (("train/1.png",), "train", ValueError, "got no sub-folder and 1 image files"),
        ((".cat/1.png",), None, ValueError, "got no sub-folder and 0 image files"),
    ],
    ids=str,
)
def test_folders_without_classes_are_refused(
    tmp_path: Path, names: tuple[str, ...], split: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_dataset(fill(tmp_path, *names), split, quiet=True)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.heic").touch()
    message = r"must hold image files \(\.jpg .*\) in a sub-folder per class, got none; left out: 1 \.heic, 1 without"
    with pytest.raises(ValueError, match=message):
        ClassFolders(tmp_path)


def test_absent_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`root` must be a folder .*got .*nowhere"):
        ClassFolders(tmp_path / "nowhere")


def test_the_home_folder(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(clean.parent))
    monkeypatch.setenv("USERPROFILE", str(clean.parent))
    assert len(ClassFolders("~/clean")) == 6


def test_items_are_decoded_when_asked_for_and_as_elsewhere(clean: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 4), 90).save(clean / "cat" / "1.png", exif=exif)
    (clean / "emu" / "5.tif").write_bytes(b"broken")
    folder = ClassFolders(clean)
    image, label = folder[0]
    assert (image.dtype, tuple(image.shape), label) == (torch.uint8, (3, 8, 4), 0)
    assert (image == 90).all()
    assert torch.equal(image, read_image(clean / "cat" / "1.png"))
    with pytest.raises(ValueError, match=r"5\.tif must be readable"):
        _ = folder[5]


def test_it_travels_to_the_workers_of_a_loader(clean: Path) -> None:
    folder = pickle.loads(pickle.dumps(ClassFolders(clean)))
    (clean / "cat" / "1.png").unlink()
    loader = DataLoader(torch.utils.data.Subset(folder, [1, 2, 3]), batch_size=3, num_workers=0)
    images, labels = next(iter(loader))
    assert images.shape == (3, 3, 20, 20)
    assert labels.tolist() == [0, 0, 1]
