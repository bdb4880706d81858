"""The stages of a run: what the settings ask for, and what each stage does and costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import costs
from .adapters.adapter import Adapter
from .adapters.stored import shapes_of
from .config import RecycleConfig
from .inversion.pictures import PAINTED_TOGETHER, painted_sides
from .inversion.prior import BatchNormPrior
from .meta.drawn import DrawnImages
from .meta.guide import guide_side
from .vit.backbone import Backbone


@dataclass(frozen=True)
class Needs:
    """What the settings make a run ask for; nothing else is checked, loaded or computed."""

    images: bool
    """Any images at all: there are steps of meta-training."""
    pictures: bool
    """Painted pictures that depend on no adapter, one set for all."""
    heads: bool
    """Heads, and with them the class counts of adapters: images are made or labelled for each adapter."""
    labels: bool
    """Episodes of classes, so enough classes, adapters and images of each class."""
    teacher_logits: bool
    """The teachers' answers, which episodes within an adapter follow."""
    scores: bool
    """Scores of patches, for masks to `meta.sparsity`."""
    prior: bool
    """A batch-norm network."""
    guide: bool
    """Features to follow."""
    warm_start: bool
    """The adapters' own weights."""

    @classmethod
    def of(cls, config: RecycleConfig) -> Needs:
        """What these settings ask for."""
        inversion, meta = config.inversion, config.meta
        images = meta.steps > 0
        labels = images and meta.guide_weight < 1
        made = inversion.steps > 0 or inversion.candidates > 1
        return cls(
            images=images,
            pictures=images and not made and not labels,
            heads=images and (made or labels),
            labels=labels,
            teacher_logits=labels and meta.interpolation < 1,
            scores=images and meta.sparsity is not None,
            prior=images and inversion.steps > 0 and inversion.prior is not None and inversion.prior_weight > 0,
            guide=images and meta.guide_weight > 0,
            warm_start=meta.init == "adapters",
        )


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: what its progress bar is called.
        what: what it does.
        amount: how much of it, in words.
        bytes: that it keeps, in the work folder or in memory.
        seconds: that it takes here, about.
    """

    name: str
    what: str
    amount: str
    bytes: int
    seconds: float


class StageMaker:
    """Describes the stages of a run.

    Args:
        backbone: on the device of the run.
        config: settings.
        dtype: precision of the run.
    """

    def __init__(self, backbone: Backbone, config: RecycleConfig, dtype: torch.dtype) -> None:
        self.backbone = backbone
        self.config = config
        self.needs: Needs = Needs.of(config)
        self.size: int = config.inversion.image_size or backbone.image_size
        self.painted_size: int = config.inversion.latent_size or self.size
        self.speed: float = costs.flops_per_second(backbone.device, dtype, backbone.embed_dim)
        self.forward: float = costs.forward_flops(backbone, self.size) / self.speed

    def all(
        self, adapters: Sequence[Adapter], drawn: DrawnImages | None, prior: BatchNormPrior | None
    ) -> tuple[Stage, ...]:
        """The stages in their order.

        Args:
            adapters: all of them.
            drawn: the images that are made; None where there are none.
            prior: the loaded network, where one is needed.
        """
        needs, images = self.needs, 0 if drawn is None else len(drawn.rows)
        stages = []
        if needs.warm_start:
            stages.append(self.warm_start(adapters))
        if drawn is not None:
            stages.append(self.pictures(drawn) if needs.pictures else self.inversion(drawn, prior))
        if needs.guide:
            stages.append(self.guide(images))
        if needs.images:
            stages.append(self.training(images))
        return tuple(stages)

    def warm_start(self, adapters: Sequence[Adapter]) -> Stage:
        width = self.backbone.embed_dim
        shapes = [shapes_of(a) for a in adapters]
        numbers = sum(s.r * (s.out + s.width) for own in shapes for s in own.values())
        ranks = sum(max(s.r for s in own.values()) for own in shapes)
        rank, sites = min(ranks, width), max(map(len, shapes))
        seconds = costs.DECOMPOSITION * sites * width * rank**2 / self.speed
        if ranks > width:  # added to matrices of the sites' sizes
            seconds += 2 * sites * width**2 * ranks / self.speed
        amount = f"{len(adapters)} adapters, {sites} sites"
        return Stage("warm start", "what the adapters' weights share", amount, 4 * numbers, seconds)

    def pictures(self, drawn: DrawnImages) -> Stage:
        images, sides = len(drawn.rows), painted_sides(self.config.inversion, self.size)
        batches = (drawn.rows // PAINTED_TOGETHER).unique().tolist()
        painted = Counter(sides[i % len(sides)] for i in batches)
        seconds = sum(PAINTED_TOGETHER * n * costs.painting_seconds(side) for side, n in painted.items())
        seconds += images * (self.needs.scores + self._masks_by_pruning) * self.forward
        amount = f"{_share(images, drawn.total, 'pictures')}, {'/'.join(map(str, sorted(painted)))} px"
        return Stage("paint pictures", "one set for all adapters", amount, self._bytes(images), seconds)

    def inversion(self, drawn: DrawnImages, prior: BatchNormPrior | None) -> Stage:
        config, images, makers = self.config.inversion, len(drawn.rows), drawn.adapters
        pruned = costs.forward_flops(self.backbone, self.size, config.prune) / self.speed
        share = 1 - config.prune_from if config.prune else 0.0
        step = (1 - share) * self.forward + share * pruned
        if prior is not None:
            step += costs.network_flops(prior.network, prior.size or self.painted_size) / self.speed
        each = config.steps * costs.PASSES * step
        if config.init == "painted":
            each += config.candidates * costs.painting_seconds(self.painted_size)
        asked = self.needs.teacher_logits or self.needs.scores
        each += self.forward * (asked + bool(config.prune) + (config.candidates > 1))
        name = "invert adapters" if config.steps else "label pictures"
        what = f"{config.steps} steps from {config.init}" if config.steps else "pictures for each adapter"
        made = sum(_in_whole_batches(drawn, i, config.batch_size) for i in makers)
        whole = len(drawn.offsets) - 1
        adapters = f"{whole} adapters" if len(makers) == whole else f"{len(makers)} of {whole} adapters"
        amount = f"{_share(images, drawn.total, 'images')} of {adapters}, {self.size} px"
        return Stage(name, what, amount, self._bytes(images), made * each)

    def guide(self, images: int) -> Stage:
        meta = self.config.meta
        side = meta.guide_size or guide_side(self.backbone, self.size)
        views = guide_views(self.config)
        seconds = images * views * costs.forward_flops(self.backbone, side) / self.speed
        amount = f"{images} images, {side} px" + (f", {views} views" if views > 1 else "")
        return Stage("guide features", "what training follows", amount, 4 * images * self.backbone.embed_dim, seconds)

    def training(self, images: int) -> Stage:
        meta = self.config.meta
        per_step = min(meta.n_way * (meta.n_shot + meta.n_query), images)
        patches, prefix = self.backbone.num_patches(self.size), self.backbone.num_prefix_tokens
        left = patches
        if meta.sparsity is not None:
            left -= math.floor(patches * meta.sparsity)
        elif self.config.inversion.prune:
            left = list(self.backbone.kept_per_layer(self.config.inversion.prune, patches).values())[-1]
        share = (left + prefix) / (patches + prefix)
        per_step *= meta.episodes_per_step
        seconds = meta.steps * per_step * share * costs.PASSES * self.forward
        loss = {1.0: "the guide", 0.0: "episodes"}.get(meta.guide_weight, "the guide and episodes")
        return Stage("meta-training", f"follows {loss}", f"{meta.steps} steps of {per_step} images", 0, seconds)

    @property
    def _masks_by_pruning(self) -> bool:
        return bool(self.config.inversion.prune) and self.config.meta.sparsity is None

    def _bytes(self, images: int) -> int:
        return images * 3 * self.size * self.size


def leaves_out_patches(config: RecycleConfig) -> bool:
    """Whether meta-training sees a part of each image only."""
    sparsity = config.meta.sparsity
    return any(config.inversion.prune.values()) if sparsity is None else sparsity > 0


def guide_views(config: RecycleConfig) -> int:
    """Views of an image that the guide's features are a mean of, see `feature_targets`."""
    return (1 + config.meta.flip) * (1 + (config.meta.guide_shift and not leaves_out_patches(config)))


def _share(made: int, total: int, what: str) -> str:
    """How many are made: all, or those that training draws."""
    return f"{made} {what}" if made == total else f"{made} drawn of {total} {what}"


def _in_whole_batches(drawn: DrawnImages, i: int, batch_size: int) -> int:
    """Images of an adapter that are optimised: batches are whole."""
    total = drawn.offsets[i + 1] - drawn.offsets[i]
    return sum(min(batch_size, total - batch_size * b) for b in (drawn.of(i) // batch_size).unique().tolist())
