"""Times one attention call against its peers on the CPU, alternating, and appends rows to bench/results/<machine>.csv.

    python bench/attention.py --lengths 4096 16384

Every provider gets the same B, H, L, D, dtype and causality; hashing and sorting count. A round runs each provider once, so
that a drift of the machine meets all of them. Peak memory is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lsh_kernels import LSHConfig, lsh_attention
from lsh_kernels.demo import machine

B, H, D, R, C = 1, 8, 64, 4, 64
MODES = ("forward", "forward+backward")
FIELDS = (
    "op provider mode dtype B H L D R C ms_min ms_p50 ms_max peak_mib gflops share_of_matmul matmul_gflops "
    "cpu cores torch triton commit"
).split()


def ours(config, separate=False):
    def attend(query, key, value):
        return lsh_attention(query, key if separate else None, value, config=config, is_causal=True)

    return lambda length: attend


def exact(length):
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, is_causal=True)


def reformer_pytorch(length):
    from reformer_pytorch.reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=C, n_hashes=R, causal=True, dropout=0.0)
    return lambda query, key, value: layer(query.flatten(0, 1), value.flatten(0, 1))[0]


def hugging_face(length):
    """Hugging Face's layer with its projections taken out: it gets projected vectors, as the others do."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        num_attention_heads=H, attention_head_size=D, hidden_size=H * D, num_hashes=R, lsh_attn_chunk_length=C,
        num_buckets=list(LSHConfig(chunk_length=C).factors(length)), is_decoder=True, lsh_attention_probs_dropout_prob=0.0,
        axial_pos_embds_dim=[H * D // 2, H * D // 2],
    )  # fmt: skip
    layer = LSHSelfAttention(config)
    given = []
    layer.query_key, layer.value = torch.nn.Identity(), torch.nn.Identity()
    # both projections get the same hidden states: hand the values over instead
    layer.value.register_forward_hook(lambda *_: given.pop())

    def attend(query, key, value):
        given.append(value.transpose(1, 2).flatten(2))
        return layer(query.transpose(1, 2).flatten(2)).hidden_states

    return attend


PROVIDERS = {
    "lsh_kernels": ours(LSHConfig()),
    "lsh_kernels dedupe=False": ours(LSHConfig(dedupe=False)),
    "lsh_kernels trax": ours(LSHConfig.trax()),
    "lsh_kernels separate keys": ours(LSHConfig(), separate=True),
    "SDPA": exact,
    "reformer-pytorch": reformer_pytorch,
    "Hugging Face": hugging_face,
}


def tensors(length):
    torch.manual_seed(0)
    return [torch.randn(B, H, length, D, requires_grad=True) for _ in range(3)]


def run(attend, inputs, mode):
    if mode == "forward":
        with torch.no_grad():
            attend(*inputs)
        return
    attend(*inputs).sum().backward()
    for x in inputs:
        x.grad = None


def matmul_gflops():
    """The rate of a large matmul on this machine: the best of a few."""
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times) / 1e9


def machine_name():
    facts = machine()
    return re.sub(r"\W+", "_", f"{facts['cpu']} {facts['cores']} cores {platform.machine()}").lower()


def lsh_flops(length, mode):
    """Multiply-adds count twice; R rounds, C queries against 2 C keys, two products forward and five backward."""
    return (2 if mode == "forward" else 7) * 2 * B * H * R * length * 2 * C * D


def peak_mib(provider, length, mode):
    """Extra peak of a process that runs one call, above that of a short call."""
    command = [sys.executable, __file__, "--peak", provider, str(length), mode]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(provider, length, mode):
    def peak():
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    run(PROVIDERS[provider](256), tensors(256), mode)
    attend, inputs = PROVIDERS[provider](length), tensors(length)
    before = peak()
    run(attend, inputs, mode)
    print(peak() - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a CSV file to append to (default: bench/results/<machine>.csv)")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return print_peak(options.peak[0], int(options.peak[1]), options.peak[2])
    facts = machine()
    out = options.out or Path(__file__).parent / "results" / f"{machine_name()}.csv"
    fresh = not out.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    cases = [(length, mode) for length in options.lengths for mode in MODES]
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        for length, mode in tqdm(cases, desc="cases"):
            attends, inputs = {p: PROVIDERS[p](length) for p in options.providers}, tensors(length)
            times = {p: [] for p in options.providers}
            for _ in range(options.rounds + 1):
                for provider, attend in attends.items():
                    start = time.perf_counter()
                    run(attend, inputs, mode)
                    times[provider].append(time.perf_counter() - start)
            rate = matmul_gflops()
            for provider, seconds in times.items():
                # the first round warms up
                seconds = sorted(seconds[1:])
                median = statistics.median(seconds)
                gflops = "" if provider == "SDPA" else lsh_flops(length, mode) / median / 1e9
                row = {
                    "op": "attention", "provider": provider, "mode": mode, "dtype": "float32",
                    "B": B, "H": H, "L": length, "D": D, "R": R, "C": C,
                    "ms_min": f"{seconds[0] * 1e3:.1f}", "ms_p50": f"{median * 1e3:.1f}", "ms_max": f"{seconds[-1] * 1e3:.1f}",
                    "peak_mib": f"{peak_mib(provider, length, mode):.0f}",
                    "gflops": gflops and f"{gflops:.1f}", "share_of_matmul": gflops and f"{gflops / rate:.3f}",
                    "matmul_gflops": f"{rate:.0f}", "cpu": facts["cpu"], "cores": facts["cores"], "torch": facts["torch"],
                    "triton": importlib.metadata.version("triton"), "commit": facts["commit"],
                }  # fmt: skip
                writer.writerow(row)
                tqdm.write(f"{provider:26} {mode:17} {length:6} {row['ms_p50']:>9} ms {row['peak_mib']:>6} MiB")
            file.flush()


if __name__ == "__main__":
    main()
