"""The contact sheet: images that the run trained on, with their masks; a click shows one with its history."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from torch import Tensor

from ..inversion.surrogate import Surrogate
from . import svg
from .images import chosen, data_address, mask_overlay
from .run import Run

OPEN = 2
"""Adapters whose images are seen at once; the others' unfold."""


def contact_sheet(run: Run, prefix: str, most: int) -> str:
    """Images of a run, adapter after adapter.

    Args:
        run: finished.
        prefix: of the identifiers in the page.
        most: images in all.
    """
    files = run.surrogate_files
    if not files:
        return '<p class="quiet">This run made no images: it used weights alone.</p>'
    shown = files[:most]
    each = min(max(1, most // len(shown)), 12 if len(files) > 1 else 24)
    rows = [_adapter_row(run.surrogate(file), f"{prefix}-{i}", each) for i, file in enumerate(shown)]
    folded = f"<details><summary>{len(rows) - OPEN} more adapters</summary>{''.join(rows[OPEN:])}</details>"
    left = f'<p class="quiet">{len(shown)} of {len(files)} adapters are shown.</p>' if len(shown) < len(files) else ""
    return "".join(rows[:OPEN]) + (folded if len(rows) > OPEN else "") + left


def _adapter_row(surrogate: Surrogate, prefix: str, most: int) -> str:
    index = chosen(surrogate, most)
    name = f"adapter {surrogate.adapter}" if surrogate.adapter else "one set for all adapters"
    masked = "" if surrogate.kept is None else f"; {_kept(surrogate)}"
    tiles = "".join(_tile(surrogate, image, f"{prefix}-{image}") for image in index)
    head = f"<h3>{escape(name)}: {len(index)} of {len(surrogate.images)} images{masked}</h3>"
    return f'{head}<div class="sheet">{tiles}</div>'


def _kept(surrogate: Surrogate) -> str:
    assert surrogate.kept is not None
    return f"{surrogate.kept.shape[1]} of {math.prod(surrogate.grid)} patches kept, the others in grey"


def _tile(surrogate: Surrogate, image: int, key: str) -> str:
    """A small image, and the sheet that a click on it opens (HTML's popover, without a script)."""
    label = "" if surrogate.labels is None else surrogate.class_names[int(surrogate.labels[image])]
    name, overlay = escape(label or f"picture {image}"), mask_overlay(surrogate, image)
    whole = f'<span class="pic" role="img" aria-label="{name}"></span>'
    masked = f'<span class="pic" role="img" aria-label="{name}, masked">{overlay}</span>' if overlay else ""
    address = data_address(surrogate.images[image])
    below = f"<small>{name}</small>" if label else ""
    facts = "".join(f"<p>{fact}</p>" for fact in _facts(surrogate, image))
    return (
        f'<div class="tile" style="--i:url({address})"><button popovertarget="{key}">{whole}{masked}{below}</button>'
        f'<div popover id="{key}"><h3>{name}</h3><div class="two">{whole}{masked}</div>{facts}'
        f"{_history(surrogate, image)}</div></div>"
    )


def _facts(surrogate: Surrogate, image: int) -> Iterator[str]:
    if surrogate.adapter:
        yield f"Made from adapter {escape(surrogate.adapter)}."
    if surrogate.teacher_logits is not None and surrogate.labels is not None:
        share = float(surrogate.teacher_logits[image].softmax(-1)[int(surrogate.labels[image])])
        yield f"The adapter's own model is {100 * share:.0f} % sure of this class."
    if surrogate.curves is None:
        yield "Painted at random from shapes; nothing was optimised."


def _history(surrogate: Surrogate, image: int) -> str:
    if surrogate.curves is None:
        return ""
    curves: Tensor = surrogate.curves[image]
    every = math.ceil(int(surrogate.config.get("steps", curves.shape[-1])) / 100)
    doubts, unnatural = ([(i * every, value) for i, value in enumerate(row)] for row in curves.tolist())
    lines = [svg.Line("cross-entropy of this image (left)", doubts)]
    if any(value > 0 for _, value in unnatural):
        lines.append(svg.Line("batch-norm prior of its batch (right)", unnatural, "s2", right=True))
    return svg.line_chart(
        lines,
        title="Cross-entropy and prior over the steps",
        x_label="step of inversion",
        y_label="cross-entropy",
        right_label="prior",
    )
