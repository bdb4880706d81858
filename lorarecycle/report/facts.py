"""Sections about how it came about: training, adapters, stages, and how to repeat it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any

from ..runtime.progress import duration
from . import svg
from .command import command_of
from .measure import META_LORA
from .run import Run

TOOK = {"paint pictures": "images", "invert adapters": "images", "label pictures": "images"}
"""Stages of the plan whose seconds are kept under another name."""
MOST_ADAPTERS = 24


def tiles(run: Run) -> str:
    """The figures that people ask first."""
    took = run.summary.get("took", {})
    size = sum(file.stat().st_size for file in run.work.meta_lora.glob("*.safetensors"))
    facts = {
        "adapters in": str(len(run.record.get("adapters", ()))),
        "training images seen": "0",
        "rank of the meta-LoRA": str(run.config.meta.r),
        "its size": f"{size / 1e6:.1f} MB",
        "time": duration(sum(took.values())) if took else "not kept",
    }
    return f'<dl class="tiles">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())}</dl>'


def training(run: Run) -> str:
    """Loss of every step, its running mean and the learning rate."""
    losses = run.losses
    if not losses:
        return '<p class="quiet">Nothing was trained: the meta-LoRA is the warm start.</p>'
    window = min(10, len(losses))
    means = [(step, sum(losses[step + 1 - window : step + 1]) / window) for step in range(window - 1, len(losses))]
    rates = list(enumerate(run.rates))
    lines = [svg.Line("loss of a step (left)", list(enumerate(losses)), "faint")]
    lines += [svg.Line(f"mean of {window} steps (left)", means)]
    lines += [svg.Line("learning rate (right)", rates, "s2", right=True)] if rates else []
    chart = svg.line_chart(
        lines, title="Loss over meta-training", x_label="step", y_label="loss", right_label="learning rate"
    )
    first, last = means[0][1], means[-1][1]
    text = f"The loss went from {first:.3g} to {last:.3g} in {len(losses)} steps (means of {window})."
    return f"<p>{text}</p><figure>{chart}</figure>"


def adapters(run: Run) -> str:
    """How far the mean of all moves without each adapter, and how alike it is to the meta-LoRA."""
    rows: Sequence[dict[str, Any]] = run.summary.get("adapters", ())
    counted = [row for row in rows if row.get("moves_mean") is not None]
    if len(counted) < 2:
        return '<p class="quiet">Nothing to compare: fewer than two adapters, or a run of an older version.</p>'
    order = sorted(counted, key=lambda row: -row["moves_mean"])
    bars = [
        svg.Bar(f"{row['name']} · likeness {row['likeness']:.2f}", 100 * row["moves_mean"], None, "s1")
        for row in order[:MOST_ADAPTERS]
    ]
    fair = 100 / len(counted)
    first, last = order[0], order[-1]
    text = (
        f"Without <b>{escape(first['name'])}</b> the mean of all updates would move by "
        f"{100 * first['moves_mean']:.0f} % of its length, without {escape(last['name'])} by "
        f"{100 * last['moves_mean']:.0f} %."
    )
    note = (
        "Computed from the weights; nothing is trained again. Likeness: cosine between the adapter's update and the "
        f"meta-LoRA's, 1 for the same direction. Each is one of {len(counted)}: {fair:.0f} % of the mean."
    )
    more = f" The first {MOST_ADAPTERS} of {len(order)} are shown." if len(order) > MOST_ADAPTERS else ""
    chart = svg.bar_chart(bars, title="What each adapter counts", unit=" %", digits=0)
    return f'<p>{text}</p><figure>{chart}</figure><p class="quiet">{note}{more}</p>'


def stages(run: Run) -> str:
    """The plan beside what it took."""
    plan, took = run.summary.get("stages", ()), run.summary.get("took", {})
    if not plan:
        return '<p class="quiet">Not kept: a run of an older version.</p>'
    rows = []
    for stage in plan:
        seconds = took.get(TOOK.get(stage["name"], stage["name"]))
        known = "" if seconds is None else duration(seconds)
        cells = f"<td>{escape(stage['name'])}</td><td>{escape(stage['what'])}, {escape(stage['amount'])}</td>"
        rows.append(f'<tr>{cells}<td class="n">{duration(stage["seconds"])}</td><td class="n">{known}</td></tr>')
    head = '<tr><th>stage</th><th>what</th><th class="n">planned</th><th class="n">took</th></tr>'
    notes = "".join(f"<p>{escape(note)}</p>" for note in run.summary.get("notes", ()))
    resumed = "<p>The run had been stopped; the seconds are those of its last part.</p>" * bool(
        run.summary.get("resumed")
    )
    where = f'<p class="quiet">{escape(run.summary["title"])}; {escape(run.summary["machine"])}.</p>'
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>{resumed}{notes}{where}'


def repeating(run: Run) -> str:
    """Command, versions, hashes."""
    record, versions = run.record, run.summary.get("versions", {"lorarecycle": run.record.get("lorarecycle", "?")})
    command = command_of(run.config, record)
    hashes = "".join(
        f"<tr><td>{escape(str(one['name']))}</td><td><code>{escape(str(one['sha256']))}</code></td></tr>"
        for one in record.get("adapters", ())
    )
    model = record["base"]
    base = f"<tr><td>{escape(str(model['name']))}</td><td><code>{escape(str(model['sha256']))}</code></td></tr>"
    ours = f"<tr><td>meta-LoRA</td><td><code>{run.meta_lora.digest()}</code></td></tr>"
    said = ", ".join(f"{escape(str(name))} {escape(str(version))}" for name, version in versions.items())
    finished = f", finished {escape(run.summary['finished'])}" if "finished" in run.summary else ""
    table = f'<div class="scroll"><table><tr><th>weights</th><th>SHA-256</th></tr>{base}{hashes}{ours}</table></div>'
    return (
        f"<p>With the folder of the adapters in the place of ADAPTERS:</p><pre>{escape(command)}</pre>"
        f'<p class="quiet">{said}{finished}</p><details><summary>hashes</summary>{table}</details>'
    )


def comparison(runs: Sequence[Run]) -> str:
    """Several runs in one table: the settings in which they differ, and what came out."""
    settings = [_flat(dataclasses.asdict(run.config)) for run in runs]
    rows = [
        [key, *(str(one[key]) for one in settings)] for key in settings[0] if len({str(s[key]) for s in settings}) > 1
    ]
    shots = sorted({shot for run in runs if run.accuracy for shot in run.accuracy["rows"][META_LORA]}, key=int)
    for shot in shots:
        found = [run.accuracy and run.accuracy["rows"][META_LORA].get(shot) for run in runs]
        rows.append(
            [f"accuracy, {shot}-shot", *(f"{f['accuracy']:.1f} ± {f['interval']:.1f} %" if f else "" for f in found)]
        )
    rows.append(["last loss", *(f"{run.losses[-1]:.3g}" if run.losses else "" for run in runs)])
    took = [run.summary.get("took", {}) for run in runs]
    rows.append(["time", *(duration(sum(one.values())) if one else "" for one in took)])
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *(run.name for run in runs)])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _flat(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict) and not before
        flat |= _flat(value, f"{key}.") if nested else {before + key: value}
    return flat
