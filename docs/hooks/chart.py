"""Draws docs/assets/accuracy.svg from benchmarks/results/: `python docs/hooks/chart.py`."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "assets" / "accuracy.svg"
ROWS = {
    "plain": "plain ViT",
    "tuned": "fine-tuned on them",
    "average": "average of the adapters",
    "warm start": "lorarecycle, weights alone",
    "default": "lorarecycle",
    "real images, to convergence (bound)": "bound: real images",
}
ASKED = {"adapters": 20, "epochs": 10, "split": "test", "distance": "centred_cosine", "n_tasks": 600, "test_images": 40}
LOW, HIGH = 80, 92
STYLE = (
    "text{font:15px system-ui,sans-serif;fill:#1d2125}.q{fill:#626a73;font-size:13px}.b{font-weight:600}"
    ".d{fill:#6b747d}.o{fill:#1f6feb}.l{stroke:#6b747d;stroke-width:2}.l.o{stroke:#1f6feb}.g{stroke:#d5d9dd}"
    "@media(prefers-color-scheme:dark){text{fill:#e8eaed}.q{fill:#a2abb4}.d{fill:#a2abb4}.o{fill:#6ea8ff}"
    ".l{stroke:#a2abb4}.l.o{stroke:#6ea8ff}.g{stroke:#3a4149}}"
)


def figures() -> dict[str, dict[str, Any]]:
    """Row -> "mean", "interval": 1-shot accuracy on CIFAR-FS with 20 adapters at 224 px, mean over the seeds."""
    results = ROOT / "benchmarks" / "results"
    groups = json.loads((results / "accuracy_224.json").read_text())["groups"]
    found = {}
    for group in groups:
        if {k: group["arguments"][k] for k in ASKED} == ASKED:
            for row, runs in group["sets"].get("cifar_fs", {}).items():
                runs = [run["cifar_fs, 1-shot"] for run in runs]
                figures = {k: sum(run[k] for run in runs) / len(runs) for k in ("mean", "interval")}
                if found.setdefault(row, figures) != figures:
                    raise ValueError(f"accuracy_224.json must hold one figure of {row!r}, got two: {figures}.")
    cells = json.loads((results / "methods.json").read_text())["methods_224_tuned"]
    tuned = next(cell["result"] for cell in cells if cell["row"] == "LoRA + Linear")
    return {**found, "tuned": {"mean": tuned["accuracy"], "interval": tuned["interval"], "tasks": tuned["n_tasks"]}}


def chart() -> str:
    """The chart as SVG: a point and its 95 % interval over tasks for each row."""
    found = figures()
    bottom = 46 + 30 * len(ROWS)
    parts = ['<text class="b" x="8" y="20">New classes from one photo each: answers right, in %</text>']
    for value in range(LOW, HIGH + 1, 2):
        parts.append(f'<path class="g" d="M{_x(value):.0f} 36V{bottom}"/>')
        parts.append(f'<text class="q" x="{_x(value):.0f}" y="{bottom + 16}" text-anchor="middle">{value}</text>')
    for i, (key, name) in enumerate(ROWS.items()):
        y, mean, interval = 56 + 30 * i, found[key]["mean"], found[key]["interval"]
        ours, bold = (" o", " b") if key == "default" else ("", "")
        parts.append(f'<text class="{bold.strip()}" x="204" y="{y + 5}" text-anchor="end">{name}</text>')
        parts.append(f'<path class="l{ours}" d="M{_x(mean - interval):.1f} {y}H{_x(mean + interval):.1f}"/>')
        parts.append(f'<circle class="d{ours}" cx="{_x(mean):.1f}" cy="{y}" r="5"/>')
        parts.append(f'<text class="b" x="564" y="{y + 5}">{mean:.1f} ± {interval:.1f}</text>')
    notes = (
        f"CIFAR-FS test classes, 5-way, 600 tasks (fine-tuned: {found['tuned']['tasks']} others), 20 adapters,",
        "ViT-Tiny at 224 px. Answers by centred cosine to class means (fine-tuned: a linear head). Guessing gives 20.",
    )
    for i, note in enumerate(notes):
        parts.append(f'<text class="q" x="8" y="{bottom + 42 + 18 * i}">{note}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 {bottom + 68}" role="img" '
        f'aria-label="Accuracy on new classes"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _x(value: float) -> float:
    """Where a value stands."""
    return 220 + 330 * (value - LOW) / (HIGH - LOW)


if __name__ == "__main__":
    FILE.write_text(chart(), encoding="utf-8")
