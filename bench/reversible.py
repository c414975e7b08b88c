"""Memory, step time and drift of reversible sequences beside their alternatives, as a CSV and docs/reversible.png.

    python bench/reversible.py

Every provider trains the same layers: pre-norm LSH attention (shared QK, causal) and a pre-norm feed-forward layer of 4 E, by
SGD on one batch of L positions. Memory is that of one training step beyond parameters and gradients, in a process of its own:
the high-water mark of its resident set over where a short step has left it. Times are of alternating runs. Drift is the
largest difference between what a layer was given in forward and when it was recomputed, over all layers.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from attention import C, R, machine_name

from lsh_kernels import LSHConfig, LSHSelfAttention, ReversibleBlock, ReversibleSequence
from lsh_kernels.demo import machine

B, E, D = 1, 256, 64
FIELDS = ("op provider mode dtype B H L D R C depth ms_min ms_p50 ms_max peak_mib drift cpu cores torch triton commit").split()


def layers(depth):
    """`depth` pairs of attention and feed-forward layer."""
    torch.manual_seed(0)
    config = LSHConfig(n_hashes=R, chunk_length=C)
    return [
        (
            nn.Sequential(nn.LayerNorm(E), LSHSelfAttention(E, E // D, config=config, causal=True)),
            nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E)),
        )
        for _ in range(depth)
    ]


class Ordinary(nn.Module):
    """The blocks without reversibility, each in a checkpoint if asked for."""

    def __init__(self, pairs, checkpointed=False):
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        self.checkpointed = checkpointed

    def forward(self, x):
        halves = x.chunk(2, -1)
        for f, g in self.pairs:
            halves = checkpoint(add_both, f, g, *halves, use_reentrant=False) if self.checkpointed else add_both(f, g, *halves)
        return torch.cat(halves, -1)


def add_both(f, g, x1, x2):
    x1 = x1 + f(x2)
    return x1, x2 + g(x1)


def reformer_pytorch(pairs):
    from reformer_pytorch.reversible import ReversibleSequence

    return ReversibleSequence(nn.ModuleList(nn.ModuleList(pair) for pair in pairs))


PROVIDERS = {
    "lsh_kernels": lambda pairs: ReversibleSequence([ReversibleBlock(*pair) for pair in pairs]),
    "lsh_kernels exact": lambda pairs: ReversibleSequence([ReversibleBlock(*pair) for pair in pairs], exact=True),
    "not reversible": Ordinary,
    "torch.utils.checkpoint": lambda pairs: Ordinary(pairs, checkpointed=True),
    "reformer-pytorch": reformer_pytorch,
}
RECOMPUTE_INPUTS = ("lsh_kernels", "lsh_kernels exact", "reformer-pytorch")


def step(model, x):
    model(x).square().mean().backward()


def new_model(provider, depth):
    model = PROVIDERS[provider](layers(depth))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model


def new_input(length):
    """x [B, L, 2E], with a gradient as what comes from an embedding has (reformer-pytorch gives parameters none without)."""
    torch.manual_seed(1)
    x = torch.randn(B, length, 2 * E, requires_grad=True)
    x.grad = torch.zeros_like(x)
    return x


def drift(provider, depth, length):
    """max |x - recomputed x| over the inputs of all layers."""
    pairs = layers(depth)
    first, worst = {}, [0.0]

    def compare(layer, args):
        x = args[0].detach()
        if layer in first:
            worst.append((x - first.pop(layer)).abs().max().item())
        else:
            first[layer] = x.clone()

    for pair in pairs:
        for layer in pair:
            layer.register_forward_pre_hook(compare)
    step(PROVIDERS[provider](pairs), new_input(length))
    return max(worst)


def peak_mib(provider, depth, length):
    command = [sys.executable, __file__, "--peak", provider, str(depth), str(length)]
    # glibc then gives back what is freed, so that the resident set is what is in use
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


def print_peak(provider, depth, length):
    def peak():
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    model = new_model(provider, depth)
    step(model, new_input(256))
    x, before = new_input(length), peak()
    step(model, x)
    print(peak() - before)


def step_seconds(providers, depth, length, rounds):
    """{provider: sorted seconds per step}, alternating; the first round warms up."""
    models, x = {provider: new_model(provider, depth) for provider in providers}, new_input(length)
    times = {provider: [] for provider in providers}
    for _ in tqdm(range(rounds + 1), desc=f"step time at depth {depth}"):
        for provider, model in models.items():
            start = time.perf_counter()
            step(model, x)
            times[provider].append(time.perf_counter() - start)
    return {provider: sorted(seconds[1:]) for provider, seconds in times.items()}


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, column in ((left, "peak_mib"), (right, "drift")):
        for i, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
            points = sorted((row["depth"], float(row[column])) for row in rows if row["provider"] == provider and row.get(column))
            if points:
                # ours and reformer-pytorch may lie on one another
                axes.plot(*zip(*points), marker="o", color=f"C{i}", linestyle=("-", "--")[i % 2], label=provider)
        axes.set_xlabel("depth (blocks)")
        axes.legend()
    left.set_ylabel("MiB beyond parameters and gradients")
    left.set_ylim(bottom=0)
    right.set_ylabel("max |x - recomputed x|")
    right.set_yscale("symlog", linthresh=1e-8)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 6, 12, 24], help="of the memory")
    parser.add_argument("--drift-depths", type=int, nargs="+", default=[2, 6, 12, 24, 48])
    parser.add_argument("--drift-length", type=int, default=512)
    parser.add_argument("--time-depth", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a CSV file (default: bench/results/reversible_<machine>.csv)")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parents[1] / "docs" / "reversible.png")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return print_peak(options.peak[0], *map(int, options.peak[1:]))
    facts = machine()
    shared = {
        "op": "reversible", "dtype": "float32", "B": B, "H": E // D, "D": D, "R": R, "C": C, "cpu": facts["cpu"],
        "cores": facts["cores"], "torch": facts["torch"], "triton": importlib.metadata.version("triton"),
        "commit": facts["commit"],
    }  # fmt: skip
    rows = []

    def add(provider, mode, depth, length, **measured):
        rows.append({**shared, "provider": provider, "mode": mode, "depth": depth, "L": length, **measured})
        tqdm.write(f"{provider:24} {mode:8} depth {depth:3}  {'  '.join(f'{k} {v}' for k, v in measured.items())}")

    for provider, seconds in step_seconds(PROVIDERS, options.time_depth, options.length, options.rounds).items():
        low, middle, high = (f"{s * 1e3:.0f}" for s in (seconds[0], statistics.median(seconds), seconds[-1]))
        add(provider, "time", options.time_depth, options.length, ms_min=low, ms_p50=middle, ms_max=high)
    for provider, depth in tqdm([(p, d) for p in PROVIDERS for d in options.depths], desc="memory"):
        add(provider, "memory", depth, options.length, peak_mib=f"{peak_mib(provider, depth, options.length):.1f}")
    for provider, depth in tqdm([(p, d) for p in RECOMPUTE_INPUTS for d in options.drift_depths], desc="drift"):
        found = drift(provider, depth, options.drift_length)
        add(provider, "drift", depth, options.drift_length, drift=f"{found:.3e}" if found else "0")
    out = options.out or Path(__file__).parent / "results" / f"reversible_{machine_name()}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.plot)


if __name__ == "__main__":
    main()
