"""The yardstick of the audit: dense attention without any mask, its tile loops forward and backward, as plain as they go.

    python bench/dense.py

compiles them by the audit at the tiles of our kernels, and prints how many instructions ours issue for each of theirs. A key
walked counts, whether a query sees it or not: at a window of 64 and 64 x 32 tiles 65 of 128.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from lsh_kernels import LSHConfig, audit, audit_cases, machine_code, offline

FIELDS = "triton target dtype D kernel tile warps trips slots_per_pair dense_registers dense_slots_per_pair ratio".split()
_LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["L"])
def _dense_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # inputs   [B * H, L, D] contiguous
    out_ptr, lse_ptr,     # outputs  [B * H, L, D], [B * H, L]
    L, logit_scale, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries of one head and walks all keys, BLOCK_N at a time. L is a multiple of both.
    logit_scale: log2(e) * scale."""
    pid = tl.program_id(0)
    n_tiles = L // BLOCK_M
    head = (pid // n_tiles).to(tl.int64) * L
    rows = head + (pid % n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + offs_d[None, :])  # [BLOCK_M, D]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, L, BLOCK_N):
        offs = (head + start + tl.arange(0, BLOCK_N))[:, None] * D + offs_d[None, :]
        logits = tl.dot(q, tl.trans(tl.load(k_ptr + offs)), input_precision="ieee") * logit_scale
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        probs = tl.exp2(logits - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(probs, 1)
        v = tl.load(v_ptr + offs)
        acc = tl.dot(probs.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    tl.store(lse_ptr + rows, m_i + tl.log2(l_i))
    tl.store(out_ptr + rows[:, None] * D + offs_d[None, :], (acc / l_i[:, None]).to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["L"])
def _dense_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr,  # inputs   [B * H, L, D] contiguous
    lse_ptr, delta_ptr,             #          [B * H, L]; lse in base 2
    dq_ptr, dk_ptr, dv_ptr,         # outputs  [B * H, L, D]
    L, logit_scale, scale, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M rows of one head: as keys it walks all queries for dk and dv, then as queries all keys for
    dq, BLOCK_N at a time. L is a multiple of both. logit_scale: log2(e) * scale."""
    pid = tl.program_id(0)
    n_tiles = L // BLOCK_M
    head = (pid // n_tiles).to(tl.int64) * L
    rows = head + (pid % n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    offs_own = rows[:, None] * D + offs_d[None, :]
    k = tl.load(k_ptr + offs_own)  # [BLOCK_M, D]
    v = tl.load(v_ptr + offs_own)
    dk = tl.zeros([BLOCK_M, D], tl.float32)
    dv = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, L, BLOCK_N):
        other = head + start + tl.arange(0, BLOCK_N)
        offs = other[:, None] * D + offs_d[None, :]
        q = tl.load(q_ptr + offs)  # [BLOCK_N, D]
        dout = tl.load(dout_ptr + offs)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * logit_scale
        probs = tl.exp2(logits - tl.load(lse_ptr + other)[None, :])  # [BLOCK_M, BLOCK_N]
        dv = tl.dot(probs.to(q.dtype), dout, dv, input_precision="ieee")
        dprobs = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dlogits = probs * (dprobs - tl.load(delta_ptr + other)[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")
    tl.store(dk_ptr + offs_own, (dk * scale).to(dk_ptr.dtype.element_ty))
    tl.store(dv_ptr + offs_own, dv.to(dv_ptr.dtype.element_ty))

    q = tl.load(q_ptr + offs_own)  # [BLOCK_M, D]
    dout = tl.load(dout_ptr + offs_own)
    lse = tl.load(lse_ptr + rows)
    delta = tl.load(delta_ptr + rows)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, L, BLOCK_N):
        offs = (head + start + tl.arange(0, BLOCK_N))[:, None] * D + offs_d[None, :]
        walked = tl.load(k_ptr + offs)  # [BLOCK_N, D]
        logits = tl.dot(q, tl.trans(walked), input_precision="ieee") * logit_scale
        probs = tl.exp2(logits - lse[:, None])  # [BLOCK_M, BLOCK_N]
        dprobs = tl.dot(dout, tl.trans(tl.load(v_ptr + offs)), input_precision="ieee")
        dq = tl.dot((probs * (dprobs - delta[:, None])).to(walked.dtype), walked, dq, input_precision="ieee")
    tl.store(dq_ptr + offs_own, (dq * scale).to(dq_ptr.dtype.element_ty))


def dense_fwd(q, k, v, scale, block_m, block_n, **options):
    """Softmax attention of q, k, v [B, H, L, D] contiguous, L a multiple of both blocks: (out, lse in base 2). options: of
    the compiler, as num_warps."""
    L, D = q.shape[2:]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _dense_fwd_kernel[(q.shape[0] * q.shape[1] * (L // block_m),)](
        q, k, v, out, lse, L, scale * _LOG2_E, D=D, BLOCK_M=block_m, BLOCK_N=block_n, **options
    )
    return out, lse


def dense_bwd(q, k, v, out, lse, dout, scale, block_m, block_n, **options):
    """Gradients (dq, dk, dv) of `dense_fwd`."""
    L, D = q.shape[2:]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = (out.float() * dout.float()).sum(-1)
    _dense_bwd_kernel[(q.shape[0] * q.shape[1] * (L // block_m),)](
        q, k, v, dout, lse, delta, dq, dk, dv, L, scale * _LOG2_E, scale, D=D, BLOCK_M=block_m, BLOCK_N=block_n, **options
    )
    return dq, dk, dv


_COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg", "matrix_instr_nonkdim")
# our kernel: its dense twin
_TWINS = {"_attention_fwd_kernel": "_dense_fwd_kernel", "_attention_bwd_kernel": "_dense_bwd_kernel"}


def compare(target, case):
    """Rows of `FIELDS`: our attention kernels beside the dense ones, at the same tile, warps, stages and walk."""
    with offline.compile_only(target) as launches:
        audit_cases.launch(case)
    for ours in launches:
        if ours.name not in _TWINS or ours.error:
            continue
        tile, code = ours.arguments["TILE"], machine_code.inspect(ours.kernel)
        trips = audit_cases.work_of(ours).trips
        x = torch.empty(1, 1, 4 * tile.M * tile.N, case.head_dim, dtype=audit_cases.DTYPES[case.dtype], device="meta")
        compiler_options = ours.kernel.metadata._asdict()
        tiling = {"block_m": tile.M, "block_n": tile.N} | {
            name: compiler_options[name] for name in _COMPILER_OPTIONS if name in compiler_options
        }
        with offline.compile_only(target) as launches:
            if ours.name == "_attention_fwd_kernel":
                dense_fwd(x, x, x, 1.0, **tiling)
            else:
                dense_bwd(x, x, x, x, x[..., 0].float(), x, 1.0, **tiling)
        dense = machine_code.inspect(next(d for d in launches if d.name == _TWINS[ours.name]).kernel)
        lanes = ours.kernel.metadata.target.warp_size / (tile.M * tile.N * trips[0])
        slots, dense_slots = (each.total("issue", trips) * lanes for each in (code, dense))
        yield {
            "triton": triton.__version__, "target": target, "dtype": case.dtype, "D": case.head_dim,
            "kernel": ours.name + (" dedupe" if ours.arguments["MODE"].DEDUPE else ""), "tile": f"{tile.M}x{tile.N}",
            "warps": code.warps, "trips": trips[0], "slots_per_pair": f"{slots:.1f}", "dense_registers": dense.registers,
            "dense_slots_per_pair": f"{dense_slots:.1f}", "ratio": f"{slots / dense_slots:.2f}",
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(audit.TARGETS), choices=audit.TARGETS, metavar="TARGET")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dense.csv")
    options = parser.parse_args()
    rows = []
    for target in options.targets:
        for head_dim in options.dims:
            for dedupe in (False, True):
                for row in compare(target, audit_cases.Case(LSHConfig(dedupe=dedupe), head_dim=head_dim)):
                    rows.append(row)
                    print(" ".join(f"{row[field]!s:>8}" for field in FIELDS[1:]))
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
