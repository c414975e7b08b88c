"""What the CSVs in bench/results say: their rows, numbers selected from them, and where two providers' times cross.

Of rows that measured the same thing on the same machine the last one counts, and where the shapes or dtypes of a machine's rows
differ, those measured last.
"""

from __future__ import annotations

import csv
import math

from cases import FIELDS

KEY = "device cpu cores suite op provider mode dtype B H L D R C regime input depth measure embed_dim".split()
MODES = ("forward", "forward+backward")
OURS = ("lsh_kernels triton", "lsh_kernels torch", "lsh_kernels BucketCache")


def load(path) -> list[dict]:
    """Rows of the CSVs that this suite wrote, the last of each kind."""
    rows = {}
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        with file.open(newline="") as lines:
            reader = csv.DictReader(lines)
            if not set(KEY) <= set(reader.fieldnames or ()):
                continue
            for row in reader:
                key = tuple(row[name] for name in KEY)
                # where the tables show it: at its last place
                rows.pop(key, None)
                rows[key] = dict.fromkeys(FIELDS, "") | row | {"stem": file.stem}
    return list(rows.values())


def machine_of(row):
    return row["device"], row["cpu"], row["cores"]


def machines(rows):
    """GPUs first."""
    return sorted({machine_of(row) for row in rows}, key=lambda m: (m[0].startswith("cpu"), m))


def name_of(machine):
    device, cpu, cores = machine
    return f"{cores} cores of {cpu}{device[3:]}" if device.startswith("cpu") else device


def latest(rows, varying):
    """The rows of the last one's shape and dtype, but for the fields that vary."""
    fixed = [name for name in ("dtype", "B", "H", "L", "D", "R", "C", "embed_dim") if name not in varying]
    return [row for row in rows if all(row[name] == rows[-1][name] for name in fixed)]


def select(rows, value, by="L", **wanted):
    """{provider: {L, or another field: number}} of the rows that ran and have these fields."""
    rows = [
        row
        for row in rows
        if row["status"] == "ok" and row.get(value) and all(row[name] == want for name, want in wanted.items())
    ]
    found = {}
    for row in latest(rows, {by, "B"} if wanted.get("regime") == "tokens" else {by}):
        found.setdefault(row["provider"], {})[int(row[by])] = float(row[value])
    return {provider: dict(sorted(points.items())) for provider, points in found.items()}


def times_of(rows, mode):
    """Of the attention suite at a fixed batch."""
    return select(rows, "ms_p50", suite="attention", regime="batch", mode=mode, input="gaussian")


def peaks_of(rows, mode):
    return select(rows, "peak_mib", op="attention", mode=mode, depth="1", regime="batch", input="gaussian")


def token_times(rows):
    """Of the decode suite."""
    return select(rows, "ms_p50", suite="decode")


def reversible_parts(rows):
    """MiB by depth, ms by depth, drift by depth; each {provider: {depth: number}}."""
    return [select(rows, value, by="depth", suite="reversible") for value in ("peak_mib", "ms_p50", "drift")]


def is_exact(provider):
    return provider.startswith("SDPA")


def fastest(times, wanted):
    """{L: the least time} of the providers that `wanted` takes."""
    best = {}
    for provider, by_length in times.items():
        for length, ms in by_length.items() if wanted(provider) else ():
            best[length] = min(ms, best.get(length, math.inf))
    return best


def crossover(ours, exact):
    """The length from which `ours` {L: ms} is faster than `exact` at every length measured: (length, words). Between two
    lengths it is where straight lines in log-log cross; length is None where that is not between two."""
    lengths = sorted(ours.keys() & exact.keys())
    if not lengths:
        return None, "not measured"
    faster = [ours[length] <= exact[length] for length in lengths]
    if not faster[-1]:
        return None, f"none up to {lengths[-1]:,}"
    first = len(faster) - (faster[::-1] + [False]).index(False)
    if first == 0:
        return None, f"at or below {lengths[0]:,}"
    low, high = lengths[first - 1], lengths[first]
    gap_low, gap_high = (math.log(ours[length] / exact[length]) for length in (low, high))
    length = round(low * (high / low) ** (gap_low / (gap_low - gap_high)))
    return length, f"{length:,}"


def crossovers(rows):
    """One line per machine, regime and mode of the attention suite, and one per machine of the decode suite."""
    lines = []
    for machine in machines(rows):
        own = [row for row in rows if machine_of(row) == machine]
        found = {
            f"{mode}, fixed {regime}": select(own, "ms_p50", suite="attention", regime=regime, mode=mode, input="gaussian")
            for regime in ("batch", "tokens")
            for mode in sorted({row["mode"] for row in own})
        }
        for what, times in {**found, "one new token": token_times(own)}.items():
            exact = fastest(times, is_exact)
            for name in OURS:
                if name in times and exact:
                    words = crossover(times[name], exact)[1]
                    lines.append(f"{what}: {name} is faster than the best exact attention from L = {words}")
    return lines
