"""Joins the partial results of the hash rounds: softmax over the rounds' log-sum-exps."""

import torch
import triton
import triton.language as tl

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit(do_not_specialize=["L"])
def _combine_rounds_fwd_kernel(
    out_ptr, lse_ptr,                # inputs   [B, H, R, L, DV], [B, H, R, L] contiguous
    combined_ptr, combined_lse_ptr,  # outputs  [B, H, L, DV], [B, H, L] contiguous
    out_strides, H, L,
    R: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M positions of one head: reads their R partial rows and log-sum-exps, weighs the rows by
    softmax(lse) and writes one row and one lse per position. A round with lse = -inf is not read."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(L, BLOCK_M)
    pid_bh = (pid // n_tiles).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    offs_m = (pid % n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = offs_m.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    row_mask = offs_m < L
    col_mask = offs_d < DV

    lse_ptrs = lse_ptr + pid_bh * R * L + offs_m
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for _ in tl.static_range(R):
        m_i = tl.maximum(m_i, tl.load(lse_ptrs, mask=row_mask, other=float("-inf")))
        lse_ptrs += L
    m_finite = tl.where(m_i == float("-inf"), 0.0, m_i)

    # weights are divided by their own sum: exp(lse_r - lse) would lose digits where lse is large
    lse_ptrs = lse_ptr + pid_bh * R * L + offs_m
    out_ptrs = out_ptr + b * out_strides[0] + h * out_strides[1] + offs_m[:, None] * out_strides[3] + offs_d[None, :]
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for _ in tl.static_range(R):
        lse = tl.load(lse_ptrs, mask=row_mask, other=float("-inf"))
        alive_mask = lse != float("-inf")
        weight = tl.exp(lse - m_finite)
        out = tl.load(out_ptrs, mask=alive_mask[:, None] & col_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
        l_i += weight
        acc += weight[:, None] * out.to(tl.float32)
        # steps, since r * stride could leave 32 bits
        lse_ptrs += L
        out_ptrs += out_strides[2]

    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    offs_row = pid_bh * L + offs_m
    combined = (acc / l_i[:, None]).to(combined_ptr.dtype.element_ty)
    combined_ptrs = combined_ptr + offs_row[:, None] * DV + offs_d[None, :]
    tl.store(combined_ptrs, combined, mask=row_mask[:, None] & col_mask[None, :])
    tl.store(combined_lse_ptr + offs_row, m_i + tl.log(l_i), mask=row_mask)


def combine_rounds(out, lse):
    """Softmax over rounds: `combined = sum_r exp(lse_r - lse) out_r`, `lse = logsumexp_r lse_r`.

    Args:
        out: [B, H, R, L, Dv], each round's attention output; fp16, bf16 or fp32; last dimension contiguous.
        lse: [B, H, R, L] float32, natural log; -inf where a round has nothing (its row of `out` is then not read).

    Returns:
        combined [B, H, L, Dv] in the dtype of `out`, lse [B, H, L] float32; 0 and -inf where no round has anything.
    """
    _check(out, lse)
    B, H, R, L, Dv = out.shape
    # Triton would compile anew for each pattern of strides divisible by 16, and there are four as L varies
    lse = lse.contiguous()
    combined = torch.empty((B, H, L, Dv), dtype=out.dtype, device=out.device)
    combined_lse = torch.empty((B, H, L), dtype=torch.float32, device=out.device)
    block_m, block_d, num_warps = _launch_config(Dv, out.dtype)
    with torch.cuda.device_of(out):
        _combine_rounds_fwd_kernel[(B * H * triton.cdiv(L, block_m),)](
            out, lse, combined, combined_lse, out.stride(), H, L,
            R=R, DV=Dv, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return combined, combined_lse


def _launch_config(D, dtype):
    """(BLOCK_M, BLOCK_D, num_warps): a tile of 4 KiB gives each of 128 threads two 128-bit loads per round."""
    block_d = max(16, triton.next_power_of_2(D))
    return 4096 // (block_d * dtype.itemsize), block_d, 4


def _check(out, lse):
    if out.dim() != 5 or lse.shape != out.shape[:4]:
        raise ValueError(f"out, lse: got {list(out.shape)}, {list(lse.shape)}, wanted [B, H, R, L, Dv], [B, H, R, L]")
    if out.dtype not in _DTYPES or lse.dtype != torch.float32:
        raise TypeError(f"out, lse: got {out.dtype}, {lse.dtype}, wanted fp16, bf16 or fp32 and float32")
    if out.device != lse.device:
        raise ValueError(f"lse: got a tensor on {lse.device}, wanted {out.device} like out")
    if out.shape[2] < 1 or not 1 <= out.shape[4] <= 256:
        raise ValueError(f"out: got {list(out.shape)}, wanted [B, H, R, L, Dv] with R >= 1 and 1 <= Dv <= 256")
    if out.stride(4) != 1 and out.shape[4] > 1:
        raise ValueError(f"out: got strides {out.stride()}, wanted a contiguous last dimension")
