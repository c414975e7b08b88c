"""What the demo, `diagnose` and the benchmarks say of the machine and of memory, and the files that results go to."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def machine():
    """Where the numbers come from: CPU model, cores, versions, commit."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": cores,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit():
    """The commit of this file's checkout, "-dirty" if changed; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # an installed copy may lie inside somebody else's checkout
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def start_of_peak():
    """Forget the peak so far where the system can (Linux), and return it: bytes that are not the model's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return peak()


def peak():
    """Most resident memory that this process had, in bytes (Linux, macOS)."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_results(folder, json_name, results, tables, picture, size, plot) -> None:
    """Write results as JSON and CSV and, with matplotlib, as a picture; say what was written.

    `tables`: file name -> rows, the names of the columns first. `size`: of the picture, in inches. `plot(figure, results)`
    draws it and returns the figure.
    """
    (folder / json_name).write_text(json.dumps(results, indent=1) + "\n")
    for name, rows in tables.items():
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    files = ", ".join([json_name, *tables])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"\nwrote {files} to {folder}; no {picture}: matplotlib is not installed")
        return
    plot(Figure(figsize=size, layout="constrained"), results).savefig(folder / picture, dpi=150)
    print(f"\nwrote {files}, {picture} to {folder}")
