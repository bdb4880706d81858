"""LoRA Inversion: labelled images synthesised from one adapter (LoRA Recycle, Sec. 4.1, 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Head
from ..config import InversionConfig, as_config, as_plain
from ..runtime.graphs import Graphs
from ..runtime.progress import track
from ..runtime.seeds import stream
from ..runtime.steps import Compile, check_compile, compiling
from ..vit.backbone import Backbone
from .answers import teacher_answers
from .optimise import BatchOptimiser
from .prior import BatchNormPrior
from .start import finished_pixels, start_images
from .surrogate import Surrogate
from .views import draw_views

KEPT = 2
"""Kinds of batches that stay ready, the whole ones' and the last one's: on a GPU each holds its graphs' memory."""


def invert(
    backbone: Backbone,
    adapter: Adapter,
    *,
    config: InversionConfig | Mapping[str, Any] | None = None,
    prior: BatchNormPrior | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    teacher_logits: bool = True,
    scores: bool = True,
    compile: Compile = None,
    graphs: Graphs = None,
    title: str | None = None,
    quiet: bool = False,
) -> Surrogate:
    """Synthesise labelled images that an adapter and its head recognise (Eq. 1, 2).

    Args:
        backbone: the model that the adapter was tuned on; its device is used.
        adapter: with a head.
        config: settings, or a mapping of those that differ; `InversionConfig()` when None.
        prior: naturalness prior; `config.prior` is loaded when None (nothing where that is None too).
        seed: of the noise and the augmentation.
        dtype: precision of the teacher, into which it is cast once the adapter is merged; the backbone's when None.
        teacher_logits: whether the teacher's logits of the finished images are wanted: what meta-training within an
            adapter's classes follows (Eq. 3).
        scores: whether the scores of their patches are wanted: what masks to any sparsity.
        compile: whether the teacher's blocks run through `torch.compile`; on a GPU, for thousands of steps, when None.
        graphs: whether a step is one launch, a CUDA graph; on a GPU only when None. What does not fit is run as it is.
        title: of the progress bar; with the adapter's name when None.
        quiet: show no progress bar.

    Returns:
        A `Surrogate` on the CPU, `config.images_per_class` images for every class of the head.

    Raises:
        ValueError: no head, an adapter that does not fit, or settings that do not fit the backbone.
        FloatingPointError: the loss of a batch was never finite.
    """
    make = Inverter(backbone, config=config, prior=prior, dtype=dtype, compile=compile, graphs=graphs)
    return make(adapter, seed=seed, teacher_logits=teacher_logits, scores=scores, title=title, quiet=quiet)


class Inverter:
    """LoRA Inversion of one adapter after another, over the same buffers: what is captured or compiled serves them all.

    Args:
        backbone, config, prior, dtype, compile, graphs: as in `invert`.

    Raises:
        ValueError: settings that are none, or a prior that cannot be had.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        config: InversionConfig | Mapping[str, Any] | None = None,
        prior: BatchNormPrior | None = None,
        dtype: torch.dtype | None = None,
        compile: Compile = None,
        graphs: Graphs = None,
    ) -> None:
        self.backbone = backbone
        self.config: InversionConfig = as_config(InversionConfig, config)
        self.prior: BatchNormPrior | None = load_prior(backbone, self.config, dtype) if prior is None else prior
        check_compile(compile, backbone.device)
        self._dtype, self._graphs, self._compile = dtype, graphs, compile
        self._teacher: Backbone | None = None
        self._heads: dict[tuple[Any, ...], Head] = {}
        self._optimisers: dict[tuple[Any, ...], BatchOptimiser] = {}

    def __call__(
        self,
        adapter: Adapter,
        *,
        seed: int = 0,
        teacher_logits: bool = True,
        scores: bool = True,
        rows: Tensor | None = None,
        title: str | None = None,
        quiet: bool = False,
    ) -> Surrogate:
        """The images of an adapter; arguments, result and errors as in `invert`.

        Args:
            rows: int64, ascending, the images that are wanted; all when None. Batches without any of them are not made,
                the others are what they are in a full run, to the bit.
        """
        config = self.config
        head = self._placed(check_invertible(self.backbone, adapter, config))
        teacher = self._merged(adapter)
        labels = torch.arange(len(head.class_names)).repeat(config.images_per_class)
        index = torch.arange(len(labels)) if rows is None else rows
        numbers = (index // config.batch_size).unique()
        made = torch.cat([torch.arange(len(labels)).split(config.batch_size)[i] for i in numbers])
        images, curves = [], []
        steps = range(len(numbers) * config.steps)
        with (
            compiling(self._compile, teacher.device, len(steps)),
            track(steps, title or f"invert {adapter.name}", quiet=quiet) as bar,
        ):
            for i in numbers.tolist():
                wanted = labels.split(config.batch_size)[i]
                generator = stream(seed, "inversion", i)
                start = start_images(teacher, head, wanted.to(teacher.device), config, generator)
                if config.steps == 0:
                    images.append(finished_pixels(start, teacher, config))
                    continue
                views = draw_views(config, start.shape[-1], generator)
                try:
                    optimiser = self._optimiser(teacher, head, len(wanted))
                    images.append(optimiser.run(start, wanted, views, bar))
                    curves.append(optimiser.curves())
                except FloatingPointError as error:
                    raise FloatingPointError(f"adapter {adapter.name!r}: {error}") from None
        pixels = torch.cat(images)
        answers = teacher_answers(
            teacher,
            pixels,
            head=head if teacher_logits else None,
            scores=scores,
            prune=config.prune,
            size=config.image_size,
            batch_size=config.batch_size,
        )
        found = Surrogate(
            images=pixels,
            labels=labels[made],
            class_names=head.class_names,
            patch_size=teacher.patch_size,
            adapter=adapter.name,
            adapter_digest=adapter.weights_digest(),
            config=as_plain(config),
            curves=torch.cat(curves) if curves else None,
            rows=None if len(made) == len(labels) else made,
            **answers._asdict(),
        )
        return found if len(index) == len(made) else found.select(torch.searchsorted(made, index))

    def _merged(self, adapter: Adapter) -> Backbone:
        """The backbone with the adapter, in weights that are this object's own and stay where they are."""
        merged = self.backbone.merge(adapter).to(dtype=self._dtype)
        if self._teacher is None:
            for weight in merged.parameters():
                weight.data = weight.data.clone()
            self._teacher = merged
        else:
            for own, weight in zip(self._teacher.parameters(), merged.parameters(), strict=True):
                own.data.copy_(weight.data)
        return self._teacher

    def _placed(self, head: Head) -> Head:
        """The head, in the tensors of the first one of its kind, with its own class names."""
        assert head.bias is not None
        key = (tuple(head.weight.shape), head.pool)
        if key not in self._heads:
            self._heads[key] = replace(
                head,
                weight=head.weight.to(self.backbone.device, copy=True),
                bias=head.bias.to(self.backbone.device, copy=True),
            )
        placed = self._heads[key]
        assert placed.bias is not None
        placed.weight.copy_(head.weight)
        placed.bias.copy_(head.bias)
        return replace(placed, class_names=head.class_names)

    def _optimiser(self, teacher: Backbone, head: Head, batch_size: int) -> BatchOptimiser:
        key = (batch_size, tuple(head.weight.shape), head.pool)
        if key not in self._optimisers:
            while len(self._optimisers) >= KEPT:
                del self._optimisers[next(iter(self._optimisers))]
            self._optimisers[key] = BatchOptimiser(teacher, head, batch_size, self.config, self.prior, self._graphs)
        return self._optimisers[key]


def check_invertible(backbone: Backbone, adapter: Adapter, config: InversionConfig) -> Head:
    """The adapter's head, after checking that inversion can work.

    Raises:
        ValueError: no head, an adapter that does not fit, a size or a pruning that does not fit the backbone.
    """
    backbone.check(adapter)
    if adapter.head is None:
        raise ValueError(
            f"adapter {adapter.name!r} must have a classification head to be inverted, got none; load it with "
            "`Adapter.load(path, head=...)` or put a head.safetensors (weight [C, D], bias [C]) beside it."
        )
    n = backbone.num_patches(config.image_size or backbone.image_size)
    backbone.kept_per_layer(config.prune, n)
    return adapter.head


def load_prior(backbone: Backbone, config: InversionConfig, dtype: torch.dtype | None = None) -> BatchNormPrior | None:
    """The prior that the settings name, on the backbone's device; None where they name none."""
    if config.prior is None or config.prior_weight == 0 or config.steps == 0:
        return None
    prior = BatchNormPrior.load(config.prior, size=config.prior_size, dtype=dtype, relative=config.prior_relative)
    return prior.to(backbone.device)
