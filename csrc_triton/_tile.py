"""What several kernels share: the record of options that they are compiled for, and helpers on tiles."""

from typing import NamedTuple

import triton
import triton.language as tl

# no length, and so no slot, reaches this (2^24 is the longest); sums and differences of a few stay within int32
_FAR = 2**28
FAR = tl.constexpr(_FAR)


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
        DROPOUT=o.dropout_p > 0, HAS_PADDING=has_padding, R=n_hashes, ROUNDS=rounds,
    )  # fmt: skip


def ceil_div(a, b):
    """triton.cdiv for the host, where that takes 5 us."""
    return -(-a // b)


def next_power_of_2(n):
    """triton.next_power_of_2 for the host."""
    return 1 << (n - 1).bit_length()


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
def is_within(x, lo, width):
    """lo <= x < lo + width by one unsigned compare."""
    return (x - lo).to(tl.uint32) < width.to(tl.uint32)


@triton.jit
def chunk_start(chunk, L, CHUNK: tl.constexpr):
    """First slot of a chunk >= 0 where rounds of L slots, the last chunk of each perhaps short, follow one another."""
    n_chunks = tl.cdiv(L, CHUNK)
    return chunk // n_chunks * L + chunk % n_chunks * CHUNK


@triton.jit
def span_interval(slots, end, first, last, r, L, S, MODE: tl.constexpr):
    """[lo, hi) of key slots, before any clipping, of the queries in `slots` of round r. `end`: one past the last key of
    the bucket [first, last) that is not after the query."""
    if MODE.SPAN == "window":
        window = tl.minimum(MODE.WINDOW, S)
        lo, hi = end - 1 - window, end + window
    elif MODE.SPAN == "bucket":
        lo, hi = first, last
    elif MODE.WRAP:
        n_all = MODE.R * tl.cdiv(L, MODE.CHUNK)
        chunk = r * tl.cdiv(L, MODE.CHUNK) + slots // MODE.CHUNK
        # one turn on, since // rounds negative numbers towards zero
        lo = chunk_start(chunk - MODE.BEFORE + n_all, L, MODE.CHUNK) - MODE.R * L
        hi = chunk_start(chunk + MODE.AFTER + 1, L, MODE.CHUNK)
        sees_all = MODE.BEFORE + 1 + MODE.AFTER >= n_all
        lo, hi = tl.where(sees_all, 0, lo), tl.where(sees_all, MODE.R * L, hi)
    else:
        chunk = slots // MODE.CHUNK
        lo, hi = (chunk - MODE.BEFORE) * MODE.CHUNK, (chunk + 1 + MODE.AFTER) * MODE.CHUNK
    return lo, hi


@triton.jit
def query_interval(
    slots, q_pos, slot_mask, r, row, q_stretched_ptr, limits_ptr, L, S, n_buckets, MODE: tl.constexpr,
):  # fmt: skip
    """[lo, hi) of key slots of the queries in `slots` of round r, with causality where slots tell it. row: (b, h, r).

    `limits`: of shared QK the bounds of the buckets, of separate keys the stretched intervals (see their kernels).
    """
    # in identity order and in a bucket positions ascend: "not after" is an end of the interval; strict, it drops self
    end = slots if MODE.SHARED else slots + 1
    if MODE.WITHIN_BUCKET:
        stretch = tl.minimum(MODE.WINDOW, S) + 1
        shift = unmarked(tl.load(q_stretched_ptr + row * L + q_pos, mask=slot_mask, other=0)) - slots
        if MODE.SHARED:
            bucket = tl.where(slot_mask, shift // stretch, 0)
            limits_ptrs = limits_ptr + (row * (n_buckets + 1) + bucket) * 2
            first = tl.load(limits_ptrs, mask=slot_mask, other=0)
            last = tl.load(limits_ptrs + 1, mask=slot_mask, other=0)
            lo, hi = span_interval(slots, slots + 1, first, last, r, L, S, MODE)
            lo, hi = tl.maximum(lo, first), tl.minimum(hi, last)
            if MODE.CAUSAL:
                hi = tl.minimum(hi, end)
            # the bucket of padding holds no target
            hi = tl.where(bucket == n_buckets, lo, hi)
        else:
            limits_ptrs = limits_ptr + (row * L + q_pos) * 2
            lo = tl.load(limits_ptrs, mask=slot_mask, other=0) - shift
            hi = lo + tl.load(limits_ptrs + 1, mask=slot_mask, other=0)
    else:
        lo, hi = span_interval(slots, slots + 1, 0, S, r, L, S, MODE)
        if not MODE.WRAP:
            lo, hi = tl.maximum(lo, 0), tl.minimum(hi, S)
            if MODE.CAUSAL and not MODE.HASHED:
                hi = tl.minimum(hi, end)
    if MODE.LOCAL_WINDOW:
        is_local = r == MODE.R
        ahead = end if MODE.CAUSAL else slots + 1 + MODE.LOCAL_WINDOW
        lo = tl.where(is_local, tl.maximum(slots - MODE.LOCAL_WINDOW, 0), lo)
        hi = tl.where(is_local, tl.minimum(ahead, L), hi)
    empty_mask = (slots >= L) | (hi <= lo)
    return lo, tl.where(empty_mask, lo, hi)


@triton.jit
def walk_range(lo, hi):
    """The slots that a tile of queries has to walk, (FAR, -FAR) if none."""
    first = tl.min(tl.where(lo < hi, lo, FAR), 0)
    last = tl.max(tl.where(lo < hi, hi, -FAR), 0)
    return first, last


@triton.jit
def online_softmax(logits, m_i, l_i, acc):
    """One step of the softmax in base 2: probabilities up to exp2(m), and m, l, acc brought to the new maximum."""
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    # a row without any key so far would be inf - inf
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    probs = tl.exp2(logits - m_finite[:, None])
    alpha = tl.exp2(m_i - m_finite)
    return probs, m_new, l_i * alpha + tl.sum(probs, 1), acc * alpha[:, None]
