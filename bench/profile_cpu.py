"""Where the time of the torch backend goes: stages, and kinds of operations within the attention, as a CSV.

    python bench/profile_cpu.py --length 16384

Stages are timed alone (medians of 5). Within a stage the share of each kind of operation is torch's profiler's, scaled to the
stage's time; what the profiler gives to no operation is Python and dispatch. Rates stand beside those of a large matmul and of
a large copy on the same machine.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from attention import lsh_flops
from timing import copy_gbs, machine_name, matmul_gflops
from torch.profiler import ProfilerActivity, profile

from lsh_kernels import LSHConfig, lsh_attention, random_rotations, torch_backend
from lsh_kernels.config import AttentionOptions
from lsh_kernels.measure import machine

B, H, D, R, C = 1, 8, 64, 4, 64
KINDS = {
    "matrix products": ("bmm", "baddbmm", "baddbmm_", "addmm"),
    "masks": ("maximum", "clamp_", "sub", "ge_", "lt_", "copy_"),
    "softmax": ("exp2_", "exp2", "amax", "sum", "sub_", "mul_", "mul"),
    "gathers": ("index_select", "index", "gather"),
    "sums over rounds": ("_embedding_bag_forward_only",),
}


def seconds(call):
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kinds_of(call):
    """Share of a call's time per kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = {e.key.removeprefix("aten::"): e.self_cpu_time_total for e in profiler.key_averages()}
    total = sum(events.values())
    shares = {kind: sum(events.get(name, 0) for name in names) / total for kind, names in KINDS.items()}
    return {**shares, "the rest, Python and dispatch": 1 - sum(shares.values())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"profile_{machine_name()}.csv")
    options = parser.parse_args()
    L = options.length
    torch.manual_seed(0)
    query, value, dout = torch.randn(3, B, H, L, D)
    config = LSHConfig(n_hashes=R, chunk_length=C)
    factors = config.factors(L)
    rotations = random_rotations(D, factors, R, n_heads=H)
    attention = AttentionOptions(
        list(factors), True, config.span, config.window_length, C, 1, 0, True, True, False, 0, 0.0, True, 0.0, 1.0
    )
    buckets = torch_backend.lsh_hash(query, rotations, factors)
    state = torch_backend.sort_rounds(buckets, None, None, attention)
    inputs = query, None, value, None, None
    out, lse = torch_backend.attention_fwd(*inputs, state, attention)
    stages = {
        "hash": (lambda: torch_backend.lsh_hash(query, rotations, factors), 2 * B * H * L * D * R * sum(factors) / 2),
        "sort": (lambda: torch_backend.sort_rounds(buckets, None, None, attention), None),
        "attention forward": (
            lambda: torch_backend.attention_fwd(*inputs, state, attention),
            lsh_flops(B, H, L, D, R, C, "forward"),
        ),
        "attention backward": (
            lambda: torch_backend.attention_bwd(dout, None, *inputs, out, lse, state, attention),
            lsh_flops(B, H, L, D, R, C, "forward+backward") - lsh_flops(B, H, L, D, R, C, "forward"),
        ),
    }
    qk, v = query.clone().requires_grad_(), value.clone().requires_grad_()
    # .backward() would add to the gradients of the call before
    whole = seconds(lambda: torch.autograd.grad(lsh_attention(qk, None, v, config=config, is_causal=True), (qk, v), dout))
    matmul, copy, facts = matmul_gflops(), copy_gbs(), machine()
    rows = [("forward + backward, whole", "", whole, 1.0, lsh_flops(B, H, L, D, R, C, "forward+backward"))]
    for stage, (call, flops) in stages.items():
        took = seconds(call)
        rows.append((stage, "", took, took / whole, flops))
        if stage.startswith("attention"):
            rows += [(stage, kind, took * share, took * share / whole, None) for kind, share in kinds_of(call).items()]
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("stage kind L ms share gflops share_of_matmul matmul_gflops copy_gbs cpu cores torch commit".split())
        for stage, kind, took, share, flops in rows:
            rate = flops / took / 1e9 if flops else None
            numbers = [f"{took * 1e3:.1f}", f"{share:.3f}", rate and f"{rate:.1f}", rate and f"{rate / matmul:.3f}"]
            facts_row = [f"{matmul:.0f}", f"{copy:.1f}", facts["cpu"], facts["cores"], facts["torch"], facts["commit"]]
            writer.writerow([stage, kind, L, *numbers, *facts_row])
            print(f"{stage:26} {kind:30} {numbers[0]:>8} ms {share:6.1%} {numbers[2] or '':>8} GFLOP/s")
    print(f"large matmul {matmul:.0f} GFLOP/s, large copy {copy:.1f} GB/s")


if __name__ == "__main__":
    main()
