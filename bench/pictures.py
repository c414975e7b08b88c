"""Pictures of the rows of one machine, as PNGs that can be read in black and white."""

from __future__ import annotations

from measured import MODES, OURS, crossover, fastest, is_exact, latest, peaks_of, reversible_parts, times_of, token_times

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


def draw(rows, folder):
    """Draw the pictures that there are rows for into a folder, and return their paths."""
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

    times = {mode: times_of(rows, mode) for mode in MODES}
    speedups = {}
    for mode, found in times.items():
        best = fastest(found, is_exact)
        ratios = {p: {n: best[n] / ms for n, ms in points.items() if n in best} for p, points in found.items() if not is_exact(p)}
        speedups[mode] = {provider: points for provider, points in ratios.items() if points}
    panels(
        "time",
        [(mode, found, "ms", "length") for mode, found in times.items()],
        [(mode, found, SPEEDUP, "length") for mode, found in speedups.items()],
        [("one new token", token_times(rows), "ms", "length")],
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
