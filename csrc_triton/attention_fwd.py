"""Attention over sorted rounds: an interval of key slots per query, online softmax, rounds joined by combine_rounds."""

import functools
import math

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_hip

from ._options import target_options
from ._tile import (
    Tile,
    at_head,
    block_dim,
    ceil_div,
    common_align,
    divide,
    divisor,
    dropout_args,
    dropout_keep,
    inverse_norm_of,
    is_within,
    load_rows,
    log2_of,
    mode_of,
    online_softmax,
    position_mask,
    slot_positions,
    store_rows,
)
from .combine_rounds import SelfOnly, combine_rounds
from .dedupe import dedupe_reach, earlier_coords, earlier_intervals, is_first_of_many, is_first_round, negated_coords
from .intervals import interval_tables, query_interval, walk_range

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2))
# instead of a scale of 0: -inf times 0 would be NaN
_LEAST_SCALE = 1e-30


@target_options
@triton.jit(do_not_specialize=["H", "HKV", "L", "S", "n_buckets", "by_tiles", "by_heads", "keep_from"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,                      # inputs   [B, H, L, D], [B, HKV, S, D], [B, HKV, S, DV]
    inverse_norm_ptr, padding_ptr, seed_ptr,  #          [B, H, L] if shared, [B, S], [1]
    q_order_ptr, q_stretched_ptr,             #          [B, H, R, L]
    k_order_ptr, coords_ptr, limits_ptr,      #          [B, HKV, R, S] twice, and see query_interval
    out_ptr, lse_ptr,                         # outputs  [B, H, ROUNDS, L, DV], [B, H, ROUNDS, L]
    q_strides, k_strides, v_strides, H, HKV, L, S, n_buckets, by_tiles, by_heads,
    logit_scale, keep_from, keep_scale, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program owns TILE.M query slots of one round and walks the key slots that any of them sees, TILE.N at a time.
    Rows are gathered by the orders and results scattered to positions. Rows of `out` without any key are not written.
    logit_scale: log2(e) * |scale| > 0."""
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    BLOCK_DV: tl.constexpr = TILE.BLOCK_DV
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(L, BLOCK_M)
    pid_bhr = divide(pid, by_tiles)
    r = pid_bhr % MODE.ROUNDS
    b = divide(pid_bhr // MODE.ROUNDS, by_heads)
    h = pid_bhr // MODE.ROUNDS - b * H
    hkv = (h if MODE.SHARED else h // (H // HKV)).to(tl.int64)
    b, h = b.to(tl.int64), h.to(tl.int64)
    pid_bh, pid_kv = b * H + h, b * HKV + hkv
    tile_start = (pid - pid_bhr * n_tiles) * BLOCK_M
    offs_m, offs_n = tile_start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_mask = offs_m < L
    # what is beyond the last slot repeats it, unstored: so no load needs a mask
    slots = tl.minimum(offs_m, L - 1)
    row = pid_bh * MODE.R + r
    q_pos = slot_positions(slots, r, q_order_ptr + row * L, L, MODE)
    lo, hi = query_interval(slots, q_pos, r, row, q_stretched_ptr, limits_ptr, L, S, n_buckets, MODE)
    if MODE.SHARED:
        # intervals move forward with the slots: those of the tile's ends span the walk. In every other lane of one warp, the
        # two are found without the shared memory that all of the tile would take
        end_slots = tl.minimum(tile_start + tl.arange(0, 32) % 2 * (BLOCK_M - 1), L - 1)
        end_pos = slot_positions(end_slots, r, q_order_ptr + row * L, L, MODE)
        end_lo, end_hi = query_interval(end_slots, end_pos, r, row, q_stretched_ptr, limits_ptr, L, S, n_buckets, MODE)
        first, last = tl.min(end_lo, 0), tl.max(end_hi, 0)
    else:
        first, last = walk_range(lo, hi)
        if not MODE.WRAP:
            # on a fixed grid of keys a row does not depend on which others are in its tile, and these may be padding
            first = first // BLOCK_N * BLOCK_N

    # within hashed buckets no interval holds a padded key
    CHECK_PADDING: tl.constexpr = MODE.HAS_PADDING and (MODE.LOCAL_WINDOW > 0 or not MODE.WITHIN_BUCKET)
    q_mask = None
    if CHECK_PADDING and MODE.SHARED:
        q_mask = tl.load(padding_ptr + b * S + q_pos) == 0
    q_ptr = at_head(q_ptr, q_strides, b, h, TILE.ALIGN)
    q = load_rows(q_ptr, q_pos, q_strides[2], q_mask, TILE.D, BLOCK_D, TILE.ALIGN)  # [M, BLOCK_D]
    # what queries see in more rounds fills the registers: on CUDA they spill, on AMD a scheduler has room for one warp
    MANY_ROUNDS: tl.constexpr = MODE.DEDUPE and MODE.ROUNDS > (16 if MODE.SHARED and not is_hip() else 8)
    FEW_ROUNDS: tl.constexpr = MODE.DEDUPE and not MANY_ROUNDS
    seen, seen_widths = (), ()
    if FEW_ROUNDS:
        if MODE.SHARED:
            before, _ = dedupe_reach(S, MODE)
            seen = negated_coords(q_pos, r, before, pid_bh, coords_ptr, L, MODE)
        else:
            seen, seen_widths = earlier_intervals(q_pos, r, pid_bh, limits_ptr, L, MODE)

    if MODE.HASHED:
        # with wrap slots count through all rounds
        k_order_ptr += (pid_kv * MODE.R + (0 if MODE.WRAP else r)) * S
    k_ptr = at_head(k_ptr, k_strides, b, hkv, TILE.ALIGN)
    v_ptr = at_head(v_ptr, v_strides, b, hkv, TILE.ALIGN)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(first, last, BLOCK_N):
        k_pos = slot_positions(tl.minimum(start + offs_n, last - 1), r, k_order_ptr, L, MODE)
        k_mask = None
        if CHECK_PADDING:
            k_mask = tl.load(padding_ptr + b * S + k_pos) == 0
        k = load_rows(k_ptr, k_pos, k_strides[2], k_mask, TILE.D, BLOCK_D, TILE.ALIGN)  # [N, BLOCK_D]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MODE.SHARED:
            inverse_norm = tl.load(inverse_norm_ptr + pid_bh * L + k_pos)
            logits *= inverse_norm[None, :]
        if MODE.NEGATED:
            logits = -logits

        valid_mask = is_within(offs_n[None, :], (lo - start)[:, None], (hi - lo)[:, None])
        valid_mask = position_mask(valid_mask, k_pos[None, :], q_pos[:, None], MODE)
        if CHECK_PADDING:
            valid_mask &= k_mask[None, :]
        if MANY_ROUNDS:
            valid_mask = is_first_of_many(
                valid_mask, q_pos[:, None], k_pos[None, :], r, pid_bh, pid_kv, coords_ptr, limits_ptr, L, S, MODE
            )
        if FEW_ROUNDS:
            coords = earlier_coords(k_pos, pid_kv, coords_ptr, S, MODE)
            valid_mask &= is_first_round(seen, coords, seen_widths, S, MODE)
        logits = tl.where(valid_mask, logits, float("-inf"))
        probs, m_i, l_i, acc = online_softmax(logits, logit_scale, m_i, l_i, acc)
        if MODE.DROPOUT:
            keep_mask = dropout_keep(seed_ptr, k_pos[None, :], q_pos[:, None], h, b, keep_from)
            probs = tl.where(keep_mask, probs, 0.0)
        v = load_rows(v_ptr, k_pos, v_strides[2], k_mask, TILE.DV, BLOCK_DV, TILE.ALIGN)  # [N, BLOCK_DV]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")

    alive_mask = row_mask & (l_i != 0.0)
    l_finite = tl.where(alive_mask, l_i, 1.0)
    out = acc * ((keep_scale if MODE.DROPOUT else 1.0) / l_finite)[:, None]
    offs_out = (pid_bh * MODE.ROUNDS + r) * L + q_pos
    tl.store(lse_ptr + offs_out, m_i * (logit_scale * _LN_2) + log2_of(l_finite) * _LN_2, mask=row_mask)
    store_rows(out_ptr, offs_out, out, alive_mask, TILE.DV)


@target_options
@triton.jit(do_not_specialize=["H", "L", "eps"])
def _inverse_norm_kernel(
    x_ptr, padding_ptr,  # inputs  [B, H, L, D], [B, L]
    out_ptr,             # output  [B, H, L]
    x_strides, H, L, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M rows of one head and writes 1 / sqrt(sum(x^2) + eps), 0 for zero and for padded rows."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(L, BLOCK_M)
    pid_bh = (pid // n_tiles).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    offs_m = ((pid % n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_mask = offs_m < L
    used_mask = row_mask
    if padding_ptr is not None:
        used_mask &= tl.load(padding_ptr + b * L + offs_m, mask=row_mask, other=1) == 0
    x = load_rows(at_head(x_ptr, x_strides, b, h, ALIGN), offs_m, x_strides[2], used_mask, D, BLOCK_D, ALIGN).to(tl.float32)
    tl.store(out_ptr + pid_bh * L + offs_m, inverse_norm_of(x, eps), mask=row_mask)


def attention_fwd(query, key, value, key_padding_mask, seed, state, options, inverse_norm=None):
    """Interval attention over all rounds, combined.

    Args:
        query [B, H, L, D], key [B, Hkv, S, D] (None: shared QK), value [B, Hkv, S, Dv]: fp16, bf16 or fp32; any strides
            with a contiguous last dimension.
        key_padding_mask: [B, S] bool, True = ignore, or None. seed: int64 [1], for options.dropout_p > 0.
        state: the sorted orders, `q_order`, `q_stretched` [B, H, R, L] and for separate keys `k_order`, `k_stretched`
            [B, Hkv, R, S], int32 contiguous. Queries without any target but themselves are marked (~t) in the last
            round of `q_stretched`.
        options: an `AttentionOptions`.
        inverse_norm: [B, H, L] float32, 1 / norm of shared keys, 0 for zero and for padded rows; computed here if None.

    Returns:
        out [B, H, L, Dv] in query's dtype, lse [B, H, L] float32, natural log, before dropout.
    """
    out, lse, inverse_norm = attend_rounds(query, key, value, key_padding_mask, seed, state, options, inverse_norm)
    o = options
    if not (o.hashed and query.shape[2] == value.shape[2]):
        return combine_rounds(out, lse)
    padding = None if key_padding_mask is None else key_padding_mask.contiguous()
    inputs = query, key, value, padding, seed, inverse_norm
    return combine_rounds(out, lse, SelfOnly(*inputs, state.q_stretched, o.scale, o.dropout_p))


def attend_rounds(query, key, value, key_padding_mask, seed, state, options, inverse_norm=None):
    """`attention_fwd` before the rounds are combined: out [B, H, R, L, Dv], lse [B, H, R, L], and inverse_norm as given or
    computed (None for separate keys). Where a round has no target for a query lse is -inf and `out` is not written; a local
    round comes last."""
    check_inputs(query, key, value, key_padding_mask, seed, state, options, inverse_norm)
    o, shared = options, key is None
    B, H, L, D = query.shape
    Hkv, S, Dv = value.shape[1:]
    mode = mode_of(o, shared, state.q_order.shape[2], key_padding_mask is not None)
    n_buckets = math.prod(o.factors)
    padding = None if key_padding_mask is None else key_padding_mask.contiguous()
    if shared and inverse_norm is None:
        inverse_norm = inverse_norms(query, padding, o.norm_eps)
    coords, limits = interval_tables(state, mode, n_buckets, L, S)
    out = torch.empty((B, H, mode.ROUNDS, L, Dv), dtype=query.dtype, device=query.device)
    lse = torch.empty((B, H, mode.ROUNDS, L), dtype=torch.float32, device=query.device)
    tile, num_warps, num_stages = _launch_config(D, Dv, query.dtype, mode)
    keys = query if shared else key
    tile = tile._replace(ALIGN=common_align(query, keys, value))
    keep_from, keep_scale = dropout_args(o.dropout_p)
    n_tiles = ceil_div(L, tile.M)
    _attention_fwd_kernel[(B * H * mode.ROUNDS * n_tiles,)](
        query, keys, value, inverse_norm, padding, seed,
        state.q_order, state.q_stretched, state.q_order if shared else state.k_order, coords, limits,
        out, lse, query.stride(), keys.stride(), value.stride(), H, Hkv, L, S, n_buckets, divisor(n_tiles), divisor(H),
        max(abs(o.scale) * _LOG2_E, _LEAST_SCALE), keep_from, keep_scale, MODE=mode, TILE=tile,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse, inverse_norm


def inverse_norms(x, key_padding_mask, norm_eps=0.0):
    """1 / sqrt(sum(x^2) + D * norm_eps) of the rows of x [B, H, L, D], 0 for zero and padded rows: fp32 [B, H, L]."""
    B, H, L, D = x.shape
    out = torch.empty((B, H, L), dtype=torch.float32, device=x.device)
    block_m, block_d, num_warps = _norm_launch_config(D)
    _inverse_norm_kernel[(B * H * ceil_div(L, block_m),)](
        x, key_padding_mask, out, x.stride(), H, L, float(D * norm_eps), D=D, BLOCK_D=block_d, BLOCK_M=block_m,
        ALIGN=common_align(x), num_warps=num_warps,
    )  # fmt: skip
    return out


@functools.cache
def _launch_config(D, Dv, dtype, mode):
    """(tile, num_warps, num_stages), the same for all GPUs. Cost follows the tiles walked, not the window: small key tiles win.
    64 rows of 128 dims with dedupe issue a third less than 32 on sm_90, a quarter less on sm_100, 4 to 7% more on sm_80; at 64
    dims no other tile leads on all three (bench/results/sweep.csv)."""
    widest = block_dim(max(D, Dv))
    block_m, block_n, num_warps = 64, 32, 4
    if widest == 16:
        # rows so short need fewer threads to fetch them, and twice the programs fit
        block_m, block_n, num_warps = 32, 32, 2
    elif widest > 128:
        block_m, block_n = 32, 16
    elif dtype == torch.float32:
        # IEEE fp32 products go through the FMA units and hold their operands in registers, too many of 128 dims for two warps
        block_m, block_n, num_warps = (16, 16, 2) if widest <= 64 else (32, 16, 4)
    elif widest == 128 and (D * dtype.itemsize % 16 or Dv * dtype.itemsize % 16):
        # rows that come element by element take registers
        block_m, num_warps = 32, 8
    elif widest == 128 and (mode.DROPOUT or mode.LOCAL_WINDOW or (mode.DEDUPE and not (mode.WITHIN_BUCKET and mode.ROUNDS <= 5))):
        # with so much for a pair to depend on 64 rows leave room for two programs per SM, and on sm_80 some spill
        block_m = 32
    blocks = (block_dim(d, min(block_m, block_n), num_warps, dtype.itemsize) for d in (D, Dv))
    return Tile(D, Dv, *blocks, block_m, block_n), num_warps, 2


def _norm_launch_config(D):
    """(BLOCK_M, BLOCK_D, num_warps): DRAM bounds it at any tile with few registers per thread; this one has 32 elements."""
    block_d = block_dim(D)
    return 4096 // block_d, block_d, 4


def check_inputs(query, key, value, key_padding_mask, seed, state, options, inverse_norm):
    """What the kernels rely on, forward and backward."""
    keys = query if key is None else key
    B, H, L, D = query.shape
    if value.dim() != 4 or keys.shape[:3] != value.shape[:3] or keys.shape[0] != B or keys.shape[3] != D:
        got = [list(x.shape) for x in (query, keys, value)]
        raise ValueError(f"query, key, value: got {got}, wanted [B, H, L, D], [B, Hkv, S, D], [B, Hkv, S, Dv]")
    Hkv, S, Dv = value.shape[1:]
    if H % Hkv or not (1 <= D <= 256 and 1 <= Dv <= 256) or L < 1 or S < 1:
        raise ValueError(f"query, value: got {list(query.shape)}, {list(value.shape)}, wanted H % Hkv = 0, D <= 256")
    if L != S and (not options.hashed or options.is_causal or options.local_window or options.span == "chunk"):
        raise ValueError(f"key: got length {S} for query length {L}, wanted equal ones (local, causal or in chunks)")
    if query.dtype not in _DTYPES or keys.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(f"query, key, value: got {query.dtype}, {keys.dtype}, {value.dtype}, wanted one of {_DTYPES}")
    for name, x in (("query", query), ("key", keys), ("value", value)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"{name}: got strides {x.stride()}, wanted a contiguous last dimension")
    if key_padding_mask is not None and (key_padding_mask.shape != (B, S) or key_padding_mask.dtype != torch.bool):
        raise ValueError(f"key_padding_mask: got {list(key_padding_mask.shape)}, wanted bool [{B}, {S}]")
    if options.dropout_p > 0 and (seed is None or seed.dtype != torch.int64):
        raise ValueError("seed: wanted an int64 tensor where dropout_p > 0")
    if inverse_norm is not None and (inverse_norm.shape != (B, H, L) or not inverse_norm.is_contiguous()):
        raise ValueError(f"inverse_norm: got {list(inverse_norm.shape)}, wanted a contiguous [{B}, {H}, {L}]")
    if not options.hashed:
        return
    R = state.q_order.shape[2]
    rounds = [(state.q_order, (B, H, R, L)), (state.q_stretched, (B, H, R, L))]
    if key is not None:
        rounds += [(state.k_order, (B, Hkv, R, S)), (state.k_stretched, (B, Hkv, R, S))]
    for x, shape in rounds:
        if x.shape != shape or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(f"state: got {list(x.shape)} {x.dtype}, wanted contiguous int32 {list(shape)}")
