"""Tables from benchmark runs: `python benchmarks/report.py RUN.json... --output benchmarks/results/speed_cpu.md`.

Takes what `pytest benchmarks --benchmark-only --benchmark-json=RUN.json` wrote. Writes one table per group, every form
beside the plain way of the same run, and the same figures as JSON beside it. Groups of an earlier report in that place
that the runs do not measure again stay, with the machine that they are of.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PLAIN = ("plain", "peft", "eager", "permute_copy", "sparse", "dense", "fused", "torch", "reference")
"""Forms that the others are compared with: the first of these that a group has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="a .md file; the .json goes beside it")
    args = parser.parse_args()
    results = [result for path in args.runs for result in read(path)]
    record = args.output.with_suffix(".json")
    again = {result["group"] for result in results}
    earlier = json.loads(record.read_text()) if record.exists() else []
    results += [result for result in earlier if result["group"] not in again]
    record.write_text(json.dumps(results, indent=1) + "\n")
    args.output.write_text(tables(results))
    print(tables(results))


def read(path: Path) -> list[dict[str, Any]]:
    """Group, form, median in ms (on CUDA of device events where there are any) and what the benchmark noted."""
    run = json.loads(path.read_text())
    cpu = run["machine_info"]["cpu"]
    results = []
    for benchmark in run["benchmarks"]:
        noted = benchmark["extra_info"]
        seconds = noted.pop("device_median_s", benchmark["stats"]["median"] / noted.get("calls", 1))
        form = (benchmark["params"] or {}).get("form", benchmark["name"].partition("[")[0].removeprefix("bench_"))
        where = {"cpu": _cpu(cpu), "cores": cpu.get("count")}
        rounds = benchmark["stats"]["rounds"]
        result = {"group": benchmark["group"], "form": form, "median_ms": 1000 * seconds, "rounds": rounds}
        results.append({**result, **where, **noted})
    return results


def _cpu(cpu: dict[str, Any]) -> str:
    """Its name, with family and model where they are known: generations of very different speed share a name."""
    name = cpu.get("brand_raw", cpu.get("arch"))
    return f"{name} (family {cpu['family']}, model {cpu['model']})" if "family" in cpu and "model" in cpu else name


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown, a table for each group in the order of the runs; the machine wherever it changes."""
    lines = ["# Speed", "", "Medians; how many times as fast as the plain way of the same run.", ""]
    machine = ""
    for group in dict.fromkeys(result["group"] for result in results):
        rows = [result for result in results if result["group"] == group]
        more = {row["form"]: _more(row) for row in rows}
        own = _machine(rows)
        if own is not None and own != machine:
            lines += [f"## {own}", ""]
            machine = own
        forms = {row["form"]: row["median_ms"] for row in rows}
        plain = next((name for name in PLAIN if name in forms), next(iter(forms)))
        called = {row["form"]: row.get("as_called_s") for row in rows}
        both = any(called.values())
        head = (
            "replayed from a CUDA graph, ms | as called, ms" if both else "median, ms",
            "--- | ---" if both else "---",
        )
        lines += [f"**{group}**", "", f"| form | {head[0]} | times as fast as {plain} |", f"| --- | {head[1]} | --- |"]
        for name, ms in forms.items():
            own = f" | {_rounded(1000 * called[name]) if called[name] else ''}" if both else ""
            lines.append(f"| {name} | {_rounded(ms)}{own} | {forms[plain] / ms:.2f} |")
        lines += ["", *(f"{name}: {words}." for name, words in more.items() if words)] if any(more.values()) else []
        lines.append("")
    return "\n".join(lines)


def _more(row: dict[str, Any]) -> str:
    """What was noted of a step on a GPU, in words."""
    noted = {"peak_memory_GB": "peak memory {:.2f} GB", "first_step_s": "first step after {:.1f} s"}
    return ", ".join(words.format(row[key]) for key, words in noted.items() if key in row and "ceiling_GB_per_s" in row)


def _machine(rows: list[dict[str, Any]]) -> str | None:
    """What the rows ran on; None where no benchmark noted it."""
    noted = next((row for row in rows if "torch" in row), None)
    if noted is None:
        return None
    if "ceiling_GB_per_s" in noted:
        return f"{noted['device']}, {noted['cpu']}, {noted['cores']} cores, torch {noted['torch']}"
    return f"{noted['cpu']}, {noted['cores']} cores, {noted['threads']} threads, torch {noted['torch']}"


def _rounded(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


if __name__ == "__main__":
    main()
