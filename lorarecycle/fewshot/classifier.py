"""FewShotClassifier: nearest class centres of a meta-LoRA's features, as a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib import effective_n_jobs
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.exceptions import NotFittedError as ScikitLearnNotFittedError
from torch import Tensor

from ..data.images import ImageInput, count_images
from ..meta.prototypes import Distance, check_distance, class_centres, distance_logits, nearest_centres
from ..runtime.deprecation import renamed_arguments
from ..vit.backbone import Backbone
from ..vit.features import extract_features
from . import labels as plain
from .encoder import AdapterSource, BackboneSource, Encoder, share_encoder
from .inputs import list_images, read_labels, read_weights, require_classes
from .labels import class_array, match_labels, require_same_length, sort_classes
from .prototype_files import read_prototypes, write_prototypes

AT_ONCE = 1 << 22
"""Distances that are held at a time where the nearest centre alone is asked for."""


class NotFittedError(plain.NotFittedError, ScikitLearnNotFittedError):
    """The classifier was asked before `fit`."""


class _Fitted(NamedTuple):
    """What `fit` decided; later changes of the parameters wait for the next `fit`."""

    encoder: Encoder
    distance: Distance
    batch_size: int
    n_jobs: int | None
    compile: bool = False


class FewShotClassifier(ClassifierMixin, TransformerMixin, BaseEstimator):
    """Classify images from a handful of labelled ones, without training (Eq. 3).

    A scikit-learn estimator: `clone`, `Pipeline`, `cross_val_score` and `GridSearchCV` work, over `meta_lora` and
    `distance` for instance. The constructor stores its arguments, `fit` checks them, loads and merges. What was set
    after `fit` waits for the next one.

    Images `X` may be whatever `lorarecycle.data.images.to_uint8` takes: PIL images, paths, numpy arrays such as
    [n, H, W, C], tensors, lists or object arrays of those, a pandas Series of paths. Labels may be anything hashable
    but numbers with a fraction.

    Thousands of classes are fine: with C classes, S support images and width D, `fit` holds the features, 4 S D bytes,
    and the centres, 4 C D, and its time is that of S forward passes; `predict` and `score` hold 16 MB of distances at a
    time, whatever C and the number of queries (benchmarks/results/scale.md).

    Classifiers of the same backbone and meta-LoRA share one model within a process, clones among them. The models used
    last stay in memory until other ones are, or until `lorarecycle.fewshot.encoder.forget_encoders()`.

    A pickle holds what the constructor was given and the class centres, never the merged model: a backbone given by
    name or path is loaded again where the pickle is read, and must be the same, which is checked; a `Backbone` or
    module takes its weights along, and so does the meta-LoRA, which is small, even if given by path.

    Args:
        backbone: a `Backbone`, or what `Backbone.load` takes.
        meta_lora: an `Adapter`, or what `Adapter.load` takes; the plain backbone when None.
        distance: see `distance_logits`; "euclidean" is the papers'.
        batch_size: images per forward pass.
        n_jobs: threads that decode and resize the images of a list; None for one (or what `joblib.parallel_config`
            says), -1 for one per core.
        compile: run the model's blocks through `torch.compile`, and on a GPU each batch as one launch: for those who
            solve many tasks, as compiling takes seconds. Batches of one shape share it.

    Attributes:
        classes_: [C], sorted where labels can be, else in order of first appearance.
        prototypes_: float32 [C, D], the class centres.
    """

    classes_: np.ndarray
    prototypes_: np.ndarray

    def __init__(
        self,
        backbone: BackboneSource,
        meta_lora: AdapterSource | None = None,
        *,
        distance: Distance = "centred_cosine",
        batch_size: int = 64,
        n_jobs: int | None = None,
        compile: bool = False,
    ) -> None:
        self.backbone = backbone
        self.meta_lora = meta_lora
        self.distance: Distance = distance
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.compile = compile

    @renamed_arguments(support_images="X", support_labels="y")
    def fit(self, X: ImageInput, y: Iterable[Hashable]) -> FewShotClassifier:
        """Load and merge the model, and compute the class centres.

        Args:
            X: S support images.
            y: S labels.

        Returns:
            itself; unchanged where anything is raised.

        Raises:
            ValueError: a constructor argument out of range, an adapter that does not fit the backbone; not one label
                per image, no image, an unreadable image, a NaN label, a label with a fraction.
            TypeError: a constructor argument of another kind, a label that is not hashable.
            FileNotFoundError: no such backbone, meta-LoRA or image.
        """
        self._fit(X, y)
        return self

    @renamed_arguments(support_images="X", support_labels="y")
    def fit_transform(self, X: ImageInput, y: Iterable[Hashable]) -> np.ndarray:
        """`fit(X, y)`, and the features of X, float32 [S, D], which are computed once for both."""
        return self._fit(X, y)

    def transform(self, X: ImageInput) -> np.ndarray:
        """Features of images, float32 [n, D]."""
        return _extract(self._require_fitted(), self._images(X, fitting=False)).numpy()

    @renamed_arguments(query_images="X")
    def logits(self, X: ImageInput) -> np.ndarray:
        """`distance_logits` of the class centres, float32 [Q, C], in the order of `classes_`."""
        return self._logits(self._require_fitted(), self._images(X, fitting=False))

    @renamed_arguments(query_images="X")
    def decision_function(self, X: ImageInput) -> np.ndarray:
        """`logits`, as scikit-learn wants them: [Q, C], but for two classes [Q], the second's minus the first's."""
        logits = self.logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    @renamed_arguments(query_images="X")
    def predict_proba(self, X: ImageInput) -> np.ndarray:
        """Softmax of the logits, float32 [Q, C], in the order of `classes_`."""
        return torch.from_numpy(self.logits(X)).softmax(dim=-1).numpy()

    @renamed_arguments(query_images="X")
    def predict_log_proba(self, X: ImageInput) -> np.ndarray:
        """Logarithm of `predict_proba`, float32 [Q, C], finite where that is 0."""
        return torch.from_numpy(self.logits(X)).log_softmax(dim=-1).numpy()

    @renamed_arguments(query_images="X")
    def predict(self, X: ImageInput) -> np.ndarray:
        """The label of the nearest class centre, [Q]."""
        nearest = self._nearest(self._require_fitted(), self._images(X, fitting=False))
        return self.classes_[nearest]

    @renamed_arguments(query_images="X", query_labels="y")
    def score(self, X: ImageInput, y: Iterable[Hashable], sample_weight: Any = None) -> float:
        """Share of the images whose predicted label is the given one, 0 to 1.

        Args:
            X: Q images.
            y: Q labels.
            sample_weight: [Q], at least 0, what each image counts; all the same when None.

        Raises:
            NotFittedError: before `fit`.
            ValueError: not one label or weight per image, weights that are negative or all 0.
        """
        fitted = self._require_fitted()
        images = self._images(X, fitting=False)
        labels, _ = read_labels(y)
        require_same_length(count_images(images), labels, "y")
        weights = None if sample_weight is None else read_weights(sample_weight, len(labels))
        hits = self._nearest(fitted, images) == match_labels(labels, self.classes_.tolist())
        return float(np.average(hits, weights=weights))

    def save_prototypes(self, path: str | PathLike[str]) -> Path:
        """Write classes and centres to a .npz or .safetensors file, for `load_prototypes`.

        Raises:
            NotFittedError: there are none yet.
            ValueError: another suffix, or labels that are neither strings nor numbers.
        """
        encoder = self._require_fitted().encoder
        return write_prototypes(path, self.prototypes_, self.classes_, encoder.digest)

    def load_prototypes(self, path: str | PathLike[str]) -> FewShotClassifier:
        """Take classes and centres from a file instead of `fit`; the model is loaded and merged as `fit` does.

        The distance is not part of the file: the centres are the same for each.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, or centres of another model (other weights or dtype, another meta-LoRA, another
                preparation of images; a file of `FewShotSession` always is).
        """
        fitted = self._build()
        centres, classes = read_prototypes(path, fitted.encoder.digest, fitted.encoder.model.embed_dim)
        self._fitted, self.prototypes_, self.classes_ = fitted, centres, classes
        return self

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Names of the features that `transform` gives, [D]; `input_features` is not used."""
        self._require_fitted()
        prefix = type(self).__name__.lower()
        return np.array([f"{prefix}{i}" for i in range(self.prototypes_.shape[1])], dtype=object)

    def _images(self, X: Any, *, fitting: bool) -> ImageInput:
        """X as images that can be counted; a subclass that reads something else converts it here."""
        return list_images(X)

    def _fit(self, X: ImageInput, y: Any) -> np.ndarray:
        """Features of X; sets what `fit` decides, at its end."""
        images = self._images(X, fitting=True)
        labels, dtype = read_labels(y)
        require_same_length(count_images(images), labels, "y")
        require_classes(labels)
        classes = sort_classes(labels)
        fitted = self._build()
        features = _extract(fitted, images)
        centres = class_centres(features, torch.from_numpy(match_labels(labels, classes)), len(classes))
        self._fitted, self.prototypes_, self.classes_ = fitted, centres.numpy(), class_array(classes, dtype)
        return features.numpy()

    def _build(self) -> _Fitted:
        self._check_parameters()
        encoder = share_encoder(self.backbone, self.meta_lora)
        return _Fitted(encoder, self.distance, self.batch_size, self.n_jobs, bool(self.compile))

    def _check_parameters(self) -> None:
        check_distance(self.distance)
        if not _is_int(self.batch_size) or self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size!r}.")
        if not isinstance(self.compile, (bool, np.bool_)):
            raise ValueError(f"`compile` must be True or False, got {self.compile!r}.")
        if self.n_jobs is not None and (not _is_int(self.n_jobs) or self.n_jobs == 0):
            raise ValueError(f"`n_jobs` must be None, a number of threads, or -1 for all cores, got {self.n_jobs!r}.")

    def _logits(self, fitted: _Fitted, images: ImageInput) -> np.ndarray:
        centres = torch.tensor(self.prototypes_)  # a copy: joblib may have mapped it read-only
        return distance_logits(_extract(fitted, images), centres, fitted.distance).numpy()

    def _nearest(self, fitted: _Fitted, images: ImageInput) -> np.ndarray:
        """Place of the nearest class centre, [Q]: never all distances at a time where they are many."""
        centres = torch.tensor(self.prototypes_)
        parts = _extract(fitted, images).split(max(1, AT_ONCE // len(centres)))
        return torch.cat([nearest_centres(part, centres, fitted.distance) for part in parts]).numpy()

    def _require_fitted(self) -> _Fitted:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(
                "the classifier must be fitted first, got no class centres; call `fit(X, y)` with images and labels, "
                "or `load_prototypes(path)`."
            )
        return self._fitted

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "prototypes_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # images, not rows of features
        tags.transformer_tags.preserves_dtype = []  # float32, whatever the images are
        return tags

    def __sklearn_clone__(self) -> FewShotClassifier:
        """An unfitted copy; backbone and meta-LoRA are frozen, so they are handed on rather than copied."""
        frozen = {"backbone": self.backbone, "meta_lora": self.meta_lora}
        light = object.__new__(type(self))
        light.__dict__.update({**self.__dict__, **dict.fromkeys(frozen)})
        return super(FewShotClassifier, light).__sklearn_clone__().set_params(**frozen)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if isinstance(self.backbone, Backbone):
            state["backbone"] = self.backbone.clone()  # without what it may have been merged from
        if "_fitted" in state:
            recipe = self._fitted.encoder.recipe()
            if self._fitted.encoder.source is self.backbone:
                recipe = recipe._replace(source=state["backbone"])  # stored once
            state["_fitted"] = (recipe, *self._fitted[1:])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_fitted" in state:
            recipe, *settings = state["_fitted"]
            state = {**state, "_fitted": _Fitted(recipe.build(), *settings)}
        super().__setstate__(state)


# set last: `set_output` of scikit-learn lies around `transform`, and would miss an X under its old name
FewShotClassifier.transform = renamed_arguments(images="X")(FewShotClassifier.transform)  # type: ignore[method-assign]


def _extract(fitted: _Fitted, images: ImageInput) -> Tensor:
    workers = effective_n_jobs(fitted.n_jobs)  # what `joblib.parallel_config` says where it is None
    model, forward = fitted.encoder.model, fitted.encoder.compiled if fitted.compile else None
    return extract_features(model, images, batch_size=fitted.batch_size, name="X", workers=workers, forward=forward)


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
