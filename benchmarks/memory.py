"""Peak memory of this process, for benchmarks (Linux)."""

from pathlib import Path


def reset_peak_memory() -> None:
    """Start counting from what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Most memory since the last reset, in GB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
