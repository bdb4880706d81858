"""Maps of features: where images lie before and after the meta-LoRA, in two dimensions (t-SNE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..vit.backbone import Backbone
from ..vit.features import extract_features
from .images import every, mean_colours
from .run import Run

MOST = 240
"""Images of a map; t-SNE takes seconds for so many."""
COLOURS = 8
"""Classes that get a colour of their own."""


@dataclass(frozen=True)
class FeatureMap:
    """The same images twice.

    Attributes:
        before, after: (x, y) under the plain ViT and with the meta-LoRA.
        styles: class of the style sheet or colour of each image.
        classes: name and style of each class that is coloured; none where colours are those of the images.
    """

    before: list[tuple[float, float]]
    after: list[tuple[float, float]]
    styles: list[str]
    classes: list[tuple[str, str]]


def map_surrogates(run: Run, backbone: Backbone) -> FeatureMap | None:
    """A map of the images that the run trained on; None where there are too few."""
    files = run.surrogate_files
    images: list[Tensor] = []
    labels: list[int] = []
    names: list[str] = []
    for file in files[:COLOURS]:
        found = run.surrogate(file)
        index = every(len(found.images), MOST // min(len(files), COLOURS))
        images.append(found.images[list(index)])
        if found.labels is not None:
            labels += [len(names) + int(found.labels[i]) for i in index]
            names += found.class_names
    if not images:
        return None
    kept = [i for i in range(len(labels)) if labels[i] < COLOURS] if labels else list(range(sum(map(len, images))))
    pixels = torch.cat(images)[kept]
    return map_images(backbone, run.meta_lora, pixels, [labels[i] for i in kept] if labels else None, names)


def map_images(
    backbone: Backbone, meta_lora: Adapter, images: Tensor, labels: Sequence[int] | None, names: Sequence[str]
) -> FeatureMap | None:
    """A map of images.

    Args:
        backbone: plain.
        meta_lora: to merge in.
        images: uint8 [n, 3, H, W].
        labels: n places in `names`; None for the mean colour of each image in place of its class's.
        names: of classes.

    Returns:
        the map; None for fewer than 8 images.
    """
    if len(images) < 8:
        return None
    before, after = (extract_features(model, images) for model in (backbone, backbone.merge(meta_lora)))
    styles = mean_colours(images) if labels is None else [f"c{label % COLOURS}" for label in labels]
    classes = [] if labels is None else [(names[c], f"c{c % COLOURS}") for c in sorted(set(labels))]
    return FeatureMap(in_two_dimensions(before), in_two_dimensions(after), styles, classes)


def in_two_dimensions(features: Tensor) -> list[tuple[float, float]]:
    """t-SNE of features [n, D], n at least 8; the same for the same features."""
    from sklearn.manifold import TSNE

    n = len(features)
    tsne = TSNE(perplexity=min(30.0, (n - 1) / 3), init="pca", random_state=0)
    return [(float(x), float(y)) for x, y in tsne.fit_transform(features.double().numpy())]
