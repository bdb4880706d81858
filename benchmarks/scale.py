"""From ten adapters to ten thousand: seconds and peak memory of jobs, of the warm start, of many classes, of processes.

    python benchmarks/scale.py jobs --adapters 10 100 1000 10000
    python benchmarks/scale.py all --adapters 10 100 1000
    python benchmarks/scale.py warm-start --adapters 100 1000 10000
    python benchmarks/scale.py classes
    python benchmarks/scale.py processes --processes 1 2 4
    python benchmarks/scale.py exchange
    python benchmarks/scale.py kills --runs 30
    python benchmarks/scale.py page

Each row is measured in a process of its own with one thread, and kept in benchmarks/results/scale.json with its
command, machine and commit; `page` writes scale.md of what is there. `jobs`: the default preset, and inversion of
what episodes draw; `all`: inversion of everything; `--only` takes one of the two jobs. Adapters are synthetic (see
`scale_job.py`). Seconds of stages of jobs are by the clock, beside the machine's load at the end: other work may share
the cores, so CPU seconds are given too. Those of the warm start and of classes are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "scale.json"
SITES = 24
"""q and v of ViT-B/16's 12 blocks."""


def main() -> None:
    """Measure a part, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", choices=["jobs", "all", "warm-start", "classes", "processes", "exchange", "kills", "page", "one"]
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--runs", type=int, default=30, help="of kills")
    parser.add_argument("--only", choices=["default", "drawn"], help="of jobs")
    parser.add_argument("--folder", type=Path, help="where synthetic adapters are kept; a temporary one when left out")
    parser.add_argument("--measure", choices=["warm_start", "classes"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "one":
        print(json.dumps({"warm_start": warm_start, "classes": classes}[options.measure](options.adapters[0])))
    elif options.part == "page":
        print(write_page())
    elif options.part == "kills":
        script = HERE.parent / "tests" / "adversarial" / "kill_ranks.py"
        command = [sys.executable, str(script), "--runs", str(options.runs)]
        keep("kills", killed(subprocess.run(command, capture_output=True, text=True).stdout))
    elif options.part == "exchange":
        keep("exchange", exchange())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            measure(options, options.folder or Path(temporary))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Run a part's rows one after the other."""
    script = str(HERE / "scale_job.py")
    if options.part in ("jobs", "all"):
        for n in options.adapters:
            common = [script, "--adapters", str(n), "--folder", str(folder / f"adapters-{n}")]
            inverted = [*common, "--inversion-steps", "1"]
            if options.part == "all":
                keep("inverting all", run([*inverted, "--images", "all"]))
                continue
            if options.only != "drawn":
                keep("default preset", run([*common, "--default"]))
            if options.only != "default":
                keep("inverting what is drawn", run(inverted))
    elif options.part == "warm-start":
        for n in options.adapters:
            keep("warm start of ViT-B/16", run([__file__, "one", "--measure", "warm_start", "--adapters", str(n)]))
    elif options.part == "classes":
        keep("classes", run([__file__, "one", "--measure", "classes", "--adapters", "10000"]))
    else:
        adapters = [script, "--adapters", "20", "--folder", str(folder / "adapters-20")]
        run([*adapters, "--steps", "1"])  # writes them
        for count in options.processes:
            job = [*adapters, "--steps", "25", "--episodes", "4", "--inversion-steps", "20"]
            job += ["--work-dir", str(folder / f"work-{count}")]
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            row = run([*launch, *job] if count > 1 else job)
            keep("processes", {**row, "processes": count, "load": os.getloadavg()[0]})


def run(command: list[str]) -> dict[str, Any]:
    """The JSON that a command prints last."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def warm_start(n: int) -> dict[str, Any]:
    """The warm start of n random adapters of ViT-B/16, rank 4 at q and v, made one after the other and never held."""
    import timm
    from scale_job import make_adapter

    from lorarecycle import Adapter, Backbone
    from lorarecycle.meta.warm_start import start_factors
    from lorarecycle.vit.lora import LoRA

    making = [0.0]

    class Made:
        """Adapters that are made when their turn comes."""

        def __len__(self) -> int:
            return n

        def __iter__(self) -> Iterator[Adapter]:
            for seed in range(n):
                began = time.process_time()
                made = make_adapter(seed, blocks=12, width=768, size=0.02, classes=0)
                making[0] += time.process_time() - began
                yield made

    torch.manual_seed(0)
    backbone = Backbone(timm.create_model("vit_base_patch16_224", num_classes=0).eval(), name="vit_base_patch16_224")
    like = LoRA.random(backbone, r=16, lora_alpha=16, generator=torch.Generator().manual_seed(0))
    before, began, clock = peak_mb(), time.process_time(), time.perf_counter()
    found = start_factors(Made(), like, backbone)
    seconds, waited = time.process_time() - began, time.perf_counter() - clock
    assert all(bool(torch.isfinite(p).all()) for p in found.parameters())
    return {
        "adapters": n,
        "seconds": {"making adapters": round(making[0], 1), "warm start": round(seconds - making[0], 1)},
        "wall_seconds": round(waited, 1),
        "before_mb": before,
        "peak_mb": peak_mb(),
    }


def classes(n: int) -> dict[str, Any]:
    """FewShotClassifier with n classes and ten support images of each, on the tiny ViT; centres at width 768."""
    from scale_job import tiny_backbone

    from lorarecycle import FewShotClassifier
    from lorarecycle.meta.prototypes import class_centres, nearest_centres

    g = torch.Generator().manual_seed(0)
    labels = torch.randperm(10 * n, generator=g) % n
    images = torch.randint(256, (10 * n, 3, 32, 32), generator=g, dtype=torch.uint8)
    classifier, before, began = FewShotClassifier(tiny_backbone()), peak_mb(), time.process_time()
    classifier.fit(images, labels)
    fitted = time.process_time()
    classifier.predict(images[:1000])
    predicted, tiny_peak = time.process_time(), peak_mb()
    features, queries = torch.randn(10 * n, 768, generator=g), torch.randn(1000, 768, generator=g)
    made = time.process_time()
    centres = class_centres(features, labels, n)
    centred = time.process_time()
    for part in queries.split(419):
        nearest_centres(part, centres)
    done = time.process_time()
    return {
        "classes": n,
        "support": 10 * n,
        "seconds": {
            "fit, tiny ViT": round(fitted - began, 1),
            "predict 1000 images, tiny ViT": round(predicted - fitted, 2),
            "class centres at width 768": round(centred - made, 2),
            "nearest centre of 1000 queries at width 768": round(done - centred, 2),
        },
        "before_mb": before,
        "peak_mb": tiny_peak,
    }


def exchange() -> dict[str, Any]:
    """What processes tell one another in a step of ViT-B/16, rank 16 at q and v, beside what each computes: figures.

    Compute is a measured step (gpu_*.json), 100 images for each process. Nothing of the exchange is hidden behind it.
    """
    bytes_ = 4 * (SITES * 16 * (768 + 768) + 1)
    places = [  # processes, bytes a second, seconds from one to the next
        ("8 GPUs of one machine, 50 GB/s", 8, 50e9, 5e-6),
        ("8 machines of one GPU, 3 GB/s", 8, 3e9, 20e-6),
        ("8 machines of 8 GPUs, 3 GB/s", 64, 3e9, 20e-6),
    ]
    rows = []
    for card, tokens in (("H100_80GB_HBM3", "dense"), ("H100_80GB_HBM3", "sparse_50"), ("H200", "sparse_75")):
        found = json.loads((HERE / "results" / f"gpu_NVIDIA_{card}.json").read_text())["benchmarks"]
        group = f"meta-training step, ViT-B/16, 100 images, {tokens}"
        each = next(r["median_ms"] for r in found if r["group"] == group and r["form"] == "graph") / 1e3
        for name, count, bandwidth, latency in places:
            hops = 2 * (count - 1)  # of a ring's all-reduce, each of a part of the bytes
            seconds = hops * (bytes_ / count / bandwidth + latency)
            shares = {k: k * each / (k * each + seconds) for k in (1, 2, 4)}
            row = {"place": name, "step": f"{card.split('_')[0]}, {tokens}", "exchange_ms": 1e3 * seconds}
            rows.append({**row, "compute_ms": 1e3 * each, "efficiency": shares})
    return {"bytes_per_step": bytes_, "rows": rows}


def killed(said: str) -> dict[str, Any]:
    """What tests/adversarial/kill_ranks.py printed, as a row."""
    if not said.strip():
        raise SystemExit("kill_ranks.py printed nothing: run it by itself")
    unbroken, *runs, places, ended = said.strip().splitlines()
    seconds = sorted(int(found[1]) for line in runs if (found := re.search(r", (\d+) s$", line)))
    return {
        "runs": len(runs),
        "lines": [f"{unbroken}; runs with a kill: {seconds[0]} to {seconds[-1]} s", places, ended],
    }


def peak_mb() -> float:
    """Most memory that this process has had in RAM."""
    return round(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)


def keep(name: str, row: dict[str, Any]) -> None:
    """Add a row to the results, in the place of an earlier one of the same size."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    size = ("adapters", "processes", "classes")
    rows = [r for r in kept.get(name, []) if any(r.get(key) != row.get(key) for key in size)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    command = re.sub(r" --folder \S+", "", " ".join(["python benchmarks/scale.py", *sys.argv[1:]]))
    row = {**row, "command": command, "commit": commit.strip(), "machine": machine(), "load": os.getloadavg()[0]} | row
    rows = sorted([*rows, row], key=lambda r: [r.get(key) or 0 for key in size])
    print(name, json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps({**kept, name: rows}, indent=2) + "\n")


def machine() -> str:
    """The processor, as the kernel names it, and torch."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = f"{facts.get('model name')}, family {facts.get('cpu family')}, model {facts.get('model')}"
    return f"{os.cpu_count()} cores ({name}), one thread, torch {torch.__version__}"


def exponent(rows: list[dict[str, Any]], value: Any) -> float:
    """Slope of the logarithms: 1 is linear, 0 flat."""
    points = torch.tensor([[math.log(r["adapters"]), math.log(max(value(r), 1e-3))] for r in rows])
    x, y = (points - points.mean(dim=0)).T
    return float((x * y).sum() / x.square().sum())


def write_page() -> Path:
    """scale.md of the rows that are there."""
    kept = json.loads(RESULTS.read_text())
    lines = ["# From ten adapters to ten thousand", "", f"{next(iter(kept.values()))[0]['machine']}. Other work"]
    lines[-1] += (
        " shared the cores: `load` is what waited for one at the end of a row, CPU seconds do not depend on it."
    )
    lines.append("")
    for name, rows in kept.items():
        lines += [f"## {name[0].upper()}{name[1:]}", ""]
        for command, commit in dict.fromkeys((r["command"], r["commit"]) for r in rows):
            lines.append(f"`{command}` at {commit}")
        lines += ["", *page_part(name, rows), ""]
        if len(rows) > 2 and "adapters" in rows[0] and "processes" not in rows[0]:
            stages = [s for s in rows[0]["seconds"] if all(r["seconds"].get(s) for r in rows)]
            found = {s: exponent(rows, lambda r, s=s: r["seconds"][s]) for s in stages}
            if "cpu_seconds" in rows[0]:
                found = {"CPU seconds": exponent(rows, lambda r: r["cpu_seconds"]), "reading": found["read"]}
            growth = exponent(rows, lambda r: r["peak_mb"])
            text = ", ".join(f"{stage} {value:.2f}" for stage, value in found.items())
            lines += [f"Exponents over the number of adapters (1 is linear): {text}; peak memory {growth:.3f}.", ""]
    path = RESULTS.with_suffix(".md")
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def page_part(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """What the page says of some rows."""
    if name == "exchange":
        return exchanged(rows[0])
    if name == "kills":
        what = (
            "A random one of two ranks (gloo, one thread each) gets SIGKILL at a random place of a run under torchrun:"
        )
        return [what, "", *(f"- {line}" for line in rows[0]["lines"])]
    lines = table(rows)
    if name == "processes":
        lines += [
            "",
            "A job whose inversion dominates, gloo, one thread each, on 2 cores that other work shared: the clock says "
            "little. Efficiency: CPU seconds of one process alone, over the number of processes times those of the "
            "busiest, which is what the clock would say with a core for each.",
        ]
    return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each size."""
    if rows[0].get("processes") == 1:  # as many as CPU seconds of the busiest one say, with a core for each
        alone = rows[0]["cpu_seconds"]
        rows = [{**r, "efficiency": f"{alone / r['processes'] / r['busiest']:.2f}"} for r in rows]
    leading = [k for k in ("adapters", "classes", "support", "processes", "images", "images_described") if k in rows[0]]
    stages = list(dict.fromkeys(stage for row in rows for stage in row["seconds"]))
    more = {"cpu_seconds": "CPU seconds", "wall_seconds": "by the clock, s"}
    if "processes" in rows[0]:
        more |= {"cpu_seconds": "CPU seconds of all", "busiest": "of the busiest", "efficiency": "efficiency"}
    more = {key: name for key, name in more.items() if all(key in row for row in rows)}
    head = [*(key.replace("_", " ") for key in leading), *(f"{s}, s" for s in stages), *more.values()]
    head += ["peak, MB", "of it before, MB"]
    lines = [f"| {' | '.join([*head, 'load'])} |", f"|{' --- |' * (len(head) + 1)}"]
    for row in rows:
        cells = [*(row[key] for key in leading), *(row["seconds"].get(s, "") for s in stages)]
        cells += [row[key] for key in more]
        cells += [row["peak_mb"], row["before_mb"], round(row["load"], 1)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def exchanged(row: dict[str, Any]) -> list[str]:
    """The figures of `exchange`."""
    lines = [
        f"Figures, not measurements: {row['bytes_per_step']} bytes a step (gradients of rank 16 at q and v, and the "
        "loss) in a ring, 5 us from GPU to GPU and 20 us from machine to machine assumed, nothing of it hidden behind "
        "compute, beside a step that was measured (gpu_*.md): 100 images for each process, replayed from a CUDA graph. "
        "Efficiency with 1, 2 and 4 such passes of a process in each step (`episodes_per_step`); inversion exchanges "
        "nothing.",
        "",
        "| where | step | exchange, ms | compute, ms | efficiency | 2 passes | 4 passes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in row["rows"]:
        shares = " | ".join(f"{value:.3f}" for value in r["efficiency"].values())
        lines.append(f"| {r['place']} | {r['step']} | {r['exchange_ms']:.3f} | {r['compute_ms']:.2f} | {shares} |")
    return lines


if __name__ == "__main__":
    main()
