"""What several kernels share: the record of options that they are compiled for, and helpers on tiles."""

from typing import NamedTuple

import triton
import triton.language as tl

# no length, and so no slot, reaches this (2^24 is the longest); sums and differences of a few stay within int32
_FAR = 2**28
FAR = tl.constexpr(_FAR)


class Tile(NamedTuple):
    """Head dims and what they are padded to, queries and keys of a tile."""

    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    M: int
    N: int


class Mode(NamedTuple):
    """The options of a call as constants of its kernels; nothing here follows from a length."""

    SHARED: bool
    HASHED: bool  # False: one round in identity order
    SPAN: str
    WINDOW: int
    CHUNK: int
    BEFORE: int
    AFTER: int
    WITHIN_BUCKET: bool
    DEDUPE: bool
    WRAP: bool
    LOCAL_WINDOW: int
    CAUSAL: bool
    DROPOUT: bool
    HAS_PADDING: bool
    NEGATED: bool  # scale < 0
    R: int  # hash rounds
    ROUNDS: int  # all rounds: the local one comes last


def mode_of(options, shared, n_hashes, has_padding):
    """`Mode` of an `AttentionOptions`."""
    o = options
    chunk = min(o.chunk_length, _FAR)
    # a reach beyond all slots is as good as any larger one
    reach = _FAR if o.wrap else -(-_FAR // chunk)
    before, after = (o.chunks_before, o.chunks_after) if o.span == "chunk" else (0, 0)
    n_hashes = n_hashes if o.hashed else 1
    rounds = n_hashes + (o.local_window > 0)
    return Mode(
        SHARED=shared, HASHED=o.hashed, SPAN=o.span, WINDOW=min(o.window, _FAR), CHUNK=chunk,
        BEFORE=min(before, reach), AFTER=min(after, reach), WITHIN_BUCKET=o.hashed and o.within_bucket,
        DEDUPE=o.dedupe and rounds > 1, WRAP=o.wrap, LOCAL_WINDOW=min(o.local_window, _FAR), CAUSAL=o.is_causal,
        DROPOUT=o.dropout_p > 0, HAS_PADDING=has_padding, NEGATED=o.scale < 0, R=n_hashes, ROUNDS=rounds,
    )  # fmt: skip


def ceil_div(a, b):
    """triton.cdiv for the host, where that takes 5 us."""
    return -(-a // b)


def next_power_of_2(n):
    """triton.next_power_of_2 for the host."""
    return 1 << (n - 1).bit_length()


def divisor(d):
    """(multiplier, shift) that `divide` divides by d with, 1 <= d < 2^31; the multiplier as the int32 of its bits.

    Source: Granlund and Montgomery 1994, "Division by invariant integers using multiplication".
    """
    shift = (d - 1).bit_length()
    return -(-(2 ** (31 + shift)) // d) - 2**32, shift


def dropout_args(dropout_p):
    """(keep_from, keep_scale): the least Philox word that keeps a pair, as the int32 of its bits, and 1 / (1 - p)."""
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return threshold - 2**32 * (threshold >= 2**31), 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p)


@triton.jit
def dropout_keep(seed_ptr, k_pos, q_pos, h, b, keep_from):
    """Which pairs (query, key) dropout keeps: a function of their positions alone, whatever the round or slot."""
    seed = tl.load(seed_ptr)
    word, _, _, _ = tl.philox(seed, k_pos, q_pos, h.to(tl.int32), b.to(tl.int32), n_rounds=7)
    return word >= keep_from.to(tl.uint32)


@triton.jit
def unmarked(stretched):
    """Stretched slots without the mark (~t) of a query that has no target but itself."""
    return stretched ^ (stretched >> 31)


@triton.jit
def divide(n, by):
    """n // d for 0 <= n < 2^31 and by = divisor(d), in three instructions for twenty-five."""
    return (tl.umulhi(n.to(tl.uint32) * 2, by[0].to(tl.uint32)) >> by[1]).to(tl.int32)


@triton.jit
def bucket_of(shift, stretch):
    """shift / stretch, a bucket id < 2^23 times the stretch. Exact: in float32 the quotient is off by far less than a half,
    and the conversion takes a tenth of the instructions of an integer division."""
    return (shift.to(tl.float32) * (1.0 / stretch) + 0.5).to(tl.int32)


@triton.jit
def is_within(x, lo, width):
    """lo <= x < lo + width by one unsigned compare."""
    return (x - lo).to(tl.uint32) < width.to(tl.uint32)


@triton.jit
def load_hashed(ptrs, slots, r, MODE: tl.constexpr):
    """Values of a hashed round, and 0 in the local one: that comes last, is in no order, and nothing is read there."""
    if MODE.LOCAL_WINDOW:
        values = tl.load(ptrs, mask=slots < tl.where(r < MODE.R, FAR, -FAR), other=0)
    else:
        values = tl.load(ptrs)
    return values


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
def slot_positions(slots, r, order_ptr, L, MODE: tl.constexpr):
    """Positions of slots, all of them real ones, of round r. order_ptr: to the order of the round, with wrap to that of the
    first, for there slots count through all rounds."""
    pos = slots
    if MODE.WRAP:
        # intervals reach at most one turn beyond both ends of the cycle
        pos = tl.where(pos < 0, pos + MODE.R * L, pos)
        pos = tl.where(pos >= MODE.R * L, pos - MODE.R * L, pos)
        if MODE.LOCAL_WINDOW:
            pos = tl.where(slots * 0 + r < MODE.R, pos, slots)
    if MODE.HASHED:
        order = load_hashed(order_ptr + pos, slots, r, MODE)
        pos = order
        if MODE.LOCAL_WINDOW:
            pos = tl.where(slots < tl.where(r < MODE.R, FAR, -FAR), order, slots)
    return pos


@triton.jit
def position_mask(valid_mask, k_pos, q_pos, MODE: tl.constexpr):
    """The pairs of valid_mask that causality and the mask of self leave, where slots don't tell; k_pos, q_pos broadcast."""
    if MODE.CAUSAL and (MODE.WRAP or (MODE.HASHED and not MODE.WITHIN_BUCKET)):
        ahead = k_pos - q_pos
        valid_mask &= (ahead < 0) if MODE.SHARED else (ahead <= 0)
    elif MODE.SHARED and not MODE.CAUSAL:
        valid_mask &= k_pos != q_pos
    return valid_mask


@triton.jit
def dedupe_reach(S, MODE: tl.constexpr):
    """(before, width): in a round of shared QK i sees j if coord_i - before <= coord_j < coord_i - before + width."""
    if MODE.SPAN == "window":
        before = tl.minimum(MODE.WINDOW, S)
        width = before + 1 if MODE.CAUSAL else 2 * before + 1
    else:
        before = tl.minimum(MODE.BEFORE, tl.cdiv(S, MODE.CHUNK))
        width = before + tl.minimum(MODE.AFTER, tl.cdiv(S, MODE.CHUNK)) + 1
    return before, width


@triton.jit
def earlier_intervals(q_pos, r, pid_bh, limits_ptr, L, MODE: tl.constexpr):
    """What queries of separate keys see in the rounds before r, in coordinates of keys: negated starts, and widths
    (tuples). Rounds that are not before r get an interval that holds nothing."""
    negated_los, widths = (), ()
    for e in tl.static_range(MODE.ROUNDS - 1):
        limits_ptrs = limits_ptr + ((pid_bh * MODE.R + e) * L + q_pos) * 2
        negated_los += (-tl.load(limits_ptrs),)
        widths += (tl.where(r > e, tl.load(limits_ptrs + 1), 0),)
    return negated_los, widths


@triton.jit
def earlier_coords(pos, pid_bh, coords_ptr, L, MODE: tl.constexpr):
    """Coordinates of rows in all rounds that may come before another (a tuple)."""
    coords = ()
    for e in tl.static_range(MODE.ROUNDS - 1):
        coord = tl.load(coords_ptr + (pid_bh * MODE.R + e) * L + pos)
        # marks are in the last hash round alone
        coords += (unmarked(coord) if e == MODE.R - 1 else coord,)
    return coords


@triton.jit
def negated_coords(pos, r, reach, pid_bh, coords_ptr, L, MODE: tl.constexpr):
    """`reach` less the coordinates of rows of shared QK in the rounds before r (a tuple); for other rounds so little that
    no coordinate, added to it, makes 0."""
    coords, negated = earlier_coords(pos, pid_bh, coords_ptr, L, MODE), ()
    for e in tl.static_range(MODE.ROUNDS - 1):
        # coordinates stay below 2^30
        negated += (tl.where(r > e, reach - coords[e], -1073741824),)
    return negated


@triton.jit
def is_first_round(own, walked, widths, S, MODE: tl.constexpr, OWN_WIDTHS: tl.constexpr = True):
    """Mask [own rows, walked rows] of the pairs that no round before has: coordinates of the ones, negated coordinates or
    starts of intervals of the others. The sum of both is one instruction with the minimum that takes it. widths: with
    separate keys, of the queries, which own the tile (OWN_WIDTHS) or are walked."""
    if MODE.SHARED:
        _, width = dedupe_reach(S, MODE)
        near = tl.full([1, 1], 4294967295, tl.uint32)
        for e in tl.static_range(MODE.ROUNDS - 1):
            near = tl.minimum(near, (walked[e][None, :] + own[e][:, None]).to(tl.uint32))
        first_mask = near >= width.to(tl.uint32)
    else:
        seen_mask = tl.full([1, 1], 0, tl.int1)
        for e in tl.static_range(MODE.ROUNDS - 1):
            width = tl.expand_dims(widths[e], 1 if OWN_WIDTHS else 0)
            seen_mask |= (walked[e][None, :] + own[e][:, None]).to(tl.uint32) < width.to(tl.uint32)
        first_mask = ~seen_mask
    return first_mask


@triton.jit
def load_rows(ptr, rows, stride, row_mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D columns as a tile [rows, BLOCK_D], zeros where there is nothing. ptr: to the head. row_mask may be None."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_d < D)[None, :]
    if row_mask is not None:
        mask = mask & row_mask[:, None]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, rows, tile, row_mask, D: tl.constexpr):
    """Store the D columns of a tile to contiguous rows."""
    offs_d = tl.arange(0, tile.shape[1])
    mask = row_mask[:, None] & (offs_d < D)[None, :]
    tl.store(ptr + rows[:, None] * D + offs_d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def walk_range(lo, hi):
    """The slots that a tile of queries has to walk, (FAR, -FAR) if none."""
    first = tl.min(tl.where(lo < hi, lo, FAR), 0)
    last = tl.max(tl.where(lo < hi, hi, -FAR), 0)
    return first, last


@triton.jit
def online_softmax(logits, scale, m_i, l_i, acc):
    """One step of the softmax in base 2 of scale * logits, scale > 0: probabilities up to exp2(scale * m), and m, l, acc
    brought to the new maximum."""
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    # a row without any key so far would be inf - inf
    top = tl.where(m_new == float("-inf"), 0.0, m_new) * scale
    probs = tl.exp2(logits * scale - top[:, None])
    alpha = tl.exp2(m_i * scale - top)
    return probs, m_new, l_i * alpha + tl.sum(probs, 1), acc * alpha[:, None]


@triton.jit
def log2_of(x):
    """log2 of positive normal float32. The exponent and the mantissa behind it, read as one number, are off by 0.045 at
    most; four terms of the series of the logarithm mend that. A third of the instructions of tl.log2."""
    guess = x.to(tl.int32, bitcast=True).to(tl.float32) * (1 / 8388608) - 126.955
    u = x * tl.exp2(-guess) - 1.0
    return guess + u * (1.4426950 + u * (-0.7213475 + u * (0.4808983 - u * 0.3606738)))
