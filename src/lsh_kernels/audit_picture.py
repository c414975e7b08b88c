"""The audit on one page: registers, instructions per pair, modelled times beside exact attention."""

from __future__ import annotations

from . import time_model

_LABELS = {"_attention_fwd_kernel": "attention fwd", "_attention_bwd_kernel": "attention bwd"}


def draw(rows: list[dict], estimates: list[time_model.Estimate]):
    """A matplotlib figure of the audit's rows and the model's estimates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    registers, pairs, times = figure.subplot_mosaic([["registers", "registers"], ["pairs", "times"]]).values()
    targets = list(dict.fromkeys(row["target"] for row in rows))
    kernels = {(row["target"], row["kernel"]): row for row in reversed(rows) if row["case"] in ("bf16-D64", "bf16-D64-64K")}
    names = list(dict.fromkeys(row["kernel"] for row in rows if (row["target"], row["kernel"]) in kernels))
    _bars(
        registers,
        targets,
        [_label(name).replace(" ", "\n") for name in names],
        lambda target, i: kernels.get((target, names[i])),
        "registers",
    )
    registers.set(title="registers per thread (bf16, D = 64)", ylabel="registers")
    registers.axhline(255, color="0.5", linestyle=":")

    attention = {
        (row["target"], row["case"], row["kernel"]): row
        for row in rows
        if row["unit"] == "pair" and row["case"] in ("bf16-D64-plain", "bf16-D64", "bf16-D128-plain", "bf16-D128")
    }
    calls = sorted({key[1:] for key in attention}, key=lambda call: (call[1], call[0]))
    labels = [f"{_label(kernel)}\n{case}".replace("bf16-", "").replace(" ", "\n").replace("-", "\n") for case, kernel in calls]
    _bars(pairs, targets, labels, lambda target, i: attention.get((target, *calls[i])), "slots_per_unit")
    pairs.set(title="instructions per pair of query and candidate (bf16, window 64, R = 4)", ylabel="lanes x instructions")

    lengths = [point.length for point in estimates]
    curves = {"LSH": [point.forward for point in estimates]}
    if all(point.backward for point in estimates):
        curves["LSH, and backward"] = [point.forward + point.backward for point in estimates]
    for (name, parts), marker in zip(curves.items(), ("o", "s")):
        for graph, line in ((True, "-"), (False, "--")):
            label = f"{name}, {'CUDA graph' if graph else 'eager'}"
            seconds = [time_model.whole(stages, graph) for stages in parts]
            times.plot(lengths, [1e3 * t for t in seconds], color="black", linestyle=line, marker=marker, label=label)
    for rate, shade in zip(time_model.EXACT, ("0.75", "0.6", "0.45")):
        seconds = [time_model.exact(time_model.CALL._replace(length=length), False)[rate] for length in lengths]
        times.plot(lengths, [1e3 * t for t in seconds], color=shade, label=f"exact, {rate}")
    times.set(
        title=f"modelled, not measured: {time_model.H100.name}, causal, bf16, B 1, H 8, D 64, R 4", xscale="log", yscale="log"
    )
    times.set(xlabel="length", ylabel="ms (exact: forward)")
    times.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    times.minorticks_off()
    for axes in (registers, pairs, times):
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.legend(fontsize="small")
    return figure


def _bars(axes, targets, labels, row_of, field):
    width = 0.8 / len(targets)
    for n, target in enumerate(targets):
        found = [row_of(target, i) for i in range(len(labels))]
        heights = [float(row[field]) if row and not row["error"] else 0 for row in found]
        places = [i + (n - (len(targets) - 1) / 2) * width for i in range(len(labels))]
        axes.bar(places, heights, width, color=str(0.85 * n / len(targets)), label=target)
    axes.set_xticks(range(len(labels)), labels, fontsize="small")


def _label(kernel):
    return _LABELS.get(kernel, kernel.strip("_").replace("_kernel", "").replace("_", " ").replace(" fwd", ""))
