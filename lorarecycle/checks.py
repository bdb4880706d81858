"""What a run asks of its adapters, checked before any work: only what the chosen settings use."""

from __future__ import annotations

from collections.abc import Sequence

from .adapters.adapter import Adapter
from .adapters.stored import head_of
from .config import RecycleConfig
from .meta.episodes import check_episodes
from .stages import Needs
from .vit.backbone import Backbone
from .vit.fit import check_fit


def choose_inverted(adapters: Sequence[Adapter], config: RecycleConfig) -> tuple[list[Adapter], list[str]]:
    """The adapters that get images of their own, and a note that names those without a head.

    Raises:
        ValueError: none has a head, or some have none and would be of no use at all.
    """
    needs = Needs.of(config)
    if not needs.heads:
        return [], []
    chosen = [adapter for adapter in adapters if head_of(adapter) is not None]
    headless = sorted(adapter.name for adapter in adapters if head_of(adapter) is None)
    if headless and (not chosen or not needs.warm_start):
        raise ValueError(
            f"adapters must have a classification head to have images of their own, got none in {', '.join(headless)}; "
            "load them with `Adapter.load(path, head=...)`, put a head.safetensors (weight [C, D], bias [C]) beside "
            "them, or use preset='weights', which needs no heads."
        )
    notes = [f"without a head, so without images of their own: {', '.join(headless)}"] if headless else []
    return chosen, notes


def check_adapters(
    backbone: Backbone, adapters: Sequence[Adapter], inverted: Sequence[Adapter], config: RecycleConfig
) -> None:
    """Make sure that adapters fit the backbone and that episodes can be drawn from them.

    Args:
        backbone: that all are for.
        adapters: all of them.
        inverted: those with images of their own.
        config: settings.

    Raises:
        ValueError: the message names adapter, rule and fix.
    """
    needs = Needs.of(config)
    for adapter in adapters:
        check_fit(backbone, adapter)
    if needs.images:
        patches = backbone.num_patches(config.inversion.image_size or backbone.image_size)
        backbone.kept_per_layer(config.inversion.prune, patches)
    if needs.labels:
        heads = [head for head in (head_of(a) for a in inverted) if head is not None]
        class_names = [head.class_names for head in heads]
        check_episodes([len(names) for names in class_names], [a.name for a in inverted], config.meta, class_names)
        wanted = config.meta.n_shot + config.meta.n_query
        if config.inversion.images_per_class < wanted:
            raise ValueError(
                f"`images_per_class` must be at least n_shot + n_query = {wanted}, got "
                f"{config.inversion.images_per_class}."
            )
