"""What several kernels share: the record of options that they are compiled for, and helpers on tiles."""

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl

# no length, and so no slot, reaches this (2^24 is the longest); sums and differences of a few stay within int32
_FAR = 2**28
FAR = tl.constexpr(_FAR)
# float32 that is not -inf
_LEAST = tl.constexpr(-3.4028234663852886e38)


class Tile(NamedTuple):
    """Head dims and what they are padded to, queries and keys of a tile, elements that strides are multiples of."""

    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    M: int
    N: int
    ALIGN: int = 1


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


@functools.cache
def block_dim(D, n_rows=1, num_warps=0, itemsize=1):
    """Columns of a tile that holds n_rows rows of D elements: a power of two, enough for tensor cores, and for each thread of
    num_warps warps of 32 to have 16 bytes of the tile, which one load fetches then."""
    return max(16, next_power_of_2(D), 32 * 16 * num_warps // (n_rows * itemsize))


def divisor(d):
    """(multiplier, shift) that `divide` divides by d with, 1 <= d < 2^31; the multiplier as the int32 of its bits.

    Source: Granlund and Montgomery 1994, "Division by invariant integers using multiplication".
    """
    shift = (d - 1).bit_length()
    return -(-(2 ** (31 + shift)) // d) - 2**32, shift


def common_align(*tensors):
    """Elements of 16 bytes if all strides of the tensors but their last (and those of single elements) are multiples of them,
    else 1; 1 as well if they are multiples of 16 elements, for that Triton finds out itself."""
    align = 16 // tensors[0].element_size()
    step = math.gcd(*(stride for x in tensors for size, stride in zip(x.shape, x.stride()[:-1]) if size > 1))
    return align if step % 16 and not step % align else 1


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
def aligned(stride, ALIGN: tl.constexpr):
    """A stride that is a multiple of ALIGN, for the compiler to see it: it would load rows of 24 one element at a time. It
    loses tl.multiple_of on the way to a load, on AMD always."""
    return stride // ALIGN * ALIGN


@triton.jit
def at_head(ptr, strides, b, h, ALIGN: tl.constexpr):
    """Pointer to the rows of one head."""
    return ptr + b * aligned(strides[0], ALIGN) + h * aligned(strides[1], ALIGN)


@triton.jit
def load_rows(ptr, rows, stride, row_mask, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """Rows of D columns as a tile [rows, BLOCK_D], zeros where there is nothing. ptr: to the head. row_mask may be None."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_d < D)[None, :]
    if row_mask is not None:
        mask = mask & row_mask[:, None]
    if rows.dtype == tl.int32:
        # none is negative: extended by zeros they take half the instructions to multiply in 64 bits
        rows = rows.to(tl.uint32)
    offs = rows.to(tl.int64) * aligned(stride, ALIGN)
    return tl.load(ptr + offs[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def inverse_norm_of(x, eps):
    """1 / sqrt(sum(x^2) + eps) of the rows of a float32 tile, 0 for rows of zeros."""
    square = tl.sum(x * x, 1)
    zero_mask = square == 0.0
    return tl.where(zero_mask, 0.0, 1.0 / tl.sqrt_rn(tl.where(zero_mask, 1.0, square + eps)))


@triton.jit
def store_rows(ptr, rows, tile, row_mask, D: tl.constexpr):
    """Store the D columns of a tile to contiguous rows."""
    offs_d = tl.arange(0, tile.shape[1])
    mask = row_mask[:, None] & (offs_d < D)[None, :]
    tl.store(ptr + rows[:, None] * D + offs_d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def online_softmax(logits, scale, m_i, l_i, acc):
    """One step of the softmax in base 2 of scale * logits, scale > 0: probabilities up to exp2(scale * m), and m, l, acc
    brought to the new maximum."""
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    # a row without any key so far would be inf - inf
    top = tl.maximum(m_new * scale, _LEAST)
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
