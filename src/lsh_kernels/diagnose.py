"""`python -m lsh_kernels diagnose`: how much of exact attention LSH attention keeps, by rounds and span.

Of queries and keys in a file, or of the layers of a model that the demo trained.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from lsh_kernels import demo
from lsh_kernels.config import SPANS, LSHConfig
from lsh_kernels.diagnostics import AttentionInputs, attention_recall, capture_attention, config_grid
from lsh_kernels.measure import machine, write_results

N_TEXTS = 4  # held-out sequences that a model of the demo reads
ENOUGH = 0.9  # of the softmax mass

_MEASURES = {"recall": "share of the softmax mass", "cosine_error": "cosine error of the output", "n_keys": "keys per query"}


def main(argv=None) -> int:
    """Measure, print the table, write `diagnosis.json`, `recall.csv` and `diagnosis.png`.

    Returns 0; after Ctrl-C 130, with everything measured so far printed and written.
    """
    options = _parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    interrupted, results = False, None
    try:
        source, layers = _load(options)
        results = {
            "machine": machine(),
            "source": source,
            "options": {
                name: getattr(options, name)
                for name in ("causal", "rounds", "spans", "local_window", "chunk_length", "n_buckets", "queries", "seed")
            },
            "layers": {},
            "rows": [],
        }
        _measure(layers, options, results)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: this is what was measured so far", file=sys.stderr)
    if results:
        print(table(results))
        _write(options.out, results)
    return 130 if interrupted else 0


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m lsh_kernels diagnose",
        description=__doc__.split("\n")[0],
        epilog="FILE: weights that the demo saved; or a .pt or .npz file of tensors: query [B, H, L, D] and, if there are any, "
        "key (without it: shared QK), value, key_padding_mask. Without FILE a model of the demo is trained first.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path)
    parser.add_argument("--causal", action="store_true", help="the tensors are those of causal attention")
    train = parser.add_argument_group("without FILE")
    train.add_argument("--model", choices=[*demo.MODELS, demo.REFORMER], default="LSH, shared QK", help="(default: %(default)s)")
    train.add_argument("--length", type=int, default=8192, help="context, in bytes (default: %(default)s)")
    train.add_argument("--steps", type=int, default=60, help="optimizer steps (default: %(default)s)")
    train.add_argument("--layers", type=int, default=2, help="layers of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of hash rounds (default: 1 2 4 8)")
    parser.add_argument("--spans", nargs="+", choices=SPANS, default=list(SPANS), help="(default: all)")
    parser.add_argument("--local-window", type=int, default=64, help="of the local round, 0: none (default: %(default)s)")
    parser.add_argument("--chunk-length", type=int, help="C, and W (default: the layer's own, or 64)")
    parser.add_argument("--n-buckets", type=int, nargs="+", help="N, or its factors (default: the layer's own, or by length)")
    parser.add_argument("--queries", type=int, default=512, help="queries drawn from each sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, and of the model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/diagnose"), help="folder for the files (default: %(default)s)")
    options = parser.parse_args(argv)
    for name, least in (("length", 16), ("steps", 1), ("layers", 1), ("queries", 1), ("local_window", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}, wanted >= {least}")
    if options.file is not None and not options.file.is_file():
        parser.error(f"FILE: got {options.file}, which is no file")
    try:
        _grid(LSHConfig(), options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _grid(own, options):
    """The configs to measure for a layer with the config `own`."""
    given = {"chunk_length": options.chunk_length, "n_buckets": options.n_buckets and tuple(options.n_buckets)}
    base = replace(own, **{name: value for name, value in given.items() if value is not None})
    windows = sorted({0, options.local_window})
    return config_grid(base, n_hashes=sorted(set(options.rounds)), spans=options.spans, local_windows=windows)


def _load(options):
    """Where the tensors come from, in words, and the layers: name -> AttentionInputs."""
    path = options.file
    if path is None:
        path = _train(options)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            saved = {name: torch.from_numpy(array) for name, array in arrays.items()}
    else:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(saved, dict) and "state_dict" in saved:
        return _load_model(saved)
    names = ("query", "key", "value", "key_padding_mask")
    if not isinstance(saved, dict) or "query" not in saved or set(saved) - set(names):
        got = list(saved) if isinstance(saved, dict) else type(saved).__name__
        raise SystemExit(f"FILE: got {got}, wanted a dict of query and, if there are any, key, value, key_padding_mask")
    query, key, value, padding = (saved.get(name) for name in names)
    return path.name, {"": AttentionInputs(query, key, value, options.causal, padding)}


def _train(options):
    """Train the demo's model in a process of its own; the path of its weights."""
    settings = {name: getattr(options, name) for name in ("length", "steps", "layers", "seed", "out")}
    with tqdm(total=options.steps, desc=f"training {options.model}", unit="step") as bar:
        for kind, *row in demo.messages(demo.train, (options.model, SimpleNamespace(**settings))):
            if kind == "step":
                bar.set_postfix_str(f"{row[1]:.2f} bits/byte", refresh=False)
                bar.update()
    return options.out / demo.weights_name(options.model)


def _load_model(saved):
    """The layers of a model of the demo while it reads held-out text."""
    options = SimpleNamespace(**saved["options"])
    model = demo.build_model(saved["model"], options).eval()
    model.load_state_dict(saved["state_dict"])
    text = demo.windows(torch.from_numpy(demo.corpus()[1]), options.length)[:N_TEXTS, :-1]  # [N_TEXTS, L]
    with torch.no_grad(), capture_attention(model) as layers:
        model(text.long())
    source = f"demo's model ({saved['model']}), {options.steps} steps, reading {N_TEXTS} held-out texts of {options.length} bytes"
    return source, layers


def _measure(layers, options, results):
    """Fill `results`, as it comes in."""
    grids = {name: _grid(inputs.config or LSHConfig(), options) for name, inputs in layers.items()}
    with tqdm(total=sum(map(len, grids.values())), desc="measuring", unit="config") as bar:
        for name, inputs in layers.items():
            for config in grids[name]:
                found = attention_recall(inputs, config, n_queries=options.queries, seed=options.seed)
                # of every round; the last config has the most
                results["layers"][name] = _bucket_facts(inputs, config, found)
                results["rows"] += _rows(name, config, found)
                bar.update()


def _bucket_facts(inputs, config, found):
    """Of the hash of a layer: sizes, and quantiles of the number of keys in a query's bucket."""
    k_len = (inputs.query if inputs.key is None else inputs.key).shape[2]
    known = ~found.recall.isnan()  # [B, H, M]
    sizes = found.bucket_sizes.transpose(2, 3)[known].flatten().sort().values
    quantiles = sizes[torch.linspace(0, len(sizes) - 1, 101).long()].tolist() if len(sizes) else []
    return {"keys": k_len, "n_buckets": config.factors(k_len), "window": config.window_length, "quantiles": quantiles}


def _rows(layer, config, found):
    """One row per head: means over its queries, and the recall that 90% of them reach."""
    for head in range(found.recall.shape[1]):
        recall = found.recall[:, head]
        known = ~recall.isnan()
        recall = recall[known].sort().values
        if not len(recall):
            continue
        yield {
            "layer": layer,
            "head": head,
            "span": config.span,
            "local_window": config.local_window,
            "n_hashes": config.n_hashes,
            "n_queries": len(recall),
            "recall": recall.mean().item(),
            "recall_p10": recall[len(recall) // 10].item(),
            "cosine_error": None if found.cosine_error is None else found.cosine_error[:, head][known].mean().item(),
            "n_keys": found.n_keys[:, head][known].double().mean().item(),
            "perplexity": found.perplexity[:, head][known].mean().item(),
        }


def summary(rows) -> dict:
    """Means over layers and heads: (span, local_window) -> n_hashes -> recall, cosine_error (or None), n_keys."""
    groups = {}
    for row in rows:
        groups.setdefault((row["span"], row["local_window"]), {}).setdefault(row["n_hashes"], []).append(row)
    return {
        key: {R: {name: _mean(row[name] for row in part) for name in _MEASURES} for R, part in by_rounds.items()}
        for key, by_rounds in groups.items()
    }


def _mean(values):
    values = list(values)
    return None if None in values else statistics.fmean(values)


def rounds_needed(means, local_window) -> str:
    """From how many rounds on the window span covers 90% of the softmax mass, as a sentence."""
    by_rounds = means["window", local_window]
    enough = [R for R, mean in by_rounds.items() if mean["recall"] >= ENOUGH]
    best = max(by_rounds)
    if enough:
        found = f"covers {ENOUGH:.0%} of the softmax mass from R = {min(enough)} on ({by_rounds[min(enough)]['recall']:.1%})"
    else:
        found = f"does not cover {ENOUGH:.0%} of the softmax mass up to R = {best} ({by_rounds[best]['recall']:.1%})"
    return f"{_label('window', local_window)} {found}"


def _label(span, local_window):
    return f"{span} + local {local_window}" if local_window else span


def table(results) -> str:
    """The results as text."""
    means = summary(results["rows"])
    rounds = sorted({row["n_hashes"] for row in results["rows"]})
    lines = []
    for name, title in _MEASURES.items():
        form = ",.0f" if name == "n_keys" else ".3f"
        lines += ["", f"{title:30}" + "".join(f"{f'R = {R}':>10}" for R in rounds)]
        for key, by_rounds in means.items():
            cells = (by_rounds.get(R, {}).get(name) for R in rounds)
            lines.append(f"{_label(*key):30}" + "".join(f"{'-' if x is None else format(x, form):>10}" for x in cells))
    lines += ["", *(rounds_needed(means, window) for span, window in means if span == "window")]
    if results["rows"]:
        perplexity = statistics.fmean(row["perplexity"] for row in results["rows"])
        lines.append(f"exact attention is as spread out as over {perplexity:,.0f} equally heavy keys per query")
    where = results["machine"]
    lines += [
        f"means over queries, {len(results['layers'])} layers and their heads; {results['source']}",
        f"torch {where['torch']}, commit {where['commit']}",
    ]
    return "\n".join(lines)


def _write(out, results):
    """diagnosis.json, recall.csv and, with matplotlib, diagnosis.png."""
    columns = ["layer", "head", "span", "local_window", "n_hashes", "n_queries", "recall", "recall_p10", "cosine_error", "n_keys",
               "perplexity"]  # fmt: skip
    tables = {"recall.csv": [columns, *([row[name] for name in columns] for row in results["rows"])]}
    write_results(out, "diagnosis.json", results, tables, "diagnosis.png", (11, 8), plot)


def plot(figure, results):
    """Recall and error against rounds; recall of each head; bucket sizes. One page, readable in black and white."""
    (recall, error), (heads, sizes) = figure.subplots(2, 2)
    means = summary(results["rows"])
    markers, colors = dict(zip(SPANS, "os^")), dict(zip(SPANS, ("black", "0.35", "0.6")))
    for (span, window), by_rounds in means.items():
        style = {"color": colors[span], "marker": markers[span], "label": _label(span, window)}
        style |= {"linestyle": "--", "markerfacecolor": "white"} if window else {"linestyle": "-"}
        for axes, name in ((recall, "recall"), (error, "cosine_error")):
            axes.plot(list(by_rounds), [mean[name] for mean in by_rounds.values()], **style)
    recall.axhline(ENOUGH, color="black", linestyle=":", linewidth=1)
    recall.set(title="softmax mass on the keys seen", ylabel="share", ylim=(0, 1.02))
    error.set(title="output: 1 - cosine with exact attention", ylabel="cosine error")
    error.set_ylim(bottom=0)
    rounds = sorted({row["n_hashes"] for row in results["rows"]})
    for axes in (recall, error):
        axes.set(xlabel="hash rounds R", xscale="log")
        axes.set_xticks(rounds, [str(R) for R in rounds])
        axes.minorticks_off()

    # the first combination, with the most rounds
    names, last = list(results["layers"]), max(rounds, default=0)
    span, window = next(iter(means), ("", 0))
    rows = [row for row in results["rows"] if (row["span"], row["local_window"], row["n_hashes"]) == (span, window, last)]
    grid = np.full((max(len(names), 1), 1 + max((row["head"] for row in rows), default=0)), np.nan)
    for row in rows:
        y, x, share = names.index(row["layer"]), row["head"], row["recall"]
        grid[y, x] = share
        text = f"{share:.2f}\n({row['perplexity']:,.0f})"
        heads.text(x, y, text, ha="center", va="center", color="black" if share > 0.5 else "white")
    heads.imshow(grid, cmap="gray", vmin=0, vmax=1, aspect="auto")
    heads.set(title=f"{_label(span, window)}, R = {last}: softmax mass (perplexity of exact attention)", xlabel="head")
    heads.set_xticks(range(grid.shape[1]))
    heads.set_yticks(range(len(names)), names)

    for n, (name, facts) in enumerate(results["layers"].items()):
        style = {"color": str(0.6 * n / len(names)), "linestyle": ("-", "--", "-.", ":")[n % 4]}
        sizes.plot(facts["quantiles"], np.linspace(0, 1, len(facts["quantiles"])), **style, label=name or "queries")
    if names:
        facts = results["layers"][names[0]]
        n_buckets = np.prod(facts["n_buckets"])
        sizes.axvline(facts["keys"] / n_buckets, color="0.7", label=f"all {n_buckets} buckets equal")
        sizes.axvline(facts["window"], color="0.7", linestyle=":", label=f"window {facts['window']}")
    sizes.set(title="bucket occupancy", xlabel="keys in a query's bucket, at most", ylabel="share of queries", xscale="symlog")
    sizes.set_xlim(left=0)
    for axes in (recall, error, sizes):
        axes.grid(color="0.9")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.suptitle(results["source"], fontsize="medium")
    return figure
