"""The folder of a run: its record, where its surrogates and checkpoints are, and whether it is of this run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .adapters.adapter import Adapter
from .adapters.stored import signature_of
from .config import RecycleConfig, as_plain
from .inversion.prior import BatchNormPrior
from .runtime.files import LEFTOVER, read_json, read_object, remove_leftovers, require_place, write_json
from .runtime.shared_folder import require_shared_folder
from .runtime.version import __version__
from .vit.backbone import Backbone

RECORD = "run.json"
IMAGES = "surrogates"
ROUNDED = (torch.bfloat16, torch.float16)
"""Precisions in which a base may have been given to `recycle`, which goes on in float32."""


class WorkDir:
    """The files of a run, which it goes on from.

    Args:
        folder: where they are; nothing is made before `open`.
        inverted: number -> adapter, those that images are made of. Names of files follow from their weights.
    """

    def __init__(self, folder: Path, inverted: Mapping[int, Adapter] | None = None) -> None:
        self.folder = folder
        images = folder / IMAGES
        self.surrogates: dict[int, Path] = {
            i: images / f"{i:05d}-{adapter.weights_digest()[:16]}.safetensors"
            for i, adapter in (inverted or {}).items()
        }
        self.pictures: Path = images / "pictures.safetensors"
        self.record: Path = folder / RECORD
        self.claims: Path = folder / "claims"
        self.checkpoint: Path = folder / "meta_checkpoint.safetensors"
        self.losses: Path = folder / "losses.csv"
        self.summary: Path = folder / "summary.json"
        self.meta_lora: Path = folder / "meta_lora"

    @property
    def finished(self) -> bool:
        """Whether the images of every adapter are there."""
        return all(path.exists() for path in self.surrogates.values())

    def recorded_prior(self) -> str | None:
        """Digest of the prior that the images were made with, where there are any and a prior was needed."""
        return read_object(self.record).get("prior") if self.record.exists() else None

    def open(self, run: dict[str, Any]) -> bool:
        """Make the folder, or make sure that it is of this run and that its file system can keep it.

        Of several processes the first one opens it before the others do. Files that they, or other runs of the same
        settings, are writing stay.

        Args:
            run: what makes it this one (see `describe_run`).

        Returns:
            whether the run has been here before.

        Raises:
            ValueError: a folder of another run, with other files in it, or on a file system that cannot keep a run.
            OSError: it cannot be written to.
        """
        folder, record = self.folder, self.record
        for place in (folder, self.pictures.parent, self.claims):
            if place.exists() and not place.is_dir():
                raise ValueError(f"`work_dir` {folder} must be a folder of this run, got a file at {place}.")
        if record.exists():
            ours, theirs = _without_names(run), _without_names(read_json(record))
            if ours != theirs:
                keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
                raise ValueError(
                    f"`work_dir` {folder} must be of this run, got one that differs in {', '.join(keys)} (see "
                    f"{record}); choose another folder, or the settings of that run."
                )
        elif not _is_empty(folder):
            raise ValueError(f"`work_dir` {folder} must be new, empty or of this run, got one with other files in it.")
        require_place(folder, "work_dir", folder=True)
        images = self.pictures.parent
        remove_leftovers(folder)
        remove_leftovers(images)
        if folder.exists():
            require_shared_folder(folder)
        known = record.exists()
        if not known:
            write_json(record, run)  # first: whatever else is there is of this run
        images.mkdir(exist_ok=True)
        return known


def describe_run(
    config: RecycleConfig,
    adapters: Sequence[Adapter],
    backbone: Backbone,
    dtype: torch.dtype,
    prior: BatchNormPrior | None,
    images: str = "drawn",
) -> dict[str, Any]:
    """What makes a run this one; names are there for people and may change."""
    return {
        "lorarecycle": __version__,
        "base": {
            "name": backbone.name,
            "sha256": backbone.digest(),
            "weights": backbone.weights_file,
            "image_size": backbone.image_size,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "resize": backbone.fit.resize,
            "crop_pct": backbone.fit.crop_pct,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "adapters": [{"name": a.name, "sha256": a.weights_digest()} for a in adapters],
        "prior": None if prior is None else prior.digest(),
        "config": as_plain(config),
        "images": images,
    }


def load_base(
    record: Mapping[str, Any],
    *,
    base: str | None = None,
    weights: str | PathLike[str] | None = None,
    image_size: int | None = None,
    device: str | torch.device | None = None,
) -> Backbone:
    """The plain model that a run was of, float32.

    Args:
        record: of the run, see `describe_run`.
        base, weights, image_size: as in `Backbone.load`; name and size are the record's when None. The rest of how
            images are prepared is the record's.
        device: where it runs.

    Raises:
        ValueError: it is another model than the run's: other weights, size or preparation of images.
        FileNotFoundError: see `Backbone.load`.
    """
    known = record["base"]
    own: dict[str, Any] = {key: known.get(key) for key in ("image_size", "mean", "std", "resize", "crop_pct")}
    own |= {} if image_size is None else {"image_size": image_size}
    found = Backbone.load(base or str(known["name"]), weights=weights, **own, device=device).float()
    rounded = (found.clone().to(dtype).float() for dtype in ROUNDED)
    same = next((one for one in itertools.chain([found], rounded) if known.get("sha256") in (None, one.digest())), None)
    if same is None:
        file = f", weights {known['weights']}" if known.get("weights") else ""
        raise ValueError(
            f"`base` must be the model that the run was of ({known['name']}{file}), got {found!r} with other weights "
            "or another preparation of images; name it by `base`, `weights` and `image_size`."
        )
    return same


def canonical_order(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters in an order that their names and places do not change, nor the rounding of a file format."""
    return sorted(adapters, key=signature_of)


def _is_empty(folder: Path) -> bool:
    """Whether a folder is absent, or holds nothing but what a run that was stopped before its record left."""
    found = [path for path in folder.iterdir() if not path.name.startswith(LEFTOVER)] if folder.exists() else []
    return all(path.name == IMAGES and path.is_dir() and _is_bare(path) for path in found)


def _is_bare(folder: Path) -> bool:
    return all(path.name.startswith(LEFTOVER) for path in folder.iterdir())


def _without_names(run: Any) -> dict[str, Any]:
    """A run's record without the names in it, adapters in no order."""
    if not isinstance(run, dict):
        return {}
    base, adapters = run.get("base"), run.get("adapters")
    return {
        **run,
        "base": base.get("sha256") if isinstance(base, dict) else base,
        "adapters": sorted(str(a.get("sha256")) for a in _list(adapters) if isinstance(a, dict)),
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
