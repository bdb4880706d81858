"""The plan of a run: which stages run, what each needs, and what it costs; made and checked before any work."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields

from .config import InversionConfig, MetaConfig, RecycleConfig
from .runtime.memory import SHARE
from .stages import Needs, Stage, leaves_out_patches

PRIOR = ("prior", "prior_weight", "prior_size", "prior_relative")
OPTIMISER = ("patience", "parametrization", "lr", "warm_up", "betas", "schedule", *PRIOR)
"""Settings of the optimisation of images."""


@dataclass(frozen=True)
class Plan:
    """What `recycle` is about to do.

    Attributes:
        stages: in the order in which they run.
        needs: what they ask for.
        unused: setting -> why it cannot move the result.
        notes: what else a user should know, such as adapters that a stage leaves out.
        title: base, adapters, device and precision in one line.
        memory: where the images are kept for training, and the budget that decides it, in one line; "" without any.
    """

    stages: tuple[Stage, ...]
    needs: Needs
    unused: dict[str, str]
    notes: tuple[str, ...]
    title: str
    memory: str = ""

    @property
    def seconds(self) -> float:
        """About how long all stages take here."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def bytes(self) -> int:
        """What all stages keep."""
        return sum(stage.bytes for stage in self.stages)

    def describe(self) -> str:
        """The plan as a short table."""
        rows = [("stage", "what", "how much", "keeps", "about")]
        rows += [(s.name, s.what, s.amount, _size(s.bytes), _duration(s.seconds)) for s in self.stages]
        rows.append(("", "", "", _size(self.bytes), _duration(self.seconds)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        needs = [f.name.replace("_", " ") for f in fields(Needs) if getattr(self.needs, f.name)]
        text = [f"needs: {', '.join(needs) or 'nothing'}", *([self.memory] if self.memory else [])]
        if self.unused:
            groups: dict[str, list[str]] = {}
            for name, why in self.unused.items():
                groups.setdefault(why, []).append(name)
            text += [f"unused, as {why}: {', '.join(names)}" for why, names in groups.items()]
        folded = [textwrap.fill(line, 118, subsequent_indent="    ") for line in (*text, *self.notes)]
        return "\n".join([self.title, "", *table, "", *folded])


def unused_settings(config: RecycleConfig) -> dict[str, str]:
    """Settings that cannot move the result under the others, with the reason."""
    needs, inversion, meta = Needs.of(config), config.inversion, config.meta
    found: dict[str, str] = {}

    def mark(reason: str, room: str, *names: str) -> None:
        for name in names:
            found.setdefault(f"{room}.{name}", reason)

    if not needs.images and needs.warm_start:
        found["seed"] = "nothing is drawn"
    if not needs.images:
        shape = ("init", "warm_start_gain", "r", "lora_alpha", "sites", "layers", "steps")
        mark("nothing is trained", "inversion", *(f.name for f in fields(InversionConfig)))
        mark("nothing is trained", "meta", *(f.name for f in fields(MetaConfig) if f.name not in shape))
    if needs.pictures:
        mark("one set of painted pictures serves all adapters", "inversion", "images_per_class", "batch_size")
    elif needs.images:
        mark("each adapter has images of its own", "inversion", "pictures")
    if inversion.steps == 0:
        mark("no image is optimised", "inversion", *OPTIMISER, "prune_from", "roll", "flip")
    if inversion.steps > 0 and inversion.init == "noise":
        mark("images start from noise", "inversion", "candidates")
    if inversion.prior is None:
        mark("there is no prior", "inversion", "prior_weight", "prior_size", "prior_relative")
    if inversion.prior_weight == 0:
        mark("the prior has no weight", "inversion", "prior", "prior_size", "prior_relative")
    if not inversion.prune:
        mark("no token is pruned", "inversion", "prune_from")
    if inversion.steps == 0 and meta.sparsity is not None:
        mark("meta.sparsity masks by scores", "inversion", "prune")
    if meta.guide_weight == 1:
        mark("only the guide counts", "meta", "interpolation", "distance")
    if meta.guide_weight == 0:
        mark("no guide counts", "meta", "guide_size", "guide_shift")
    if leaves_out_patches(config):
        mark("patches are left out", "meta", "guide_shift")
    if meta.init == "random":
        mark("training starts from random factors", "meta", "warm_start_gain")
    return found


def where_images_are(bytes: int, budget: int, *, given: bool) -> str:
    """In words: in memory, or read from disk, and why."""
    limit = f"{_size(budget) or '0 B'} of memory" + ("" if given else f", {SHARE:.0%} of what is free")
    if bytes <= budget:
        return f"images for training: {_size(bytes)}, held in memory (budget: {limit})"
    return f"images for training: {_size(bytes)}, read from disk step by step, as they are above the budget ({limit})"


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B" if count else ""


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    for unit, scale, last in (("min", 60, 120), ("h", 3600, 72)):
        if seconds < scale * last:
            return f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
