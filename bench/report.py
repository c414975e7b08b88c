"""`make report`: tables and pictures of the rows in bench/results, the tables into README.md between its two markers.

Of rows that measured the same thing on the same machine the last one counts, and where the shapes or dtypes of a machine's rows
differ, those measured last. What did not run is listed with its reason.
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
KEY = "device cpu cores suite op provider mode dtype B H L D R C regime input depth measure embed_dim".split()
# rows without the newer fields are of one shape; SDPA picks flash for it
OLD_NAMES = {"lsh_kernels": "lsh_kernels torch", "SDPA": "SDPA flash"}
OLD_FIELDS = {
    "device": "cpu",
    "regime": "batch",
    "input": "gaussian",
    "depth": "1",
    "status": "ok",
    "suite": "attention",
    "measure": "time",
}
MODES = ("forward", "forward+backward")
# lengths of the tables, where they were measured; the CSV has all
SHOWN = (4096, 16384, 65536)
# the most that is allowed: memory of the deepest over the shallowest, step over its twin's; memory and time over the plain MLP's
DEPTH_BAR, STEP_BAR, MLP_MEMORY_BAR, MLP_TIME_BAR = 1.10, 1.40, 0.125, 1.35
OURS = ("lsh_kernels triton", "lsh_kernels torch")
SPEEDUP, DRIFT = "times as fast as the best SDPA", "max |x - recomputed x|"
# told apart in black and white
LINES = [
    {"color": grey, "linestyle": line, "marker": marker, "markerfacecolor": "white" if i % 2 else grey, "markersize": 5}
    for i, (grey, line, marker) in enumerate(
        zip(
            ["0", "0", "0.35", "0.35", "0.35", "0.35", "0.55", "0.55", "0.55", "0.2", "0.2", "0.2"],
            ["-", "--", ":", "-.", ":", "-.", "-", "--", ":", "-.", "-", "--"],
            "osv^Dx<>P*hp",
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
        commits = sorted({(row["torch"], row["triton"], row["commit"]) for row in own})
        measured = "; ".join(f"torch {torch}, triton {triton}, commit {commit}" for torch, triton, commit in commits)
        text += [f"### {name_of(machine)}", "", f"Measured with {measured}.", "", *tables(own)]
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
                if not row["suite"]:
                    row["provider"] = OLD_NAMES.get(row["provider"], row["provider"])
                row |= {name: row[name] or value for name, value in OLD_FIELDS.items()}
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


def peaks_of(rows, mode):
    return select(rows, "peak_mib", op="attention", mode=mode, depth="1", regime="batch", input="gaussian")


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
    """One line per machine, regime and mode of the attention suite."""
    lines = []
    for machine in machines(rows):
        own = [row for row in rows if machine_of(row) == machine]
        for regime in ("batch", "tokens"):
            for mode in sorted({row["mode"] for row in own}):
                times = select(own, "ms_p50", suite="attention", op="attention", regime=regime, mode=mode, input="gaussian")
                exact = fastest(times, is_exact)
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


def columns_of(numbers):
    """Columns of the modes by the lengths to show, and a row per provider; `numbers` is {mode: {provider: {L: number}}}."""
    lengths = sorted({length for found in numbers.values() for points in found.values() for length in points})
    lengths = [length for length in lengths if length in SHOWN] or lengths[-1:]
    shown = [(mode, length) for mode in numbers for length in lengths]
    rows = [
        [provider, *(number(numbers[mode].get(provider, {}).get(length)) for mode, length in shown)]
        for provider in dict.fromkeys(provider for found in numbers.values() for provider in found)
    ]
    return table([f"{mode} {length:,}" for mode, length in shown], rows)


def tables(rows):
    """The tables of one machine, those only that there are rows for."""
    text = []
    times = {
        mode: select(rows, "ms_p50", suite="attention", regime="batch", mode=mode, input="gaussian")
        for mode in MODES + tuple(f"{mode} graph" for mode in MODES)
    }
    times = {mode: found for mode, found in times.items() if found}
    if times:
        text += ["One attention call, ms by length (graph: as a CUDA graph):", "", *columns_of(times)]
        text += [*(f"- {crossing}" for crossing in crossovers(rows)), ""]
    peaks = {mode: found for mode in MODES if (found := peaks_of(rows, mode))}
    if peaks:
        text += ["Its extra peak memory, MiB by length:", "", *columns_of(peaks)]
    stages = latest([row for row in rows if row["suite"] == "stages" and row["status"] == "ok"], {"L"})
    if stages:
        longest = max(int(row["L"]) for row in stages)
        cells = [
            [f"{row['op']}, {row['provider']}", row["ms_p50"], row["roofline"] and f"{float(row['roofline']):.1%}"]
            for row in stages
            if int(row["L"]) == longest
        ]
        text += [f"Stages of the forward pass at L = {longest:,}:", "", *table(["ms", "of the roofline"], cells)]
    text += reversible_tables(rows) + feedforward_tables(rows)
    reasons = {}
    for row in rows:
        if row["status"] in ("absent", "failed"):
            reasons.setdefault((row["provider"], row["status"], row["reason"]), set()).add(int(row["L"]))
    if reasons:
        text += ["What did not run:", ""]
        for (provider, status, reason), lengths in reasons.items():
            text.append(f"- {provider} ({status} at {', '.join(f'{length:,}' for length in sorted(lengths))}): {reason}")
        text.append("")
    return text


def reversible_parts(rows):
    """MiB by depth, ms by depth, drift by depth; each {provider: {depth: number}}."""
    return [select(rows, value, by="depth", suite="reversible") for value in ("peak_mib", "ms_p50", "drift")]


def reversible_tables(rows):
    parts = reversible_parts(rows)
    shown = [
        (words, found, depth)
        for words, found in zip(("MiB", "ms per step", "drift"), parts)
        for depth in sorted({depth for points in found.values() for depth in points})
    ]
    if not shown:
        return []
    providers = dict.fromkeys(provider for found in parts for provider in found)
    cells = [[name, *(number(found.get(name, {}).get(depth)) for _, found, depth in shown)] for name in providers]
    own = [row for row in rows if row["suite"] == "reversible"]
    length, drift_length, width = max(int(row["L"]) for row in own), min(int(row["L"]) for row in own), own[-1]["embed_dim"]
    text = [
        f"A training step by depth, embed_dim {width}, L = {length:,}: MiB beyond parameters, gradients, input, ms, and drift,",
        f"the largest difference between a layer's input and that input recomputed (L = {drift_length:,}):",
        "",
    ]
    text += table([f"{words}, depth {depth}" for words, _, depth in shown], cells)
    memory, ms, _ = parts
    for name in providers:
        if name.startswith("lsh_kernels"):
            by_depth = list(memory.get(name, {}).items())
            if len(by_depth) > 1:
                (low, least), (high, most) = by_depth[0], by_depth[-1]
                text.append(f"- {name}: memory at depth {high} is {ratio(most, least, DEPTH_BAR)} that at depth {low}")
            for depth, twin in ms.get("not reversible", {}).items():
                if depth in ms.get(name, {}):
                    text.append(f"- {name}: a step takes {ratio(ms[name][depth], twin, STEP_BAR)} its time not reversible")
    return [*text, ""]


def feedforward_tables(rows):
    parts = {
        (words, mode): {
            name: found
            for name, points in select(rows, value, suite="feedforward", mode=mode).items()
            for found in points.values()
        }
        for words, value in (("MiB", "peak_mib"), ("ms", "ms_p50"))
        for mode in MODES
    }
    parts = {key: found for key, found in parts.items() if found}
    if not parts:
        return []
    tokens, width, chunk = next((int(r["L"]), r["embed_dim"], r["C"]) for r in rows if r["suite"] == "feedforward")
    text = [
        f"A feed-forward layer, {tokens:,} tokens, embed_dim {width}, chunks of {chunk}: MiB beyond inputs and results, and ms:",
        "",
    ]
    names = dict.fromkeys(name for found in parts.values() for name in found)
    text += table(
        [f"{words}, {mode}" for words, mode in parts],
        [[name, *(number(found.get(name)) for found in parts.values())] for name in names],
    )
    for words, what, bar in (("MiB", "memory", MLP_MEMORY_BAR), ("ms", "time", MLP_TIME_BAR)):
        found = parts.get((words, MODES[1]), {})
        if {"lsh_kernels", "plain MLP"} <= found.keys():
            text.append(f"- {MODES[1]}: {what} is {ratio(found['lsh_kernels'], found['plain MLP'], bar)} the plain MLP's")
    return [*text, ""]


def ratio(ours, other, bar):
    return f"{ours / other:.3f} times (bar: {bar:.3f})"


def draw(rows, folder):
    """The pictures that there are rows for, as paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    paths = []

    def save(figure, kind):
        paths.append(folder / f"{rows[0]['stem']}_{kind}.png")
        figure.savefig(paths[-1], dpi=110)

    def panels(kind, *lines):
        """A picture of lines of panels: (title, {provider: {x: y}}, what y is, what x is), empty ones left out."""
        lines = [there for line in lines if (there := [panel for panel in line if panel[1]])]
        if not lines:
            return
        n_columns = max(map(len, lines))
        figure = Figure((6 * n_columns, 4.5 * len(lines)), layout="constrained")
        grid = figure.subplots(len(lines), n_columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (title, found, ylabel, xlabel) in (pair for places, line in zip(grid, lines) for pair in zip(places, line)):
            axes.set_axis_on()
            for i, (provider, points) in enumerate(found.items()):
                axes.plot(list(points), list(points.values()), label=provider, **LINES[i % len(LINES)])
            axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
            if xlabel == "length":
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
            if ylabel == "ms":
                length, words = crossover(fastest(found, lambda name: name in OURS), fastest(found, is_exact))
                if length:
                    axes.axvline(length, color="0.7", linewidth=1)
                    place = {"rotation": 90, "va": "top", "ha": "right", "transform": axes.get_xaxis_transform()}
                    axes.text(length, 0.98, f"crossover {words}", fontsize=8, **place)
            elif ylabel == SPEEDUP:
                axes.axhline(1, color="0.7", linewidth=1)
            elif ylabel == DRIFT:
                # exact mode's zeros have a place
                axes.set_yscale("symlog", linthresh=1e-8)
            elif xlabel == "depth":
                axes.set_ylim(bottom=0)
            axes.legend(fontsize=7)
        save(figure, kind)

    times = {mode: select(rows, "ms_p50", suite="attention", regime="batch", mode=mode, input="gaussian") for mode in MODES}
    speedups = {}
    for mode, found in times.items():
        best = fastest(found, is_exact)
        ratios = {p: {n: best[n] / ms for n, ms in points.items() if n in best} for p, points in found.items() if not is_exact(p)}
        speedups[mode] = {provider: points for provider, points in ratios.items() if points}
    panels(
        "time",
        [(mode, found, "ms", "length") for mode, found in times.items()],
        [(mode, found, SPEEDUP, "length") for mode, found in speedups.items()],
    )
    panels("memory", [(mode, peaks_of(rows, mode), "extra peak MiB", "length") for mode in MODES])
    memory, _, drift = reversible_parts(rows)
    panels("reversible", [("memory of a step", memory, "extra peak MiB", "depth"), ("drift", drift, DRIFT, "depth")])
    bars = latest([row for row in rows if row["status"] == "ok" and row["roofline"]], {"L"})
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
