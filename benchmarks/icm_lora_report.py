"""Part of benchmarks/icm_lora.py: its results as a page of tables, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icm_lora_adapters import LEARNT, SAVE_LAST, TEST_PER_CLASS, TUNE_PER_CLASS, Task

from lorarecycle.runtime.files import write_json, write_text

Facts = dict[str, Any]
EARLIER = "(*)"
"""Marks rows that were measured under other settings than the rest; `facts["earlier"]` lists them."""
RANKS, LAYERS = (1, 2, 4, 8), (10, 12, 14)


def write_report(facts: Facts, tasks: Sequence[Task], seen: int, output: Path) -> None:
    """`output`.md and `output`.json; what was not measured is left out."""
    write_json(output.with_suffix(".json"), {k: v for k, v in facts.items() if not k.startswith("vector")})
    parts = [
        head(facts, tasks, seen),
        methods(facts, tasks[:seen]),
        choice(facts, tasks[:seen]),
        ranks(facts, tasks[:seen]),
        layers(facts, tasks[:seen]),
        vectors(facts, tasks[:seen]),
        held_out(facts, tasks[seen:]),
        recycling(facts),
        storage(facts),
        fits(facts),
        scaling(facts),
    ]
    write_text(output.with_suffix(".md"), "\n\n".join(part for part in parts if part) + "\n")


def head(facts: Facts, tasks: Sequence[Task], seen: int) -> str:
    settings = facts["settings"]
    note = f"Rows with {EARLIER}: {facts['earlier_note']}\n\n" if facts.get("earlier") else ""
    names = "; ".join(f"{task.name}: {', '.join(task.test.class_names)}" for task in tasks)
    return (
        "# ICM-LoRA: adapters from task vectors\n\n"
        f"`{settings['command']}` on {settings['machine']}; tuning, fits and accuracies with one thread, on a machine "
        "that others used at the same time.\n\n"
        f"ViT-Tiny at 112 x 112 pixels. {len(tasks)} five-way tasks of CIFAR-FS train classes without a class in "
        f"common, {seen} of which the generators learn from. An adapter (q and v of every block, with its head) is "
        f"tuned on {TUNE_PER_CLASS} images per class for {settings['tuning_epochs']} epochs at batch 20 (bfloat16), "
        f"all from the same start; the checkpoints of the last {SAVE_LAST} epochs are kept, and a generator learns "
        f"from the last {LEARNT} unless a row says otherwise. Fits: {settings['fit_epochs'] * SAVE_LAST // LEARNT} "
        f"epochs over {seen * LEARNT} checkpoints at batch 2, {settings['dtype']} (the paper: 2000 epochs), the rest "
        "as in `GenerateConfig`. "
        f"Accuracies in % on {TEST_PER_CLASS} other images of each class; a "
        "difference of 0.2 is one image. Parts of the benchmark without a row here have not been measured yet.\n\n"
        f"{note}Tasks: {names}."
    )


def methods(facts: Facts, tasks: Sequence[Task]) -> str:
    rows = [
        ("plain model, nearest class mean", "plain"),
        ("original adapter, last checkpoint", "original"),
        ("original adapter, mean over checkpoints", "original, mean of checkpoints"),
        ("ICM-LoRA, generated", "generated"),
        ("ICM-LoRA, generated, learnt from the last 5 checkpoints", "generated, last 5"),
        (f"ICM-LoRA, generated, learnt from all {SAVE_LAST} checkpoints", f"generated, last {SAVE_LAST}"),
        ("ICM-LoRA, generated from the vector of other images", "generated, vector of other images"),
        ("COND P-DIFF, generated", "COND P-DIFF"),
        ("nearest task vector (keeps all checkpoints)", "nearest"),
        ("model soup of all adapters", "soup of all"),
        ("model soup of the task's own checkpoints", "soup of the task"),
        ("greedy soup of all (by accuracy on the images tuned on)", "greedy soup of all"),
    ]
    table = accuracy_table("r = 2", rows, facts, tasks)
    found = facts.get("relative distances")
    if found:
        mean = {key: 100 * sum(values) / len(values) for key, values in found.items()}
        table += (
            f"\n\nIn parameters, relative to the length of the last checkpoint: a sample lies "
            f"{mean['to checkpoint']:.1f} % from it, two samples of one vector {mean['between samples']:.1f} % from "
            f"each other, the first and the last checkpoint {mean['between checkpoints']:.1f} %. The KL term goes to "
            "zero, so z hardly matters and samples of one vector are near copies."
        )
    return "## Accuracy on the tasks learnt from (Tab. 1)\n\n" + table


def choice(facts: Facts, tasks: Sequence[Task]) -> str:
    rows = (
        ("original adapter, last checkpoint", "last checkpoint", None),
        (f"original adapter, mean over the last {SAVE_LAST}", "mean of checkpoints", None),
        (f"average of the task's last {SAVE_LAST} checkpoints", f"soup of the last {SAVE_LAST}", None),
        (f"average of the task's last {LEARNT}", f"soup of the last {LEARNT}", None),
        ("average of the task's last 5", "soup of the last 5", None),
        (f"ICM-LoRA from the last {SAVE_LAST}, `settle=0`", "generated, plain", "plain"),
        (f"ICM-LoRA from the last {SAVE_LAST}, default `settle`", "generated, settled", "settled"),
        (f"ICM-LoRA from the last {LEARNT}, default `settle`", "generated, settled, fewer", "settled, fewer"),
    )
    lines = []
    for label, key, error in rows:
        values = [facts.get(f"rest: {key} / {task.name}") for task in tasks]
        if None not in values:
            gap = facts.get(f"distance, {error}")
            lines.append(f"| {label} | {sum(values) / len(values):.2f} | {'' if gap is None else f'{100 * gap:.1f}'} |")
    if not lines:
        return ""
    return (
        "## What the settings were chosen by\n\nRank 2 on the images of each class that are neither tuned on nor "
        "reported elsewhere here (30 per class), and how far a sample lies from the mean of the checkpoints learnt "
        "from.\n\n| r = 2 | accuracy | distance, % |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n\nAs z hardly "
        "matters, a sample is the mean of the checkpoints learnt from, and an error of the fit. In a batch of 2, batch "
        "norm sees other statistics than in a sample; a last quarter of the steps under its running statistics "
        "(`settle`) takes much of that error away. What the mean of many checkpoints lacks against the last one, "
        "fewer and later checkpoints bring."
    )


def ranks(facts: Facts, tasks: Sequence[Task]) -> str:
    rows = []
    for r in RANKS:
        generated = f"generated r={r} n=12" if r != 2 else "generated"
        rows += [
            (f"r = {r}: original, last checkpoint", f"last original r={r}" if r != 2 else "original"),
            (f"r = {r}: original, mean", f"original r={r}" if r != 2 else "original, mean of checkpoints"),
            (f"r = {r}: ICM-LoRA", generated),
            (f"r = {r}: soup of all", f"soup r={r}" if r != 2 else "soup of all"),
        ]
    return "## By rank (Tab. 4)\n\n" + accuracy_table("12 layers", rows, facts, tasks)


def layers(facts: Facts, tasks: Sequence[Task]) -> str:
    rows = [(f"n = {n}", f"generated r=2 n={n}" if n != 12 else "generated") for n in LAYERS]
    rows.append(("n = 12 under the settings of those marked", "generated before"))
    return "## By convolutional layers (Tab. 5)\n\n" + accuracy_table("r = 2", rows, facts, tasks)


def vectors(facts: Facts, tasks: Sequence[Task]) -> str:
    rows = [("vision: the images tuned on", "generated"), ("vision: other images", "generated, vector of other images")]
    return (
        "## By task vector (Tab. 6)\n\n" + accuracy_table("r = 2", rows, facts, tasks) + "\n\nThe text row is absent: "
        "no text encoder's weights were at hand where this ran."
    )


def held_out(facts: Facts, tasks: Sequence[Task]) -> str:
    names = (
        ("plain model", "plain"),
        ("its own adapter (tuned)", "original"),
        ("ICM-LoRA, generated", "generated"),
        ("nearest task vector", "nearest"),
        ("model soup of all", "soup of all"),
    )
    rows = [(f"{label}, class means", key if key == "plain" else f"{key}, class means") for label, key in names]
    rows += [(f"{label}, own head", key) for label, key in names[1:]]
    return (
        "## Vectors of tasks that no generator has seen\n\n"
        + accuracy_table("r = 2", rows, facts, tasks)
        + f"\n\nA generated head belongs to classes of the tasks learnt from, so on new classes it is chance (20 %). "
        f"With the nearest class means of the {TUNE_PER_CLASS} images per class in its place, what the factors do to "
        "the features remains."
    )


def recycling(facts: Facts) -> str:
    rows = (
        ("plain model", "recycle plain"),
        ("meta-LoRA of 3 real adapters", "recycle real"),
        ("meta-LoRA of those and 3 generated for the same tasks", "recycle real and generated"),
    )
    lines = [f"| {label} | {facts[k]['mean']:.2f} ± {facts[k]['interval']:.2f} |" for label, k in rows if k in facts]
    if not lines:
        return ""
    return (
        "## Generated adapters into `recycle()`\n\nCIFAR-FS test classes, 600 five-way one-shot tasks; the default "
        "settings, images of 32 pixels enlarged (benchmarks/icm_lora_recycle.py).\n\n"
        "| adapters recycled | 1-shot |\n| --- | --- |\n" + "\n".join(lines)
    )


def storage(facts: Facts) -> str:
    lines = []
    settings = facts["settings"]
    sizes = settings["generator_bytes"]
    for label, values in (
        ("all checkpoints (fp32)", [settings["adapter_bytes"][r]["checkpoints"] for r in RANKS]),
        ("last checkpoints only", [settings["adapter_bytes"][r]["last"] for r in RANKS]),
        ("model soup of all", [sizes.get(f"soup-r{r}" if r != 2 else "soup-of-all") for r in RANKS]),
        ("ICM-LoRA", [sizes.get(f"icm-r{r}-n12") for r in RANKS]),
        ("COND P-DIFF", [sizes.get(f"pdiff-r{r}") for r in RANKS]),
    ):
        lines.append(f"| {label} | " + " | ".join("" if not v else f"{v / 1e6:.2f}" for v in values) + " |")
    return (
        "## Storage in MB (Tab. 3), 5 tasks\n\n| what | r = 1 | r = 2 | r = 4 | r = 8 |\n"
        "| --- | --- | --- | --- | --- |\n" + "\n".join(lines) + f"\n\nThe images tuned on, 32 x 32, uncompressed: "
        f"{settings['image_bytes'] / 1e6:.2f}. The adapters' files hold q and v in timm's fused layout, with zeros for "
        "k. The size of a generator hardly grows with the adapters, so it pays for large or many ones; here it is "
        "larger than the last checkpoints of 5 tasks."
    )


def fits(facts: Facts) -> str:
    rows = [(key.removeprefix("fit "), value) for key, value in facts.items() if key.startswith("fit ")]
    ms = {key.removeprefix("sampling "): f"{value:.1f}" for key, value in facts.items() if key.startswith("sampling ")}
    lines = [
        f"| {name} | {v['parameters']} | {v['steps']} | {v['seconds']:.0f} | {v['peak_gb']:.2f} | {ms.get(name, '')} | "
        + ", ".join(f"{key} {value:.2g}" for key, value in v["losses_of_last_50_steps"].items())
        + " |"
        for name, v in rows
    ]
    return (
        "## Fits\n\n| generator | parameters of an adapter | steps | seconds | peak memory of the process (GB) | "
        "ms per sample | losses, mean of the last 50 steps |\n| --- | --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(lines)
        + "\n\nSamples: one thread, "
        "the median of 9. Tuning all adapters took "
        f"{facts['settings']['tuning_seconds']:.0f} s."
    )


def scaling(facts: Facts) -> str:
    if "scaling" not in facts:
        return ""
    lines = [
        f"| {row['parameters']} | {row['seconds_per_step']:.3f} | {row['peak_gb_above_start']:.2f} | "
        f"{row['sample_ms']:.1f} | {row['generator_mb']:.1f} |"
        for row in facts["scaling"]
    ]
    threads = facts["scaling"][0]["threads"]
    return (
        f"## Scaling\n\nBatch 2, float32, {threads} threads, random adapters of one site; the mean of 3 steps (with "
        "everything that a fit does once), the median of 5 samples.\n\n| parameters | seconds per step | peak memory "
        "above the start (GB) | ms per sample | generator (MB) |\n| --- | --- | --- | --- | --- |\n" + "\n".join(lines)
    )


def accuracy_table(corner: str, rows: Sequence[tuple[str, str]], facts: Facts, tasks: Sequence[Task]) -> str:
    names = [task.name for task in tasks]
    lines = [f"| {corner} | " + " | ".join(names) + " | mean |", "| --- |" + " --- |" * (len(names) + 1)]
    for label, key in rows:
        values = [facts.get(f"{key} / {name}") for name in names]
        if all(value is not None for value in values):
            found = [float(value) for value in values if value is not None]
            cells = [f"{value:.1f}" for value in found]
            if any(f"{key} / {name}" in facts.get("earlier", ()) for name in names):
                label = f"{label} {EARLIER}"
            lines.append(f"| {label} | " + " | ".join(cells) + f" | {sum(found) / len(found):.2f} |")
    return "\n".join(lines)
