"""`python -m lsh_kernels demo`: a small language model, exact attention beside its two LSH twins.

A byte-level model of the source text of the running Python's standard library, trained three times from the same
weights on the same batches: with `nn.MultiheadAttention`, and with it swapped for LSH attention with shared QK and with
separate keys. Every model trains in a process of its own, so that peak memory is its own too. `--model reformer` trains a
`ReformerLM` on that text, at 16K context.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import re
import signal
import statistics
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from lsh_kernels.config import LSHConfig
from lsh_kernels.measure import machine, peak, start_of_peak, write_results
from lsh_kernels.models import ReformerConfig, ReformerLM
from lsh_kernels.multihead import LSHMultiheadAttention, replace_multihead_attention

EMBED_DIM = 128
NUM_HEADS = 4
CONFIG = LSHConfig(local_window=64)
LEARNING_RATE = 6e-3
N_HELDOUT = 8  # sequences of held-out text
N_EVALUATIONS = 4  # during training, evenly spaced, the last one at the end

# what becomes of each nn.MultiheadAttention: shared_qk, or None to leave it alone
MODELS = {"exact": None, "LSH, shared QK": True, "LSH, separate keys": False}
REFORMER = "reformer"


def main(argv=None) -> int:
    """Train, time, print the table, write `results.json`, `losses.csv`, `layer.csv`, `demo.png` and each model's weights.

    Returns 0; after Ctrl-C 130, with everything measured so far printed and written.
    """
    options = _parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine(),
        "options": {"length": options.length, "steps": options.steps, "layers": options.layers, "seed": options.seed},
        "models": {},
        "layer": {},
    }
    interrupted = False
    try:
        _measure(options, results)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: this is what was measured so far", file=sys.stderr)
    finally:
        print(table(results))
        _write(options.out, results)
    return 130 if interrupted else 0


def _parse(argv):
    parser = argparse.ArgumentParser(prog="python -m lsh_kernels demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", nargs="+", choices=[*MODELS, REFORMER], default=list(MODELS), dest="models", metavar="NAME",
        help=f"models to train, out of {', '.join(map(repr, [*MODELS, REFORMER]))} (default: all but the last)",
    )  # fmt: skip
    parser.add_argument("--length", type=int, help=f"context, in bytes (default: 8192, with {REFORMER} 16384)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps per model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and hashes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the files (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.length is None:
        options.length = 16384 if REFORMER in options.models else 8192
    for name, least in (("length", 16), ("steps", 1), ("layers", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: got {getattr(options, name)}, wanted >= {least}")
    return options


def _measure(options, results):
    """Fill `results`, as it comes in."""
    for name in options.models:
        rows = results["models"][name] = {"train": [], "heldout": []}
        with tqdm(total=options.steps, desc=f"training {name}", unit="step") as bar:
            for kind, *row in messages(train, (name, options)):
                if kind == "step":
                    rows["train"].append(dict(zip(("step", "bits_per_byte", "seconds"), row, strict=True)))
                    bar.set_postfix_str(f"{row[1]:.2f} bits/byte", refresh=False)
                    bar.update()
                elif kind == "heldout":
                    rows["heldout"].append(dict(zip(("step", "bits_per_byte"), row, strict=True)))
                elif kind == "text":
                    results["text"] = row[0]
                else:
                    rows["peak_bytes"] = row[0]
    lengths = [options.length * 2**p // 8 for p in range(5)]
    # of the reformer no layer is timed: it has no twin with exact attention
    for name in [name for name in options.models if name in MODELS]:
        rows = results["layer"][name] = []
        with tqdm(total=len(lengths), desc=f"one layer, {name}", unit="length") as bar:
            for row in messages(_time_layer, (name, lengths, options.seed)):
                rows.append(dict(zip(("length", "seconds", "peak_bytes"), row, strict=True)))
                bar.update()


def messages(worker, args):
    """Run `worker(send, *args)` in a fresh process and yield what it sends."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(worker, sender, args), daemon=True)
    # the child inherits this: Ctrl-C is for the parent to handle
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, handler)
    sender.close()
    try:
        while True:
            yield receiver.recv()
    except EOFError:
        process.join()
    finally:
        process.terminate()
    if process.exitcode != 0:
        raise RuntimeError(f"{worker.__name__}{args[:1]}: the process ended with exit code {process.exitcode}")


def _run(worker, sender, args):
    # in eval it would read the mask of zeros below, and not is_causal
    torch.backends.mha.set_fastpath_enabled(False)
    worker(sender.send, *args)


def train(send, name, options):
    """Train one model.

    Sends ("text", facts), then ("step", step, bits, seconds) and ("heldout", step, bits), last ("peak", bytes). Bits
    are per byte; `seconds` is one optimizer step: forward, backward, update. Writes the weights to `options.out`.
    """
    train, heldout = (torch.from_numpy(part) for part in corpus())
    heldout = windows(heldout, options.length)  # [N_HELDOUT, L + 1]
    send(("text", text_facts(train, heldout)))

    model = build_model(name, options)
    # loads what torch loads on first use
    update(model, torch.optim.AdamW(model.parameters()), train[: min(options.length, 64) + 1])
    resting = start_of_peak()
    model = build_model(name, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, options.steps))
    batches = torch.Generator().manual_seed(options.seed)
    for step in range(1, options.steps + 1):
        start = int(torch.randint(len(train) - options.length, (), generator=batches))
        began = time.perf_counter()
        loss = update(model, optimizer, train[start : start + options.length + 1])
        send(("step", step, loss / math.log(2), time.perf_counter() - began))
        schedule.step()
        if step * N_EVALUATIONS // options.steps > (step - 1) * N_EVALUATIONS // options.steps:
            model.eval()
            with torch.no_grad():
                loss = statistics.fmean(next_byte_loss(model, text).item() for text in heldout)
            model.train()
            send(("heldout", step, loss / math.log(2)))
    send(("peak", peak() - resting))
    settings = {option: value for option, value in vars(options).items() if option not in ("out", "models")}
    torch.save({"model": name, "options": settings, "state_dict": model.state_dict()}, options.out / weights_name(name))


def weights_name(name) -> str:
    """The file of a model's trained weights, which `python -m lsh_kernels diagnose` reads."""
    return re.sub(r"\W+", "_", name.lower()) + ".pt"


def _time_layer(send, name, lengths, seed):
    """Time one causal attention layer, forward + backward. Sends (length, seconds: median of 3 runs, peak bytes).

    The lengths ascend, so the peak of the process is that of the last length.
    """
    torch.manual_seed(seed)
    layer = attention_layer(name)

    def run(length):
        x = torch.randn(1, length, EMBED_DIM, requires_grad=True)
        began = time.perf_counter()
        layer(x, x, x, attn_mask=no_mask(length), is_causal=True, need_weights=False)[0].sum().backward()
        return time.perf_counter() - began

    run(min(lengths[0], 256))  # threads, libraries
    resting = start_of_peak()
    for length in lengths:
        seconds = statistics.median(run(length) for _ in range(3))
        send((length, seconds, peak() - resting))


class ByteModel(nn.Module):
    """A causal language model of bytes [B, L]: sinusoidal positions, pre-norm `nn.TransformerEncoderLayer`s, logits."""

    def __init__(self, n_layers):
        super().__init__()
        self.embed = nn.Embedding(256, EMBED_DIM)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                EMBED_DIM, NUM_HEADS, 4 * EMBED_DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(EMBED_DIM)
        self.head = nn.Linear(EMBED_DIM, 256)

    def forward(self, text):
        x = self.embed(text) + sinusoids(text.shape[1])  # [B, L, E]
        for layer in self.layers:
            x = layer(x, src_mask=no_mask(text.shape[1]), is_causal=True)
        return self.head(self.norm(x))


def build_model(name, options) -> ByteModel | ReformerLM:
    """The exact model, or one of its twins: the same initial weights for the same seed; or the reformer."""
    torch.manual_seed(options.seed)
    if name == REFORMER:
        sizes = {"embed_dim": EMBED_DIM, "num_heads": NUM_HEADS, "n_layers": options.layers}
        return ReformerLM(ReformerConfig(vocab_size=256, max_length=options.length, **sizes))
    model = ByteModel(options.layers)
    shared_qk = MODELS[name]
    return model if shared_qk is None else replace_multihead_attention(model, CONFIG, shared_qk=shared_qk)


def attention_layer(name):
    """One layer as the models have it."""
    shared_qk = MODELS[name]
    if shared_qk is None:
        return nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True)
    return LSHMultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, config=CONFIG, shared_qk=shared_qk)


def no_mask(length):
    """A stand-in [L, L] of one element: `nn.MultiheadAttention` wants a mask beside is_causal but does not read it."""
    return torch.zeros(()).expand(length, length)


def sinusoids(length):
    """Positions [L, E]: sines and cosines with wavelengths from 2 pi to 10,000 * 2 pi."""
    rates = 1e-4 ** (torch.arange(0, EMBED_DIM, 2) / EMBED_DIM)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def next_byte_loss(model, text):
    """Mean cross-entropy (natural log) of text[1:] given what comes before; text [L + 1] uint8."""
    text = text.long()
    if isinstance(model, ReformerLM):
        return model(text[None, :-1], text[None, 1:])
    return F.cross_entropy(model(text[None, :-1])[0], text[1:])


def update(model, optimizer, text) -> float:
    """One optimizer step; returns the loss before it."""
    loss = next_byte_loss(model, text)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def learning_rate(step, steps):
    """Factor: linear warm-up over a tenth of the steps, at most 100, then a cosine down to a tenth."""
    warm_up = min(max(steps // 10, 1), 100)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1))


def corpus():
    """The standard library's source text as bytes: (train, held-out), one file after the other, split by file name.

    Without tests (not every distribution has them) and installed packages.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    parts = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if skip.isdisjoint(name.split("/")):
            parts[zlib.crc32(name.encode()) % 16 == 0].append(path.read_bytes())
    return tuple(np.frombuffer(bytearray(b"\0".join(parts[heldout])), np.uint8) for heldout in (False, True))


def windows(text, length):
    """N_HELDOUT evenly spaced pieces of `text`, [N_HELDOUT, length + 1]."""
    if len(text) <= length:
        raise ValueError(f"--length: got {length}, wanted < {len(text)}, the bytes of held-out text")
    starts = torch.linspace(0, len(text) - length - 1, N_HELDOUT, dtype=torch.float64).long()
    return torch.stack([text[start : start + length + 1] for start in starts])


def text_facts(train, heldout):
    """Sizes, and what counting alone gives: bits per byte of the held-out targets, all bytes that the models predict.

    unigram, bigram: cross-entropy under the byte and byte-pair counts of the training text (the unigram model with one
    more count for each byte; a bigram row with one more count, spread like the unigram model). unigram_of_heldout: the
    entropy of the held-out bytes' own distribution, the least that any unigram model could reach.
    """
    train, previous, target = train.long(), heldout[:, :-1].long().flatten(), heldout[:, 1:].long().flatten()
    unigram = (train.bincount(minlength=256) + 1).double()
    unigram /= unigram.sum()
    bigram = (train[:-1] * 256 + train[1:]).bincount(minlength=256 * 256).view(256, 256) + unigram
    bigram /= bigram.sum(1, keepdim=True)
    own = target.bincount(minlength=256).double() / len(target)
    return {
        "train_bytes": len(train),
        "heldout_targets": len(target),
        "unigram": -unigram[target].log2().mean().item(),
        "bigram": -bigram[previous, target].log2().mean().item(),
        "unigram_of_heldout": -torch.special.xlogy(own, own).sum().item() / math.log(2),
    }


def summary(rows):
    """What the table says of one model: last held-out bits per byte, seconds per step (median), peak bytes, or None."""
    return {
        "heldout": rows["heldout"][-1]["bits_per_byte"] if rows["heldout"] else None,
        "seconds": statistics.median(row["seconds"] for row in rows["train"]) if rows["train"] else None,
        "peak_bytes": rows.get("peak_bytes"),
    }


def table(results) -> str:
    """The results as text; "-" where nothing was measured."""
    length, steps = results["options"]["length"], results["options"]["steps"]
    lines = [
        "",
        f"{'':30}{'held-out':>12}{'tokens/s':>12}{'s/step':>12}{'peak':>12}",
        f"{'':30}{'bits/byte':>12}{'':>12}{'':>12}{'MiB':>12}",
    ]
    for name, rows in results["models"].items():
        cells = summary(rows)
        seconds, peak = cells["seconds"], cells["peak_bytes"]
        stopped = f" ({len(rows['train'])} steps)" if len(rows["train"]) < steps else ""
        lines.append(
            f"{name + stopped:30}{_cell(cells['heldout'], '.3f')}{_cell(seconds and length / seconds, ',.0f')}"
            f"{_cell(seconds, '.3f')}{_cell(peak and peak / 2**20, ',.0f')}"
        )
    for name in ("unigram", "bigram"):
        lines.append(f"{name + ' counts':30}{_cell(results.get('text', {}).get(name), '.3f')}")
    where = results["machine"]
    lines += [
        "",
        f"context {length}, {steps} steps of one sequence, {results['options']['layers']} layers of {EMBED_DIM} with "
        f"{NUM_HEADS} heads; {where['cpu']}, {where['cores']} cores, torch {where['torch']}, commit {where['commit']}",
        "peak: resident memory of the model's own process, above what it had before the model was built",
        "unigram, bigram counts: cross-entropy of the held-out bytes under counts of the training text",
    ]
    return "\n".join(lines)


def _cell(value, form):
    return f"{'-' if value is None else format(value, form):>12}"


def _write(out, results):
    """results.json, losses.csv, layer.csv and, with matplotlib, demo.png."""
    losses = [["model", "step", "train_bits_per_byte", "heldout_bits_per_byte", "seconds"]]
    for name, model in results["models"].items():
        heldout = {row["step"]: row["bits_per_byte"] for row in model["heldout"]}
        losses += [[name, row["step"], row["bits_per_byte"], heldout.get(row["step"]), row["seconds"]] for row in model["train"]]
    layer = [["model", "length", "seconds", "peak_bytes"]]
    for name, rows in results["layer"].items():
        layer += [[name, row["length"], row["seconds"], row["peak_bytes"]] for row in rows]
    tables = {"losses.csv": losses, "layer.csv": layer}
    write_results(out, "results.json", results, tables, "demo.png", (13, 4), plot)


def plot(figure, results):
    """Loss curves; time and memory of one layer against length. Readable in black and white."""
    losses, *layer = figure.subplots(1, 3 if results["layer"] else 1, squeeze=False)[0]
    styles = (("black", "-", "o"), ("0.35", "--", "s"), ("0.6", "-.", "^"), ("black", "--", "D"))
    styles = dict(zip([*MODELS, REFORMER], styles, strict=True))
    for name, rows in results["models"].items():
        color, line, marker = styles[name]
        train, heldout = rows["train"], rows["heldout"]
        losses.plot(_column(train, "step"), _column(train, "bits_per_byte"), line, color=color, linewidth=1)
        losses.plot(_column(heldout, "step"), _column(heldout, "bits_per_byte"), line, color=color, marker=marker, label=name)
    for name, line in (("unigram", ":"), ("bigram", (0, (1, 4)))):
        if "text" in results:
            losses.axhline(results["text"][name], color="black", linestyle=line, linewidth=1, label=f"{name} counts")
    losses.set(title="loss (thin: training; markers: held-out)", xlabel="step", ylabel="bits per byte")
    for name, rows in results["layer"].items():
        color, line, marker = styles[name]
        style = {"color": color, "linestyle": line, "marker": marker, "label": name}
        seconds, peak = layer
        seconds.plot(_column(rows, "length"), _column(rows, "seconds"), **style)
        peak.plot(_column(rows, "length"), [row["peak_bytes"] / 2**20 for row in rows], **style)
    for axes, ylabel in zip(layer, ("seconds", "peak MiB")):
        axes.set(title="one layer, forward + backward", ylabel=ylabel, xlabel="length", xscale="log")
        axes.set_yscale("log", nonpositive="mask")
        lengths = sorted({row["length"] for rows in results["layer"].values() for row in rows})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
    for axes in (losses, *layer):
        axes.grid(color="0.9")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def _column(rows, name):
    return [row[name] for row in rows]
