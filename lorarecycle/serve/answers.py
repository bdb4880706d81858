"""Answers with what explains them: probabilities, the nearest example, and where the model looked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..config import MIDDLE, SHARPNESS, Distance
from ..runtime.files import read_object
from ..work_dir import RECORD, WorkDir, load_base


class Answer(NamedTuple):
    """What is said about one query."""

    label: str
    probabilities: dict[str, float]
    """Of every class, in the order in which classes were given."""
    nearest: int
    """Place of the example whose feature is nearest."""
    attention: list[list[float]] | None
    """Rows and columns of patches: attention of the class token in the last block, 1 for the most; None where the
    model does not tell."""


class Model(Protocol):
    """What answers are made with."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def distance(self) -> Distance:
        """By which class means are compared, see `distance_logits`."""

    def look(self, images: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """Features, float32 [n, D], and attention over the patches [n, rows, columns] where it is known."""


@dataclass(frozen=True)
class TorchModel:
    """A backbone with its meta-LoRA merged in."""

    backbone: Any
    name: str
    distance: Distance = "centred_cosine"

    def look(self, images: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Model`."""
        import torch

        from ..vit.features import normalized_batches

        features, maps, model = [], [], self.backbone
        with torch.no_grad():
            for batch in normalized_batches(model, list(images), batch_size=16):
                encoding = model.encode(batch, scores=True)
                features.append(model.pool(encoding.tokens).float())
                rows, columns = (side // model.patch_size for side in batch.shape[-2:])
                maps.append(encoding.scores.float().view(len(batch), rows, columns))
        return torch.cat(features).cpu().numpy(), torch.cat(maps).cpu().numpy()


@dataclass(frozen=True)
class OnnxModel:
    """An exported model, without attention."""

    session: Any
    name: str

    @property
    def distance(self) -> Distance:
        """What it was exported with."""
        return self.session.config["distance"]  # type: ignore[no-any-return]

    def look(self, images: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Model`."""
        return self.session.transform(list(images)), None


def open_model(
    source: str | PathLike[str],
    *,
    base: str | None = None,
    weights: str | PathLike[str] | None = None,
    image_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Model:
    """The model that a folder stands for.

    Args:
        source: the `work_dir` of a run, an exported model (`python -m lorarecycle.export --onnx`), or a PEFT adapter.
        base, weights, image_size: model of a run or an adapter, as in `Backbone.load`; what it names itself when None.
        device, dtype: as in `recycle`; not for an exported model.

    Raises:
        FileNotFoundError: no such folder, or one of none of these kinds.
        ValueError: the base is not named, does not fit, or is another than the run's.
    """
    folder = Path(source).expanduser()
    if (folder / "encoder.onnx").is_file():
        from ..export import FewShotSession

        return OnnxModel(FewShotSession(folder), folder.resolve().name)
    record = None
    if (folder / RECORD).is_file():
        record = read_object(folder / RECORD)
        folder = WorkDir(folder).meta_lora
    elif not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"`source` must be the work_dir of a run, an exported model or a PEFT adapter, got {folder} with none of "
            f"{RECORD}, encoder.onnx and adapter_config.json."
        )
    from ..adapters.adapter import Adapter
    from ..runtime.device import resolve
    from ..vit.backbone import Backbone

    meta_lora = Adapter.load(folder)
    where, precision = resolve(device, dtype)
    named: dict[str, Any] = {"weights": weights, "image_size": image_size, "device": where}
    if record is not None:
        plain = load_base(record, base=base, **named)
    elif base or meta_lora.base_model:
        plain = Backbone.load(base or str(meta_lora.base_model), **named)
    else:
        raise ValueError("`base` must name the model, got none, nor does the adapter name one; pass it.")
    return TorchModel(plain.merge(meta_lora).to(precision), f"{plain.name} with {meta_lora.name}")


def answer(
    model: Model, support: Mapping[str, Sequence[Any]], queries: Sequence[Any]
) -> tuple[list[Answer], dict[str, float]]:
    """Classify queries by the nearest class mean, in the model's distance.

    Args:
        model: see `open_model`.
        support: class -> images of it, at least one of at least one class.
        queries: images, at least one.

    Returns:
        an `Answer` for each query, and milliseconds of "learn" (examples) and "answer" (all queries).

    Raises:
        ValueError: no class, a class without images, no query, an unreadable image.
    """
    if not support or not queries:
        raise ValueError("`support` must name a class and `queries` hold an image, got none.")
    empty = [name for name, images in support.items() if not len(images)]
    if empty:
        raise ValueError(f"`support` must hold an image of every class, got none of {', '.join(empty)}.")
    names, examples = list(support), [image for images in support.values() for image in images]
    owner = np.repeat(np.arange(len(names)), [len(images) for images in support.values()])
    start = time.perf_counter()
    known, _ = model.look(examples)
    centres = np.stack([known[owner == c].mean(axis=0) for c in range(len(names))])
    learnt = time.perf_counter()
    features, maps = model.look(queries)
    logits = logits_of(features, centres, model.distance)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    nearest = logits_of(features, known, model.distance).argmax(axis=1)
    done = time.perf_counter()
    found = [
        Answer(
            names[int(row.argmax())],
            {name: float(share) for name, share in zip(names, row, strict=True)},
            int(nearest[i]),
            None if maps is None else (maps[i] / maps[i].max()).round(4).tolist(),
        )
        for i, row in enumerate(shares)
    ]
    return found, {"learn": 1000 * (learnt - start), "answer": 1000 * (done - learnt)}


def logits_of(features: np.ndarray, centres: np.ndarray, distance: Distance) -> np.ndarray:
    """`distance_logits` in numpy, as an exported model is served without torch."""
    if distance == "centred_cosine":
        middle = MIDDLE * centres.mean(axis=0)
        return SHARPNESS * (_unit(features - middle) @ _unit(centres - middle).T - 1)
    if distance == "cosine":
        return _unit(features) @ _unit(centres).T - 1
    lengths = np.linalg.norm(features[:, None] - centres, axis=-1)
    return -lengths if distance == "euclidean" else -(lengths**2)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Each row brought to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
