"""Images of any kind to uint8 RGB with numpy and Pillow: the decoder of the library and of the torch-free session."""

from __future__ import annotations

import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from .rgb import refuse_strips, to_rgb

ImageInput = Any
"""A PIL image, a path, a file's bytes, a file object, an array, a tensor, or a sequence of those; see `decode`."""

_ORIENTATION = 0x0112  # tag of EXIF
_URL = re.compile(r"[A-Za-z][\w+.-]+:/|data:")
_KINDS = "a PIL image, a path, a file's bytes, a file object, a numpy array, a tensor, or a list of those"
_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # torchvision's
    *(".jpe", ".jfif", ".pbm", ".pnm", ".gif", ".avif", ".jp2", ".heic", ".heif"),
)

_Reader = Callable[[Any, str], Any]
_Leaf = tuple[_Reader, Any, str]


def decode(
    images: ImageInput,
    name: str = "images",
    *,
    fit: Callable[[Any], Any] | None = None,
    workers: int | None = None,
) -> Iterator[Any]:
    """Decode images of any kind, lazily and in order.

    Files are turned upright by their EXIF tag, of several frames the first is taken; grey becomes RGB; an alpha channel
    is dropped. What numbers mean depends on their dtype alone, in files, PIL images, arrays and tensors alike:

    - uint8 is taken as it is;
    - uint16 is scaled by 65535; so are Pillow's modes I;16 and, where it comes from a PNG, PGM or PPM file (which hold
      16 bits), I;
    - other integers, Pillow's other images of mode I among them, must be 0 to 255;
    - floats, Pillow's mode F among them, must lie in [0, 1].

    Args:
        images: one image or many:
            - PIL images;
            - image files: their paths (`~` is the home folder), their content as bytes, or file objects;
            - numpy arrays, [H, W], [H, W, C] or a batch [B, H, W, C]; channels first is understood where last cannot
              be; C is 1, 3 or 4;
            - tensors, [H, W], [C, H, W] or [B, C, H, W]; channels last is understood where first cannot be;
            - sequences, iterators, arrays of objects and pandas Series of those, nested or mixed.
        name: what error messages call `images`.
        fit: applied to the pixels of each image that is not part of a batch, in the thread that reads it.
        workers: threads that read files, PIL images and single arrays, counted as scikit-learn's `n_jobs`: one when
            None, -1 for one per core. Pillow and torch work without Python's lock. The result does not depend on it.

    Yields:
        uint8 [B, 3, H, W], one for each image or batch in `images`: of a tensor a tensor on the same device, otherwise
        a numpy array; of a single image what `fit` makes of it.

    Raises:
        FileNotFoundError: no such image file.
        ImportError: an image file without Pillow.
        TypeError: something that is no image.
        ValueError: an unreadable file, a URL, a folder, another number of channels, values out of range, NaN, or a side
            more than 100 times the other.
    """

    def run(leaf: _Leaf) -> Any:
        reader, image, label = leaf
        pixels = reader(image, label)
        return fit(pixels) if fit is not None and _is_single(leaf) else pixels

    threads, leaves = _threads(workers), _leaves(images, name)
    yield from map(run, leaves) if threads == 1 else _in_order(run, leaves, threads)


def _in_order(run: Callable[[_Leaf], Any], leaves: Iterator[_Leaf], threads: int) -> Iterator[Any]:
    """`run` of each leaf in turn, single images by threads and a few ahead."""
    waiting: deque[Callable[[], Any]] = deque()
    met: set[int] = set()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        while True:
            while len(waiting) <= 2 * threads:
                try:
                    leaf = next(leaves)
                except StopIteration:
                    break
                except Exception as error:  # raised in its turn, after the images before it
                    waiting.append(partial(_raise, error))
                    break
                # an image that was met before may be loading still, which two threads must not do
                alone = _is_single(leaf) and not (leaf[0] is _from_pil and id(leaf[1]) in met)
                met.add(id(leaf[1]))
                waiting.append(pool.submit(run, leaf).result if alone else partial(run, leaf))
            if not waiting:
                return
            yield waiting.popleft()()
    finally:
        pool.shutdown(cancel_futures=True)


def count_images(images: ImageInput) -> int:
    """Number of images in what `decode` takes, without reading any file; iterators count as one, see `list_images`."""
    if _is_one(images):
        return 1
    if getattr(images, "one_each", False):  # a sequence that says so: looking at its items would read them
        return len(images)
    if hasattr(images, "__array__"):
        array = images if hasattr(images, "detach") else np.asarray(images)
        if not _holds_objects(array):
            return len(array) if array.ndim == 4 else 1
        images = array.tolist()
        return count_images(images)
    return sum(map(count_images, images)) if isinstance(images, Sequence) else 1


def list_images(images: ImageInput) -> ImageInput:
    """The same images, of which iterators have become lists, so that they can be counted."""
    if _is_one(images) or hasattr(images, "__array__") or isinstance(images, (Sequence, Mapping)):
        return images
    return list(images) if isinstance(images, Iterable) else images


def image_suffixes() -> tuple[str, ...]:
    """Suffixes, in lower case, of the image files that a folder of images is searched for: those of photographs which
    Pillow reads here. HEIC is among them once `pillow_heif.register_heif_opener()` was called."""
    Image = import_pillow()
    known = Image.registered_extensions()
    return tuple(suffix for suffix in _SUFFIXES if known.get(suffix) in Image.OPEN)


def import_pillow() -> Any:
    """The module `PIL.Image`.

    Raises:
        ImportError: there is none; the message says who needs it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"image files and images of another size need Pillow ({error}); install `pillow`, or pass arrays of the "
            "model's size."
        ) from None
    return Image


def _is_single(leaf: _Leaf) -> bool:
    """Whether it is one image, which a thread may read; tensors stay in the thread whose CUDA stream they are on."""
    reader, image, _ = leaf
    return reader in (_from_path, _from_bytes, _from_pil) or (isinstance(image, np.ndarray) and image.ndim < 4)


def _raise(error: Exception) -> None:
    raise error


def _threads(workers: int | None) -> int:
    if workers is None:
        return 1
    if workers == 0:
        raise ValueError("`workers` must be a number of threads, or -1 for one per core, got 0.")
    return workers if workers > 0 else max(1, (os.cpu_count() or 1) + 1 + workers)


def _leaves(images: ImageInput, name: str) -> Iterator[_Leaf]:
    """Each image or batch with the function that reads it and what messages call it."""
    label = f"`{name}`"
    if _is_pil(images):
        yield _from_pil, images, label
    elif isinstance(images, (str, os.PathLike)):
        yield _from_path, images, label
    elif isinstance(images, (bytes, bytearray, memoryview)):
        yield _from_bytes, images, label
    elif hasattr(images, "read"):
        yield _from_bytes, _content(images, label), label
    elif hasattr(images, "detach"):  # a tensor, known without importing torch
        yield partial(to_rgb, channels_last=False), images.detach(), label
    elif hasattr(images, "__array__"):
        array = np.asarray(images)
        if _holds_objects(array):  # an array or Series of paths, of PIL images
            yield from _leaves(array.tolist(), name)
        else:
            yield partial(to_rgb, channels_last=True), array, label
    elif isinstance(images, Iterable) and not isinstance(images, Mapping):
        for i, image in enumerate(images):
            yield from _leaves(image, f"{name}[{i}]")
    else:
        raise TypeError(f"{label} must be {_KINDS}, got {type(images).__name__}.")


def _is_pil(image: Any) -> bool:
    return any(cls.__module__ == "PIL.Image" for cls in type(image).__mro__)


def _is_one(images: Any) -> bool:
    return isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview)) or (
        _is_pil(images) or hasattr(images, "read")
    )


def _holds_objects(array: Any) -> bool:
    return getattr(array.dtype, "kind", "") in ("O", "U", "S", "T")


def _content(file: Any, label: str) -> bytes:
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        content = file.read()
    except Exception as error:  # closed, or any kind of error from what it reads
        raise _unreadable(label, error) from error
    if not isinstance(content, bytes):
        raise TypeError(f"{label} must be a file opened in binary mode, got {type(content).__name__} from `read()`.")
    return content


def _from_path(path: str | os.PathLike[str], label: str) -> np.ndarray:
    file = os.path.expanduser(os.fsdecode(path))
    shown = file if len(file) <= 200 else f"{file[:200]}..."
    if os.path.isdir(file):
        raise ValueError(f"{label} must be image files, got the folder {shown}; pass the files in it.")
    if not os.path.exists(file):
        if _URL.match(file):
            raise ValueError(f"{label} must be image files on this machine, got the URL {shown!r}; download it first.")
        raise FileNotFoundError(f"no image file {shown}.")
    if not os.path.isfile(file):  # reading a pipe or a device may never end
        raise ValueError(f"{label} must be image files, got {shown}, which is no regular file; copy it to one.")
    return _open(file, f"image file {shown}")


def _from_bytes(content: bytes, label: str) -> np.ndarray:
    return _open(io.BytesIO(content), label)


def _open(file: str | io.BytesIO, label: str) -> np.ndarray:
    Image = import_pillow()
    try:
        image = Image.open(file)
    except Exception as error:  # Pillow's readers raise many kinds
        raise _unreadable(label, error, _head(file)) from error
    with image:
        return _from_pil(image, label)


def _head(file: str | io.BytesIO) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:32]
    try:
        with open(file, "rb") as opened:
            return opened.read(32)
    except OSError:
        return b""


def _unreadable(label: str, error: Exception, head: bytes = b"") -> ValueError:
    kind, fix = type(error).__name__, "replace or remove it"
    found = f"{kind}: {error}"
    if kind.startswith("DecompressionBomb"):
        fix = "make it smaller, or raise `PIL.Image.MAX_IMAGE_PIXELS` if you trust it"
    elif kind == "UnidentifiedImageError":
        found = f"content that Pillow takes for no image, {head[:16]!r}..." if head else "no content"
        if head.startswith(b"version https://git-lfs"):
            found, fix = "a Git LFS pointer in its place", "fetch it with `git lfs pull`"
        elif head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf"):
            found, fix = "HEIC", "install `pillow-heif` and call `pillow_heif.register_heif_opener()`"
    return ValueError(f"{label} must be readable, got {found}; {fix}.")


def _from_pil(image: Any, label: str) -> np.ndarray:
    refuse_strips(image.height, image.width, label)
    try:
        image.load()
        deep = image.mode == "I" and image.format in ("PNG", "PPM")
        image = _upright(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        pixels = np.asarray(image if image.mode[0] in "IF" else image.convert("RGB"))
    except Exception as error:
        raise _unreadable(label, error) from error
    return to_rgb(pixels.astype(np.uint16) if deep else pixels, label, channels_last=True)


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # EXIF that cannot be read says nothing of the pixels, which are there
        return image
