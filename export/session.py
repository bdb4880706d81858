"""FewShotSession: `FewShotClassifier` on ONNX Runtime, with numpy and onnxruntime and without torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..data.decode import count_images, list_images
from ..fewshot.labels import NotFittedError, class_array, label_list, match_labels, require_same_length, sort_classes
from ..fewshot.prototype_files import read_prototypes, write_prototypes
from ..runtime.settled import read_settled
from .folder_config import CONFIG, check_hash, model_hash, read_config
from .pixels import normalize, to_batches
from .runtime import Graph

DIFFERENCES = 1 << 24
"""Numbers that the head holds at a time, 64 MB of them."""


class FewShotSession:
    """Classify images from a handful of labelled ones with an exported model (Eq. 3).

    `fit`, `predict`, `predict_proba` and `score` take and give what those of `FewShotClassifier` do; images may be
    PIL images, paths, numpy arrays, tensors, or lists of those.

    Args:
        directory: written by `export_onnx` or `python -m lorarecycle.export --onnx`.
        providers: ONNX Runtime's execution providers in the order to try, of which the first must load; CUDA, TensorRT,
            CPU where present when None.
        threads: threads within an operation; `OMP_NUM_THREADS`, else one per core, when None.
        batch_size: images per call; a model exported with a fixed batch uses that.
        verify: compare the files' hashes with config.json.

    Attributes:
        config: the content of config.json.
        classes_: [C], sorted where labels can be, else in order of first appearance; after `fit` or `load_prototypes`.
        prototypes_: float32 [C, D], the class centres.

    Raises:
        ImportError: onnxruntime is missing; the message names the extra.
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: a corrupt, truncated or replaced file, a provider that is unknown or does not load.
    """

    classes_: np.ndarray
    prototypes_: np.ndarray

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        batch_size: int = 8,
        verify: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.directory: Path = Path(directory).expanduser()
        self._options: dict[str, Any] = {"providers": providers, "threads": threads}
        self._verify = verify

        def read() -> tuple[Graph, Graph]:
            self.config: dict[str, Any] = read_config(self.directory)
            return self._open("encoder.onnx"), self._open("head.onnx")

        names = (CONFIG, "encoder.onnx", "encoder.onnx.data", "head.onnx")
        self._encoder, self._head = read_settled(self.directory, names, read)
        fixed = self.config["batch_size"]
        self.batch_size: int = batch_size if fixed == "dynamic" else int(fixed)

    def __getstate__(self) -> dict[str, Any]:
        """All but the sessions of ONNX Runtime, for `pickle`: a process that is spawned opens the files anew."""
        return {key: value for key, value in self.__dict__.items() if not isinstance(value, Graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encoder, self._head = self._open("encoder.onnx"), self._open("head.onnx")

    def fit(self, support_images: Any, support_labels: Iterable[Hashable]) -> FewShotSession:
        """Compute the class centres.

        Args:
            support_images: S images.
            support_labels: S labels, anything hashable.

        Returns:
            itself.

        Raises:
            ValueError: not one label per image, no image, an unreadable image, NaN pixels, a NaN label.
            TypeError: a label that is not hashable.
        """
        images = list_images(support_images)
        labels, dtype = label_list(support_labels, "support_labels")
        require_same_length(count_images(images), labels, "support_labels")
        classes = sort_classes(labels)
        index = match_labels(labels, classes)
        features = self._features(images, "support_images")
        order = np.argsort(index, kind="stable")
        first = np.searchsorted(index[order], np.arange(len(classes)))  # every class has an image
        counts = np.diff(first, append=len(order)).astype(np.float32)
        self.prototypes_ = np.add.reduceat(features[order], first, axis=0) / counts[:, None]
        self.classes_ = class_array(classes, dtype)
        return self

    def transform(self, images: Any) -> np.ndarray:
        """Features of images, float32 [n, D]."""
        return self._features(list_images(images), "images")

    def embed(self, pixel_values: np.ndarray) -> np.ndarray:
        """Features of pixels that are prepared already, float32 [n, D].

        Args:
            pixel_values: [n, 3, H, W] as config.json says: float32 and normalised, or uint8.

        Raises:
            ValueError: another shape or dtype, or NaN.
        """
        return self._encoder.run({"pixel_values": np.asarray(pixel_values)})["embeddings"].numpy()

    def decision_function(self, query_images: Any) -> np.ndarray:
        """Logits, float32 [Q, C]: minus the distance to each class centre, in the order of `classes_`."""
        return self._ask(query_images, "logits")

    def predict_proba(self, query_images: Any) -> np.ndarray:
        """Softmax of the logits, float32 [Q, C], in the order of `classes_`."""
        return self._ask(query_images, "probabilities")

    def predict(self, query_images: Any) -> np.ndarray:
        """The label of the nearest class centre, [Q]."""
        self._require_fitted()
        return self.classes_[self._nearest(list_images(query_images))]

    def score(self, query_images: Any, query_labels: Iterable[Hashable]) -> float:
        """Share of the images whose predicted label is the given one, 0 to 1."""
        self._require_fitted()
        images = list_images(query_images)
        labels, _ = label_list(query_labels, "query_labels")
        require_same_length(count_images(images), labels, "query_labels")
        truth = match_labels(labels, self.classes_.tolist())
        return float(np.mean(self._nearest(images) == truth))

    def solve(self, support_images: Any, support_labels: Iterable[int], query_images: Any) -> np.ndarray:
        """A whole task in one call of episode.onnx, which keeps no centres.

        Args:
            support_images: S images.
            support_labels: S integers, every one of 0 to C - 1 at least once.
            query_images: Q images.

        Returns:
            logits, float32 [Q, C].

        Raises:
            ValueError: not one label per image, or a class without support images.
        """
        images = list_images(support_images)
        given, _ = label_list(support_labels, "support_labels")
        require_same_length(count_images(images), given, "support_labels")
        labels = np.array(given)
        if given and labels.dtype.kind not in "iu":
            raise ValueError(f"`support_labels` must be integers, got {labels.dtype}; number the classes from 0.")
        classes = sorted(set(labels.tolist()))
        if classes != list(range(len(classes))):
            raise ValueError(
                f"`support_labels` must hold every class from 0 to the largest, each at least once, got the classes "
                f"{classes[:20]}; number them without gaps."
            )
        feeds = {
            "support_images": np.concatenate(list(self._pixels(images, "support_images"))),
            "support_labels": labels.astype(np.int64),
            "query_images": np.concatenate(list(self._pixels(list_images(query_images), "query_images"))),
        }
        return self._episode.run(feeds)["logits"].numpy()

    def save_prototypes(self, path: str | PathLike[str]) -> Path:
        """Write classes and centres to a .npz or .safetensors file, for `load_prototypes`.

        Raises:
            NotFittedError: there are none yet.
            ValueError: another suffix, or labels that are neither strings nor numbers.
        """
        self._require_fitted()
        return write_prototypes(path, self.prototypes_, self.classes_, model_hash(self.config))

    def load_prototypes(self, path: str | PathLike[str]) -> FewShotSession:
        """Take classes and centres from a file instead of `fit`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, or centres of another model (other weights, other preparation of images).
        """
        self.prototypes_, self.classes_ = read_prototypes(path, model_hash(self.config), self.config["embed_dim"])
        return self

    def __repr__(self) -> str:
        return f"FewShotSession({str(self.directory)!r}, {self.config.get('model')!r}, {self.config.get('dtype')!r})"

    @cached_property
    def _episode(self) -> Graph:
        return self._open("episode.onnx")

    def _open(self, name: str) -> Graph:
        if self._verify:
            check_hash(self.directory, name, self.config)
        return Graph(self.directory / name, **self._options)

    def _ask(self, query_images: Any, output: str) -> np.ndarray:
        self._require_fitted()
        return np.concatenate(list(self._answers(list_images(query_images), output)))

    def _nearest(self, images: Any) -> np.ndarray:
        """Place of the nearest class centre, [Q]: never all distances at a time."""
        return np.concatenate([logits.argmax(axis=-1) for logits in self._answers(images, "logits")])

    def _answers(self, images: Any, output: str) -> Iterable[np.ndarray]:
        """What the head says of each batch, [B, C]. It is asked about part of the classes at a time where there are
        many, as it holds a difference of width D for each pair; with a cosine it holds none, and wants all at once."""
        centres = self.prototypes_
        step = max(1, DIFFERENCES // (self.batch_size * centres.shape[1]))
        for embeddings, n in self._embeddings(images, "query_images"):
            if len(centres) <= step or "cosine" in self.config["distance"]:
                yield self._head.run({"embeddings": embeddings, "prototypes": centres})[output].numpy()[:n]
                continue
            parts = [centres[start : start + step] for start in range(0, len(centres), step)]
            logits = np.concatenate(
                [self._head.run({"embeddings": embeddings, "prototypes": p})["logits"].numpy()[:n] for p in parts],
                axis=1,
            )
            yield logits if output == "logits" else _softmax(logits)

    def _features(self, images: Any, name: str) -> np.ndarray:
        return np.concatenate([embeddings.numpy()[:n] for embeddings, n in self._embeddings(images, name)])

    def _embeddings(self, images: Any, name: str) -> Iterable[tuple[Any, int]]:
        """OrtValues [B, D] where the encoder leaves them, and how many of their rows count."""
        fixed = self.config["batch_size"] != "dynamic"
        for pixels in self._pixels(images, name):
            n = len(pixels)
            if fixed and n < self.batch_size:
                pixels = np.concatenate([pixels, pixels[-1:].repeat(self.batch_size - n, axis=0)])
            yield self._encoder.run({"pixel_values": pixels})["embeddings"], n

    def _pixels(self, images: Any, name: str) -> Iterable[np.ndarray]:
        config = self.config
        fit = {"resize": config["resize"], "crop_pct": config["crop_pct"]}
        for pixels in to_batches(images, config["image_size"], self.batch_size, name=name, **fit):
            yield pixels if config["input_dtype"] == "uint8" else normalize(pixels, config["mean"], config["std"])

    def _require_fitted(self) -> None:
        if not hasattr(self, "prototypes_"):
            raise NotFittedError(
                "the session must have class centres first, got none; call `fit(support_images, support_labels)` or "
                "`load_prototypes(path)`."
            )


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
