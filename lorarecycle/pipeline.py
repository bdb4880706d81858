"""The pipeline: many adapters in, one meta-LoRA out (LoRA Recycle, Alg. 1). Plan, images, meta-training, saving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .adapters.adapter import Adapter
from .adapters.copies import note_copies
from .adapters.dead import leave_out_dead
from .adapters.load_many import AdapterLike, HubOptions, Loaded, load_all
from .checks import check_adapters, choose_inverted
from .config import InversionConfig, MetaConfig, RecycleConfig, as_config
from .inversion.prior import BatchNormPrior
from .job import ImageChoice, Job
from .meta.factors import random_factors
from .plan import Plan, unused_settings
from .runtime.device import resolve
from .runtime.graphs import Graphs
from .runtime.steps import Compile
from .runtime.strict import left_out_error
from .stages import Needs
from .vit.base import BaseLike, doubts, find_base
from .vit.fit import leave_out_unfit
from .work_dir import canonical_order

if TYPE_CHECKING:
    from typing_extensions import Unpack


def recycle(
    adapters: AdapterLike | Iterable[AdapterLike],
    *,
    base: BaseLike | None = None,
    work_dir: str | PathLike[str] | None = None,
    preset: Literal["default", "weights", "paper"] = "default",
    config: RecycleConfig | Mapping[str, Any] | None = None,
    inversion: InversionConfig | Mapping[str, Any] | None = None,
    meta: MetaConfig | Mapping[str, Any] | None = None,
    seed: int | None = None,
    strict: bool | None = None,
    prior: BatchNormPrior | nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    images: ImageChoice = "drawn",
    memory_budget: int | None = None,
    name: str = "meta-lora",
    compile: Compile = None,
    graphs: Graphs = None,
    quiet: bool = False,
    **hub: Unpack[HubOptions],
) -> Adapter:
    """Distil adapters into one meta-LoRA, without any of their training data.

    The default preset, "weights", is ours and inverts nothing: it starts from what the adapters' own weights have in
    common (`warm_start`), then teaches the meta-LoRA to give that start's features at the backbone's own resolution, on
    painted pictures. Where the adapters share little, most of what it gains comes from those pictures. "paper" is LoRA
    Recycle as published. Compare the result with the plain ViT on tasks of your own (`evaluate`).

    The order of adapters and the names of adapters, classes and files do not change the result, but for classes of one
    name: no episode sets them against each other.

    Args:
        adapters: `Adapter` objects, PEFT models, PEFT folders or Hub ids, or one folder that holds many, at any depth.
            Heads are asked for only where the settings use them (see `Plan.needs`).
        base: the model that they were tuned on (see `Backbone.load`); the one that the adapters name when None.
        work_dir: folder for images and checkpoints. A run that was stopped there, however abruptly, goes on
            where it was and ends with the same bits (on a CPU; some of CUDA's operations are not exactly repeatable);
            it repeats at most one adapter's images or 100 meta-steps. The meta-LoRA is also saved there, as
            `meta_lora`. Under `torchrun` the processes share the run through it: on several machines it must lie on a
            disk that all see, and a run that was begun by some processes may be finished by more or fewer.
        preset: which settings (see `RecycleConfig.preset`).
        config: settings of all stages in place of a preset's, or a mapping of those that differ; `inversion`, `meta`
            and `seed` replace its parts.
        inversion: settings of the images, or a mapping of those that differ.
        meta: settings of the meta-training, likewise.
        seed: of everything random.
        strict: what becomes of adapters, or parts of them, that are left out (updates of zero, earlier checkpoints,
            LoRA outside the blocks). None: they are counted and named, in the log and in the plan, and an adapter that
            cannot be read is an error. True: they are an error. False: a bad adapter is left out too.
        prior: batch-norm network in place of `inversion.prior`; its normalisation is ImageNet's unless it is a
            `BatchNormPrior`.
        device, dtype: where and in which precision; the GPU and bfloat16 where the machine has them.
        images: "drawn" makes and keeps only the images that meta-training will draw, so that the work grows with
            its steps and not with the adapters. "all" makes all: for other uses of the images. It changes no image and
            no loss but the guide's, whose targets have the mean length of all images that are made.
        memory_budget: bytes of images that may be held in memory (the GPU's where it trains). What is more stays in
            `work_dir`, or in a temporary folder, and is read ahead of each step. Half of what is free when None; the
            plan says which it is. It does not change the result.
        name: of the meta-LoRA.
        compile: whether the ViT's blocks run through `torch.compile`; on a GPU, for thousands of steps, when None.
        graphs: whether a step is one launch, a CUDA graph; on a GPU only when None. A step that cannot be captured
            runs as it is, and a line of the log says why.
        quiet: show no progress bars.
        hub: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only` for Hub ids among `adapters`, as in
            `Adapter.from_pretrained`.

    Returns:
        the meta-LoRA, without a head: give it to `FewShotClassifier` or `Adapter.save`.

    Raises:
        ValueError, FileNotFoundError, TypeError: before any work starts; the message names argument, rule and fix.
        OSError: writing to `work_dir` failed; files written earlier are whole.
    """
    job = prepare(
        adapters,
        base=base,
        preset=preset,
        config=config,
        inversion=inversion,
        meta=meta,
        seed=seed,
        strict=strict,
        prior=prior,
        device=device,
        dtype=dtype,
        images=images,
        memory_budget=memory_budget,
        **hub,
    )
    return job.run(work_dir, name=name, compile=compile, graphs=graphs, quiet=quiet)


def make_plan(adapters: AdapterLike | Iterable[AdapterLike], **settings: Any) -> Plan:
    """What `recycle` would do with these arguments, what it needs and about how long it takes on this device.

    All that `recycle` checks before it starts is checked here too.

    Args:
        adapters: as in `recycle`.
        settings: `base`, `preset`, `config`, `inversion`, `meta`, `seed`, `strict`, `prior`, `device`, `dtype`,
            `images`, `memory_budget` and those for the Hub, as in `recycle`.

    Raises:
        ValueError, FileNotFoundError, TypeError: as `recycle` does.
    """
    return prepare(adapters, **settings).plan()


def prepare(
    adapters: AdapterLike | Iterable[AdapterLike] | Loaded,
    *,
    base: BaseLike | None = None,
    preset: Literal["default", "weights", "paper"] = "default",
    config: RecycleConfig | Mapping[str, Any] | None = None,
    inversion: InversionConfig | Mapping[str, Any] | None = None,
    meta: MetaConfig | Mapping[str, Any] | None = None,
    seed: int | None = None,
    strict: bool | None = None,
    prior: BatchNormPrior | nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    images: ImageChoice = "drawn",
    memory_budget: int | None = None,
    **hub: Unpack[HubOptions],
) -> Job:
    """Load and check what a run needs; arguments and errors as in `recycle`."""
    if images not in ("drawn", "all"):
        raise ValueError(f"`images` must be 'drawn' or 'all', got {images!r}.")
    start = RecycleConfig.preset(preset)
    settings = as_config(RecycleConfig, config, default=start)
    settings = replace(
        settings,
        inversion=as_config(InversionConfig, inversion, argument="inversion", default=settings.inversion),
        meta=as_config(MetaConfig, meta, argument="meta", default=settings.meta),
        seed=settings.seed if seed is None else seed,
    )
    if prior is not None and settings.inversion.prior is None:
        settings = replace(settings, inversion=replace(settings.inversion, prior="given"))
    where, precision = resolve(device, dtype)
    loaded = load_all(adapters, strict=strict, stored=True, **hub)
    found = canonical_order(loaded.adapters)
    backbone = find_base(base, found).to(where)
    found, dead = leave_out_dead(found)
    found, unfit = leave_out_unfit(backbone, found) if strict is False else (found, [])
    inverted, headless = choose_inverted(found, settings)
    left_out = [*dead, *unfit, *headless]
    if strict and left_out:
        raise left_out_error("; ".join(left_out))
    check_adapters(backbone, found, inverted, settings)
    random_factors(backbone, settings.meta, settings.seed)
    notes = [*loaded.notes, *left_out, *note_copies(found), *doubts(backbone, found)]
    idle = [f"{key}={value!r}" for key, value in _changed(settings, start) if key in unused_settings(settings)]
    if idle:
        notes.append(f"set, but without effect under the other settings: {', '.join(idle)}")
    if prior is not None and not Needs.of(settings).prior:
        notes.append("`prior` has no effect: no image is optimised, or `prior_weight` is 0")
        prior = None
    if prior is not None and not isinstance(prior, BatchNormPrior):
        size, relative = settings.inversion.prior_size, settings.inversion.prior_relative
        prior = BatchNormPrior(prior, size=size, dtype=precision, relative=relative)
    network = None if prior is None else prior.to(where)
    return Job(
        found, inverted, backbone, settings, network, precision, images, memory_budget, tuple(notes), len(loaded.notes)
    )


def _changed(config: RecycleConfig, start: RecycleConfig) -> list[tuple[str, Any]]:
    """Settings that differ from a preset's, by their full names."""
    rooms = ("inversion", "meta")
    return [
        (f"{room}.{key}", value)
        for room in rooms
        for key, value in vars(getattr(config, room)).items()
        if value != getattr(getattr(start, room), key)
    ]
