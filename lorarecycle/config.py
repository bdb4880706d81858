"""Settings of every stage: frozen dataclasses, checked when made; the command line's flags come from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from numbers import Integral
from typing import Any, Literal, TypeVar, cast, get_args

from .runtime.deprecation import renamed_fields, warn_renamed

T = TypeVar("T")

Distance = Literal["euclidean", "sqeuclidean", "cosine", "centred_cosine"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
MIDDLE, SHARPNESS = 0.8, 12.0
"""Of "centred_cosine": the share of the centres' mean that is taken off, and what the cosine counts in logits. Chosen
on validation classes of four data sets, where the result is in benchmarks/results/distances.md."""
SITES = ("q", "k", "v", "proj", "fc1", "fc2")


@renamed_fields(
    {}, removed={"adapters_per_batch": "batches of several adapters were slower than one adapter after the other"}
)
@dataclass(frozen=True)
class InversionConfig:
    """Images to train on: LoRA Inversion (Eq. 1, 2) with token pruning (Sec. 4.3), or painted pictures.

    By default the images are painted pictures that nothing has optimised; the paper's 2000 steps from noise are
    those of `RecycleConfig.paper()`.
    """

    images_per_class: int = 20
    """Images synthesised for each class of an adapter."""
    pictures: int = 400
    """Painted pictures in all, where they depend on no adapter: not optimised, not chosen, not labelled."""
    batch_size: int = 25
    """Images of an adapter optimised together; the batch-norm prior compares their joint statistics."""
    steps: int = 0
    """Adam steps per batch; none leaves the images as they start, which must be painted then."""
    patience: int | None = None
    """Stop optimising a batch once its lowest loss has fallen by less than 1 % in so many steps (pruned ones, where
    tokens are pruned), which is looked at every 50 steps; never when None."""
    parametrization: Literal["normalized", "pixels", "fourier"] = "normalized"
    """What Adam changes: the images as the backbone reads them (the paper's), their pixels in [0, 1], or Fourier
    coefficients of decorrelated colours, with which images are smooth by construction (Olah et al. 2017)."""
    lr: float = 0.25
    """Highest learning rate of Adam, in units of the parametrization."""
    warm_up: float = 0.0
    """Share of the steps over which the learning rate rises to `lr`."""
    betas: tuple[float, float] = (0.5, 0.99)
    """Adam's betas."""
    image_size: int | None = None
    """Side in pixels; the backbone's own when None."""
    latent_size: int | None = None
    """Side in pixels at which the images are painted and optimised before they are enlarged to `image_size`. When None,
    that is `image_size`; painted pictures that depend on no adapter are then painted at 32, 64 and `image_size` pixels
    in turn, as far as those are lower. Set it to the resolution of the photographs where that is known and lower, or to
    `image_size` for pictures in full detail only."""
    init: Literal["noise", "painted"] = "painted"
    """What the images start as: Gaussian noise, or painted pictures (see `candidates`)."""
    candidates: int = 1
    """Painted pictures that the teacher looks at for each one that it takes, to find the likeliest of each class."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the steps: as it is, or falling to zero along half a cosine."""
    prior: str | None = "resnet50"
    """Batch-norm network of the prior: a timm model name, a safetensors file of one, or None for no prior."""
    prior_weight: float = 0.01
    """alpha_R of Eq. 1."""
    prior_relative: bool = False
    """Measure each layer of the prior against the length of its own statistics, so that no layer has more say."""
    prior_size: int | None = None
    """Side in pixels at which the prior sees the images; their own when None."""
    prune: dict[int, float] = field(default_factory=dict)
    """`{layer: ratio}`: share of the patch tokens still there that is dropped in that block."""
    prune_from: float = 0.25
    """Share of the steps before pruning starts."""
    roll: float = 0.125
    """Largest random shift of the images at each step, as a share of the side."""
    flip: bool = True
    """Mirror the images with probability 1/2 at each step."""

    def __post_init__(self) -> None:
        _at_least("images_per_class", self.images_per_class, 1)
        _at_least("pictures", self.pictures, 1)
        _at_least("batch_size", self.batch_size, 1)
        if cast(str, self.init) == "shapes":
            warn_renamed("init='shapes'", "init='painted'", stacklevel=5)
            object.__setattr__(self, "init", "painted")
        _one_of("init", self.init, ("noise", "painted"))
        _at_least("steps", self.steps, 0)
        if self.steps == 0 and self.init != "painted":
            raise ValueError(f"`steps` must be at least 1 with init={self.init!r}, got 0: the images would stay noise.")
        if self.patience is not None:
            _at_least("patience", self.patience, 1)
        _positive("lr", self.lr)
        _not_negative("prior_weight", self.prior_weight)
        if self.image_size is not None:
            _at_least("image_size", self.image_size, 1)
        if self.prior_size is not None:
            _at_least("prior_size", self.prior_size, 1)
        if self.latent_size is not None:
            _at_least("latent_size", self.latent_size, 1)
        _at_least("candidates", self.candidates, 1)
        _one_of("schedule", self.schedule, ("constant", "cosine"))
        _one_of("parametrization", self.parametrization, ("normalized", "pixels", "fourier"))
        _between("prune_from", self.prune_from, 0, 1)
        _between("warm_up", self.warm_up, 0, 0.9)
        _between("roll", self.roll, 0, 0.5)
        for name, beta in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            _between(name, beta, 0, 1)
        for layer, ratio in self.prune.items():
            if not 0 <= ratio < 1:
                raise ValueError(f"`prune[{layer}]` must be a ratio in [0, 1), got {ratio}; no token would be left.")


@renamed_fields({"distill": "guide_weight", "gain": "warm_start_gain"})
@dataclass(frozen=True)
class MetaConfig:
    """Meta-training of the meta-LoRA (Eq. 3, 4)."""

    steps: int = 100
    """Optimiser steps, of `episodes_per_step` episodes each."""
    episodes_per_step: int = 1
    """Episodes whose mean loss one optimiser step follows. Several processes share them out, so that the result does
    not depend on how many there are."""
    n_way: int = 5
    """Classes of an episode."""
    n_shot: int = 1
    """Support images per class."""
    n_query: int = 15
    """Query images per class."""
    interpolation: float = 0.5
    """Share of episodes whose classes come from different adapters (Sec. 4.2)."""
    distance: Distance = "euclidean"
    """Distance of features to class centres in training (Eq. 3b), see `distance_logits`."""
    guide_weight: float = 1.0
    """w in `loss = w * guide_loss + (1 - w) * episode_loss`. `guide_loss` is the distance to the guide's features (see
    `feature_targets`), `episode_loss` that of Eq. 3 and 4. With w = 1 labels, teachers' logits, `distance` and
    `interpolation` are not used."""
    guide_size: int | None = None
    """Side in pixels at which the guide sees the images; the size that the backbone was made for when None."""
    guide_shift: bool = True
    """Whether the guide's features are a mean over the image as it is and rolled by half a patch, down and across at
    once; not where patches are left out."""
    init: Literal["adapters", "random"] = "adapters"
    """What the meta-LoRA starts as: the adapters' mean update, amplified (see `warm_start`), or random factors."""
    warm_start_gain: float | None = None
    """Factor on the mean of the adapters' updates, where training starts from it; `common_gain` when None."""
    r: int = 16
    """Rank of the meta-LoRA."""
    lora_alpha: float = 16.0
    """Scaling is lora_alpha / r."""
    sites: tuple[str, ...] = ("q", "v")
    """Linear layers that the meta-LoRA adapts: any of q, k, v, proj, fc1, fc2."""
    layers: tuple[int, ...] | None = None
    """Blocks that it adapts; all when None (Tab. 10)."""
    lr: float | None = None
    """Highest learning rate of a cycle; `default_lr` of the backbone's width when None (the paper's is 1e-3)."""
    lr_min: float = 1e-5
    """Lowest learning rate of a cycle."""
    cycle: int = 100
    """Steps of a learning-rate cycle, all of them where there are fewer: the first quarter warms up linearly, the rest
    is a cosine back."""
    flip: bool = True
    """Mirror each image with probability 1/2."""
    resolutions: tuple[int, ...] = ()
    """Sides in pixels: each image is reduced to one of them, drawn at random, and enlarged again before the student
    sees it; the guide sees it whole. For adapters of small photographs (CIFAR's have 32 pixels). Whole when empty."""
    sparsity: float | None = None
    """Share of the patches that meta-training leaves out of every image, those with the lowest scores (Eq. 5) first:
    0.75 keeps a quarter. None: read the patches that inversion kept, all where it pruned none. The guide reads the same
    patches."""

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 0)
        _at_least("episodes_per_step", self.episodes_per_step, 1)
        _at_least("n_way", self.n_way, 2)
        _at_least("n_shot", self.n_shot, 1)
        _at_least("n_query", self.n_query, 1)
        _between("interpolation", self.interpolation, 0, 1)
        _one_of("distance", self.distance, DISTANCES)
        _between("guide_weight", self.guide_weight, 0, 1)
        if self.guide_size is not None:
            _at_least("guide_size", self.guide_size, 1)
        _one_of("init", self.init, ("adapters", "random"))
        if self.warm_start_gain is not None:
            _positive("warm_start_gain", self.warm_start_gain)
        _at_least("r", self.r, 1)
        _positive("lora_alpha", self.lora_alpha)
        _sites(self.sites)
        if self.layers is not None and not self.layers:
            raise ValueError("`layers` must name at least one block, got none; leave it out for all.")
        if self.lr is not None:
            _positive("lr", self.lr)
        _positive("lr_min", self.lr_min)
        _at_least("cycle", self.cycle, 4)
        for side in self.resolutions:
            _at_least("resolutions", side, 4)
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"`sparsity` must be in [0, 1), got {self.sparsity}; no token would be left.")


@dataclass(frozen=True)
class RecycleConfig:
    """The whole pipeline: images, then meta-training. The defaults are those of `weights()`."""

    inversion: InversionConfig = field(default_factory=InversionConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be in [0, 2**63), got {self.seed}.")

    @classmethod
    def preset(cls, name: str) -> RecycleConfig:
        """The settings called "weights" or "paper"; "default" is "weights".

        Raises:
            ValueError: another name.
        """
        _one_of("preset", name, ("default", "weights", "paper"))
        return cls.paper() if name == "paper" else cls.weights()

    @classmethod
    def weights(cls) -> RecycleConfig:
        """Our own recipe, which inverts nothing: a start from the adapters' weights (`warm_start`), whose features at
        the backbone's own resolution the meta-LoRA then learns to have on painted pictures."""
        return cls()

    @classmethod
    def paper(cls) -> RecycleConfig:
        """LoRA Recycle as published (Sec. 5): 2000 steps from noise, then episodes only, from random factors."""
        meta = MetaConfig(steps=200, guide_weight=0.0, init="random", r=4, lora_alpha=4.0, lr=1e-3)
        return cls(InversionConfig(steps=2000, init="noise"), meta)


@dataclass(frozen=True)
class TuneConfig:
    """Tuning of one adapter and its head on labelled images (Sec. 5, implementation details)."""

    epochs: int = 10
    """Passes over the images."""
    batch_size: int = 32
    """Images per step."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    r: int = 4
    """Rank."""
    lora_alpha: float = 4.0
    """Scaling is lora_alpha / r."""
    sites: tuple[str, ...] = ("q", "v")
    """Linear layers that get factors: any of q, k, v, proj, fc1, fc2."""
    layers: tuple[int, ...] | None = None
    """Blocks that get factors; all when None."""
    flip: bool = True
    """Mirror each image with probability 1/2."""
    save_last: int = 0
    """Checkpoints to keep, one after each of the last so many epochs: what an adapter generator learns from."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        _at_least("epochs", self.epochs, 1)
        _between("save_last", self.save_last, 0, self.epochs)
        _at_least("batch_size", self.batch_size, 1)
        _positive("lr", self.lr)
        _at_least("r", self.r, 1)
        _positive("lora_alpha", self.lora_alpha)
        _sites(self.sites)


@dataclass(frozen=True)
class EvaluateConfig:
    """Few-shot tasks of an evaluation (Sec. 3, testing setup)."""

    n_way: int = 5
    """Classes of a task."""
    n_shot: int = 1
    """Support images per class."""
    n_query: int = 15
    """Query images per class."""
    n_tasks: int = 600
    """Tasks."""
    distance: Distance = "centred_cosine"
    """Distance of features to class centres, see `distance_logits`; the papers' is euclidean."""
    seed: int = 0
    """Seed of the task list: equal seeds, equal tasks."""
    n_validation_tasks: int = 20
    """Tasks of validation classes that a method's learning rate is chosen on, where it has one."""

    def __post_init__(self) -> None:
        for name in ("n_way", "n_shot", "n_query", "n_tasks", "n_validation_tasks"):
            _at_least(name, getattr(self, name), 2 if name == "n_way" else 1)
        _one_of("distance", self.distance, DISTANCES)


def as_config(cls: type[T], given: Any, *, argument: str = "config", default: T | None = None) -> T:
    """Settings from an object of their class, or from a mapping of those that differ.

    Args:
        cls: class of the settings.
        given: an object of `cls`; a mapping, whose values may be mappings for settings that have settings; or None.
        argument: what error messages call it.
        default: what a mapping differs from, and what None means; `cls()` when None.

    Raises:
        TypeError: another kind of object, or a name that is no setting; the message lists those that are.
        ValueError: a value out of range.
    """
    default = cls() if default is None else default
    if given is None:
        return default
    if isinstance(given, cls):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"`{argument}` must be a {cls.__name__} or a mapping, got {type(given).__name__}.")
    renamed, removed = getattr(cls, "RENAMED", {}), getattr(cls, "REMOVED", {})
    known = [f.name for f in fields(cast(Any, cls))]
    unknown = sorted(set(map(str, given)) - {*known, *renamed, *removed})
    if unknown:
        raise TypeError(
            f"`{argument}` must name settings of {cls.__name__} ({', '.join(known)}), got {', '.join(unknown)}."
        )
    values: dict[str, Any] = {}
    for name, value in given.items():
        own = getattr(default, name) if name in known else None
        if is_dataclass(own) and not isinstance(own, type):
            value = as_config(type(own), value, argument=f"{argument}.{name}", default=own)
        if name in renamed:
            warn_renamed(name, renamed[name], stacklevel=4)
        if renamed.get(name) in given:
            raise TypeError(f"`{name}` is the old name of `{renamed[name]}`, got both; give `{renamed[name]}`.")
        if name in removed:
            cls(**{str(name): value})  # raises with the reason
        values[str(renamed.get(name, name))] = value
    return cast(T, replace(cast(Any, default), **values))


def as_plain(config: Any) -> dict[str, Any]:
    """A config as JSON-ready values: tuples as lists, dictionary keys as strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


def _at_least(name: str, value: int, low: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")


def _not_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be at least 0 and finite, got {value}.")


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive and finite, got {value}.")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be between {low} and {high}, got {value}.")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {tuple(allowed)}, got {value!r}.")


def _sites(sites: Sequence[str]) -> None:
    if not sites or not set(sites) <= set(SITES):
        raise ValueError(f"`sites` must name some of {SITES}, got {tuple(sites)}.")
