"""Stable sort of positions by bucket: counting passes over digits of the bucket id, the lowest digit first."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._options import target_options
from ._tile import ceil_div, next_power_of_2

MAX_BUCKETS = 32_768
MAX_LENGTH = 2**24
# positions per program where bucket ids come from memory
_TILE = 256

# a word between two passes: position in the low 24 bits, what is left of the bucket id in the high 8
_POSITION_BITS = tl.constexpr(24)
_POSITION_MASK = tl.constexpr(2**24 - 1)
_LEFT_BITS = tl.constexpr(8)
_LEFT_MASK = tl.constexpr(2**8 - 1)


@triton.jit
def tile_counts(digits, mask, BLOCK_BINS: tl.constexpr):
    """How many of the tile's digits [BLOCK_M] fall into each of BLOCK_BINS bins; int32 [BLOCK_BINS]."""
    # elements beyond the mask count as digit 0 and are taken off again
    n_beyond = tl.sum(1 - mask.to(tl.int32), 0)
    counts = tl.histogram(tl.where(mask, digits, 0), BLOCK_BINS)
    return counts - tl.where(tl.arange(0, BLOCK_BINS) == 0, n_beyond, 0)


@triton.jit
def clamped_buckets(buckets_ptrs, mask, N):
    """Bucket ids, of any integer type, clamped to [0, N)."""
    buckets = tl.load(buckets_ptrs, mask=mask, other=0)
    return tl.minimum(tl.maximum(buckets, 0), N - 1).to(tl.int32)


@triton.jit
def load_buckets(buckets_ptr, padding_ptr, pid_bhr, n_rounds, positions, mask, L, N, HAS_PADDING: tl.constexpr):
    """Bucket ids at positions [BLOCK_M] of one (b, h, r), clamped to [0, N); padded positions are in bucket N."""
    buckets = clamped_buckets(buckets_ptr + pid_bhr * L + positions, mask, N)
    if HAS_PADDING:
        padded_mask = tl.load(padding_ptr + pid_bhr // n_rounds * L + positions, mask=mask, other=0) != 0
        buckets = tl.where(padded_mask, N, buckets)
    return buckets


@target_options
@triton.jit(do_not_specialize=["L", "N", "low_bits"])
def _bucket_sort_count_kernel(
    buckets_ptr, padding_ptr, words_ptr,  # inputs   [B, H, R, L], [B, L], [B, H, R, L] contiguous
    counts_ptr,                           # output   [B, H, R, n_tiles, BLOCK_BINS]
    L, n_rounds, N, low_bits,
    HAS_PADDING: tl.constexpr, FIRST: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M elements of one round and writes how many of them have each digit. The first pass reads
    bucket ids, the second the words that the first one left."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(L, BLOCK_M)
    pid_bhr = (pid // n_tiles).to(tl.int64)
    offs_m = (pid % n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < L
    if FIRST:
        digits = load_buckets(buckets_ptr, padding_ptr, pid_bhr, n_rounds, offs_m, row_mask, L, N, HAS_PADDING)
        digits = digits & ((1 << low_bits) - 1)
    else:
        words = tl.load(words_ptr + pid_bhr * L + offs_m, mask=row_mask, other=0)
        digits = (words >> _POSITION_BITS) & _LEFT_MASK
    counts = tile_counts(digits, row_mask, BLOCK_BINS)
    offs_bin = tl.arange(0, BLOCK_BINS)
    tl.store(counts_ptr + pid.to(tl.int64) * BLOCK_BINS + offs_bin, counts)


@target_options
@triton.jit(do_not_specialize=["n_tiles"])
def _bucket_sort_scan_kernel(
    counts_ptr,  # input and output [B, H, R, n_tiles, BLOCK_BINS]
    n_tiles, BLOCK_BINS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program owns the counts of one round and replaces each by the slot of the first element of that (bin, tile),
    less the number of the tile's elements in lower bins: slot = offset[tile, bin] + rank in the sorted tile."""
    pid_bhr = tl.program_id(0).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T)
    offs_bin = tl.arange(0, BLOCK_BINS)
    tile_ptrs = counts_ptr + pid_bhr * n_tiles * BLOCK_BINS + offs_t[:, None] * BLOCK_BINS + offs_bin[None, :]

    totals = tl.zeros([BLOCK_BINS], tl.int32)
    counts_ptrs = tile_ptrs
    first = 0
    # not `for .. in range`, which Triton 3.6's interpreter cannot do with a bound known at run time and NumPy 2.4
    while first < n_tiles:
        block_mask = (first + offs_t < n_tiles)[:, None]
        totals += tl.sum(tl.load(counts_ptrs, mask=block_mask, other=0), 0)
        counts_ptrs += BLOCK_T * BLOCK_BINS
        first += BLOCK_T

    before = tl.cumsum(totals, 0) - totals  # [BLOCK_BINS]
    counts_ptrs = tile_ptrs
    first = 0
    while first < n_tiles:
        block_mask = (first + offs_t < n_tiles)[:, None]
        counts = tl.load(counts_ptrs, mask=block_mask, other=0)  # [BLOCK_T, BLOCK_BINS]
        # both sums include the count itself, once with each sign
        offsets = before[None, :] + tl.cumsum(counts, 0) - tl.cumsum(counts, 1)
        tl.store(counts_ptrs, offsets, mask=block_mask)
        before += tl.sum(counts, 0)
        counts_ptrs += BLOCK_T * BLOCK_BINS
        first += BLOCK_T


@target_options
@triton.jit(do_not_specialize=["L", "N", "stretch", "low_bits", "n_bins"])
def _bucket_sort_scatter_kernel(
    buckets_ptr, padding_ptr, offsets_ptr,  # inputs   [B, H, R, L], [B, L] contiguous, scanned counts
    words_ptr,                              # output of the first of two passes, input of the second  [B, H, R, L]
    order_ptr, stretched_ptr,               # outputs of the last pass  [B, H, R, L]
    L, n_rounds, N, stretch, low_bits, n_bins,
    HAS_PADDING: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M elements of one round: sorts them stably by digit and writes each to its slot, as a word
    for the second pass or, in the last, as `order` (slot -> position) and `stretched` (position -> slot + bucket * stretch)."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(L, BLOCK_M)
    pid_bhr = (pid // n_tiles).to(tl.int64)
    start = (pid % n_tiles) * BLOCK_M
    rank = tl.arange(0, BLOCK_M)
    row_mask = start + rank < L

    # sort keys are (digit, place in the tile), so that equal digits keep their order
    if FIRST:
        buckets = load_buckets(buckets_ptr, padding_ptr, pid_bhr, n_rounds, start + rank, row_mask, L, N, HAS_PADDING)
        keys = (buckets & ((1 << low_bits) - 1)) * BLOCK_M + rank
        if not LAST:
            keys = (keys << _LEFT_BITS) | (buckets >> low_bits)
    else:
        words = tl.load(words_ptr + pid_bhr * L + start + rank, mask=row_mask, other=0)
        keys = ((words >> _POSITION_BITS) & _LEFT_MASK) * BLOCK_M + rank
    keys = tl.sort(tl.where(row_mask, keys, 2**30 - 1))
    if not LAST:
        left = keys & _LEFT_MASK
        keys = keys >> _LEFT_BITS
    digits = keys // BLOCK_M
    places = start + keys % BLOCK_M

    slots = tl.load(offsets_ptr + pid.to(tl.int64) * n_bins + digits, mask=row_mask, other=0) + rank
    if not LAST:
        tl.store(words_ptr + pid_bhr * L + slots, (left << _POSITION_BITS) | places, mask=row_mask)
    else:
        if FIRST:
            positions = places
            buckets = digits
        else:
            # the program has read these words just now: they come from the cache
            positions = tl.load(words_ptr + pid_bhr * L + places, mask=row_mask, other=0) & _POSITION_MASK
            buckets = load_buckets(buckets_ptr, padding_ptr, pid_bhr, n_rounds, positions, row_mask, L, N, HAS_PADDING)
        tl.store(order_ptr + pid_bhr * L + slots, positions, mask=row_mask)
        tl.store(stretched_ptr + pid_bhr * L + positions, slots + buckets * stretch, mask=row_mask)


def bucket_sort(buckets, n_buckets, key_padding_mask=None):
    """Stable sort of positions by bucket, padded positions last.

    Args:
        buckets: [B, H, R, L], int32 or int64; ids out of [0, n_buckets) are clamped.
        n_buckets: N, 1 to 32,768.
        key_padding_mask: [B, L] bool, True = ignore, or None.

    Returns:
        order [B, H, R, L] int32, slot -> position; inside a bucket positions ascend.
    """
    _check(buckets, n_buckets, key_padding_mask)
    return sort_buckets(buckets, n_buckets, 0, key_padding_mask)[0]


def sort_buckets(buckets, n_buckets, stretch, key_padding_mask=None, tile_counts=None):
    """`bucket_sort` that also fixes slot and bucket of every position. The arguments are not checked here.

    Args:
        buckets, n_buckets, key_padding_mask: as in `bucket_sort`.
        stretch: what one bucket adds to a stretched slot.
        tile_counts: `TileCounts` from `hash_rows` for these buckets, or None to count here. They are used up: the scan
            overwrites them.

    Returns:
        order [B, H, R, L] int32, slot -> position; stretched [B, H, R, L] int32, position -> slot + bucket * stretch,
        where padded positions have bucket N.
    """
    B, H, R, L = buckets.shape
    has_padding = key_padding_mask is not None
    low_bits, bins = digit_bins(n_buckets, has_padding)
    # kernels of a pass leave alone what the pass does not have
    buckets = buckets.contiguous()
    padding = key_padding_mask.contiguous() if has_padding else buckets
    order = torch.empty((B, H, R, L), dtype=torch.int32, device=buckets.device)
    stretched = torch.empty((B, H, R, L), dtype=torch.int32, device=buckets.device)
    words = torch.empty((B, H, R, L), dtype=torch.int32, device=buckets.device) if len(bins) == 2 else order
    for i, n_bins in enumerate(bins):
        if tile_counts is None or i > 0:
            tile_counts = _count(buckets, padding, words, L, H * R, n_buckets, has_padding, i == 0, low_bits, n_bins)
        counts, block_m = tile_counts
        n_tiles = ceil_div(L, block_m)
        block_t, num_warps = _scan_launch_config(n_bins)
        _bucket_sort_scan_kernel[(B * H * R,)](counts, n_tiles, BLOCK_BINS=n_bins, BLOCK_T=block_t, num_warps=num_warps)
        _bucket_sort_scatter_kernel[(B * H * R * n_tiles,)](
            buckets, padding, counts, words, order, stretched, L, H * R, n_buckets, stretch, low_bits, n_bins,
            HAS_PADDING=has_padding, FIRST=i == 0, LAST=i == len(bins) - 1, BLOCK_M=block_m, num_warps=_launch_config(block_m),
        )  # fmt: skip
    return order, stretched


class TileCounts(NamedTuple):
    """Per tile of `block_m` positions, how many have each digit: counts [B, H, R, n_tiles, n_bins] int32."""

    counts: torch.Tensor
    block_m: int


def digit_bins(n_buckets, has_padding):
    """(low_bits, bins per pass): one pass over all bucket ids up to N = 256, else two over their low and high bits. Bins
    are a power of 2 and no fewer than a warp of any GPU has lanes, which tl.histogram needs; so kernels compile for few
    numbers of them, where N follows the length."""
    n_values = n_buckets + has_padding
    bits = (n_values - 1).bit_length()
    low_bits = bits if n_buckets <= 256 else bits // 2
    bins = [min(n_values, 2**low_bits), ceil_div(n_values, 2**low_bits)]
    return low_bits, [max(64, next_power_of_2(n)) for n in bins if n > 1]


def _count(buckets, padding, words, L, n_rounds, n_buckets, has_padding, first, low_bits, n_bins):
    B, H, R, _ = buckets.shape
    n_tiles = ceil_div(L, _TILE)
    counts = torch.empty((B, H, R, n_tiles, n_bins), dtype=torch.int32, device=buckets.device)
    _bucket_sort_count_kernel[(B * H * R * n_tiles,)](
        buckets, padding, words, counts, L, n_rounds, n_buckets, low_bits,
        HAS_PADDING=has_padding, FIRST=first, BLOCK_BINS=n_bins, BLOCK_M=_TILE, num_warps=_launch_config(_TILE),
    )  # fmt: skip
    return TileCounts(counts, _TILE)


def _launch_config(block_m):
    """num_warps: the sort does a tile of 256 in 132 instructions per element with one warp, in 160 with two."""
    return max(1, block_m // 256)


def _scan_launch_config(n_bins):
    """(BLOCK_T, num_warps): 16 counters per thread; more take 5% fewer instructions of many tiles, and 70% more of few."""
    return 2048 // n_bins, 4


def _check(buckets, n_buckets, key_padding_mask):
    if buckets.dim() != 4 or not 1 <= buckets.shape[3] <= MAX_LENGTH or 0 in buckets.shape[1:]:
        raise ValueError(f"buckets: got {list(buckets.shape)}, wanted [B, H, R, L] with 1 <= L <= {MAX_LENGTH}")
    if buckets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"buckets: got {buckets.dtype}, wanted int32 or int64")
    if not 1 <= n_buckets <= MAX_BUCKETS:
        raise ValueError(f"n_buckets: got {n_buckets}, wanted 1 to {MAX_BUCKETS}")
    if key_padding_mask is None:
        return
    B, L = buckets.shape[0], buckets.shape[3]
    if key_padding_mask.shape != (B, L) or key_padding_mask.dtype != torch.bool:
        got = f"{key_padding_mask.dtype} {list(key_padding_mask.shape)}"
        raise ValueError(f"key_padding_mask: got {got}, wanted bool {[B, L]}")
    if key_padding_mask.device != buckets.device:
        raise ValueError(f"key_padding_mask: got a tensor on {key_padding_mask.device}, wanted {buckets.device}")
