"""From ten adapters to ten thousand: seconds and peak memory of jobs, of the warm start, of many classes, of processes.

    python benchmarks/scale.py jobs --adapters 10 100 1000 10000
    python benchmarks/scale.py all --adapters 10 100 1000
    python benchmarks/scale.py warm-start --adapters 100 1000 10000
    python benchmarks/scale.py classes
    python benchmarks/scale.py processes --processes 1 2 4
    python benchmarks/scale.py exchange
    python benchmarks/scale.py page

Each row is measured in a process of its own with one thread, and kept in benchmarks/results/scale.json with its
command, machine and commit; `page` writes scale.md of what is there. `jobs`: the default preset, and inversion of
what episodes draw; `all`: inversion of everything. Adapters are synthetic (see `scale_job.py`). Seconds of stages of
jobs are by the clock, beside the machine's load at the end; those of the warm start and of classes are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
        "part", choices=["jobs", "all", "warm-start", "classes", "processes", "exchange", "page", "one"]
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, help="where synthetic adapters are kept; a temporary one when left out")
    parser.add_argument("--measure", choices=["warm_start", "classes"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "one":
        print(json.dumps({"warm_start": warm_start, "classes": classes}[options.measure](options.adapters[0])))
    elif options.part == "page":
        print(write_page())
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
            else:
                keep("default preset", run([*common, "--default"]))
                keep("inverting what is drawn", run(inverted))
    elif options.part == "warm-start":
        for n in options.adapters:
            keep("warm start of ViT-B/16", run([__file__, "one", "--measure", "warm_start", "--adapters", str(n)]))
    elif options.part == "classes":
        keep("classes", run([__file__, "one", "--measure", "classes", "--adapters", "10000"]))
    else:
        run([script, "--adapters", "20", "--folder", str(folder / "adapters-20"), "--steps", "1"])  # writes them
        for count in options.processes:
            job = [
                script,
                "--adapters",
                "20",
                "--folder",
                str(folder / "adapters-20"),
                "--steps",
                "100",
                "--episodes",
                "4",
            ]
            job += ["--inversion-steps", "40", "--work-dir", str(folder / f"work-{count}")]
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

    from lorarecycle import Adapter, Backbone
    from lorarecycle.adapters.adapter import LoRAFactors
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
                g = torch.Generator().manual_seed(seed)
                factors = {
                    f"blocks.{block}.attn.{part}": LoRAFactors(
                        torch.randn(4, 768, generator=g) * 0.02, torch.randn(768, 4, generator=g) * 0.02, 1.0
                    )
                    for block in range(12)
                    for part in "qv"
                }
                made = Adapter(factors)
                making[0] += time.process_time() - began
                yield made

    torch.manual_seed(0)
    backbone = Backbone(timm.create_model("vit_base_patch16_224", num_classes=0).eval(), name="vit_base_patch16_224")
    like = LoRA.random(backbone, r=16, lora_alpha=16, generator=torch.Generator().manual_seed(0))
    before, began = peak_mb(), time.process_time()
    found = start_factors(Made(), like, backbone)
    seconds = time.process_time() - began
    assert all(bool(torch.isfinite(p).all()) for p in found.parameters())
    return {
        "adapters": n,
        "seconds": {"making adapters": round(making[0], 1), "warm start": round(seconds - making[0], 1)},
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
    """What processes tell one another in a step of ViT-B/16, rank 16 at q and v, beside what each computes: figures."""
    import timm

    from lorarecycle import Backbone
    from lorarecycle.costs import EFFICIENCY, PASSES, forward_flops

    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    backbone = Backbone(vit, name="vit_base_patch16_224")
    bytes_ = 4 * (SITES * 16 * (768 + 768) + 1)
    speed = EFFICIENCY["cuda"] * 666e12  # of the product of that shape on an H100, bf16 (CONTRIBUTING.md)
    each = PASSES * 80 * forward_flops(backbone, 224) / speed  # an episode of 5 classes, 16 images each
    rows = {}
    for name, count, bandwidth in (("8 GPUs, 50 GB/s", 8, 50e9), ("8 machines of one GPU, 3 GB/s", 8, 3e9)):
        seconds = 2 * (count - 1) / count * bytes_ / bandwidth  # a ring's all-reduce
        rows[name] = {"exchange_ms": 1e3 * seconds, "compute_ms": 1e3 * each, "efficiency": each / (each + seconds)}
    return {"bytes_per_step": bytes_, "rows": rows}


def peak_mb() -> float:
    """Most memory that this process has had in RAM."""
    return round(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)


def keep(name: str, row: dict[str, Any]) -> None:
    """Add a row to the results, in the place of an earlier one of the same size."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    size = ("adapters", "processes", "classes")
    rows = [r for r in kept.get(name, []) if any(r.get(key) != row.get(key) for key in size)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    command = " ".join(["python benchmarks/scale.py", *sys.argv[1:]])
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
    lines = ["# From ten adapters to ten thousand", "", f"{next(iter(kept.values()))[0]['machine']}.", ""]
    for name, rows in kept.items():
        lines += [f"## {name[0].upper()}{name[1:]}", ""]
        for command, commit in dict.fromkeys((r["command"], r["commit"]) for r in rows):
            lines.append(f"`{command}` at {commit}")
        lines += ["", *(exchanged(rows[0]) if name == "exchange" else table(rows)), ""]
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


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each size."""
    leading = [k for k in ("adapters", "classes", "support", "processes", "images", "images_described") if k in rows[0]]
    stages = list(dict.fromkeys(stage for row in rows for stage in row["seconds"]))
    cpu = ["CPU seconds"] * ("cpu_seconds" in rows[0])
    head = [*(key.replace("_", " ") for key in leading), *(f"{s}, s" for s in stages), *cpu]
    head += ["peak, MB", "of it before, MB"]
    lines = [f"| {' | '.join([*head, 'load'])} |", f"|{' --- |' * (len(head) + 1)}"]
    for row in rows:
        cells = [*(row[key] for key in leading), *(row["seconds"].get(s, "") for s in stages)]
        cells += [row["cpu_seconds"] for _ in cpu]
        cells += [row["peak_mb"], row["before_mb"], round(row["load"], 1)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def exchanged(row: dict[str, Any]) -> list[str]:
    """The figures of `exchange`."""
    lines = [
        f"Figures, not measurements. {row['bytes_per_step']} bytes a step (gradients of rank 16 at q and v, and the "
        "loss); compute is an episode of 80 images for each process.",
        "",
    ]
    lines += ["| | exchange, ms | compute, ms | efficiency |", "| --- | --- | --- | --- |"]
    for name, r in row["rows"].items():
        lines.append(f"| {name} | {r['exchange_ms']:.3f} | {r['compute_ms']:.2f} | {r['efficiency']:.3f} |")
    return lines


if __name__ == "__main__":
    main()
