"""Gradients of attention over sorted rounds, without atomics: probabilities are recomputed from the total lse.

With P_ij = exp(s_ij - lse_i) over the union of all rounds, dS = P * (dP - delta), delta_i = do_i.o_i - dlse_i, and
dq_i = scale * sum_j dS_ij k_j, dk_j = scale * sum_i dS_ij q_i, dv_j = sum_i P_ij do_i. The queries that see a key slot are
an interval of slots as well, so that a program owns a tile of rows as keys and as queries and writes each of its sums once.

Source: Dao 2022 (arXiv 2205.14135), the backward from lse; Kitaev et al. 2020 (arXiv 2001.04451), the rounds.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ._options import target_options
from ._tile import (
    FAR,
    Tile,
    at_head,
    block_dim,
    ceil_div,
    common_align,
    divide,
    divisor,
    dropout_args,
    dropout_keep,
    is_within,
    load_hashed,
    load_rows,
    mode_of,
    position_mask,
    slot_positions,
)
from .attention_bwd_prepare import prepare_bwd
from .attention_fwd import check_inputs
from .combine_rounds import RoundGradients, combine_rounds_bwd
from .dedupe import dedupe_reach, earlier_coords, earlier_intervals, is_first_of_many, is_first_round, negated_coords
from .intervals import interval_tables, key_interval, query_interval, search_queries, walk_range

_LOG2_E = math.log2(math.e)


@triton.jit
def recompute_probs(logits, valid_mask, lse):
    """P from logits and the total lse in base 2; never above 1, however coarse the grid of huge logits is."""
    return tl.where(valid_mask, tl.exp2(tl.minimum(logits - lse, 0.0)), 0.0)


@triton.jit
def store_gradients(ptrs, gradients, mask, first_round, IN_PLACE: tl.constexpr):
    """Store partial gradients, in place on top of what the rounds before have left."""
    if IN_PLACE:
        if first_round > 0:
            gradients += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, gradients.to(ptrs.dtype.element_ty), mask=mask)


_RUN_TIME = "H HKV L S n_buckets first_round n_rounds by_tiles by_rounds by_heads keep_from".split()


@target_options
@triton.jit(do_not_specialize=_RUN_TIME)
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr,            # inputs   [B, H, L, D], [B, HKV, S, D], [B, HKV, S, DV], [B, H, L, DV]
    stats_ptr, inverse_norm_ptr,              #          [B, H, L, 2], [B, H, L] if shared
    padding_ptr, seed_ptr,                    #          [B, S], [1]
    q_order_ptr, q_stretched_ptr,             #          [B, H, R, L]
    k_order_ptr, coords_ptr, limits_ptr,      #          [B, HKV, R, S] twice, and see query_interval
    gradients_ptr,                            # output   [B, H or HKV, n_rounds, L or S, columns of PART]
    q_strides, k_strides, v_strides, dout_strides, H, HKV, L, S, n_buckets, first_round, n_rounds,
    by_tiles, by_rounds, by_heads, scale, logit_scale, keep_from, keep_scale,
    MODE: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """One program owns TILE.M slots of one of the rounds first_round + (0 .. n_rounds - 1), gathers their rows and
    scatters their gradients to positions. As keys ("keys") they walk the query slots that see them, head after head of the
    group, for dk and dv; as queries ("queries") the key slots that they see, for dq. Shared rows ("both") do one after the
    other, and the gradient through the norm of the key starts the sum of dq. Columns: dk dv, dq, or dqk dv."""
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    BLOCK_DV: tl.constexpr = TILE.BLOCK_DV
    N_COLUMNS: tl.constexpr = TILE.D if PART == "queries" else TILE.D + TILE.DV
    # the queries that see a key depend on the data
    SEARCHED: tl.constexpr = MODE.HASHED and MODE.WITHIN_BUCKET and not MODE.SHARED
    # within hashed buckets no interval holds a padded key
    CHECK_PADDING: tl.constexpr = MODE.HAS_PADDING and (MODE.LOCAL_WINDOW > 0 or not MODE.WITHIN_BUCKET)
    # what rows see in so many rounds does not fit into registers
    MANY_ROUNDS: tl.constexpr = MODE.DEDUPE and MODE.ROUNDS > 8
    FEW_ROUNDS: tl.constexpr = MODE.DEDUPE and not MANY_ROUNDS
    pid = tl.program_id(0)
    n_own, n_heads = (S, HKV) if PART == "keys" else (L, H)
    n_tiles = tl.cdiv(n_own, BLOCK_M)
    pid_row = divide(pid, by_tiles)
    pid_own = divide(pid_row, by_rounds)
    r = first_round + pid_row - pid_own * n_rounds
    b = divide(pid_own, by_heads)
    h_own = pid_own - b * n_heads
    group = 1 if MODE.SHARED else H // HKV
    h_kv = h_own if PART == "keys" or MODE.SHARED else h_own // group
    tile = pid - pid_row * n_tiles
    b, h_own, h_kv, pid_own = b.to(tl.int64), h_own.to(tl.int64), h_kv.to(tl.int64), pid_own.to(tl.int64)
    pid_kv = b * HKV + h_kv
    offs_n, offs_d, offs_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    col_mask, v_col_mask = offs_d < TILE.D, offs_dv < TILE.DV

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < n_own
    # what is beyond the last slot repeats it, unstored: so no load needs a mask
    slots = tl.minimum(offs_m, n_own - 1)
    row = pid_own * MODE.R + r
    own_order_ptr = k_order_ptr if PART == "keys" else q_order_ptr
    pos = slot_positions(slots, r, own_order_ptr + row * n_own, L, MODE)
    gradients_ptr += (pid_own * n_rounds + r - first_round) * n_own * N_COLUMNS
    used_mask = None
    if CHECK_PADDING and (MODE.SHARED or PART == "keys"):
        used_mask = tl.load(padding_ptr + b * S + pos) == 0
    order_round = 0 if MODE.WRAP else r
    k_ptr = at_head(k_ptr, k_strides, b, h_kv, TILE.ALIGN)
    v_ptr = at_head(v_ptr, v_strides, b, h_kv, TILE.ALIGN)

    if PART != "queries":
        own_k = load_rows(k_ptr, pos, k_strides[2], used_mask, TILE.D, BLOCK_D, TILE.ALIGN)  # [M, BLOCK_D]
        own_v = load_rows(v_ptr, pos, v_strides[2], used_mask, TILE.DV, BLOCK_DV, TILE.ALIGN)  # [M, BLOCK_DV]
        key_scale = tl.zeros([BLOCK_M], tl.float32) + logit_scale
        if MODE.SHARED:
            own_inverse_norm = tl.load(inverse_norm_ptr + pid_own * L + pos)
            key_scale *= own_inverse_norm
        if FEW_ROUNDS:
            if MODE.SHARED:
                before, width = dedupe_reach(S, MODE)
                own = negated_coords(pos, r, width - 1 - before, pid_kv, coords_ptr, S, MODE)
            else:
                own = earlier_coords(pos, pid_kv, coords_ptr, S, MODE)
        lo, hi = key_interval(slots, pos, r, row, q_stretched_ptr, limits_ptr, L, S, n_buckets, MODE)
        if used_mask is not None:
            hi = tl.where(used_mask, hi, lo)
        if SEARCHED:
            stretched = load_hashed(coords_ptr + row * S + pos, slots, r, MODE)
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for g in range(0, 1 if MODE.SHARED else group):
            h = h_own if MODE.SHARED else h_kv * group + g
            pid_bh = b * H + h
            row_bh = pid_bh * MODE.R + r
            walk_lo, walk_hi = lo, hi
            if SEARCHED:
                walk_lo, walk_hi = search_queries(
                    stretched, slots, r, row_bh, q_order_ptr, q_stretched_ptr, limits_ptr, L, S, n_buckets, MODE
                )
                if MODE.LOCAL_WINDOW:
                    walk_lo, walk_hi = tl.where(r < MODE.R, walk_lo, lo), tl.where(r < MODE.R, walk_hi, hi)
            first, last = walk_range(walk_lo, walk_hi)
            order_ptr = q_order_ptr + (pid_bh * MODE.R + order_round) * L
            for start in range(first, last, BLOCK_N):
                q_slots = tl.minimum(start + offs_n, last - 1)
                q_pos = slot_positions(q_slots, r, order_ptr, L, MODE)
                q_mask = None
                if CHECK_PADDING and MODE.SHARED:
                    # a padded query is a row of zeros
                    q_mask = tl.load(padding_ptr + b * S + q_pos) == 0
                q_rows_ptr = at_head(q_ptr, q_strides, b, h, TILE.ALIGN)
                q = load_rows(q_rows_ptr, q_pos, q_strides[2], q_mask, TILE.D, BLOCK_D, TILE.ALIGN)  # [N, BLOCK_D]
                dout_rows_ptr = at_head(dout_ptr, dout_strides, b, h, TILE.ALIGN)
                dout = load_rows(dout_rows_ptr, q_pos, dout_strides[2], None, TILE.DV, BLOCK_DV, TILE.ALIGN)  # [N, BLOCK_DV]
                stats_ptrs = stats_ptr + (pid_bh * L + q_pos) * 2
                lse, delta = tl.load(stats_ptrs), tl.load(stats_ptrs + 1)

                valid_mask = is_within(offs_n[None, :], (walk_lo - start)[:, None], (walk_hi - walk_lo)[:, None])  # [M, N]
                if SEARCHED:
                    limits_ptrs = limits_ptr + (row_bh * L + q_pos) * 2
                    seen_from = load_hashed(limits_ptrs, q_slots, r, MODE)
                    seen_width = load_hashed(limits_ptrs + 1, q_slots, r, MODE)
                    # the local round is left to its slots
                    seen_width = tl.where(r < MODE.R, seen_width, FAR)
                    valid_mask &= is_within(stretched[:, None], seen_from[None, :], seen_width[None, :])
                valid_mask = position_mask(valid_mask, pos[:, None], q_pos[None, :], MODE)
                if MANY_ROUNDS:
                    valid_mask = is_first_of_many(
                        valid_mask, q_pos[None, :], pos[:, None], r, pid_bh, pid_kv, coords_ptr, limits_ptr, L, S, MODE
                    )
                if FEW_ROUNDS:
                    if MODE.SHARED:
                        walked, widths = earlier_coords(q_pos, pid_bh, coords_ptr, L, MODE), ()
                    else:
                        walked, widths = earlier_intervals(q_pos, r, pid_bh, limits_ptr, L, MODE)
                    valid_mask &= is_first_round(own, walked, widths, S, MODE, OWN_WIDTHS=False)
                logits = tl.dot(own_k, tl.trans(q), input_precision="ieee") * key_scale[:, None]
                probs = recompute_probs(logits, valid_mask, lse[None, :])  # [M, N]
                dprobs = tl.dot(own_v, tl.trans(dout), input_precision="ieee")
                kept = probs
                if MODE.DROPOUT:
                    keep_mask = dropout_keep(seed_ptr, pos[:, None], q_pos[None, :], h, b, keep_from)
                    kept = tl.where(keep_mask, probs, 0.0)
                    dprobs = tl.where(keep_mask, dprobs * keep_scale, 0.0)
                dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision="ieee")
                dlogits = probs * (dprobs - delta[None, :])
                dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")
        if MODE.DROPOUT:
            dv *= keep_scale
        dv_ptrs = gradients_ptr + pos.to(tl.int64)[:, None] * N_COLUMNS + TILE.D + offs_dv[None, :]
        store_gradients(dv_ptrs, dv, row_mask[:, None] & v_col_mask[None, :], first_round, IN_PLACE)
        if MODE.SHARED:
            # k = q / |q|: the gradient through k loses its part along k
            unit = own_k.to(tl.float32) * own_inverse_norm[:, None]
            dq = (dk - unit * tl.sum(unit * dk, 1)[:, None]) * own_inverse_norm[:, None]
        else:
            dk_ptrs = gradients_ptr + pos.to(tl.int64)[:, None] * N_COLUMNS + offs_d[None, :]
            store_gradients(dk_ptrs, dk * scale, row_mask[:, None] & col_mask[None, :], first_round, IN_PLACE)
    else:
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if PART != "keys":
        lo, hi = query_interval(slots, pos, r, row, q_stretched_ptr, limits_ptr, L, S, n_buckets, MODE)
        first, last = walk_range(lo, hi)
        own_q_ptr = at_head(q_ptr, q_strides, b, h_own, TILE.ALIGN)
        own_q = load_rows(own_q_ptr, pos, q_strides[2], used_mask, TILE.D, BLOCK_D, TILE.ALIGN)
        dout_ptr = at_head(dout_ptr, dout_strides, b, h_own, TILE.ALIGN)
        own_dout = load_rows(dout_ptr, pos, dout_strides[2], None, TILE.DV, BLOCK_DV, TILE.ALIGN)  # [M, BLOCK_DV]
        stats_ptrs = stats_ptr + (pid_own * L + pos) * 2
        own_lse, own_delta = tl.load(stats_ptrs), tl.load(stats_ptrs + 1)
        seen, seen_widths = (), ()
        if FEW_ROUNDS:
            if MODE.SHARED:
                before, _ = dedupe_reach(S, MODE)
                seen = negated_coords(pos, r, before, pid_own, coords_ptr, L, MODE)
            else:
                seen, seen_widths = earlier_intervals(pos, r, pid_own, limits_ptr, L, MODE)
        order_ptr = k_order_ptr + (pid_kv * MODE.R + order_round) * S
        for start in range(first, last, BLOCK_N):
            k_pos = slot_positions(tl.minimum(start + offs_n, last - 1), r, order_ptr, L, MODE)
            k_mask = None
            if CHECK_PADDING:
                k_mask = tl.load(padding_ptr + b * S + k_pos) == 0
            k = load_rows(k_ptr, k_pos, k_strides[2], k_mask, TILE.D, BLOCK_D, TILE.ALIGN)  # [N, BLOCK_D]
            v = load_rows(v_ptr, k_pos, v_strides[2], k_mask, TILE.DV, BLOCK_DV, TILE.ALIGN)  # [N, BLOCK_DV]
            valid_mask = is_within(offs_n[None, :], (lo - start)[:, None], (hi - lo)[:, None])  # [M, N]
            valid_mask = position_mask(valid_mask, k_pos[None, :], pos[:, None], MODE)
            if CHECK_PADDING:
                valid_mask &= k_mask[None, :]
            if MANY_ROUNDS:
                valid_mask = is_first_of_many(
                    valid_mask, pos[:, None], k_pos[None, :], r, pid_own, pid_kv, coords_ptr, limits_ptr, L, S, MODE
                )
            if FEW_ROUNDS:
                coords = earlier_coords(k_pos, pid_kv, coords_ptr, S, MODE)
                valid_mask &= is_first_round(seen, coords, seen_widths, S, MODE)
            logits = tl.dot(own_q, tl.trans(k), input_precision="ieee")
            if MODE.SHARED:
                inverse_norm = tl.load(inverse_norm_ptr + pid_own * L + k_pos)
                logits *= (inverse_norm * logit_scale)[None, :]
            else:
                logits *= logit_scale
            probs = recompute_probs(logits, valid_mask, own_lse[:, None])  # [M, N]
            dprobs = tl.dot(own_dout, tl.trans(v), input_precision="ieee")
            if MODE.DROPOUT:
                keep_mask = dropout_keep(seed_ptr, k_pos[None, :], pos[:, None], h_own, b, keep_from)
                dprobs = tl.where(keep_mask, dprobs * keep_scale, 0.0)
            dlogits = probs * (dprobs - own_delta[:, None])
            if MODE.SHARED:
                dlogits *= inverse_norm[None, :]
            dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision="ieee")
        dq_ptrs = gradients_ptr + pos.to(tl.int64)[:, None] * N_COLUMNS + offs_d[None, :]
        store_gradients(dq_ptrs, dq * scale, row_mask[:, None] & col_mask[None, :], first_round, IN_PLACE)


def attention_bwd(dout, dlse, query, key, value, key_padding_mask, seed, out, lse, state, options, in_place=None):
    """Gradients of `attention_fwd`, from its inputs and outputs and the sorted state that it leaves.

    Each round gives each row its share. Either all rounds run in one launch, and a last kernel adds up the shares, held in
    the dtype of the inputs (*partials*), or they run one after the other and add theirs *in place* to float32 sums. Per
    position and head, with w = D + Dv columns and e bytes per element (beside outputs, and inputs and tables, which one
    launch reads once, R launches R times):

    | | memory | DRAM traffic | launches | w = 128, R = 4: 16 bits | fp32 |
    |---|---|---|---|---|---|
    | partials | R e w | 2 R e w: written, read | 1 | 1,024 B held, 2,048 B moved | 2,048 B, 4,096 B |
    | in place | 4 w | 8 R w: written R times, read R - 1 times and at the end | R | 512 B held, 4,096 B moved | 512 B, 4,096 B |

    R counts a local round, too; separate keys have D columns for queries and D + Dv for keys. Partials need few launches
    and in 16 bits move fewer bytes; in place needs R e / 4 times less memory. So up to 8 hash rounds, where the paper finds
    exact attention nearly matched, partials are the choice: with 8, of 65,536 positions, 8 heads, D = Dv = 64, they hold 1 GiB
    in 16 bits and 2 GiB in fp32, where forward holds half of that. Beyond 8 in place is, which holds 256 MiB of any number.

    Args:
        dout: [B, H, L, Dv], gradient of out, in query's dtype, any strides with a contiguous last dimension.
        dlse: [B, H, L] float32, gradient of lse, or None. It is ignored where lse is -inf.
        query, key, value, key_padding_mask, seed, options: as in `attention_fwd`.
        out, lse: what that returned. state: with its marks of queries that attend only themselves.
        in_place: whether rounds are accumulated in place; None: as above.

    Returns:
        dquery, dkey (None if shared), dvalue: contiguous, in the shapes and the dtype of the inputs.
    """
    check_inputs(query, key, value, key_padding_mask, seed, state, options, None)
    _check_gradients(dout, dlse, query, value, out, lse)
    o, shared = options, key is None
    B, H, L, D = query.shape
    Hkv, S, Dv = value.shape[1:]
    mode = mode_of(o, shared, state.q_order.shape[2], key_padding_mask is not None)
    if in_place is None:
        in_place = mode.R > 8
    n_buckets, device = math.prod(o.factors), query.device
    padding = None if key_padding_mask is None else key_padding_mask.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    coords, limits = interval_tables(state, mode, n_buckets, L, S)
    stats, inverse_norm = prepare_bwd(out.contiguous(), dout, lse.contiguous(), dlse, query, padding, o.norm_eps, shared)

    n_parts = 1 if in_place else mode.ROUNDS
    partials = torch.float32 if in_place else query.dtype
    new = {"dtype": partials, "device": device}
    if shared:
        parts = {"both": (H, L, torch.empty((B, H, n_parts, L, D + Dv), **new))}
    else:
        parts = {
            "keys": (Hkv, S, torch.empty((B, Hkv, n_parts, S, D + Dv), **new)),
            "queries": (H, L, torch.empty((B, H, n_parts, L, D), **new)),
        }
    keys = query if shared else key
    k_order = state.q_order if state.k_order is None else state.k_order
    keep = dropout_args(o.dropout_p)
    align = common_align(query, keys, value, dout)
    for first_round in range(mode.ROUNDS) if in_place else (0,):
        for part, (n_heads, length, gradients) in parts.items():
            tile, num_warps, num_stages = _launch_config(D, Dv, query.dtype, mode, part, in_place)
            n_tiles = ceil_div(length, tile.M)
            _attention_bwd_kernel[(B * n_heads * n_parts * n_tiles,)](
                query, keys, value, dout, stats, inverse_norm, padding, seed,
                state.q_order, state.q_stretched, k_order, coords, limits, gradients,
                query.stride(), keys.stride(), value.stride(), dout.stride(), H, Hkv, L, S, n_buckets, first_round, n_parts,
                divisor(n_tiles), divisor(n_parts), divisor(n_heads), o.scale, o.scale * _LOG2_E, *keep, MODE=mode,
                TILE=tile._replace(ALIGN=align), PART=part, IN_PLACE=in_place, num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
    gradients = [part[2] for part in parts.values()]
    inputs = dout, dlse, query, key, value, padding, seed, inverse_norm
    stretched = state.q_stretched if o.hashed and L == S else None
    return combine_rounds_bwd(gradients[-1], gradients[0], RoundGradients(*inputs, stretched, o.scale, o.dropout_p))


@functools.cache
def _launch_config(D, Dv, dtype, mode, part, in_place):
    """(tile, num_warps, num_stages): of those that spill nothing up to 128 dims, in any call like it, one with the fewest
    instructions per pair, or nearly. Two accumulators and the operands of four products live at once, and for dedupe what rows
    see in other rounds, so that tiles are smaller than forward's. `audit --sweep` ranks higher what keeps 12 warps on an SM and
    issues a quarter more: how many it takes to hide latency is its guess, and is to be measured first.
    32x32 with four warps at 128 dims leads by both counts, but not for shared keys with dedupe (bench/results/sweep.csv)."""
    widest = block_dim(max(D, Dv))
    light = mode.ROUNDS <= 5 and not (mode.DROPOUT or mode.LOCAL_WINDOW or in_place)
    plain = mode.SHARED and light
    # two warps repeat less of the rows than four do
    block_m, block_n, num_warps = 16, 16, 2
    if widest == 16:
        # rows so short need few threads to fetch them, or many rows
        if light and dtype != torch.float32:
            block_m, block_n = 32, 32
        else:
            num_warps = 1
    elif dtype == torch.float32:
        # products on FMA units take whole rows into registers
        num_warps = (2 if plain else 4) * (2 if widest > 64 else 1)
    elif widest > 128:
        num_warps = 4
    elif D * dtype.itemsize % 16 or Dv * dtype.itemsize % 16:
        # rows that come element by element take registers
        num_warps = 8 if widest > 64 and mode.DROPOUT and mode.LOCAL_WINDOW else 4
    elif widest > 64:
        # where two warps spill: with float32 sums to add to, intervals of many rounds, or all that a pair can depend on
        if mode.SHARED and (in_place or mode.ROUNDS > 5 and (mode.DEDUPE or mode.DROPOUT and mode.LOCAL_WINDOW)):
            block_n, num_warps = 32 if min(D, Dv) > 64 else 16, 4
        elif part == "keys" and mode.DEDUPE and mode.ROUNDS > 5 and (mode.DROPOUT or mode.LOCAL_WINDOW):
            num_warps = 4
        elif min(D, Dv) > 64 and (
            light and not mode.DEDUPE or not (mode.SHARED or in_place or mode.DROPOUT and mode.LOCAL_WINDOW)
        ):
            block_m, block_n, num_warps = 32, 32, 4
    elif in_place or (mode.DEDUPE and mode.ROUNDS > 8):
        if not mode.DEDUPE:
            block_n, num_warps = 32, 4
        elif mode.SHARED and mode.ROUNDS > 8 and mode.DROPOUT and mode.LOCAL_WINDOW:
            num_warps = 4
    elif mode.SHARED and mode.SPAN == "chunk" and mode.CHUNK >= 64 and mode.ROUNDS <= 5 and (light or mode.LOCAL_WINDOW):
        # rows of a chunk see the same keys, so that twice as many walk hardly further
        block_m, block_n, num_warps = 64, 32 if light else 16, 4
    elif not mode.DEDUPE:
        block_m, block_n = 32, 32 if light else 16
    elif mode.DROPOUT + (mode.LOCAL_WINDOW > 0) + (mode.ROUNDS > 5) < 2:
        # with more for a pair to depend on they spill
        block_m = 32
    blocks = (block_dim(d, min(block_m, block_n), num_warps, dtype.itemsize) for d in (D, Dv))
    # beside products on FMA units, tiles fetched ahead find no registers
    return Tile(D, Dv, *blocks, block_m, block_n), num_warps, 1 if dtype == torch.float32 else 2


def _check_gradients(dout, dlse, query, value, out, lse):
    shape = (*query.shape[:3], value.shape[3])
    for name, x in (("dout", dout), ("out", out)):
        if x.shape != shape or x.dtype != query.dtype:
            raise ValueError(f"{name}: got {list(x.shape)} {x.dtype}, wanted {list(shape)} {query.dtype}")
    if dout.stride(3) != 1 and dout.shape[3] > 1:
        raise ValueError(f"dout: got strides {dout.stride()}, wanted a contiguous last dimension")
    for name, x in (("dlse", dlse), ("lse", lse)):
        if x is not None and (x.shape != shape[:3] or x.dtype != torch.float32):
            raise ValueError(f"{name}: got {list(x.shape)} {x.dtype}, wanted {list(shape[:3])} torch.float32")
