"""`make report`: tables and pictures of the rows in bench/results, the tables into README.md between its two markers.

What did not run is listed with its reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measured import (
    MODES,
    crossovers,
    latest,
    load,
    machine_of,
    machines,
    name_of,
    peaks_of,
    reversible_parts,
    select,
    times_of,
    token_times,
)
from pictures import draw

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
# lengths of the tables, where they were measured; the CSV has all
SHOWN = (4096, 16384, 65536)
# the most that is allowed: memory of the deepest over the shallowest, step over its twin's; memory and time over the plain MLP's
DEPTH_BAR, STEP_BAR, MLP_MEMORY_BAR, MLP_TIME_BAR = 1.10, 1.40, 0.125, 1.35


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
        text += [f"### {name_of(machine)}", "", versions(own), "", *tables(own)]
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


def versions(rows):
    """What the rows of each suite were measured with."""
    commits = {}
    for row in rows:
        commits.setdefault((row["torch"], row["triton"]), {}).setdefault(row["suite"], set()).add(row["commit"])
    found = [
        f"with torch {torch}, triton {triton}, at commits "
        + ", ".join(f"{' and '.join(sorted(suites[suite]))} ({suite})" for suite in sorted(suites))
        for (torch, triton), suites in commits.items()
    ]
    return f"Measured {'; '.join(found)}."


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
    return table([f"{mode} {length:,}".strip() for mode, length in shown], rows)


def tables(rows):
    """The tables of one machine, those only that there are rows for."""
    text = []
    times = {mode: found for mode in MODES + tuple(f"{mode} graph" for mode in MODES) if (found := times_of(rows, mode))}
    if times:
        text += ["One attention call, ms by length (graph: as a CUDA graph):", "", *columns_of(times)]
    tokens = token_times(rows)
    if tokens:
        text += ["One new token after so many cached ones, ms:", "", *columns_of({"": tokens})]
    crossings = crossovers(rows)
    if crossings:
        text += [*(f"- {crossing}" for crossing in crossings), ""]
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
        text += [f"Stages at L = {longest:,}:", "", *table(["ms", "of the roofline"], cells)]
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


if __name__ == "__main__":
    sys.exit(main())
