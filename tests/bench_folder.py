"""The modules of bench/, its command at tiny sizes, and rows to report."""

import csv
import importlib.util
from pathlib import Path

import peers
import torch
from cases import FIELDS, Settings

BENCH = Path(__file__).parent.parent / "bench"
spec = importlib.util.spec_from_file_location("bench_main", BENCH / "__main__.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

SETTINGS = Settings(torch.device("cpu"), torch.float32, (32, 64), heads=2, head_dim=16, n_hashes=2, chunk_length=16)
TINY = "--seconds 0.1 --lengths 32 64 --heads 2 --head-dim 16 --n-hashes 2 --chunk-length 16 --device cpu --dtype float32".split()


def run(out, *options):
    status = bench.main([*TINY, "--out", str(out), *options])
    with out.open(newline="") as file:
        return status, list(csv.DictReader(file))


def rows_csv(path, rows):
    with bench.open_rows(path) as file:
        csv.DictWriter(file, FIELDS, restval="").writerows(rows)


def sample_rows(**fields):
    """Two lengths of ours and of SDPA, crossing at 2,048, the same for one token, a failure, memory, a stage, reversible and
    feed-forward layers."""
    common = dict.fromkeys(FIELDS, "") | {
        "suite": "attention", "op": "attention", "mode": "forward", "device": "cpu", "cpu": "Some CPU", "cores": "2",
        "regime": "batch", "input": "gaussian", "depth": "1", "status": "ok", "torch": "2", "triton": "3", "commit": "abc",
    } | fields  # fmt: skip
    rows = [
        {**common, "provider": provider, "L": length, "ms_p50": ms}
        for provider, times in (("lsh_kernels torch", (2, 8)), ("SDPA math", (1, 16)))
        for length, ms in zip((1024, 4096), times)
    ]
    rows += [row | {"suite": "decode", "op": "decode"} for row in rows]
    for row in rows[4:6]:
        row["provider"] = "lsh_kernels BucketCache"
    return rows + [
        {**common, "provider": "SDPA cuDNN", "L": 1024, "status": "absent", "reason": "not a backend of the CPU"},
        {**common, "provider": "SDPA math", "L": 1024, "suite": "memory", "peak_mib": 77.5},
        {**common, "provider": "torch.sort int16", "op": "sort", "suite": "stages", "L": 1024, "ms_p50": 3, "roofline": 0.25},
        *(
            {**common, "op": suite, "suite": suite, "mode": "forward+backward", "L": 1024, "C": 32, "embed_dim": 64} | row
            for suite, row in (
                ("reversible", {"provider": "lsh_kernels exact", "measure": "memory", "depth": 2, "peak_mib": 10}),
                ("reversible", {"provider": "lsh_kernels exact", "measure": "memory", "depth": 24, "peak_mib": 12}),
                ("reversible", {"provider": "lsh_kernels exact", "measure": "time", "depth": 24, "ms_p50": 13}),
                ("reversible", {"provider": "lsh_kernels exact", "measure": "drift", "depth": 24, "drift": 0}),
                ("reversible", {"provider": "not reversible", "measure": "time", "depth": 24, "ms_p50": 10}),
                ("feedforward", {"provider": "plain MLP", "measure": "memory", "peak_mib": 100}),
                ("feedforward", {"provider": "lsh_kernels", "measure": "memory", "peak_mib": 5}),
                ("feedforward", {"provider": "plain MLP", "measure": "time", "ms_p50": 2}),
                ("feedforward", {"provider": "lsh_kernels", "measure": "time", "ms_p50": 3}),
            )
        ),
    ]


def interrupt():
    raise KeyboardInterrupt


def shape_of(length, **changes):
    """A tiny call of a peer on the CPU."""
    shape = peers.Shape(1, 2, length, 16, 2, 16, torch.float32, torch.device("cpu"), False)
    return shape._replace(**changes)
