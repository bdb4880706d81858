"""What there is to know of a GPU in eight minutes: `make gpu`, or some of it: `make gpu PARTS="tests ops steps job"`.

Needs torch, triton, timm, pytest, pytest-benchmark and pytest-xdist; PEFT for its rows; no network. Every command has a
limit of its own; what it measured until then counts. Writes `benchmarks/results/gpu_<card>.json` and `.md` (or to
`--output`), with card, versions and commit. Without a GPU it runs the same commands on the smallest sizes, to see that
they work: the figures then mean nothing, and go to a temporary folder unless `--output` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from report import read, tables

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib -q"]
TESTS = ["tests/kernels", "tests/runtime/test_graphs.py", "tests/runtime/test_steps.py", "tests/vit/test_replay.py"]
TESTS += ["tests/vit/test_attention.py", "tests/test_backends_agree.py", "tests/inversion/test_prior.py"]
STEPS = {
    "inversion": "bench_inversion_step and not published",
    "meta": "bench_meta_step and not published",
    "tasks": "bench_tasks or bench_prior_alone",
    "published": "published and (25 or dense)",
}
LIMITS = {
    "tests": {"": 110},
    "ops": {"": 100},
    "steps": dict(zip(STEPS, (70, 60, 40, 30), strict=True)),
    "job": {"": 50},
}
"""Seconds for each command of a part: under eight minutes in all."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(LIMITS)}; all when left out")
    parser.add_argument(
        "-k", dest="words", help="of the benchmarks, only these, as pytest's -k; the others' figures stay"
    )
    parser.add_argument("--output", type=Path, help="folder of the results; benchmarks/results on a GPU")
    args = parser.parse_args()
    unknown = set(args.parts) - LIMITS.keys()
    if unknown:
        parser.error(f"parts must be of {', '.join(LIMITS)}, got {', '.join(sorted(unknown))}")
    output = args.output or (ROOT / "benchmarks" / "results" if CUDA else Path(tempfile.mkdtemp()))
    output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "commands": []}
    path = output / f"gpu_{report['machine']['device'].replace(' ', '_')}.json"
    if path.exists():  # parts that are not run again stay
        report |= {key: value for key, value in json.loads(path.read_text()).items() if key not in ("machine",)}
    for part in args.parts or LIMITS:
        for name, command in commands(part, output, args.words):
            row = run(f"{part} {name}".strip(), command, LIMITS[part][name])
            report["commands"] = [old for old in report["commands"] if old["name"] != row["name"]] + [row]
            collect(report, part, name, output)
            path.write_text(json.dumps(report, indent=1) + "\n")
            path.with_suffix(".md").write_text(page(report))
    print(page(report))
    print(path)
    return int(any(row["status"] != 0 for row in report["commands"]))


def machine() -> dict[str, Any]:
    """Card, versions and commit."""

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "triton", "timm", "peft", "xformers", "onnxruntime-gpu")
    return {
        "device": torch.cuda.get_device_name() if CUDA else f"cpu {platform.machine()}",
        "memory_GB": torch.cuda.get_device_properties(0).total_memory / 1e9 if CUDA else None,
        "cuda": torch.version.cuda,
        "versions": {name: found(name) for name in packages},
        "commit": commit(),
    }


def commit() -> str | None:
    """Of the checkout; where it travelled without its history, what LORARECYCLE_COMMIT says."""
    own = os.environ.get("LORARECYCLE_COMMIT")
    said = ["git", "describe", "--always", "--dirty"]
    return own or subprocess.run(said, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or None


def commands(part: str, output: Path, words: str | None = None) -> list[tuple[str, list[str]]]:
    """Name and command line of each run of a part."""
    if part == "tests":
        workers = ["-n", "10"] if CUDA else ["-n", "1", "-k", "graphs or replay"]
        return [
            (
                "",
                [*PYTEST, "-p", "no:benchmark", "--dist", "worksteal", *workers, "-m", "not slow and not grid", *TESTS],
            )
        ]
    if part == "job":
        return [("", [sys.executable, "benchmarks/gpu_job.py", "--output", str(output / "job.json")])]
    models = "vit_base" if CUDA else "vit_tiny"
    bench = [*PYTEST, "-p", "no:xdist", "--benchmark-only", "--benchmark-columns=median", "--models", models]
    if part == "ops":
        names = (
            "lora_qkv",
            "cls_topk_gather",
            "batch_norm_prior",
            "select_tokens",
            "split_heads",
            "attention",
            "op_host",
        )
        files = [ROOT / "benchmarks" / f"bench_{name}.py" for name in names]
        chosen = ["-k", words] if words else []
        return [
            ("", [*bench, f"--benchmark-json={output / 'ops.json'}", *chosen, *(str(f) for f in files if f.exists())])
        ]
    groups = STEPS if CUDA else {"meta": "bench_meta_step and dense and (eager or plain or ours)", "tasks": "tasks"}
    return [
        (
            name,
            [
                *[*bench, f"--benchmark-json={output / f'steps-{name}.json'}", "benchmarks/bench_steps.py"],
                *["-k", f"({own}) and ({words})" if words else own],
            ],
        )
        for name, own in groups.items()
    ]


def run(name: str, command: list[str], limit: int) -> dict[str, Any]:
    """Run a command to its end or its limit, its output going where ours goes."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    environment = os.environ | ({} if CUDA else {"LORARECYCLE_DRY_RUN": "1"})
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        status = process.wait(limit if CUDA else 10 * limit)
    except subprocess.TimeoutExpired:
        process.send_signal(2)  # pytest then writes what it has measured
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
        status = 124
    return {"name": name, "status": status, "seconds": time.perf_counter() - start, "commit": commit()}


def collect(report: dict[str, Any], part: str, name: str, output: Path) -> None:
    """Put what a command has written into the report."""
    if part == "job":
        written = output / "job.json"
        if written.exists():
            report["job"] = json.loads(written.read_text())
    elif part in ("ops", "steps"):
        written = output / ("ops.json" if part == "ops" else f"steps-{name}.json")
        if written.exists() and written.stat().st_size:
            rows = read(written)
            known = {(row["group"], row["form"]): row for row in [*report.get("benchmarks", []), *rows]}
            report["benchmarks"] = list(known.values())
            written.unlink()


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    found = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    lines = [f"# {found['device']}", "", f"`make gpu`; CUDA {found['cuda']}, {versions}; commit {found['commit']}.", ""]
    lines += ["| part | result | seconds | commit |", "| --- | --- | --- | --- |"]
    words = {0: "done", 124: "stopped at its limit"}
    for row in report["commands"]:
        result = words.get(row["status"], "failed")
        lines.append(f"| {row['name']} | {result} | {row['seconds']:.0f} | {row.get('commit', '')} |")
    if not found["versions"]["xformers"]:
        lines += ["", 'xformers is not installed: `attention="xformers"` was not measured.']
    if "job" in report:
        lines += ["", "## A whole job", "", *job_table(report["job"])]
    if "benchmarks" in report:
        lines += ["", tables(report["benchmarks"]).replace("# Speed", "## Speed", 1)]
    return "\n".join(lines) + "\n"


def job_table(job: dict[str, Any]) -> list[str]:
    lines = [job["what"], "", "| preset | stage | seconds |", "| --- | --- | --- |"]
    for row in job["rows"]:
        lines += [f"| {row['preset']} | {stage} | {seconds:.1f} |" for stage, seconds in row["seconds"].items()]
        if row["peak_memory_GB"] is not None:
            lines.append(f"| {row['preset']} | peak memory, GB | {row['peak_memory_GB']:.2f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
