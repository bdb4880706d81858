"""The pipeline: a folder of adapters in, one meta-LoRA out (LoRA Recycle, Alg. 1)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .adapters.adapter import Adapter
from .config import InversionConfig, MetaConfig, RecycleConfig, as_plain
from .inversion.invert import check_invertible, check_side_by_side, invert_together, load_prior
from .inversion.prior import BatchNormPrior
from .inversion.surrogate import Surrogate
from .meta.episodes import check_episodes
from .meta.train import meta_train, random_factors
from .runtime.device import resolve
from .runtime.files import read_json, remove_leftovers, write_json, write_text
from .runtime.steps import Compile
from .runtime.version import __version__
from .vit.backbone import Backbone

logger = logging.getLogger(__name__)

AdapterLike = Adapter | str | PathLike[str]


def recycle(
    adapters: AdapterLike | Iterable[AdapterLike],
    *,
    base: Backbone | str | PathLike[str] | nn.Module | None = None,
    work_dir: str | PathLike[str] | None = None,
    preset: Literal["default", "paper"] = "default",
    config: RecycleConfig | None = None,
    inversion: InversionConfig | Mapping[str, Any] | None = None,
    meta: MetaConfig | Mapping[str, Any] | None = None,
    seed: int | None = None,
    prior: BatchNormPrior | nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    name: str = "meta-lora",
    compile: Compile = None,
    quiet: bool = False,
) -> Adapter:
    """Distil adapters into one meta-LoRA, without any of their training data.

    Args:
        adapters: `Adapter` objects, PEFT folders or Hub ids, or one folder that holds many. One without a head cannot
            be inverted; with `meta.init="adapters"` it takes part in the warm start all the same, and is logged.
        base: the model that they were tuned on (see `Backbone.load`); the one that the adapters name when None.
        work_dir: folder for surrogates and checkpoints. A run that was stopped there, however abruptly, goes on
            where it was and ends with the same bits (on a CPU; some of CUDA's operations are not exactly repeatable);
            it repeats at most `adapters_per_batch` surrogates or 100 meta-steps. The meta-LoRA is also saved there, as
            `meta_lora`.
        preset: which settings: what did best where it was measured, or the paper's own (see `RecycleConfig.preset`).
        config: settings of all stages in place of a preset's; `inversion`, `meta` and `seed` replace its parts.
        inversion: settings of the inversion, or a mapping of those that differ from the defaults.
        meta: settings of the meta-training, likewise.
        seed: of everything random.
        prior: batch-norm network in place of `inversion.prior`; its normalisation is ImageNet's unless it is a
            `BatchNormPrior`.
        device, dtype: where and in which precision; the GPU and bfloat16 where the machine has them.
        name: of the meta-LoRA.
        compile: whether the steps of both stages run through `torch.compile`; on a GPU only when None. A mode of
            `torch.compile` works too.
        quiet: show no progress bars.

    Returns:
        the meta-LoRA, without a head: give it to `FewShotClassifier` or `Adapter.save`.

    Raises:
        ValueError, FileNotFoundError, TypeError: before any work starts; the message names argument, rule and fix.
        OSError: writing to `work_dir` failed; files written earlier are whole.
    """
    config = _merge_config(config or RecycleConfig.preset(preset), inversion, meta, seed)
    pool = load_adapters(adapters)
    resolved_device, resolved_dtype = resolve(device, dtype)
    backbone = _load_base(base, pool).to(resolved_device)
    everyone, pool = pool, _with_heads(pool, config.meta)
    heads = [check_invertible(backbone, adapter, config.inversion) for adapter in pool]
    if _group_size(config) > 1:
        check_side_by_side(backbone, pool)
    for adapter in everyone:
        backbone.check(adapter)
        _check_normalisation(backbone, adapter)
    check_episodes([len(h.class_names) for h in heads], [a.name for a in pool], config.meta)
    _check_images_per_class(config)
    random_factors(backbone, config.meta, config.seed)
    if isinstance(prior, nn.Module) and not isinstance(prior, BatchNormPrior):
        prior = BatchNormPrior(prior, size=config.inversion.prior_size, dtype=resolved_dtype)
    if prior is not None:
        if config.inversion.steps == 0:
            logger.warning("`prior` has no effect without steps of inversion (`inversion.steps` is 0)")
        loaded_prior: BatchNormPrior | None = prior.to(resolved_device)
    else:
        finished = all(path is not None and path.exists() for path in _surrogate_paths(work_dir, pool))
        loaded_prior = None if finished else load_prior(backbone, config.inversion, resolved_dtype)
    folder = None
    if work_dir is not None:
        folder = _open_work_dir(Path(work_dir), config, everyone, backbone, resolved_dtype, prior)
    surrogates = _invert_all(backbone, resolved_dtype, pool, config, loaded_prior, folder, compile, quiet)
    checkpoint = None if folder is None else folder / "meta_checkpoint.safetensors"
    trained = meta_train(
        backbone.to(resolved_dtype),
        surrogates,
        config.meta,
        adapters=everyone,
        seed=config.seed,
        checkpoint=checkpoint,
        name=name,
        compile=compile,
        quiet=quiet,
    )
    if folder is not None:
        rows = "".join(f"{step},{loss:.9g}\n" for step, loss in enumerate(trained.losses.tolist()))
        write_text(folder / "losses.csv", "step,loss\n" + rows)
        trained.meta_lora.save(folder / "meta_lora", config=as_plain(config), sources=everyone)
    return trained.meta_lora


def load_adapters(adapters: AdapterLike | Iterable[AdapterLike]) -> list[Adapter]:
    """Adapters from objects, PEFT folders, Hub ids, or one folder that holds many PEFT folders.

    Raises:
        ValueError: none given, or adapters for different bases.
        FileNotFoundError: a path without an adapter.
    """
    if isinstance(adapters, (str, PathLike)):
        folder = Path(adapters)
        if folder.is_dir() and not (folder / "adapter_config.json").exists():
            found = sorted(p.parent for p in folder.glob("*/adapter_config.json"))
            if not found:
                raise ValueError(f"`adapters` must be a folder of PEFT adapters, got {folder} with none in it.")
            adapters = list(found)
        else:
            adapters = [adapters]
    elif isinstance(adapters, Adapter):
        adapters = [adapters]
    pool = [a if isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    if not pool:
        raise ValueError("`adapters` must hold at least one adapter, got none.")
    bases = {a.base_model: a.name for a in pool if a.base_model}
    if len(bases) > 1:
        raise ValueError(
            f"`adapters` must be tuned on one base, got {len(bases)}: "
            + ", ".join(f"{base!r} (adapter {name!r})" for base, name in sorted(bases.items()))
            + "; recycle them apart, or set the same `base_model` if they are one model under two names."
        )
    return pool


def _merge_config(
    config: RecycleConfig,
    inversion: InversionConfig | Mapping[str, Any] | None,
    meta: MetaConfig | Mapping[str, Any] | None,
    seed: int | None,
) -> RecycleConfig:
    if inversion is not None:
        config = replace(config, inversion=_override("inversion", config.inversion, inversion))
    if meta is not None:
        config = replace(config, meta=_override("meta", config.meta, meta))
    return config if seed is None else replace(config, seed=seed)


def _override(argument: str, default: Any, given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    unknown = set(given) - set(default.__dataclass_fields__)
    if unknown:
        raise TypeError(
            f"`{argument}` must name settings of {type(default).__name__} ({', '.join(default.__dataclass_fields__)}), "
            f"got {', '.join(sorted(unknown))}."
        )
    return replace(default, **given)


def _load_base(base: Backbone | str | PathLike[str] | nn.Module | None, pool: Sequence[Adapter]) -> Backbone:
    """The backbone in float32 (adapters are merged before it is cast)."""
    if isinstance(base, Backbone):
        return base.clone().float()
    if base is None:
        base = next((a.base_model for a in pool if a.base_model), None)
        if base is None:
            raise ValueError("`base` must be given, for the adapters do not name the model they were tuned on.")
    return Backbone.load(base).float()


def _with_heads(pool: Sequence[Adapter], meta: MetaConfig) -> list[Adapter]:
    """The adapters that can be inverted; all of them where a headless one would be of no use, to be refused later."""
    chosen = [adapter for adapter in pool if adapter.head is not None]
    if meta.init != "adapters" or not chosen:
        return list(pool)
    if len(chosen) < len(pool):
        names = ", ".join(adapter.name for adapter in pool if adapter.head is None)
        logger.warning("no head in %s: used for the warm start, not inverted", names)
    return chosen


def _check_normalisation(backbone: Backbone, adapter: Adapter) -> None:
    for what, own, theirs in (("mean", adapter.mean, backbone.mean), ("std", adapter.std, backbone.std)):
        if own is not None and any(abs(a - b) > 1e-3 for a, b in zip(own, theirs, strict=True)):
            raise ValueError(
                f"adapter {adapter.name!r} must be tuned under the input normalisation of the backbone, got {what} "
                f"{own} and {theirs}; pass the right one to `Backbone.load({what}=...)`."
            )


def _check_images_per_class(config: RecycleConfig) -> None:
    needed = config.meta.n_shot + config.meta.n_query
    if config.inversion.images_per_class < needed:
        raise ValueError(
            f"`images_per_class` must be at least n_shot + n_query = {needed}, got {config.inversion.images_per_class}."
        )


def _open_work_dir(
    folder: Path,
    config: RecycleConfig,
    pool: Sequence[Adapter],
    backbone: Backbone,
    dtype: torch.dtype,
    prior: BatchNormPrior | None,
) -> Path:
    """Make or re-open a folder of this very run; refuse one of another run."""
    run = {
        "lorarecycle": __version__,
        "base": {"name": backbone.name, "sha256": backbone.digest()},
        "dtype": str(dtype).removeprefix("torch."),
        "adapters": [{"name": a.name, "sha256": a.digest()} for a in pool],
        "prior": None if prior is None else prior.digest(),  # config.inversion.prior otherwise
        "config": as_plain(config),
    }
    record = folder / "run.json"
    if record.exists():
        earlier = read_json(record)
        if earlier != run:
            keys = sorted(k for k in run.keys() | earlier.keys() if run.get(k) != earlier.get(k))
            raise ValueError(
                f"`work_dir` {folder} must be of this run, got one that differs in {', '.join(keys)} (see {record}); "
                "choose another folder, or the settings of that run."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`work_dir` {folder} must be new, empty or of this run, got one with other files in it.")
    (folder / "surrogates").mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    remove_leftovers(folder / "surrogates")
    write_json(record, run)
    return folder


def _invert_all(
    backbone: Backbone,
    dtype: torch.dtype,
    pool: Sequence[Adapter],
    config: RecycleConfig,
    prior: BatchNormPrior | None,
    folder: Path | None,
    compile: Compile,
    quiet: bool,
) -> list[Surrogate]:
    """One surrogate for each adapter, those that are on disk already read from there.

    Adapters that share batches are inverted anew together where any of theirs is missing: the bits depend on it.
    """
    surrogates: list[Surrogate] = []
    paths = _surrogate_paths(folder, pool)
    size = _group_size(config)
    for first in range(0, len(pool), size):
        group = slice(first, first + size)
        found = [Surrogate.load(path) if path is not None and path.exists() else None for path in paths[group]]
        if any(surrogate is None for surrogate in found):
            made = invert_together(
                backbone,
                pool[group],
                config.inversion,
                prior=prior,
                seed=config.seed,
                dtype=dtype,
                compile=compile,
                quiet=quiet,
            )
            for old, new, path in zip(found, made, paths[group], strict=True):
                if old is None and path is not None:
                    new.save(path)
                surrogates.append(old or new)
        else:
            surrogates += [surrogate for surrogate in found if surrogate is not None]
    return surrogates


def _group_size(config: RecycleConfig) -> int:
    """Adapters inverted together; one where nothing is optimised."""
    return config.inversion.adapters_per_batch if config.inversion.steps else 1


def _surrogate_paths(folder: str | PathLike[str] | None, pool: Sequence[Adapter]) -> list[Path | None]:
    """Where the surrogate of each adapter is kept; None for each without a folder."""
    if folder is None:
        return [None] * len(pool)
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", adapter.name) for adapter in pool]
    return [Path(folder) / "surrogates" / f"{i:03d}-{name}.safetensors" for i, name in enumerate(names)]
