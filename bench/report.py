"""`make report`: tables and pictures of the rows in bench/results, the tables into README.md between its two markers.

Of rows that measured the same thing on the same machine the last one counts. What did not run is
listed with its reason.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path

from cases import FIELDS

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
KEY = "device cpu cores suite op provider mode dtype B H L D R C regime input depth".split()
# rows without the newer fields are of one shape; SDPA picks flash for it
OLD_NAMES = {"lsh_kernels": "lsh_kernels torch", "SDPA": "SDPA flash"}
OLD_FIELDS = {"device": "cpu", "regime": "batch", "input": "gaussian", "depth": "1", "status": "ok", "suite": "attention"}
MODES = ("forward", "forward+backward")
OURS = ("lsh_kernels triton", "lsh_kernels torch")
# told apart in black and white
LINES = [
    {"color": grey, "linestyle": line, "marker": marker, "markerfacecolor": "white" if i % 2 else grey, "markersize": 5}
    for i, (grey, line, marker) in enumerate(
        zip(
            ["0", "0", "0.35", "0.35", "0.35", "0.35", "0.55", "0.55", "0.55"],
            ["-", "--", ":", "-.", ":", "-.", "-", "--", ":"],
            "osv^Dx<>P",
        )
    )
]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "ooo"]


def main(argv=None) -> int:
    """Write the tables and draw the pictures. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="a folder with CSVs, or one CSV")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="a text with the two markers, or a new file")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs", help="folder of the PNGs")
    options = parser.parse_args(argv)
    rows, text, where = load(options.results), [], options.readme.resolve().parent
    options.pictures.mkdir(parents=True, exist_ok=True)
    for machine in machines(rows):
        own = [row for row in rows if machine_of(row) == machine]
        pictures = draw(own, options.pictures)
        text += [f"### {name_of(machine)}", "", *tables(own)]
        for path in pictures:
            path = path.resolve()
            text += [
                f"![{path.stem.replace('_', ' ')}]({path.relative_to(where) if path.is_relative_to(where) else path.name})",
                "",
            ]
    write(options.readme, "\n".join([origins(rows), "", *text]))
    return 0


def write(path, text):
    """Put the text between the markers of a file; a file that is not there becomes the markers and the text."""
    old = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{path}: wanted one {BEGIN} before one {END}")
    head, tail = old.split(BEGIN)[0], old.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{text.strip()}\n{END}{tail}")


def load(path) -> list[dict]:
    """Rows of the CSVs that this suite wrote, the last of each kind."""
    rows = {}
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        with file.open(newline="") as lines:
            reader = csv.DictReader(lines)
            if not {"op", "provider", "L", "ms_p50"} <= set(reader.fieldnames or ()):
                continue
            for row in reader:
                row = dict.fromkeys(FIELDS, "") | row
                row |= {name: row[name] or value for name, value in OLD_FIELDS.items()}
                row["provider"] = OLD_NAMES.get(row["provider"], row["provider"])
                row["stem"] = file.stem
                key = tuple(row[name] for name in KEY)
                # where the tables show it: at its last place
                rows.pop(key, None)
                rows[key] = row
    return list(rows.values())


def machine_of(row):
    return row["device"], row["cpu"], row["cores"]


def machines(rows):
    """GPUs first."""
    return sorted({machine_of(row) for row in rows}, key=lambda m: (m[0].startswith("cpu"), m))


def name_of(machine):
    device, cpu, cores = machine
    return f"{cores} cores of {cpu}{device[3:]}" if device.startswith("cpu") else device


def origins(rows):
    """Which rows come from where."""
    counts = {True: {}, False: {}}
    for row in rows:
        if row["status"] == "ok":
            machine = machine_of(row)
            on = counts[machine[0].startswith("cpu")]
            on[name_of(machine)] = on.get(name_of(machine), 0) + 1
    cpus, gpus = ("; ".join(f"{n} on {name}" for name, n in counts[cpu].items()) or "none" for cpu in (True, False))
    return f"Rows run on a CPU: {cpus}. Rows run on a GPU: {gpus}. Rows modelled: none."


def select(rows, value, **wanted):
    """{provider: {L: number}} of the rows that ran and have these fields."""
    found = {}
    for row in rows:
        if row["status"] == "ok" and row.get(value) and all(row[name] == want for name, want in wanted.items()):
            found.setdefault(row["provider"], {})[int(row["L"])] = float(row[value])
    return {provider: dict(sorted(by_length.items())) for provider, by_length in found.items()}


def peaks_of(rows, mode):
    return select(rows, "peak_mib", op="attention", mode=mode, depth="1", regime="batch", input="gaussian")


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
    """One line per machine, regime and mode of the attention suite."""
    lines = []
    for machine in machines(rows):
        own = [row for row in rows if machine_of(row) == machine]
        for regime in ("batch", "tokens"):
            for mode in sorted({row["mode"] for row in own}):
                times = select(own, "ms_p50", suite="attention", op="attention", regime=regime, mode=mode, input="gaussian")
                exact = fastest(times, lambda name: name.startswith("SDPA"))
                for name in OURS:
                    if name in times and exact:
                        words = crossover(times[name], exact)[1]
                        lines.append(f"{mode}, fixed {regime}: {name} is faster than the best exact attention from L = {words}")
    return lines


def table(columns, rows):
    """Markdown; numbers that are not there are dashes."""
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def number(value):
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def by_length(numbers):
    lengths = sorted({length for found in numbers.values() for length in found})
    return table(
        [f"{length:,}" for length in lengths],
        [[provider, *(number(found.get(length)) for length in lengths)] for provider, found in numbers.items()],
    )


def tables(rows):
    """The tables of one machine, those only that there are rows for."""
    text = []
    for regime, words in (("batch", "fixed batch"), ("tokens", "fixed number of tokens"), ("one thread", "one thread")):
        for mode in MODES + tuple(f"{mode} graph" for mode in MODES):
            times = select(rows, "ms_p50", suite="attention", regime=regime, mode=mode, input="gaussian")
            if times:
                text += [f"{mode.replace(' graph', ' as a CUDA graph')}, {words}, ms by length:", "", *by_length(times)]
    text += [line for crossing in crossovers(rows) for line in (f"- {crossing}",)]
    text += [""] if text else []
    for kind in ("clustered", "equal"):
        times = select(rows, "ms_p50", suite="attention", regime="batch", mode=MODES[1], input=kind)
        if times:
            text += [f"{MODES[1]}, {kind} inputs, ms by length:", "", *by_length(times)]
    for mode in MODES:
        peaks = peaks_of(rows, mode)
        if peaks:
            text += [f"{mode}, extra peak MiB by length:", "", *by_length(peaks)]
    depths = {}
    for row in rows:
        if row["suite"] == "memory" and row["status"] == "ok" and row["depth"] != "1":
            depths.setdefault(row["provider"], {})[int(row["depth"])] = float(row["peak_mib"])
    if depths:
        (length,) = {row["L"] for row in rows if row["depth"] not in ("", "1")}
        text += [f"{MODES[1]}, extra peak MiB at L = {int(length):,} by depth of the stack:", "", *by_length(depths)]
    stages = [row for row in rows if row["suite"] == "stages" and row["status"] == "ok"]
    if stages:
        cells = [
            [f"{row['op']}, {row['provider']}", row["L"], row["ms_p50"], row["roofline"] and f"{float(row['roofline']):.1%}"]
            for row in stages
        ]
        text += ["Stages:", "", *table(["L", "ms", "of the roofline"], cells)]
    reasons = {}
    for row in rows:
        if row["status"] in ("absent", "failed"):
            reasons.setdefault((row["provider"], row["status"], row["reason"]), set()).add(int(row["L"]))
    if reasons:
        text += ["What did not run:", ""]
        for (provider, status, reason), lengths in reasons.items():
            text.append(f"- {provider} ({status} at {', '.join(f'{length:,}' for length in sorted(lengths))}): {reason}")
        text.append("")
    commits = sorted({(row["torch"], row["triton"], row["commit"]) for row in rows})
    return text + ["Measured with " + "; ".join(f"torch {t}, triton {tr}, commit {c}" for t, tr, c in commits) + ".", ""]


def draw(rows, folder):
    """The pictures that there are rows for, as paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    paths = []

    def panels(numbers, ylabel, kind, mark=False):
        numbers = {title: found for title, found in numbers.items() if found}
        if not numbers:
            return
        figure = Figure((6 * len(numbers), 4.5), layout="constrained")
        for axes, (title, found) in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers.items()):
            for i, (provider, points) in enumerate(found.items()):
                axes.plot(list(points), list(points.values()), label=provider, **LINES[i % len(LINES)])
            exact = fastest(found, lambda name: name.startswith("SDPA"))
            length, words = crossover(fastest(found, lambda name: name in OURS), exact)
            if mark and length:
                axes.axvline(length, color="0.7", linewidth=1)
                place = {"rotation": 90, "va": "top", "ha": "right", "transform": axes.get_xaxis_transform()}
                axes.text(length, 0.98, f"crossover {words}", fontsize=8, **place)
            if kind == "speedup":
                axes.axhline(1, color="0.7", linewidth=1)
            axes.set(xscale="log", yscale="log", xlabel="length", ylabel=ylabel, title=title)
            axes.set_xscale("log", base=2)
            axes.legend(fontsize=7)
        save(figure, kind)

    def save(figure, kind):
        paths.append(folder / f"{rows[0]['stem']}_{kind}.png")
        figure.savefig(paths[-1], dpi=110)

    times = {mode: select(rows, "ms_p50", suite="attention", regime="batch", mode=mode, input="gaussian") for mode in MODES}
    panels(times, "ms", "time", mark=True)
    speedups = {}
    for mode, found in times.items():
        best = fastest(found, lambda name: name.startswith("SDPA"))
        ratios = {p: {n: best[n] / ms for n, ms in points.items() if n in best} for p, points in found.items() if p[:4] != "SDPA"}
        speedups[mode] = {provider: points for provider, points in ratios.items() if points}
    panels(speedups, "times as fast as the best SDPA", "speedup")
    panels({mode: peaks_of(rows, mode) for mode in MODES}, "extra peak MiB", "memory")
    bars = [row for row in rows if row["status"] == "ok" and row["roofline"]]
    longest = max((int(row["L"]) for row in bars), default=0)
    bars = {f"{row['op']} {row['provider']}": row for row in bars if int(row["L"]) == longest}
    if bars:
        figure = Figure((8, 1 + 0.3 * len(bars)), layout="constrained")
        axes, ops = figure.subplots(), list(dict.fromkeys(row["op"] for row in bars.values()))
        for label, row in bars.items():
            hatch = HATCHES[ops.index(row["op"]) % len(HATCHES)]
            axes.barh(label, 100 * float(row["roofline"]), color="white", edgecolor="black", hatch=hatch)
        axes.invert_yaxis()
        axes.set(xlabel="per cent of the roofline", title=f"stages at L = {longest:,}")
        save(figure, "roofline")
    return paths


if __name__ == "__main__":
    sys.exit(main())
