"""What backward needs of each position, once for all rounds: lse in base 2, delta and the norm of its key.

Source: Dao 2022 (arXiv 2205.14135), delta_i = do_i.o_i; here less dlse_i, the gradient of lse.
"""

import math

import torch
import triton
import triton.language as tl

from ._options import target_options
from ._tile import at_head, block_dim, ceil_div, common_align, inverse_norm_of, load_rows

LOG2_E = tl.constexpr(math.log2(math.e))


@target_options
@triton.jit(do_not_specialize=["H", "L", "eps"])
def _attention_bwd_prepare_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr,  # inputs   [B, H, L, DV] twice, [B, H, L] twice; dlse may be None
    q_ptr, padding_ptr,                    #          [B, H, L, D] (None: separate keys), [B, L] or None
    stats_ptr, inverse_norm_ptr,           # outputs  [B, H, L, 2], [B, H, L] if shared
    dout_strides, q_strides, H, L, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M positions of one head. It writes lse in base 2 (inf where there is no target: then P = 0)
    and delta side by side, since they are gathered together, and the inverse norm of shared keys, 0 for zero and for
    padded rows."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(L, BLOCK_M)
    pid_bh = (pid // n_tiles).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    offs_m = ((pid % n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_mask = offs_m < L
    offs_row = pid_bh * L + offs_m

    out = load_rows(out_ptr + pid_bh * L * DV, offs_m, DV, row_mask, DV, BLOCK_DV, 1).to(tl.float32)
    dout_ptr = at_head(dout_ptr, dout_strides, b, h, ALIGN)
    dout = load_rows(dout_ptr, offs_m, dout_strides[2], row_mask, DV, BLOCK_DV, ALIGN).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    lse = tl.load(lse_ptr + offs_row, mask=row_mask, other=0.0)
    no_target_mask = lse == float("-inf")
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offs_row, mask=row_mask & ~no_target_mask, other=0.0)
    tl.store(stats_ptr + offs_row * 2, tl.where(no_target_mask, float("inf"), lse * LOG2_E), mask=row_mask)
    tl.store(stats_ptr + offs_row * 2 + 1, delta, mask=row_mask)

    if q_ptr is not None:
        used_mask = row_mask
        if padding_ptr is not None:
            used_mask &= tl.load(padding_ptr + b * L + offs_m, mask=row_mask, other=1) == 0
        q_ptr = at_head(q_ptr, q_strides, b, h, ALIGN)
        q = load_rows(q_ptr, offs_m, q_strides[2], used_mask, D, BLOCK_D, ALIGN).to(tl.float32)
        tl.store(inverse_norm_ptr + offs_row, inverse_norm_of(q, eps), mask=row_mask)


def prepare_bwd(out, dout, lse, dlse, query, padding, norm_eps, shared):
    """What the backward kernel gathers beside rows, float32: stats [B, H, L, 2], lse in base 2 and delta, and inverse_norm
    [B, H, L] (None for separate keys). Arguments as in `attention_bwd`, contiguous but for dout and query."""
    B, H, L, Dv = out.shape
    D = query.shape[3]
    stats = torch.empty((B, H, L, 2), dtype=torch.float32, device=out.device)
    inverse_norm = torch.empty((B, H, L), dtype=torch.float32, device=out.device) if shared else None
    block_m, num_warps = _launch_config(D, Dv)
    block_d, block_dv = (block_dim(d, block_m, num_warps, query.element_size()) for d in (D, Dv))
    _attention_bwd_prepare_kernel[(B * H * ceil_div(L, block_m),)](
        out, dout, lse, dlse, query if shared else None, padding, stats, inverse_norm, dout.stride(), query.stride(), H, L,
        float(D * norm_eps), D=D, BLOCK_D=block_d, DV=Dv, BLOCK_DV=block_dv, BLOCK_M=block_m,
        ALIGN=common_align(dout, query), num_warps=num_warps,
    )  # fmt: skip
    return stats, inverse_norm


def _launch_config(D, Dv):
    """(BLOCK_M, num_warps): DRAM bounds it at any tile with few registers per thread; this one has 32 elements of each row."""
    return 4096 // block_dim(max(D, Dv)), 4
