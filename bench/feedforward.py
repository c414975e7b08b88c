"""Times ChunkedFeedForward against the plain MLP on the CPU, alternating: rows in bench/results/feedforward_<machine>.csv.

    python bench/feedforward.py --tokens 16384

Memory is what a call takes beyond x, the output, their gradients and those of the weights, in a process of its own. The bars: at
most 1/8 of the plain MLP's memory, in at most 1.35 times its time.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from attention import MODES, machine_name
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lsh_kernels import ChunkedFeedForward
from lsh_kernels.demo import machine, peak, start_of_peak

N_CHUNKS = 32
MEMORY_BAR, TIME_BAR = 1 / 8, 1.35
FIELDS = (
    "op provider mode dtype tokens embed_dim ff_dim chunk activation ms_min ms_p50 ms_max extra_mib gflops "
    "cpu cores torch triton commit"
).split()


def ours(embed_dim, chunk):
    return ChunkedFeedForward(embed_dim, 4 * embed_dim, chunk)


def plain(embed_dim, chunk):
    return nn.Sequential(nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim))


class Checkpointed(nn.Module):
    def __init__(self, embed_dim, chunk):
        super().__init__()
        self.layer = plain(embed_dim, chunk)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


PROVIDERS = {"plain MLP": plain, "lsh_kernels": ours, "torch.utils.checkpoint": Checkpointed}


def flops(tokens, embed_dim, mode):
    """Of the plain MLP: multiply-adds count twice; two products forward, four backward; what is recomputed does not count."""
    return (2 if mode == "forward" else 6) * 2 * tokens * embed_dim * 4 * embed_dim


def tensors(tokens, embed_dim):
    torch.manual_seed(0)
    return torch.randn(tokens, embed_dim, requires_grad=True), torch.randn(tokens, embed_dim)


def run(layer, x, dout, mode):
    """One call; its bytes that any layer would take: output, gradients of x and of the weights."""
    if mode == "forward":
        with torch.no_grad():
            return layer(x).nbytes
    out = layer(x)
    out.backward(dout)
    made = [out, *(leaf.grad for leaf in (x, *layer.parameters()))]
    for leaf in (x, *layer.parameters()):
        leaf.grad = None
    return sum(tensor.nbytes for tensor in made)


def extra_mib(provider, tokens, embed_dim, mode):
    command = [sys.executable, __file__, "--peak", provider, str(tokens), str(embed_dim), mode]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_extra_mib(provider, tokens, embed_dim, mode):
    layer = PROVIDERS[provider](embed_dim, max(1, tokens // N_CHUNKS))
    run(layer, *tensors(64, embed_dim), mode)  # threads, libraries
    inputs = tensors(tokens, embed_dim)
    resting = start_of_peak()
    print((-run(layer, *inputs, mode) + peak() - resting) / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a CSV file to append to (default: bench/results/feedforward_<machine>.csv)")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        provider, tokens, embed_dim, mode = options.peak
        return print_extra_mib(provider, int(tokens), int(embed_dim), mode)
    out = options.out or Path(__file__).parent / "results" / f"feedforward_{machine_name()}.csv"
    tokens, embed_dim = options.tokens, options.embed_dim
    chunk = max(1, tokens // N_CHUNKS)
    layers, inputs = {name: make(embed_dim, chunk) for name, make in PROVIDERS.items()}, tensors(tokens, embed_dim)
    facts, rows = machine(), []
    for mode in MODES:
        times = {name: [] for name in layers}
        for _ in tqdm(range(options.rounds + 1), desc=mode):
            for name, layer in layers.items():
                start = time.perf_counter()
                run(layer, *inputs, mode)
                times[name].append(time.perf_counter() - start)
        for name, seconds in times.items():
            # the first round warms up
            seconds = sorted(seconds[1:])
            median = statistics.median(seconds)
            rows.append({
                "op": "feedforward", "provider": name, "mode": mode, "dtype": "float32", "tokens": tokens, "embed_dim": embed_dim,
                "ff_dim": 4 * embed_dim, "chunk": chunk if name == "lsh_kernels" else "", "activation": "gelu",
                "ms_min": f"{seconds[0] * 1e3:.1f}", "ms_p50": f"{median * 1e3:.1f}", "ms_max": f"{seconds[-1] * 1e3:.1f}",
                "extra_mib": f"{extra_mib(name, tokens, embed_dim, mode):.1f}",
                "gflops": f"{flops(tokens, embed_dim, mode) / median / 1e9:.1f}",
                "cpu": facts["cpu"], "cores": facts["cores"], "torch": facts["torch"],
                "triton": importlib.metadata.version("triton"), "commit": facts["commit"],
            })  # fmt: skip
            print(f"{name:24} {mode:17} {rows[-1]['ms_p50']:>9} ms {rows[-1]['extra_mib']:>8} MiB")
    fresh = not out.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    of = {row["provider"]: row for row in rows if row["mode"] == "forward+backward"}
    for field, bar in (("extra_mib", MEMORY_BAR), ("ms_p50", TIME_BAR)):
        ratio = float(of["lsh_kernels"][field]) / float(of["plain MLP"][field])
        print(f"{field}: {ratio:.3f} of the plain MLP's (bar: {bar:.3f}) {'met' if ratio <= bar else 'MISSED'}")


if __name__ == "__main__":
    main()
