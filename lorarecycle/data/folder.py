"""A folder with a sub-folder of images per class, read as torchvision reads it; what is left out is counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from logging import getLogger
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder

from ..runtime.strict import left_out_error
from .decode import decode, image_suffixes

_LITTER = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found", "system volume information"}
_BACK = "links to a folder above"
_BESIDE = "image files beside the class folders"
_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class ClassFolders(ImageFolder):
    """Labelled image files, decoded one by one.

    A sub-folder is a class; all image files in it and in its own sub-folders belong to it, in the order of
    torchvision's `ImageFolder`. Left out are hidden files and folders and what operating systems leave behind
    (`__MACOSX`, `._a.jpg`, `Thumbs.db`), files of other kinds (see `image_suffixes`), image files beside the class
    folders, and classes without images; one line of the log counts them.

    Args:
        root: the folder.
        split: a part of it, `root/split/class/...`; the folder itself when None.
        strict: True: what is left out is an error. False: image files that cannot be read are left out too, and
            counted; each is read once for that. None: what is left out is counted only.

    Attributes:
        classes: C names, sorted.
        class_to_idx: names to labels, 0 to C - 1.
        samples: (file, label) of each image; `targets` are the labels alone.
        skipped: what was left out, to how many.

    Items are uint8 [3, H, W] in their own size, and the label.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folder, no image, or parts of a data set such as train and test in the place of classes;
            with `strict=True`, anything left out.
    """

    classes: list[str]
    class_to_idx: dict[str, int]
    samples: list[tuple[str, int]]
    targets: list[int]

    def __init__(self, root: str | PathLike[str], split: str | None = None, *, strict: bool | None = None) -> None:
        path = Path(root).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"`root` must be a folder with a sub-folder of image files per class, got {path}.")
        if split is not None:
            if not (path / split).is_dir():
                raise FileNotFoundError(f"`split` must be a folder in {path}, got {split!r}.")
            path = path / split
        self.skipped: Counter[str] = Counter()
        self._suffixes, self._tries = image_suffixes(), strict is False
        super().__init__(str(path), loader=read_image, is_valid_file=self._is_image, allow_empty=True)
        self._refuse_parts()
        self._drop_empty_classes()
        if self.skipped and strict:
            held = f"{path} with {len(self)} images of {len(self.classes)} classes"
            raise left_out_error(f"{held}; {self._left_out().removesuffix('.')}")
        if self.skipped:
            getLogger(__name__).warning(
                "%s: %d images of %d classes; %s", path, len(self), len(self.classes), self._left_out()
            )

    def make_dataset(  # type: ignore[override]  # torchvision's is static
        self,
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: Any = None,
        is_valid_file: Any = None,
        allow_empty: bool = False,
    ) -> list[tuple[str, int]]:
        """(file, label) of each image, in torchvision's order; links that lead back to a folder above are left out."""
        samples = []
        for name in sorted(class_to_idx):
            found = []
            for root, inner, files in os.walk(os.path.join(directory, name), followlinks=True):
                round_about = [one for one in inner if self._leads_back(Path(root, one))]
                self.skipped[_BACK] += len(round_about)
                inner[:] = [one for one in inner if one not in round_about]
                found.append((root, sorted(files)))
            paths = (os.path.join(root, file) for root, files in sorted(found) for file in files)
            samples += [(path, class_to_idx[name]) for path in paths if is_valid_file(path)]
        self.skipped = +self.skipped  # without what was counted zero times
        return samples

    def _leads_back(self, folder: Path) -> bool:
        if not folder.is_symlink():
            return False
        real = folder.resolve()
        return any(real == above or real in above.parents for above in map(Path.resolve, folder.parents))

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The sub-folders that are not hidden, sorted."""
        names = []
        for entry in os.scandir(directory):
            if _is_hidden(entry.name):
                self.skipped["hidden"] += 1
            elif entry.is_dir():
                names.append(entry.name)
            elif Path(entry.name).suffix.lower() in self._suffixes:
                self.skipped[_BESIDE] += 1
        if not names:
            raise ValueError(
                f"{directory} must hold a sub-folder of image files per class, got no sub-folder and "
                f"{self.skipped[_BESIDE]} image files; move the images of each class into a folder with its name."
            )
        names.sort()
        return names, {name: label for label, name in enumerate(names)}

    def _is_image(self, path: str) -> bool:
        if any(map(_is_hidden, Path(path).relative_to(self.root).parts)):
            self.skipped["hidden"] += 1
            return False
        suffix = Path(path).suffix.lower()
        if suffix in self._suffixes:
            return not self._tries or self._can_read(path)
        self.skipped[suffix or "without suffix"] += 1
        return False

    def _can_read(self, path: str) -> bool:
        try:
            read_image(path)
        except ValueError:
            self.skipped[f"unreadable ({Path(path).relative_to(self.root)})"] += 1
            return False
        return True

    def _refuse_parts(self) -> None:
        depths: dict[int, set[int]] = {}
        for file, label in self.samples:
            depths.setdefault(label, set()).add(len(Path(file).relative_to(self.root).parts))
        parts = [self.classes[c] for c, found in depths.items() if 2 not in found and self.classes[c].lower() in _PARTS]
        if len(parts) > 1 or (parts and len(depths) == 1):
            part = next((name for name in parts if name.lower().startswith("train")), parts[0])
            raise ValueError(
                f"{self.root} must hold a folder per class, got folders of classes in {', '.join(parts)}; pass "
                f"`split={part!r}`, or the folder {Path(self.root) / part} itself."
            )

    def _drop_empty_classes(self) -> None:
        used = sorted(set(self.targets))
        empty = [name for label, name in enumerate(self.classes) if label not in used]
        if empty:
            self.skipped[f"without images ({', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''})"] = len(empty)
        if not used:
            raise ValueError(
                f"{self.root} must hold image files ({' '.join(self._suffixes)}) in a sub-folder per class, got none; "
                f"{self._left_out()}"
            )
        self.classes = [self.classes[label] for label in used]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.samples = self.imgs = [(file, used.index(label)) for file, label in self.samples]
        self.targets = [label for _, label in self.samples]

    def _left_out(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(self.skipped.items()))
        heif = {".heic", ".heif"} & set(self.skipped)
        hint = "; `pillow_heif.register_heif_opener()` makes HEIC readable" if heif else ""
        return f"left out: {counts}{hint}."


def read_image(file: str | PathLike[str]) -> Tensor:
    """An image file as `to_uint8` reads it, in its own size, uint8 [3, H, W]."""
    return torch.tensor(next(decode(file))[0])


def readable(files: Sequence[Path]) -> list[Path]:
    """The image files that can be read, in their order; the others are counted and named in one line of the log.

    Raises:
        ValueError: none can.
    """
    good, bad = [], []
    for file in files:
        try:
            read_image(file)
            good.append(file)
        except (ValueError, OSError) as error:
            bad.append(str(error))
    if not good:
        raise ValueError(
            f"`files` must hold an image that can be read, got {len(bad)} bad ones: {bad[0] if bad else ''}"
        )
    if bad:
        getLogger(__name__).warning("%d of %d files left out: %s", len(bad), len(files), " ".join(bad[:5]))
    return good


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER
