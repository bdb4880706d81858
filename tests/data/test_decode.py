"""The library and the torch-free session read the same pixels, by the same rules, from images of every kind."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lorarecycle.export import pixels as session
from PIL import Image, ImageFile, features

from lorarecycle.data.decode import count_images, decode, image_suffixes, list_images
from lorarecycle.data.images import to_batches, to_uint8

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)
DARK = np.minimum(GREY, 40)


def one(images: Any, size: int = 16) -> np.ndarray:
    """[3, size, size], the same from both sides."""
    library = to_uint8(images, size).numpy()
    (ours,) = session.to_batches(images, size, 1)
    assert ours.shape == library.shape == (1, 3, size, size)
    np.testing.assert_array_equal(ours, library)
    return library[0]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def transparent_palette() -> Image.Image:
    image = Image.fromarray(GREY).convert("P")
    image.info["transparency"] = bytes(range(256))
    return image


GREY_IMAGES: dict[str, Callable[[], Any]] = {
    "L": lambda: Image.fromarray(GREY),
    "LA": lambda: Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (16, 16), 7)]),
    "P": lambda: Image.fromarray(GREY).convert("P"),
    "P with transparency": transparent_palette,
    "P with transparency, PNG": lambda: saved(transparent_palette(), "PNG"),
    "I;16": lambda: Image.fromarray(GREY.astype(np.uint16) * 257),
    "I;16, PNG": lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "I;16, TIFF": lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
    "I of 16 bits, PGM": lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PPM"),
    "I of 0 to 255": lambda: Image.fromarray(GREY.astype(np.int32)),
    "I of 0 to 255, TIFF": lambda: saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "F": lambda: Image.fromarray(GREY.astype(np.float32) / 255),
    "F, TIFF": lambda: saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
    "uint8": lambda: GREY,
    "uint8 with an axis": lambda: GREY[..., None],
    "uint16": lambda: GREY.astype(np.uint16) * 257,
    "uint16, big-endian": lambda: (GREY.astype(np.uint16) * 257).astype(">u2"),
    "int64": lambda: GREY.astype(np.int64),
    "int32, big-endian": lambda: GREY.astype(">i4"),
    "float64": lambda: GREY / 255,
    "float16": lambda: (GREY / 255).astype(np.float16),
    "read-only": lambda: np.broadcast_to(GREY, (1, 16, 16)),
    "tensor uint8": lambda: torch.from_numpy(GREY),
    "tensor uint16": lambda: torch.from_numpy(GREY.astype(np.uint16) * 257),
    "tensor int16": lambda: torch.from_numpy(GREY).short(),
    "tensor float64": lambda: torch.from_numpy(GREY / 255),
    "tensor with a gradient": lambda: torch.from_numpy(GREY / 255).requires_grad_(),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", GREY_IMAGES)
def test_the_same_grey_pixels(kind: str) -> None:
    np.testing.assert_array_equal(one(GREY_IMAGES[kind]()), np.broadcast_to(GREY, (3, 16, 16)))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision(kind: str) -> None:
    half = torch.from_numpy(GREY / 255).to(getattr(torch, kind))
    expected = (half.float() * 255).round().byte().expand(3, -1, -1)
    np.testing.assert_array_equal(one(half), expected)


COLOUR_IMAGES: dict[str, Callable[[Path], Any]] = {
    "PIL": lambda path: Image.fromarray(COLOUR),
    "path": lambda path: path,
    "string": lambda path: str(path),
    "lazy PIL": lambda path: Image.open(path),
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "open file": lambda path: path.open("rb"),
    "BMP": lambda path: saved(Image.fromarray(COLOUR), "BMP"),
    "WebP": lambda path: saved(Image.fromarray(COLOUR), "WEBP", lossless=True),
    "CMYK": lambda path: Image.merge(
        "CMYK", [*map(Image.fromarray, np.moveaxis(255 - COLOUR, 2, 0)), Image.new("L", (16, 16))]
    ),
    "RGBA": lambda path: Image.fromarray(COLOUR).convert("RGBA"),
    "channels last": lambda path: COLOUR,
    "channels first": lambda path: COLOUR.transpose(2, 0, 1),
    "batch": lambda path: COLOUR[None],
    "negative strides": lambda path: COLOUR[::-1].copy()[::-1],
    "four channels": lambda path: np.dstack([COLOUR, GREY]),
    "tensor": lambda path: torch.from_numpy(COLOUR).permute(2, 0, 1),
    "tensor, channels last": lambda path: torch.from_numpy(COLOUR),
    "tensor, batch": lambda path: torch.from_numpy(COLOUR).permute(2, 0, 1)[None],
    "nested": lambda path: [[COLOUR]],
    "iterator": lambda path: [COLOUR, COLOUR][:1],
    "array of paths": lambda path: np.array([str(path)]),
    "array of objects": lambda path: np.array([path, None], dtype=object)[:1],
}


@pytest.mark.filterwarnings("error:The given NumPy array")
@pytest.mark.parametrize("kind", COLOUR_IMAGES)
def test_the_same_colour_pixels(kind: str, tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    image = COLOUR_IMAGES[kind](tmp_path / "a.png")
    assert count_images(image) == 1
    assert list_images(image) is image
    np.testing.assert_array_equal(one(image), COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_same_pixels_from_lossy_files(kind: str, mode: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    image = Image.fromarray(COLOUR).convert(mode)
    content = saved(image, kind)
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(opened.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(one(content), expected)


def test_cmyk_jpeg() -> None:
    content = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG")
    red, green, blue = one(content)[:, 8, 8].astype(int)
    assert red < 10
    assert min(green, blue) > 245


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
    turned |= {7: "TRANSVERSE", 8: "ROTATE_90"}
    upright = Image.fromarray(COLOUR)
    if orientation > 1:
        upright = upright.transpose(Image.Transpose[turned[orientation]])
    content = saved(Image.fromarray(COLOUR), "PNG", exif=exif)
    np.testing.assert_array_equal(one(content), np.asarray(upright).transpose(2, 0, 1))


def test_exif_that_cannot_be_read_is_passed_over() -> None:
    content = saved(Image.fromarray(COLOUR), "PNG", exif=b"Exif\0\0no exif at all")
    np.testing.assert_array_equal(one(content), COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "size", [(32, 32), (90, 41), (33, 70), (20, 25), (32, 57), (7, 300), (136, 35), (15, 140), (1, 100)]
)
def test_resizing_agrees_to_two_grey_levels(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    (ours,) = session.to_batches(noise, 32, 1)
    theirs = to_uint8(noise, 32).numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def truncated(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = saved(Image.fromarray(noise), kind)
    return content[: len(content) // 2]


def closed_file() -> io.BytesIO:
    file = io.BytesIO(b"abc")
    file.close()
    return file


def bomb() -> bytes:
    """A PNG of 20000 x 20000 pixels, of which the header alone is there."""
    content = bytearray(saved(Image.new("L", (1, 1)), "PNG"))
    content[16:24] = (20000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


NO_IMAGES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "nothing": (list, ValueError, "`images` must hold at least one image"),
    "an empty iterator": (lambda: iter(()), ValueError, "`images` must hold at least one image"),
    "an empty object array": (lambda: np.array([], object), ValueError, "`images` must hold at least one image"),
    "grey batch": (lambda: np.zeros((2, 8, 8)), ValueError, r"`images` must have 1, 3 or 4 channels.*\[2, 8, 8\]"),
    "five channels": (lambda: [COLOUR, np.zeros((8, 8, 5))], ValueError, r"`images\[1\]` must have 1, 3 or 4"),
    "empty batch": (lambda: torch.zeros(0, 3, 8, 8), ValueError, r"shape \[0, 3, 8, 8\]"),
    "no height": (lambda: Image.new("RGB", (8, 0)), ValueError, r"shape \[0, 8, 3\]"),
    "one axis": (lambda: torch.zeros(7), ValueError, r"shape \[7\]"),
    "five axes": (lambda: np.zeros((1, 1, 3, 8, 8)), ValueError, r"shape \[1, 1, 3, 8, 8\]"),
    "NaN": (lambda: torch.full((3, 8, 8), float("nan")), ValueError, "`images` must be finite, got 192 NaN"),
    "infinite": (lambda: np.full((8, 8), -np.inf), ValueError, "`images` must be finite, got 64 NaN or infinite"),
    "normalised": (lambda: torch.full((3, 8, 8), -2.0), ValueError, r"got -2 to -2; .*undo the normalisation"),
    "floats of 255": (lambda: torch.full((3, 8, 8), 16.0), ValueError, r"floats in \[0, 1\], got 16 to 16"),
    "F of 255": (lambda: Image.new("F", (8, 8), 16.0), ValueError, r"floats in \[0, 1\], got 16 to 16"),
    "int64": (lambda: np.full((8, 8, 3), 300), ValueError, r"integers 0 to 255 .*got int64 300 to 300"),
    "negative": (lambda: torch.full((3, 8, 8), -1), ValueError, r"integers 0 to 255 .*got int64 -1 to -1"),
    "I": (lambda: Image.new("I", (8, 8), 65535), ValueError, r"integers 0 to 255 .*got int32 65535 to 65535"),
    "bool": (lambda: np.zeros((8, 8), bool), TypeError, r"floats in \[0, 1\], got bool"),
    "tensor of bool": (lambda: torch.zeros(8, 8, dtype=torch.bool), TypeError, r"floats in \[0, 1\], got bool"),
    "complex": (lambda: torch.zeros(8, 8, dtype=torch.complex64), TypeError, r"got complex64"),
    "number": (lambda: [3.5], TypeError, r"`images\[0\]` must be a PIL image.*got float"),
    "None": (lambda: None, TypeError, "got NoneType"),
    "mapping": (lambda: {"a": 1}, TypeError, "got dict"),
    "nested None": (lambda: [COLOUR, [None]], TypeError, r"`images\[1\]\[0\]` must be"),
    "text file": (lambda: io.StringIO("abc"), TypeError, "binary mode, got str"),
    "closed file": (closed_file, ValueError, "`images` must be readable.*closed file"),
    "bytes": (lambda: b"abc", ValueError, r"`images` must be readable, got content that Pillow takes .*b'abc'"),
    "no bytes": (lambda: [b""], ValueError, r"`images\[0\]` must be readable, got no content"),
    "Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid",
        ValueError,
        "a Git LFS pointer .*git lfs pull",
    ),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0", ValueError, "got HEIC; install `pillow-heif`"),
    "short PNG": (lambda: truncated("PNG"), ValueError, "`images` must be readable, got .*replace or remove"),
    "short JPEG": (lambda: truncated("JPEG"), ValueError, "`images` must be readable, got .*replace or remove"),
    "bomb": (bomb, ValueError, "got DecompressionBombError.*400000000 pixels.*MAX_IMAGE_PIXELS"),
    "URL": (lambda: "https://example.com/cat.jpg", ValueError, "got the URL 'https://example.com/cat.jpg'; download"),
    "URL as a path": (lambda: [Path("http://example.com/a.jpg")], ValueError, "got the URL"),
    "bucket": (lambda: "s3://bucket/cat.jpg", ValueError, "got the URL 's3://bucket/cat.jpg'"),
    "data URL": (lambda: "data:image/png;base64," + "A" * 9000, ValueError, r"got the URL 'data:image/png.{,200}'; d"),
    "absent": (lambda: "nowhere/cat.jpg", FileNotFoundError, r"no image file nowhere/cat\.jpg"),
    "absent, long": (lambda: "x" * 9000, FileNotFoundError, r"no image file x{200}\.\.\.\."),
    "absent, odd": (lambda: "a\0b", FileNotFoundError, "no image file"),
    "strip": (lambda: Image.new("RGB", (20000, 1)), ValueError, "100 times as long as wide, got 1 x 20000 pixels"),
    "strip of a file": (lambda: saved(Image.new("L", (1, 500)), "PNG"), ValueError, "got 500 x 1 pixels; cut it"),
    "strip of an array": (lambda: np.zeros((101, 1, 3)), ValueError, "got 101 x 1 pixels"),
    "strips": (lambda: torch.zeros(2, 3, 2, 201), ValueError, "got 2 x 201 pixels"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_both_sides_refuse_it_in_the_same_words(kind: str) -> None:
    make, error, message = NO_IMAGES[kind]
    with pytest.raises(error, match=message) as ours:
        list(session.to_batches(make(), 8, 1))
    with pytest.raises(error, match=message) as theirs:
        to_uint8(make(), 8)
    assert str(ours.value) == str(theirs.value)


def test_folders_and_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`query\[0\]` must be image files, got the folder {tmp_path}"):
        to_uint8([tmp_path], 8, name="query")


@pytest.mark.parametrize("name", ["text.png", "short.jpg"])
def test_unreadable_files_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no image" if name == "text.png" else truncated("JPEG"))
    with pytest.raises(ValueError, match=rf"image file .*{name} must be readable, .*; replace or remove it\."):
        to_uint8([COLOUR, tmp_path / name], 8)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    np.testing.assert_array_equal(one("~/a.png"), COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["uint16", "I;16", "tensor"])
def test_sixteen_bits_that_look_like_eight_are_remarked(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    pixels = GREY.astype(np.uint16)
    image = {"uint16": pixels, "I;16": Image.fromarray(pixels), "tensor": torch.from_numpy(pixels)}[kind]
    assert to_uint8(image, 16).max() == 1
    assert "`images`: 16-bit pixels of at most 255 make a black image; pass uint8" in caplog.text


def test_a_file_object_is_read_from_its_start_each_time() -> None:
    file = io.BytesIO(saved(Image.fromarray(COLOUR), "PNG"))
    np.testing.assert_array_equal(to_uint8([file, file], 16, workers=2), to_uint8([COLOUR, COLOUR], 16))
    assert torch.equal(to_uint8(file, 16), to_uint8(COLOUR, 16))


def test_series_of_paths(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    series = pandas.Series([str(tmp_path / "a.png")] * 3, index=[5, 7, 9])
    assert count_images(series) == 3
    assert list_images(series) is series
    assert torch.equal(to_uint8(series, 16), to_uint8([COLOUR] * 3, 16))


class Column:
    """A column of a table: it can be asked for an array, as those of pandas, polars and pyarrow."""

    def __init__(self, values: list[Any]) -> None:
        self.values = np.array(values, object)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


def test_columns_of_tables(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    column = Column([tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()])
    assert count_images(column) == 3
    assert list_images(column) is column
    assert torch.equal(to_uint8(column, 16), to_uint8([COLOUR] * 3, 16))


@pytest.mark.parametrize(
    ("images", "n"),
    [
        (np.zeros((5, 3, 8, 8)), 5),
        (torch.zeros(8, 8), 1),
        (["a.png", b"", io.BytesIO(), Image.new("L", (1, 1))], 4),
        ([np.zeros((2, 8, 8, 3)), [GREY, "b.png"]], 4),
        (np.array(["a.png", "b.png"]), 2),
        ((), 0),
        ("a.png", 1),
    ],
    ids=["array", "tensor", "list", "nested list", "array of paths", "nothing", "path"],
)
def test_images_are_counted_without_reading_them(images: Any, n: int) -> None:
    assert count_images(images) == n


@pytest.mark.parametrize(
    "make", [iter, set, dict.fromkeys, lambda x: (i for i in x)], ids=["iter", "set", "keys", "loop"]
)
def test_what_cannot_be_counted_becomes_a_list(make: Callable[[Any], Any]) -> None:
    images = make(["a.png", "b.png"])
    if isinstance(images, dict):
        assert list_images(images) is images  # refused later, by name
        images = images.keys()
    listed = list_images(images)
    assert sorted(listed) == ["a.png", "b.png"]
    assert count_images(listed) == 2


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Thirty images of one grey level and of different sizes."""
    for level in range(30):
        Image.new("RGB", (20 + level, 30), (level,) * 3).save(tmp_path / f"{level:02d}.png")
    return sorted(tmp_path.iterdir())


class Recorded:
    """A path that remembers which thread asked for it."""

    threads: set[str] = set()  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        self.threads.add(threading.current_thread().name)
        return str(self.path)


@pytest.mark.parametrize("workers", [None, 1, 2, 7, -1])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_workers_do_not_change_the_result(files: list[Path], workers: int | None, batch_size: int) -> None:
    mixed = [*files[:10], torch.full((3, 3, 16, 16), 200, dtype=torch.uint8), *files[10:], files[0].read_bytes()]
    parts = list(to_batches(mixed, 16, batch_size, workers=workers))
    assert [len(part) for part in parts] == [len(part) for part in to_batches(mixed, 16, batch_size)]
    assert torch.cat(parts)[:, 0, 0, 0].tolist() == [*range(10), 200, 200, 200, *range(10, 30), 0]


def test_workers_read_the_files(files: list[Path]) -> None:
    Recorded.threads.clear()
    to_uint8([Recorded(file) for file in files], 16, workers=3)
    assert threading.current_thread().name not in Recorded.threads
    assert 1 <= len(Recorded.threads) <= 3


def test_files_are_read_when_their_part_is_due(files: list[Path]) -> None:
    taken = []

    def lazily() -> Iterator[Path]:
        for file in files:
            taken.append(file)
            yield file

    batches = to_batches(lazily(), 16, 4, workers=2)
    next(batches)
    assert len(taken) <= 4 + 1 + 2 * 2 + 1
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_the_first_files_may_take_longest(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Image.open

    def open_late(path: str) -> Image.Image:
        time.sleep(0.002 * (30 - int(Path(path).stem)))
        return opened(path)

    monkeypatch.setattr(Image, "open", open_late)
    assert to_uint8(files, 16, workers=4)[:, 0, 0, 0].tolist() == list(range(30))


@pytest.mark.parametrize("kind", ["path", "bytes", "PIL"])
def test_two_images_are_read_at_once(kind: str, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    images = [{"path": file, "bytes": file.read_bytes(), "PIL": Image.open(file)}[kind] for file in files[:8]]
    meeting, load = threading.Barrier(2, timeout=30), ImageFile.ImageFile.load

    def load_in_pairs(image: ImageFile.ImageFile) -> Any:
        if image.tile:  # not loaded yet
            meeting.wait()  # one thread alone would never get past it
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load_in_pairs)
    assert to_uint8(images, 16, workers=2)[:, 0, 0, 0].tolist() == list(range(8))


def test_one_lazy_image_many_times(files: list[Path]) -> None:
    image = Image.open(files[7])
    assert to_uint8([image] * 20, 16, workers=4)[:, 0, 0, 0].tolist() == [7] * 20


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        ("no.png", FileNotFoundError, r"no image file no\.png"),
        (b"no image", ValueError, r"`X\[2\]` must be readable"),
        (3, TypeError, r"`X\[2\]` must be a PIL image"),
        (np.zeros((2, 2)) / 0.5 - 1, ValueError, r"`X\[2\]` must hold floats"),
        ([None], TypeError, r"`X\[2\]\[0\]` must be a PIL image"),
    ],
)
@pytest.mark.parametrize("workers", [None, 3])
def test_what_is_no_image_is_refused_in_its_turn(
    files: list[Path], last: Any, error: type[Exception], message: str, workers: int | None
) -> None:
    decoded = decode([files[0], np.zeros((2, 8, 8, 3)), last, files[1]], "X", workers=workers)
    assert [len(next(decoded)), len(next(decoded))] == [1, 2]
    with pytest.raises(error, match=message):
        next(decoded)


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="`workers` must be a number of threads, or -1 for one per core, got 0"):
        to_uint8(GREY, 16, workers=0)


def test_tensors_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    on_meta = torch.empty(5, 3, 40, 30, dtype=torch.uint8, device="meta")
    assert [part.device.type for part in to_batches(on_meta, 16, 2)] == ["meta"] * 3
    for name in ("numpy", "cpu", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, property(lambda self: pytest.fail("a detour")), raising=False)
    assert to_uint8(torch.zeros(2, 8, 8, 3), 16).shape == (2, 3, 16, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64, torch.float16, torch.float64])
def test_tensors_of_a_gpu_stay_there(dtype: torch.dtype) -> None:
    images = torch.zeros(3, 3, 20, 16, device="cuda").to(dtype)
    assert to_uint8([images, GREY], 16).device == images.device


def test_suffixes_are_those_that_pillow_reads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    suffixes = image_suffixes()
    assert {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"} <= set(suffixes)
    assert (".avif" in suffixes) == bool(features.check("avif"))
    assert not {".heic", ".pdf", ".eps", ".mpg", ".txt"} & set(suffixes)
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")  # as pillow-heif does when it is registered
    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: None, None))
    assert ".heic" in image_suffixes()


def test_decode_gives_arrays_for_files_and_tensors_for_tensors() -> None:
    a, b = decode([saved(Image.fromarray(COLOUR), "PNG"), torch.zeros(2, 3, 8, 8)])
    assert isinstance(a, np.ndarray)
    assert isinstance(b, torch.Tensor)
    assert (a.dtype, b.dtype) == (np.uint8, torch.uint8)
    assert (a.shape, tuple(b.shape)) == ((1, 3, 16, 16), (2, 3, 8, 8))
