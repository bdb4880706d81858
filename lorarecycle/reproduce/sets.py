"""Data sets of experiments: found by name under one folder, parted into classes to tune, to choose and to test on."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.lazy import Dataset
from ..data.names import is_number
from ..data.sets import PLACES, open_dataset
from ..data.splits import class_split, refuse_overlap

logger: logging.Logger = logging.getLogger(__name__)

Part = str
PARTS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
"""Our name of a part -> the names that sets give it."""


class SetMissing(FileNotFoundError):
    """A set, or a text, is not in the folder of the data."""


class Known(NamedTuple):
    """A set of the papers."""

    folders: tuple[str, ...]
    """Under the root, or under `datasets` there; npz files have their suffix."""
    split: str
    """Of `lorarecycle.data.splits`."""
    parts: tuple[str, ...] = ("train", "val", "test")
    """That have classes."""
    by_list: bool = False
    """Parted by the lists alone, whatever parts the files have."""


KNOWN = {
    "cifar-fs": Known(("cifar_fs.npz", "cifar_fs", "cifar-fs"), "cifar_fs"),
    "mini-imagenet": Known(("mini_imagenet", "mini-imagenet", "miniImageNet", "mini_imagenet.npz"), "mini_imagenet"),
    "vgg-flower": Known(("vgg_flower", "vgg-flower", "flowers102"), "vgg_flower"),
    "cub": Known(("cub", "CUB_200", "cub200"), "cub"),
    "chestx": Known(("chestx", "ChestX"), "chestx", ("test",)),
    "isic": Known(("isic", "ISIC2018"), "isic", ("test",)),
    "eurosat": Known(("eurosat.npz", "eurosat", "EuroSAT"), "eurosat", ("test",)),
    "crop-diseases": Known(("crop_diseases", "CropDiseases", "plant_village"), "crop_diseases", ("test",)),
    "crop-diseases-by-plant": Known(
        ("crop_diseases", "CropDiseases", "plant_village"), "crop_diseases_by_plant", ("train", "test"), by_list=True
    ),
    "aircraft": Known(("aircraft", "fgvc_aircraft"), "aircraft"),
    "dtd": Known(("dtd", "DTD"), "dtd"),
}


class Sets:
    """The sets of an experiment.

    Args:
        root: folder that holds them.
        own: sets of the experiment's file: name -> `{"path": under the root, or whatever `open_dataset` takes,
            "train", "val", "test": the set's own name of that part, or a list of classes}`; where it names none, the
            usual names of parts are tried, and a set without parts is one to test on.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a set of the file that does not say where it is, or whose lists of classes overlap.
    """

    def __init__(self, root: str | PathLike[str], own: Mapping[str, Any] | None = None) -> None:
        self.root: Path = Path(root).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"`data` must be a folder that holds the sets, got {self.root}.")
        self.own: dict[str, Any] = dict(own or {})
        for name, facts in self.own.items():
            if not isinstance(facts, Mapping) or not facts.get("path") or not set(facts) <= {"path", *PARTS}:
                raise ValueError(f"`sets.{name}` must hold `path` and maybe {', '.join(PARTS)}, got {facts!r}.")
            refuse_overlap({part: facts[part] for part in PARTS if isinstance(facts.get(part), list)}, name)
        self.open: Callable[[str, Part], Dataset] = cache(self._open)

    def _open(self, name: str, part: Part) -> Dataset:
        """A part of a set, its images on disk.

        Raises:
            ValueError: an unknown set, or one without such a part.
            SetMissing: it is not there.
        """
        try:
            return self._find(name, part)
        except FileNotFoundError as error:
            raise SetMissing(str(error)) from error

    def _find(self, name: str, part: Part) -> Dataset:
        if name in self.own:
            return self._own(name, part)
        known = find_known(name, self.own)
        if part not in known.parts and not class_split(known.split)[part]:
            raise ValueError(f"`set` must be one with a {part} part, got {name!r}, all of whose classes are for tests.")
        places = [place / folder for folder in known.folders for place in (self.root, self.root / "datasets")]
        path = next((place for place in places if place.exists()), None)
        if path is None:
            where = PLACES.get(name.replace("-", ""), "")
            raise FileNotFoundError(
                f"set {name!r} must be under {self.root} as one of {', '.join(known.folders)}, got none of them"
                f"{f'; it is to be had at {where}' if where else ''}."
            )
        return self._part(path, name, part, class_split(known.split)[part], own=not known.by_list)

    def read_text(self, name: str) -> str:
        """The text `texts/<name>.txt` under the root.

        Raises:
            SetMissing: there is none.
            ValueError: it is not in UTF-8.
        """
        path = self.root / "texts" / f"{name}.txt"
        if not path.is_file():
            raise SetMissing(f"text {name!r} must be {path}, got no such file.")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text {name!r} ({path}) must be in UTF-8, got other bytes ({error}).") from error

    def _own(self, name: str, part: Part) -> Dataset:
        facts = self.own[name]
        places = [self.root / facts["path"], self.root / "datasets" / facts["path"]]
        path = next((place for place in places if place.exists()), facts["path"])
        wanted = facts.get(part)
        if isinstance(wanted, str):
            return open_dataset(path, wanted)
        if isinstance(wanted, list):
            return open_dataset(path).select_classes(wanted)
        if part == "test" and not set(facts) & set(PARTS):  # a set for tests alone
            try:
                return self._part(path, name, part, ())
            except ValueError:
                return open_dataset(path)
        return self._part(path, name, part, ())

    def _part(self, path: Any, name: str, part: Part, classes: Sequence[str], own: bool = True) -> Dataset:
        """The part that the set itself has; else, or where that is not wanted, the classes of a list."""
        tried: Exception | None = None
        for named in PARTS[part] if own else ():
            try:
                return open_dataset(path, named)
            except (FileNotFoundError, ValueError) as error:
                tried = error
        if not classes:
            raise ValueError(f"set {name!r} ({path}) must have a part {part!r}, got none: {tried}") from tried
        whole = open_dataset(path)
        there = {plain: one for one in whole.class_names if (plain := _plain(one))}
        there |= {one: one for one in whole.class_names}
        found = [there[key] for one in classes if (key := one if one in there else _plain(one)) in there]
        if not found:
            raise ValueError(
                f"set {name!r} ({path}) must hold classes such as {', '.join(classes[:3])}, got "
                f"{', '.join(whole.class_names[:3])}."
            )
        if len(found) < len(classes):
            absent = [one for one in classes if one not in there and _plain(one) not in there]
            text = "%s: %d of %d %s classes are there, without %s"
            logger.warning(text, name, len(found), len(classes), part, ", ".join(absent))
        return whole.select_classes(found)


def find_known(name: str, own: Mapping[str, Any]) -> Known:
    """A set of the papers by name.

    Raises:
        ValueError: an unknown name; the known are listed.
    """
    if name not in KNOWN:
        raise ValueError(f"`set` must be one of {', '.join([*own, *KNOWN])}, got {name!r}.")
    return KNOWN[name]


def check_apart(seen: Dataset, unseen: Dataset, name: str, other: str | None = None) -> None:
    """Make sure that no class is tuned on and tested on: accuracy on seen classes is no few-shot accuracy.

    Args:
        seen: that adapters are tuned on.
        unseen: that is tested on.
        name: of the set that both are parts of, or that the second is.
        other: of the set that the first is a part of, where it is another one: "healthy" may mean another thing there.

    Raises:
        ValueError: a class, named, is in both parts of one set; or an image of classes that are mere numbers, or of
            another set, which may be others.
    """
    both = sorted(set(seen.class_names) & set(unseen.class_names))
    found = next((repr(one) for one in both if other is None and not is_number(one)), "")
    if both and not found:
        images = []
        for part in (seen, unseen):
            numbers = {part.class_names.index(one) for one in both}
            owned = zip(part.image_digests, part.labels.tolist(), strict=True)
            images.append({digest for digest, label in owned if label in numbers})
        shared = len(images[0] & images[1])
        found = f"{shared} images of the classes {', '.join(both[:5])}" if shared else ""
    if found:
        where = f"set {name!r}" if other is None else f"the sets {other!r} and {name!r}"
        raise ValueError(
            f"{where} must have each class in one part only, got {found} both in the part that adapters are tuned on "
            "and in the part that is tested on; take it out of one of them."
        )


def with_enough(data: Dataset, count: int, n_way: int, what: str) -> Dataset:
    """The classes with at least `count` images.

    Raises:
        ValueError: fewer than `n_way` of them are left.
    """
    counts = torch.bincount(data.labels, minlength=len(data.class_names))
    chosen = [i for i, n in enumerate(counts.tolist()) if n >= count]
    if len(chosen) < n_way:
        raise ValueError(
            f"{what} must have {n_way} classes of at least {count} images (shots and queries), got {len(chosen)}; "
            "lower `n_shot`, `n_query` or `n_way`."
        )
    return data if len(chosen) == len(data.class_names) else data.select_classes(chosen)


def _plain(name: str) -> str:
    """A class name as it is compared: letters and digits without case, without a number in front, without what stands
    in brackets, no word twice in a row; empty where nothing is left. Copies of one set spell its names in many ways."""
    bare = name.split(".", 1)[1] if name.partition(".")[0].isdecimal() and "." in name else name
    found = re.findall(r"\w+", re.sub(r"\(.*?\)", " ", bare).casefold().replace("_", " "))
    return "".join(word for word, before in zip(found, [None, *found][: len(found)], strict=True) if word != before)
