"""Which slots see which: one interval of key slots per query and of query slots per key, and the tables that they come from."""

import torch
import triton
import triton.language as tl

from ._options import target_options
from ._tile import FAR, bucket_of, ceil_div, load_hashed, unmarked


@triton.jit
def chunk_start(chunk, L, CHUNK: tl.constexpr):
    """First slot of a chunk >= 0 where rounds of L slots, the last chunk of each perhaps short, follow one another."""
    n_chunks = tl.cdiv(L, CHUNK)
    return chunk // n_chunks * L + chunk % n_chunks * CHUNK


@triton.jit
def span_interval(slots, end, first, last, r, L, S, BEFORE: tl.constexpr, AFTER: tl.constexpr, MODE: tl.constexpr):
    """[lo, hi) of key slots, before any clipping, of the queries in `slots` of round r. `end`: one past the last key of
    the bucket [first, last) that is not after the query."""
    if MODE.SPAN == "window":
        window = tl.minimum(MODE.WINDOW, S)
        lo, hi = end - 1 - window, end + window
    elif MODE.SPAN == "bucket":
        # bounds of all slots together are scalars
        lo, hi = tl.zeros_like(slots) + first, tl.zeros_like(slots) + last
    elif MODE.WRAP:
        n_all = MODE.R * tl.cdiv(L, MODE.CHUNK)
        chunk = r * tl.cdiv(L, MODE.CHUNK) + slots // MODE.CHUNK
        # one turn on, since // rounds negative numbers towards zero
        lo = chunk_start(chunk - BEFORE + n_all, L, MODE.CHUNK) - MODE.R * L
        hi = chunk_start(chunk + AFTER + 1, L, MODE.CHUNK)
        sees_all = BEFORE + 1 + AFTER >= n_all
        lo, hi = tl.where(sees_all, 0, lo), tl.where(sees_all, MODE.R * L, hi)
    else:
        chunk = slots // MODE.CHUNK
        lo, hi = (chunk - BEFORE) * MODE.CHUNK, (chunk + 1 + AFTER) * MODE.CHUNK
    return lo, hi


@triton.jit
def query_interval(
    slots, q_pos, r, row, q_stretched_ptr, limits_ptr, L, S, n_buckets, MODE: tl.constexpr,
):  # fmt: skip
    """[lo, hi) of key slots of the queries in `slots` of round r, with causality where slots tell it. row: (b, h, r).

    `limits`: of shared QK the bounds of the buckets, of separate keys the stretched intervals (see their kernels).
    """
    # in identity order and in a bucket positions ascend: "not after" is an end of the interval; strict, it drops self
    end = slots if MODE.SHARED else slots + 1
    if MODE.WITHIN_BUCKET:
        stretch = tl.minimum(MODE.WINDOW, S) + 1
        shift = unmarked(load_hashed(q_stretched_ptr + row * L + q_pos, slots, r, MODE)) - slots
        if MODE.SHARED:
            bucket = bucket_of(shift, stretch)
            limits_ptrs = limits_ptr + (row * (n_buckets + 1) + bucket) * 2
            first, last = load_hashed(limits_ptrs, slots, r, MODE), load_hashed(limits_ptrs + 1, slots, r, MODE)
            lo, hi = span_interval(slots, slots + 1, first, last, r, L, S, MODE.BEFORE, MODE.AFTER, MODE)
            lo, hi = tl.maximum(lo, first), tl.minimum(hi, last)
            if MODE.CAUSAL:
                hi = tl.minimum(hi, end)
            # the bucket of padding holds no target
            lo, hi = tl.where(bucket == n_buckets, first, lo), tl.where(bucket == n_buckets, first, hi)
        else:
            limits_ptrs = limits_ptr + (row * L + q_pos) * 2
            lo = load_hashed(limits_ptrs, slots, r, MODE) - shift
            hi = lo + load_hashed(limits_ptrs + 1, slots, r, MODE)
    else:
        lo, hi = span_interval(slots, slots + 1, 0, S, r, L, S, MODE.BEFORE, MODE.AFTER, MODE)
        if not MODE.WRAP:
            lo, hi = tl.maximum(lo, 0), tl.minimum(hi, S)
            if MODE.CAUSAL and not MODE.HASHED:
                hi = tl.minimum(hi, end)
    if MODE.LOCAL_WINDOW:
        is_local = r == MODE.R
        ahead = end if MODE.CAUSAL else slots + 1 + MODE.LOCAL_WINDOW
        lo = tl.where(is_local, tl.maximum(slots - MODE.LOCAL_WINDOW, 0), lo)
        hi = tl.where(is_local, tl.minimum(ahead, L), hi)
    return lo, tl.maximum(lo, hi)


@triton.jit
def key_interval(slots, k_pos, r, row, stretched_ptr, limits_ptr, L, S, n_buckets, MODE: tl.constexpr):
    """[lo, hi) of the query slots of round r that see the keys in `slots`: `query_interval` turned round, chunks before
    for chunks after. Not for hashed rounds of separate keys within buckets, where it depends on the data."""
    # the first query not before the key; strict, it drops self
    start = slots + 1 if MODE.SHARED else slots
    if MODE.SHARED and MODE.WITHIN_BUCKET:
        stretch = tl.minimum(MODE.WINDOW, S) + 1
        bucket = bucket_of(unmarked(load_hashed(stretched_ptr + row * L + k_pos, slots, r, MODE)) - slots, stretch)
        limits_ptrs = limits_ptr + (row * (n_buckets + 1) + bucket) * 2
        first, last = load_hashed(limits_ptrs, slots, r, MODE), load_hashed(limits_ptrs + 1, slots, r, MODE)
        lo, hi = span_interval(slots, slots + 1, first, last, r, L, S, MODE.AFTER, MODE.BEFORE, MODE)
        lo, hi = tl.maximum(lo, first), tl.minimum(hi, last)
        if MODE.CAUSAL:
            lo = tl.maximum(lo, start)
        lo, hi = tl.where(bucket == n_buckets, first, lo), tl.where(bucket == n_buckets, first, hi)
    else:
        lo, hi = span_interval(slots, slots + 1, 0, L, r, L, S, MODE.AFTER, MODE.BEFORE, MODE)
        if not MODE.WRAP:
            lo, hi = tl.maximum(lo, 0), tl.minimum(hi, L)
            if MODE.CAUSAL and not MODE.HASHED:
                lo = tl.maximum(lo, start)
    if MODE.LOCAL_WINDOW:
        is_local = r == MODE.R
        behind = start if MODE.CAUSAL else tl.maximum(slots - MODE.LOCAL_WINDOW, 0)
        lo = tl.where(is_local, behind, lo)
        hi = tl.where(is_local, tl.minimum(slots + 1 + MODE.LOCAL_WINDOW, L), hi)
    return lo, tl.maximum(lo, hi)


@triton.jit
def walk_range(lo, hi):
    """The slots that a tile of queries has to walk, (FAR, -FAR) if none."""
    first = tl.min(tl.where(lo < hi, lo, FAR), 0)
    last = tl.max(tl.where(lo < hi, hi, -FAR), 0)
    return first, last


@triton.jit
def count_queries(
    bucket, edge, order_ptr, stretched_ptr, limits_ptr, L, stretch, OF_STARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many query slots of a round lie in a bucket before `bucket`, or in it with an interval of keys that ends
    (OF_STARTS: starts) at the stretched slot `edge` or before. Searched BLOCK slots at a time. All pointers: to the round."""
    count = 0
    # 2^24 slots take three steps; behind branches and loops in a loop Triton no longer sees what loads are aligned to
    for i in tl.static_range(2, -1, -1):
        slots = count + tl.arange(0, BLOCK) * BLOCK**i
        slot_mask = slots < L
        pos = tl.load(order_ptr + slots, mask=slot_mask, other=0)
        q_bucket = bucket_of(unmarked(tl.load(stretched_ptr + pos, mask=slot_mask, other=0)) - slots, stretch)
        end = tl.load(limits_ptr + pos * 2, mask=slot_mask, other=0)
        if not OF_STARTS:
            end += tl.load(limits_ptr + pos * 2 + 1, mask=slot_mask, other=0)
        before_mask = slot_mask & ((q_bucket < bucket) | ((q_bucket == bucket) & (end <= edge)))
        n_before = tl.sum(before_mask.to(tl.int32), 0)
        # the last slot that lies before is known: the next, finer search starts with it
        count += n_before if i == 0 else tl.maximum(n_before - 1, 0) * BLOCK**i
    return count


@triton.jit
def search_queries(
    stretched, slots, r, row, order_ptr, stretched_ptr, limits_ptr, L, S, n_buckets, MODE: tl.constexpr
):  # fmt: skip
    """[lo, hi) of the query slots of a round that see any of the keys with these stretched slots. row: (b, h, r)."""
    stretch = tl.minimum(MODE.WINDOW, S) + 1
    bucket = bucket_of(stretched - slots, stretch)
    # the bucket of padding comes last and nobody sees it
    real_mask = bucket < n_buckets
    order_ptr += row * L
    stretched_ptr += row * L
    limits_ptr += row * L * 2
    # in the local round there is nothing to search
    n_slots = tl.where(r < MODE.R, L, 0)
    lowest, lowest_bucket = tl.min(tl.where(real_mask, stretched, 4 * FAR), 0), tl.min(tl.where(real_mask, bucket, FAR), 0)
    highest, highest_bucket = tl.max(tl.where(real_mask, stretched, -1), 0), tl.max(tl.where(real_mask, bucket, -1), 0)
    lo = count_queries(lowest_bucket, lowest, order_ptr, stretched_ptr, limits_ptr, n_slots, stretch, False, 256)
    hi = count_queries(highest_bucket, highest, order_ptr, stretched_ptr, limits_ptr, n_slots, stretch, True, 256)
    none = tl.zeros_like(slots)
    return none + lo, none + tl.maximum(lo, hi)


@target_options
@triton.jit(do_not_specialize=["L", "n_buckets", "gap"])
def _bucket_bounds_kernel(
    order_ptr, stretched_ptr,  # inputs   [B, H, R, L]
    bounds_ptr, coords_ptr,    # outputs  [B, H, R, n_buckets + 1, 2], [B, H, R, L]
    L, n_buckets, gap, MODE: tl.constexpr, HAS_COORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK slots of one round: writes first slot and one past the last of each bucket that begins or
    ends there (buckets without any key are not written), and to each position the coordinate that dedupe goes by."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(L, BLOCK)
    row = (pid // n_tiles).to(tl.int64)
    slots = (pid % n_tiles) * BLOCK + tl.arange(0, BLOCK)
    slot_mask = slots < L
    pos = tl.load(order_ptr + row * L + slots, mask=slot_mask, other=0)
    coords = slots // MODE.CHUNK if MODE.SPAN == "chunk" else tl.zeros_like(slots)
    if MODE.WITHIN_BUCKET:
        stretch = tl.minimum(MODE.WINDOW, L) + 1
        bucket = bucket_of(unmarked(tl.load(stretched_ptr + row * L + pos, mask=slot_mask, other=0)) - slots, stretch)
        prev_mask = slot_mask & (slots > 0)
        prev_pos = tl.load(order_ptr + row * L + slots - 1, mask=prev_mask, other=0)
        prev = unmarked(tl.load(stretched_ptr + row * L + prev_pos, mask=prev_mask, other=0))
        prev_bucket = tl.where(prev_mask, bucket_of(prev - slots + 1, stretch), -1)
        bounds_ptr += row * (n_buckets + 1) * 2
        border_mask = slot_mask & (bucket != prev_bucket)
        tl.store(bounds_ptr + bucket * 2, slots, mask=border_mask)
        tl.store(bounds_ptr + prev_bucket * 2 + 1, slots, mask=border_mask & prev_mask)
        tl.store(bounds_ptr + bucket * 2 + 1, slots + 1, mask=slots == L - 1)
        coords += bucket * gap
    if HAS_COORDS:
        tl.store(coords_ptr + row * L + pos, coords, mask=slot_mask)


@target_options
@triton.jit(do_not_specialize=["H", "HKV", "L", "S", "n_buckets"])
def _stretched_intervals_kernel(
    q_order_ptr, q_stretched_ptr,              # inputs   [B, H, R, L]
    k_order_ptr, k_stretched_ptr, bounds_ptr,  #          [B, HKV, R, S] twice, [B, HKV, R, n_buckets + 1, 2]
    limits_ptr,                                # output   [B, H, R, L, 2]
    H, HKV, L, S, n_buckets, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK query slots of one round and writes to their positions start and width of the interval of
    separate keys that they see, in stretched slots of keys."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(L, BLOCK)
    row = (pid // n_tiles).to(tl.int64)  # (b, h, r)
    r, h, b = row % MODE.R, row // MODE.R % H, row // MODE.R // H
    k_row = (b * HKV + h // (H // HKV)) * MODE.R + r
    k_order_ptr += k_row * S
    k_stretched_ptr += k_row * S
    slots = (pid % n_tiles) * BLOCK + tl.arange(0, BLOCK)
    slot_mask = slots < L
    pos = tl.load(q_order_ptr + row * L + slots, mask=slot_mask, other=0)
    if MODE.WITHIN_BUCKET:
        stretch = tl.minimum(MODE.WINDOW, S) + 1
        shift = unmarked(tl.load(q_stretched_ptr + row * L + pos, mask=slot_mask, other=0)) - slots
        bounds_ptrs = bounds_ptr + (k_row * (n_buckets + 1) + tl.where(slot_mask, bucket_of(shift, stretch), 0)) * 2
        first = tl.load(bounds_ptrs, mask=slot_mask, other=0)
        last = tl.load(bounds_ptrs + 1, mask=slot_mask, other=0)
        # key j of the bucket counts as not after i if j * L <= i * S; positions ascend in it
        limit = pos
        if L != S:
            # a division in 64 bits takes as long as the rest of the kernel
            limit = (pos.to(tl.int64) * S // L).to(tl.int32)
        end, above = first, last
        while tl.max(above - end, 0) > 0:
            middle = (end + above) // 2
            open_mask = end < above
            before = tl.load(k_order_ptr + middle, mask=open_mask, other=0) <= limit
            above = tl.where(open_mask & (~before), middle, above)
            end = tl.where(open_mask & before, middle + 1, end)
        lo, hi = span_interval(slots, end, first, last, r, L, S, MODE.BEFORE, MODE.AFTER, MODE)
        lo, hi = tl.maximum(lo, first), tl.minimum(hi, last)
        if MODE.CAUSAL:
            hi = tl.minimum(hi, end)
        width = tl.maximum(hi - lo, 0)
        lo += shift
    else:
        lo, hi = span_interval(slots, slots + 1, 0, S, r, L, S, MODE.BEFORE, MODE.AFTER, MODE)
        lo, hi = tl.maximum(lo, 0), tl.minimum(hi, S)
        # across buckets the stretched slots of both ends are needed
        ends_mask = slot_mask & (lo < hi)
        lo = tl.load(k_order_ptr + lo, mask=ends_mask, other=0)
        hi = tl.load(k_order_ptr + hi - 1, mask=ends_mask, other=0)
        lo = tl.load(k_stretched_ptr + lo, mask=ends_mask, other=0)
        width = tl.load(k_stretched_ptr + hi, mask=ends_mask, other=-1) + 1 - lo
    limits_ptrs = limits_ptr + (row * L + pos) * 2
    tl.store(limits_ptrs, lo, mask=slot_mask)
    tl.store(limits_ptrs + 1, width, mask=slot_mask)


def interval_tables(state, mode, n_buckets, L, S):
    """(coords, limits) that dedupe and `query_interval` read: bounds of buckets or intervals, see the two kernels."""
    if not mode.HASHED:
        return None, None
    q_order, device = state.q_order, state.q_order.device
    B, H, R, _ = q_order.shape
    if mode.SHARED:
        order, stretched, coords, bounds = q_order, state.q_stretched, state.q_stretched, None
        has_coords = mode.DEDUPE and mode.SPAN != "window"
        if has_coords:
            coords = torch.empty(stretched.shape, dtype=torch.int32, device=device)
        if mode.WITHIN_BUCKET:
            bounds = torch.empty((B, H, R, n_buckets + 1, 2), dtype=torch.int32, device=device)
    else:
        order, stretched, coords, has_coords = state.k_order, state.k_stretched, state.k_stretched, False
        bounds = None
        if mode.WITHIN_BUCKET:
            # queries may ask for a bucket without keys
            bounds = torch.zeros((*order.shape[:3], n_buckets + 1, 2), dtype=torch.int32, device=device)
    block, num_warps = _launch_config()
    if mode.WITHIN_BUCKET or has_coords:
        # so far apart that the reach of a query leads from no bucket to another
        gap = min(max(mode.BEFORE, mode.AFTER), ceil_div(S, mode.CHUNK)) + 1
        n_rows = order.shape[0] * order.shape[1] * R
        _bucket_bounds_kernel[(n_rows * ceil_div(S, block),)](
            order, stretched, bounds, coords, S, n_buckets, gap, MODE=mode, HAS_COORDS=has_coords, BLOCK=block,
            num_warps=num_warps,
        )  # fmt: skip
    if mode.SHARED or not (mode.WITHIN_BUCKET or mode.DEDUPE):
        return coords, bounds
    limits = torch.empty((B, H, R, L, 2), dtype=torch.int32, device=device)
    _stretched_intervals_kernel[(B * H * R * ceil_div(L, block),)](
        q_order, state.q_stretched, order, stretched, bounds, limits, H, order.shape[1], L, S, n_buckets,
        MODE=mode, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return coords, limits


def _launch_config():
    """(BLOCK, num_warps): with one warp no step of a search waits for other warps, and 8 slots per thread share what is worked
    out once per warp."""
    return 256, 1
