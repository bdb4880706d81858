"""FewShotClassifier: nearest class centres of a meta-LoRA's features, in scikit-learn's manners."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..data.images import ImageInput, count_images
from ..data.images import list_images as _listed
from ..meta.prototypes import Distance, class_centres, distance_logits
from ..vit.backbone import Backbone
from ..vit.features import extract_features
from .labels import NotFittedError, class_array, label_list, match_labels, require_same_length, sort_classes


class FewShotClassifier:
    """Classify images from a handful of labelled ones, without training (Eq. 3).

    Images may be whatever `lorarecycle.data.images.to_uint8` takes: PIL images, paths, numpy arrays, tensors,
    lists of those. Labels may be anything hashable.

    Args:
        backbone: a `Backbone`, or what `Backbone.load` takes.
        meta_lora: an `Adapter`, or what `Adapter.load` takes, merged once; the plain backbone when None.
        distance: "euclidean", "sqeuclidean" or "cosine".
        batch_size: images per forward pass.

    Attributes:
        classes_: [C], sorted where labels can be, else in order of first appearance; after `fit`.
        prototypes_: float32 [C, D], the class centres; after `fit`.

    Raises:
        ValueError: an adapter that does not fit the backbone, an unknown distance.
    """

    classes_: np.ndarray
    prototypes_: np.ndarray

    def __init__(
        self,
        backbone: Backbone | str | PathLike[str] | torch.nn.Module,
        meta_lora: Adapter | str | PathLike[str] | None = None,
        *,
        distance: Distance = "euclidean",
        batch_size: int = 64,
    ) -> None:
        self.backbone = backbone
        self.meta_lora = meta_lora
        self.distance: Distance = distance
        self.batch_size = batch_size
        self._prepare()

    def _prepare(self) -> None:
        if self.distance not in ("euclidean", "sqeuclidean", "cosine"):
            raise ValueError(f"`distance` must be 'euclidean', 'sqeuclidean' or 'cosine', got {self.distance!r}.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        model = self.backbone if isinstance(self.backbone, Backbone) else Backbone.load(self.backbone)
        lora = self.meta_lora
        if lora is not None:
            model = model.merge(lora if isinstance(lora, Adapter) else Adapter.load(lora))
        self._model = model

    def fit(self, support_images: ImageInput, support_labels: Iterable[Hashable]) -> FewShotClassifier:
        """Compute the class centres.

        Args:
            support_images: S images.
            support_labels: S labels.

        Returns:
            itself.

        Raises:
            ValueError: not one label per image, no image, an unreadable image, a NaN label.
            TypeError: a label that is not hashable.
        """
        images = _listed(support_images)
        labels, dtype = label_list(support_labels, "support_labels")
        require_same_length(count_images(images), labels, "support")
        classes = sort_classes(labels)
        features = self._features(images, "support_images")
        centres = class_centres(features, torch.from_numpy(match_labels(labels, classes)), len(classes))
        self.classes_, self.prototypes_ = class_array(classes, dtype), centres.numpy()
        return self

    def transform(self, images: ImageInput) -> np.ndarray:
        """Features of images, float32 [n, D]."""
        return self._features(_listed(images), "images").numpy()

    def decision_function(self, query_images: ImageInput) -> np.ndarray:
        """Logits, float32 [Q, C]: minus the distance to each class centre, in the order of `classes_`."""
        self._require_fitted()
        features = self._features(_listed(query_images), "query_images")
        return distance_logits(features, torch.from_numpy(self.prototypes_), self.distance).numpy()

    def predict_proba(self, query_images: ImageInput) -> np.ndarray:
        """Softmax of the logits, float32 [Q, C], in the order of `classes_`."""
        return torch.from_numpy(self.decision_function(query_images)).softmax(dim=-1).numpy()

    def predict(self, query_images: ImageInput) -> np.ndarray:
        """The label of the nearest class centre, [Q]."""
        logits = self.decision_function(query_images)
        return self.classes_[logits.argmax(axis=-1)]

    def score(self, query_images: ImageInput, query_labels: Iterable[Hashable]) -> float:
        """Share of the images whose predicted label is the given one, 0 to 1."""
        self._require_fitted()
        images = _listed(query_images)
        labels, _ = label_list(query_labels, "query_labels")
        require_same_length(count_images(images), labels, "query")
        truth = match_labels(labels, self.classes_.tolist())
        return float(np.mean(self.decision_function(images).argmax(axis=-1) == truth))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in ("backbone", "meta_lora", "distance", "batch_size")}

    def set_params(self, **params: Any) -> FewShotClassifier:
        """Change constructor arguments; another backbone or meta-LoRA asks for a new `fit`.

        Raises:
            ValueError: no such argument.
        """
        known = self.get_params()
        for name in params:
            if name not in known:
                raise ValueError(f"parameters must be some of {tuple(known)}, got {name!r}.")
        for name, value in params.items():
            setattr(self, name, value)
        self._prepare()
        if {"backbone", "meta_lora"} & set(params):
            self.__dict__.pop("classes_", None)
            self.__dict__.pop("prototypes_", None)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, Tags, TargetTags

        return Tags("classifier", TargetTags(required=True), classifier_tags=ClassifierTags())

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "prototypes_")

    def __repr__(self) -> str:
        lora = self.meta_lora.name if isinstance(self.meta_lora, Adapter) else self.meta_lora
        return f"FewShotClassifier({self._model.name!r}, {str(lora) if lora is not None else None!r})"

    def _features(self, images: ImageInput, name: str) -> Tensor:
        return extract_features(self._model, images, batch_size=self.batch_size, name=name)

    def _require_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(
                "the classifier must be fitted first, got no class centres; call `fit(support_images, support_labels)`."
            )
