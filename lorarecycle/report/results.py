"""Sections about what came out: accuracy, who is taken for whom, maps of features."""

from __future__ import annotations

from html import escape

from . import svg
from .maps import FeatureMap
from .measure import META_LORA, PLAIN
from .run import Run

MOST_CLASSES = 20
"""Classes of a confusion table; the worst ones where there are more."""


def verdict(run: Run) -> str:
    """The result in one or two sentences."""
    count = len(run.record.get("adapters", ()))
    made = f"{count} adapters of <b>{escape(str(run.record['base']['name']))}</b> became one meta-LoRA"
    if run.accuracy is None:
        return (
            f"{made}. Its accuracy has not been measured: "
            "<code>lorarecycle report RUN --data IMAGES_OF_NEW_CLASSES</code> does so."
        )
    rows, tasks = run.accuracy["rows"], run.accuracy["tasks"]
    shot = min(rows[META_LORA], key=int)
    ours, plain = rows[META_LORA][shot]["accuracy"], rows[PLAIN][shot]["accuracy"]
    size = f"{tasks['n_way']} new classes, {_photos(int(shot))} of each"
    better = (
        f"{abs(ours - plain):.1f} points {'more' if ours >= plain else 'less'} than the plain model's {plain:.1f} %"
    )
    return f"{made}. Shown {size}, it names {ours:.1f} % of new images right: {better}."


def accuracy(run: Run) -> str:
    """Bars beside the baselines, for each number of shots."""
    measured = run.accuracy
    if measured is None:
        return '<p class="quiet">Not measured.</p>'
    rows, tasks, parts = measured["rows"], measured["tasks"], []
    chance = 100 / tasks["n_way"]
    for shot in next(iter(rows.values())):
        bars = [
            svg.Bar(name, row[shot]["accuracy"], row[shot]["interval"], "s1" if name == META_LORA else "")
            for name, row in rows.items()
        ]
        title = f"{_photos(int(shot))} per class"
        chart = svg.bar_chart(bars, title=f"Accuracy with {title}", unit=" %")
        parts.append(f"<figure><h3>{title} ({shot}-shot)</h3>{chart}</figure>")
    distance = tasks.get("distance", "euclidean").replace("_", " ")
    note = (
        f"{tasks['n_tasks']} tasks of {tasks['n_way']} classes, {tasks['n_query']} questions per class; mean and 95 % "
        f"interval, by {distance}. Guessing gives {chance:.0f} %. Images: "
        f"{escape(str(measured['data'] or 'given'))}, {measured['images']} of {len(measured['classes'])} classes that "
        "no adapter should have seen."
    )
    return f'<div class="pair">{"".join(parts)}</div><p class="quiet">{note}</p>'


def confusion(run: Run) -> str:
    """A table of truth by answer."""
    if run.accuracy is None:
        return '<p class="quiet">Not measured.</p>'
    rows, names = run.accuracy["confusion"], run.accuracy["classes"]
    order = sorted(range(len(names)), key=lambda c: rows[c][c])
    worst, best = order[0], order[-1]
    shown = sorted(order[:MOST_CLASSES])
    table = svg.heat_map(
        [[rows[i][j] for j in shown] for i in shown], [names[i] for i in shown], title="Share of answers by true class"
    )
    text = (
        f"Easiest: {escape(names[best])}, {100 * rows[best][best]:.0f} % right. Hardest: {escape(names[worst])}, "
        f"{100 * rows[worst][worst]:.0f} %."
    )
    left = len(names) - len(shown)
    more = f" The {len(shown)} hardest of {len(names)} classes are shown." if left else ""
    return f'<p>{text}</p><figure>{table}</figure><p class="quiet">Rows: what is shown; columns: the answer.{more}</p>'


def feature_map(found: FeatureMap | None, why: str) -> str:
    """Two maps beside one another; why there is none where `found` is None."""
    if found is None:
        return f'<p class="quiet">{escape(why)}</p>'
    parts = [
        f"<figure><h3>{name}</h3>{svg.scatter(points, found.styles, title=f'Map of features, {name}')}</figure>"
        for name, points in (("Plain model", found.before), ("With the meta-LoRA", found.after))
    ]
    plain = '<p class="quiet">Each dot has the mean colour of its picture: these pictures have no classes.</p>'
    return f'<div class="pair">{"".join(parts)}</div>{svg.legend(found.classes) if found.classes else plain}'


def _photos(count: int) -> str:
    return "1 photo" if count == 1 else f"{count} photos"
