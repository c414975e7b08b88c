"""Joins the partial results of the hash rounds: softmax over the rounds' log-sum-exps; in backward their sum."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._options import target_options
from ._tile import (
    at_head,
    block_dim,
    ceil_div,
    common_align,
    dropout_args,
    dropout_keep,
    load_rows,
    store_rows,
    unmarked,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class SelfOnly(NamedTuple):
    """What a query that found no key in any round needs to attend itself; see `attention_fwd`."""

    query: torch.Tensor
    key: torch.Tensor | None  # None: shared QK
    value: torch.Tensor
    padding: torch.Tensor | None  # contiguous
    seed: torch.Tensor | None
    inverse_norm: torch.Tensor | None
    q_stretched: torch.Tensor  # such queries are marked in its last round
    scale: float
    dropout_p: float


class RoundGradients(NamedTuple):
    """What the gradients of a call need beside the rounds' sums; see `attention_bwd`."""

    dout: torch.Tensor
    dlse: torch.Tensor | None  # contiguous
    query: torch.Tensor
    key: torch.Tensor | None  # None: shared QK
    value: torch.Tensor
    padding: torch.Tensor | None  # contiguous
    seed: torch.Tensor | None
    inverse_norm: torch.Tensor | None
    q_stretched: torch.Tensor | None  # None: no query attends itself for lack of others
    scale: float
    dropout_p: float


class _Case(NamedTuple):
    """SelfOnly as constants of the kernel."""

    SHARED: bool
    HAS_PADDING: bool
    DROPOUT: bool
    R_HASHED: int
    D: int
    BLOCK_D: int


class _SelfGradients(NamedTuple):
    """RoundGradients as constants of the kernel, where queries may attend only themselves."""

    HAS_DLSE: bool
    DROPOUT: bool
    R_HASHED: int


@target_options
@triton.jit(do_not_specialize=["L", "keep_from"])
def _combine_rounds_fwd_kernel(
    out_ptr, lse_ptr,                # inputs   [B, H, R, L, DV], [B, H, R, L] contiguous
    q_ptr, k_ptr, v_ptr, inverse_norm_ptr, padding_ptr, seed_ptr,  # inputs of SelfOnly, which is None or a _Case
    stretched_ptr,                   # in and out [B, H, R_HASHED, L] contiguous
    combined_ptr, combined_lse_ptr,  # outputs  [B, H, L, DV], [B, H, L] contiguous
    q_strides, k_strides, v_strides, H, HKV, L, scale, keep_from, keep_scale,
    R: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SELF: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M positions of one head: reads their R partial rows and log-sum-exps, weighs the rows by
    softmax(lse) and writes one row and one lse per position. A round with lse = -inf is not read. With SELF a query
    without any round that is no padding attends itself and is marked."""
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
    out_ptrs = out_ptr + pid_bh * R * L * DV + offs_m[:, None] * DV + offs_d[None, :]
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
        out_ptrs += L.to(tl.int64) * DV

    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    offs_row = pid_bh * L + offs_m
    combined = acc / l_i[:, None]
    total = m_i + tl.log(l_i)
    if SELF is not None:
        alone_mask = row_mask & (m_i == float("-inf"))
        if SELF.HAS_PADDING:
            alone_mask &= tl.load(padding_ptr + b * L + offs_m, mask=row_mask, other=1) == 0
        hkv = h // (H // HKV)
        v = load_alone(v_ptr, v_strides, b, hkv, offs_m, alone_mask, DV, BLOCK_D, ALIGN)
        if SELF.DROPOUT:
            offs_i = offs_m.to(tl.int32)
            v *= tl.where(dropout_keep(seed_ptr, offs_i, offs_i, h, b, keep_from), keep_scale, 0.0)[:, None]
        # rows that found keys have v = 0 here
        combined += v
        q = load_alone(q_ptr, q_strides, b, h, offs_m, alone_mask, SELF.D, SELF.BLOCK_D, ALIGN)
        if SELF.SHARED:
            inverse_norm = tl.load(inverse_norm_ptr + offs_row, mask=alone_mask, other=0.0)
            own_logit = tl.sum(q * q, 1) * inverse_norm * scale - 1e5
        else:
            k = load_alone(k_ptr, k_strides, b, hkv, offs_m, alone_mask, SELF.D, SELF.BLOCK_D, ALIGN)
            own_logit = tl.sum(q * k, 1) * scale
        total = tl.where(alone_mask, own_logit, total)
        stretched_ptrs = stretched_ptr + (pid_bh * SELF.R_HASHED + SELF.R_HASHED - 1) * L + offs_m
        stretched = tl.load(stretched_ptrs, mask=alone_mask, other=0)
        tl.store(stretched_ptrs, ~unmarked(stretched), mask=alone_mask)
    combined_ptrs = combined_ptr + offs_row[:, None] * DV + offs_d[None, :]
    tl.store(combined_ptrs, combined.to(combined_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])
    tl.store(combined_lse_ptr + offs_row, total, mask=row_mask)


@triton.jit
def sum_rounds(ptr, rows, row_mask, n_rows, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr):
    """Sum over rounds of D columns of the rows of WIDTH, n_rows per round: fp32 [rows, BLOCK_D]. ptr: to the first round."""
    acc = tl.zeros([rows.shape[0], BLOCK_D], tl.float32)
    for _ in tl.static_range(R):
        acc += load_rows(ptr, rows, WIDTH, row_mask, D, BLOCK_D, 1).to(tl.float32)
        # n_rows * WIDTH could leave 32 bits
        rows += n_rows
    return acc


@triton.jit
def load_alone(ptr, strides, b, h, rows, alone_mask, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """fp32 rows of a user's tensor where a query attends only itself, else zeros."""
    return load_rows(at_head(ptr, strides, b, h, ALIGN), rows, strides[2], alone_mask, D, BLOCK_D, ALIGN).to(tl.float32)


@triton.jit
def own_dlogit(dlse_ptr, stretched_ptr, pid_bh, rows, row_mask, L, scale, SELF: tl.constexpr):
    """(mask of the queries that attend only themselves, gradient of their q.k: lse is scale * q.k and a constant)."""
    # rows >= L are masked where SELF, for then L = S
    stretched = tl.load(stretched_ptr + (pid_bh * SELF.R_HASHED + SELF.R_HASHED - 1) * L + rows, mask=row_mask, other=0)
    alone_mask = row_mask & (stretched < 0)
    dlogit = tl.zeros([rows.shape[0]], tl.float32)
    if SELF.HAS_DLSE:
        dlogit = tl.load(dlse_ptr + pid_bh * L + rows, mask=alone_mask, other=0.0) * scale
    return alone_mask, dlogit


@target_options
@triton.jit(do_not_specialize=["H", "HKV", "L", "S", "n_q_programs", "keep_from"])
def _combine_rounds_bwd_kernel(
    q_parts_ptr, k_parts_ptr,  # inputs   [B, H, R, L, D], [B, HKV, R, S, D + DV]; of shared QK both [B, H, R, L, D + DV]
    dout_ptr, dlse_ptr, q_ptr, k_ptr, inverse_norm_ptr, padding_ptr, seed_ptr, stretched_ptr,  # inputs of RoundGradients
    dq_ptr, dk_ptr, dv_ptr,    # outputs  [B, H, L, D], [B, HKV, S, D], [B, HKV, S, DV] contiguous
    dout_strides, q_strides, k_strides, H, HKV, L, S, n_q_programs, scale, keep_from, keep_scale,
    R: tl.constexpr, SHARED: tl.constexpr, SELF: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M positions of one head: of a query head (dq), of a key head (dk and dv; these programs come
    last) or, with shared QK, of both. It adds up what the rounds give its rows and, with SELF, what queries that attend only
    themselves give: dv += dout, and the gradient of lse. Padded keys get 0."""
    pid = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    if not SHARED and pid < n_q_programs:
        n_tiles = tl.cdiv(L, BLOCK_M)
        pid_bh = (pid // n_tiles).to(tl.int64)
        b, h = pid_bh // H, pid_bh % H
        rows = (pid % n_tiles) * BLOCK_M + offs_m
        row_mask = rows < L
        dq = sum_rounds(q_parts_ptr + pid_bh * R * L * D, rows, row_mask, L, D, D, BLOCK_D, R)
        if SELF is not None:
            if SELF.HAS_DLSE:
                alone_mask, dlogit = own_dlogit(dlse_ptr, stretched_ptr, pid_bh, rows, row_mask, L, scale, SELF)
                dq += dlogit[:, None] * load_alone(k_ptr, k_strides, b, h // (H // HKV), rows, alone_mask, D, BLOCK_D, ALIGN)
        store_rows(dq_ptr + pid_bh * L * D, rows, dq, row_mask, D)
    else:
        WIDTH: tl.constexpr = D + DV
        pid_k = pid if SHARED else pid - n_q_programs
        n_tiles = tl.cdiv(S, BLOCK_M)
        pid_kv = (pid_k // n_tiles).to(tl.int64)
        b = pid_kv // HKV
        rows = (pid_k % n_tiles) * BLOCK_M + offs_m
        row_mask = rows < S
        used_mask = row_mask
        if padding_ptr is not None:
            used_mask &= tl.load(padding_ptr + b * S + rows, mask=row_mask, other=1) == 0
        k_parts_ptr += pid_kv * R * S * WIDTH
        dk = sum_rounds(k_parts_ptr, rows, used_mask, S, WIDTH, D, BLOCK_D, R)
        dv = sum_rounds(k_parts_ptr + D, rows, used_mask, S, WIDTH, DV, BLOCK_DV, R)
        if SELF is not None:
            group = H // HKV
            for g in range(0, 1 if SHARED else group):
                h = (pid_kv % HKV) * group + g
                pid_bh = b * H + h
                alone_mask, dlogit = own_dlogit(dlse_ptr, stretched_ptr, pid_bh, rows, row_mask, L, scale, SELF)
                dout = load_alone(dout_ptr, dout_strides, b, h, rows, alone_mask, DV, BLOCK_DV, ALIGN)
                if SELF.DROPOUT:
                    offs_i = rows.to(tl.int32)
                    dout *= tl.where(dropout_keep(seed_ptr, offs_i, offs_i, h, b, keep_from), keep_scale, 0.0)[:, None]
                dv += dout
                if SELF.HAS_DLSE:
                    dunit = dlogit[:, None] * load_alone(q_ptr, q_strides, b, h, rows, alone_mask, D, BLOCK_D, ALIGN)
                    if SHARED:
                        # through the query, and through the norm of the key
                        inverse_norm = tl.load(inverse_norm_ptr + pid_bh * L + rows, mask=alone_mask, other=0.0)[:, None]
                        unit = inverse_norm * load_alone(q_ptr, q_strides, b, h, rows, alone_mask, D, BLOCK_D, ALIGN)
                        dk += dlogit[:, None] * unit + (dunit - unit * tl.sum(unit * dunit, 1)[:, None]) * inverse_norm
                    else:
                        dk += dunit
        store_rows(dk_ptr + pid_kv * S * D, rows, dk, row_mask, D)
        store_rows(dv_ptr + pid_kv * S * DV, rows, dv, row_mask, DV)


def combine_rounds(out, lse, self_only=None):
    """Softmax over rounds: `combined = sum_r exp(lse_r - lse) out_r`, `lse = logsumexp_r lse_r`.

    Args:
        out: [B, H, R, L, Dv], each round's attention output; fp16, bf16 or fp32; last dimension contiguous,
            copied if the others are not.
        lse: [B, H, R, L] float32, natural log; -inf where a round has nothing (its row of `out` is then not read).
        self_only: a `SelfOnly`, where a query without any round attends itself and is marked in `q_stretched`.

    Returns:
        combined [B, H, L, Dv] in the dtype of `out`, lse [B, H, L] float32; 0 and -inf where no round has anything.
    """
    _check(out, lse)
    B, H, R, L, Dv = out.shape
    out, lse = out.contiguous(), lse.contiguous()
    combined = torch.empty((B, H, L, Dv), dtype=out.dtype, device=out.device)
    combined_lse = torch.empty((B, H, L), dtype=torch.float32, device=out.device)
    own = self_only or SelfOnly(None, None, None, None, None, None, None, 1.0, 0.0)
    case, qkv, D = None, (out, out, out), own.query.shape[3] if self_only else Dv
    block_m, num_warps = _launch_config(D, Dv, out.dtype)
    if self_only:
        qk_block = block_dim(D, block_m, num_warps, out.element_size())
        case = _Case(own.key is None, own.padding is not None, own.dropout_p > 0, own.q_stretched.shape[2], D, qk_block)
        qkv = (own.query, own.query if own.key is None else own.key, own.value)
    block_d = block_dim(Dv, block_m, num_warps, out.element_size())
    _combine_rounds_fwd_kernel[(B * H * ceil_div(L, block_m),)](
        out, lse, *qkv, own.inverse_norm, own.padding, own.seed, own.q_stretched, combined, combined_lse,
        *(x.stride() for x in qkv), H, qkv[2].shape[1], L, own.scale, *dropout_args(own.dropout_p),
        R=R, DV=Dv, BLOCK_M=block_m, BLOCK_D=block_d, SELF=case, ALIGN=common_align(*qkv), num_warps=num_warps,
    )  # fmt: skip
    return combined, combined_lse


def combine_rounds_bwd(q_parts, k_parts, call):
    """Sums of what the rounds give, with the gradients of queries that attend only themselves.

    Args:
        q_parts: [B, H, R, L, D] contiguous, each round's gradient of queries.
        k_parts: [B, Hkv, R, S, D + Dv] contiguous, each round's gradients of keys and values. Shared QK: both are one
            tensor [B, H, R, L, D + Dv].
        call: a `RoundGradients`.

    Returns:
        dquery [B, H, L, D], dkey [B, Hkv, S, D] (None if shared), dvalue [B, Hkv, S, Dv] in the dtype of the inputs.
    """
    shared = call.key is None
    (B, H, L, D), (Hkv, S, Dv) = call.query.shape, call.value.shape[1:]
    new = {"dtype": call.query.dtype, "device": call.query.device}
    dquery, dvalue = torch.empty((B, H, L, D), **new), torch.empty((B, Hkv, S, Dv), **new)
    dkey = None if shared else torch.empty((B, Hkv, S, D), **new)
    keys = call.query if shared else call.key
    self_only = None
    if call.q_stretched is not None:
        self_only = _SelfGradients(call.dlse is not None, call.dropout_p > 0, call.q_stretched.shape[2])
    block_m, num_warps = _bwd_launch_config(D, Dv, q_parts.dtype)
    block_d, block_dv = (block_dim(d, block_m, num_warps, call.query.element_size()) for d in (D, Dv))
    n_q_programs = 0 if shared else B * H * ceil_div(L, block_m)
    _combine_rounds_bwd_kernel[(n_q_programs + B * Hkv * ceil_div(S, block_m),)](
        q_parts, k_parts, call.dout, call.dlse, call.query, keys, call.inverse_norm, call.padding, call.seed,
        call.q_stretched, dquery, dquery if shared else dkey, dvalue, call.dout.stride(), call.query.stride(),
        keys.stride(), H, Hkv, L, S, n_q_programs, call.scale, *dropout_args(call.dropout_p), R=q_parts.shape[2],
        SHARED=shared, SELF=self_only, D=D, BLOCK_D=block_d, DV=Dv, BLOCK_DV=block_dv, BLOCK_M=block_m,
        ALIGN=common_align(call.dout, call.query, keys), num_warps=num_warps,
    )  # fmt: skip
    return dquery, dkey, dvalue


def _launch_config(D, Dv, dtype):
    """(BLOCK_M, num_warps): a tile of 4 KiB gives each of 128 threads two 128-bit loads per round."""
    return 4096 // (block_dim(max(D, Dv)) * dtype.itemsize), 4


def _bwd_launch_config(D, Dv, dtype):
    """(BLOCK_M, num_warps) as forward has them; rows that come element by element take registers. dtype: of the partials."""
    aligned = D * dtype.itemsize % 16 == 0 == Dv * dtype.itemsize % 16
    return 4096 // (block_dim(max(D, Dv)) * dtype.itemsize), 4 if aligned else 8


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
