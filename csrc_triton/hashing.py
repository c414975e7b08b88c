"""Angular LSH: `argmax([xR ; -xR])` per round and factor, and what else one pass over x can give."""

import math

import torch
import triton
import triton.language as tl

from ._options import target_options
from ._tile import at_head, block_dim, ceil_div, common_align, inverse_norm_of, load_rows
from .bucket_sort import MAX_BUCKETS, MAX_LENGTH, TileCounts, clamped_buckets, digit_bins, tile_counts

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def project(x, rotations):
    """x [BLOCK_M, BLOCK_D] times float32 rotations [BLOCK_D, BLOCK_W], as float32. A half-precision x meets the
    rotations as a sum of two halves, which keeps 16 bits of them (bf16) or 22 (fp16) on the tensor cores."""
    if x.dtype == tl.float32:
        y = tl.dot(x, rotations, input_precision="ieee")
    else:
        high = rotations.to(x.dtype)
        low = (rotations - high.to(tl.float32)).to(x.dtype)
        y = tl.dot(x, high, tl.dot(x, low))
    return y


@triton.jit
def argmax_of_signed(y, columns, HALF: tl.constexpr):
    """(max |y|, lowest index that has it in [y ; -y]) of each row; y [BLOCK_M, BLOCK_W], HALF columns in all. A row of
    NaN equals nothing and keeps the last index."""
    top = tl.max(tl.abs(y), 1)  # [BLOCK_M]
    index = tl.where(y == -top[:, None], columns[None, :] + HALF, 2 * HALF - 1)
    index = tl.where(y == top[:, None], columns[None, :], index)
    return top, tl.min(index, 1)


@triton.jit
def hash_factor(x, rotations_ptrs, col_mask, HALF: tl.constexpr, MAX_BLOCK_W: tl.constexpr):
    """argmax([xR ; -xR]) of the rows x [BLOCK_M, BLOCK_D], where rotations_ptrs [BLOCK_D, 1] start R's HALF columns."""
    # a dot needs 16 columns; those that are not there project to 0, which is the maximum only where column 0 has it too
    BLOCK_W: tl.constexpr = min(MAX_BLOCK_W, max(16, triton.next_power_of_2(HALF)))
    offs_w = tl.arange(0, BLOCK_W)
    top = tl.full([x.shape[0]], -1.0, tl.float32)
    index = tl.full([x.shape[0]], 2 * HALF - 1, tl.int32)
    for start in range(0, HALF, BLOCK_W):
        columns = start + offs_w
        rotations_mask = col_mask[:, None] & (columns < HALF)[None, :]
        rotations = tl.load(rotations_ptrs + columns[None, :], mask=rotations_mask, other=0.0)  # [BLOCK_D, BLOCK_W]
        new_top, new_index = argmax_of_signed(project(x, rotations), columns, HALF)
        new_index = tl.where(new_top == top, tl.minimum(index, new_index), new_index)
        index = tl.where(new_top >= top, new_index, index)
        top = tl.maximum(top, new_top)
    return index


@target_options
@triton.jit(do_not_specialize=["L", "n_buckets"])
def _hashing_fwd_kernel(
    x_ptr, rotations_ptr, padding_ptr,            # inputs   [B, H, L, D], [Hr, D, R, W] and [B, L] contiguous
    buckets_ptr,                                  # output   [B, H, R, L]; input if there are no rotations
    inverse_norm_ptr, counts_ptr,                 # outputs  [B, H, L], [B, H, R, n_tiles, BLOCK_BINS]
    x_strides, H, L, group, n_buckets, norm_eps,
    HAS_PADDING: tl.constexpr, HAS_NORM: tl.constexpr, HAS_COUNTS: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, FACTORS: tl.constexpr, LOW_BITS: tl.constexpr, BLOCK_BINS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MAX_BLOCK_W: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M rows of one head and reads them once. For every round it writes their bucket ids and how
    many of them have each low digit, and once 1 / norm. Rotations are read column block by column block; projections
    stay in registers. `group` heads share a rotation. Without rotations bucket ids are read, not written.

    FACTORS are constants: run-time ones, in blocks of 32 or of 16 columns, would issue 31% or 57% more instructions at
    N = 128 (bf16, D = 64, sm_90)."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(L, BLOCK_M)
    pid_bh = (pid // n_tiles).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    tile = pid % n_tiles
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = offs_m.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    row_mask = offs_m < L
    col_mask = offs_d < D

    # padded rows are read like any other: whatever they hold stays in their own row, whose results are replaced. Had
    # the mask of this load come from a load of bytes, Triton 3.7 for sm_100 would take x for a widened 8-bit type and
    # run the dot in TF32
    x = load_rows(at_head(x_ptr, x_strides, b, h, ALIGN), offs_m, x_strides[2], row_mask, D, BLOCK_D, ALIGN)
    if HAS_PADDING:
        padded_mask = tl.load(padding_ptr + b * L + offs_m, mask=row_mask, other=0) != 0
    if HAS_NORM:
        inverse_norm = inverse_norm_of(x.to(tl.float32), D * norm_eps)
        if HAS_PADDING:
            inverse_norm = tl.where(padded_mask, 0.0, inverse_norm)
        tl.store(inverse_norm_ptr + pid_bh * L + offs_m, inverse_norm, mask=row_mask)

    if rotations_ptr is not None:
        rotations_ptrs = rotations_ptr + (h // group) * D * R * W + offs_d[:, None] * (R * W)
    buckets_ptrs = buckets_ptr + pid_bh * R * L + offs_m
    offs_bin = tl.arange(0, BLOCK_BINS)
    counts_ptrs = counts_ptr + (pid_bh * R * n_tiles + tile) * BLOCK_BINS + offs_bin
    for _ in range(R):
        if rotations_ptr is None:
            buckets = clamped_buckets(buckets_ptrs, row_mask, n_buckets)
        else:
            buckets = tl.zeros([BLOCK_M], tl.int32)
            n_before = 1
            column = 0
            for i in tl.static_range(len(FACTORS)):
                index = hash_factor(x, rotations_ptrs + column, col_mask, FACTORS[i] // 2, MAX_BLOCK_W)
                buckets += n_before * index
                n_before *= FACTORS[i]
                column += FACTORS[i] // 2
        if HAS_PADDING:
            buckets = tl.where(padded_mask, n_buckets, buckets)
        if rotations_ptr is not None:
            tl.store(buckets_ptrs, buckets, mask=row_mask)
        if HAS_COUNTS:
            counts = tile_counts(buckets & ((1 << LOW_BITS) - 1), row_mask, BLOCK_BINS)
            tl.store(counts_ptrs, counts)
        if rotations_ptr is not None:
            rotations_ptrs += W
        # steps, since r * stride could leave 32 bits
        buckets_ptrs += L
        counts_ptrs += n_tiles * BLOCK_BINS


def lsh_hash(x, rotations, factors):
    """Bucket ids by angular LSH: per round and factor `argmax([xR ; -xR])`, ties to the lowest index.

    Projections are summed in fp32. fp16 and bf16 rows meet 22 and 16 bits of the float32 rotations, so that a row whose
    two largest projections differ by less than about 2^-21 or 2^-15 of them can land in the other one's bucket.

    Args:
        x: [B, H, L, D], fp16, bf16 or fp32; 1 <= D <= 256; last dimension contiguous.
        rotations: [Hr, D, R, W] floating point, H % Hr == 0: query head h uses rotation h // (H // Hr). The columns of
            factor i start at sum_{j<i} N_j / 2.
        factors: even ints N_i; ids combine as h_0 + N_0 * h_1 + N_0 * N_1 * h_2.

    Returns:
        buckets [B, H, R, L] int32, in [0, N) also for a row of NaN.
    """
    _check(x, rotations, factors)
    return hash_rows(x, rotations, factors, None, None, with_counts=False)[0]


def hash_rows(x, rotations, factors, key_padding_mask, norm_eps, with_counts=True, buckets=None):
    """`lsh_hash`, and in the same pass over x what sorting and attention need. The arguments are not checked here.

    Args:
        x, rotations, factors: as in `lsh_hash`.
        key_padding_mask: [B, L] bool, True = ignore, or None. Padded rows get bucket N.
        norm_eps: None, or what is added to the mean square of a row before it normalises the row.
        with_counts: count the first digit per tile, for `sort_buckets`.
        buckets: int32 or int64 [B, H, R, L] in place of rotations, which are None then: nothing is hashed.

    Returns:
        buckets [B, H, R, L], int32 where hashed, else those given, contiguous; inverse_norm [B, H, L] float32,
        1 / sqrt(sum(x^2) + D * norm_eps), 0 for zero vectors and padded rows, None without norm_eps; `TileCounts` or
        None.
    """
    B, H, L, D = x.shape
    R = (rotations if buckets is None else buckets).shape[2]
    has_padding = key_padding_mask is not None
    block_m, block_d, block_w, num_warps, num_stages = _launch_config(D, x.dtype)
    n_tiles = ceil_div(L, block_m)
    n_buckets = math.prod(factors)
    low_bits, bins = digit_bins(n_buckets, has_padding)
    if buckets is None:
        rotations, group = rotations.to(torch.float32).contiguous(), H // rotations.shape[0]
        buckets = torch.empty((B, H, R, L), dtype=torch.int32, device=x.device)
    else:
        buckets, factors, group = buckets.contiguous(), (), 1
        # the rows in float32 alone fill the registers of four warps
        num_warps = 8
    # the kernel leaves alone what is not wanted
    padding = key_padding_mask.contiguous() if has_padding else buckets
    inverse_norm = counts = buckets
    if norm_eps is not None:
        inverse_norm = torch.empty((B, H, L), dtype=torch.float32, device=x.device)
    if with_counts:
        counts = torch.empty((B, H, R, n_tiles, bins[0]), dtype=torch.int32, device=x.device)
    _hashing_fwd_kernel[(B * H * n_tiles,)](
        x, rotations, padding, buckets, inverse_norm, counts, x.stride(), H, L, group, n_buckets,
        norm_eps or 0.0,
        HAS_PADDING=has_padding, HAS_NORM=norm_eps is not None, HAS_COUNTS=with_counts,
        R=R, D=D, W=sum(factors) // 2, FACTORS=tuple(factors), LOW_BITS=low_bits, BLOCK_BINS=bins[0],
        BLOCK_M=block_m, BLOCK_D=block_d, MAX_BLOCK_W=block_w, ALIGN=common_align(x),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return buckets, None if norm_eps is None else inverse_norm, TileCounts(counts, block_m) if with_counts else None


def _launch_config(D, dtype):
    """(BLOCK_M, BLOCK_D, MAX_BLOCK_W, num_warps, num_stages). BLOCK_M is the tile of the sort too, so as large as
    registers and 64 KiB of shared memory let it be; fp32 dots spill with more than 8 of their sums per thread (16 would issue
    16 to 19% less, but spill with a mask on sm_90)."""
    block_d = block_dim(D)
    if dtype == torch.float32:
        # without pipelining, rotations would wait in registers
        return (64, block_d, 32, 8, 2) if block_d <= 128 else (32, block_d, 32, 4, 2)
    if block_d <= 64:
        return 256, block_d, 64, 8, 2
    return (128 if block_d == 128 else 64), block_d, 32, 4, 1


def _check(x, rotations, factors):
    if x.dim() != 4 or 0 in x.shape[1:] or not 1 <= x.shape[3] <= 256 or x.shape[2] > MAX_LENGTH:
        raise ValueError(f"x: got {list(x.shape)}, wanted [B, H, L, D] with 1 <= D <= 256 and L <= {MAX_LENGTH}")
    if x.dtype not in _DTYPES or not rotations.is_floating_point():
        raise TypeError(f"x, rotations: got {x.dtype}, {rotations.dtype}, wanted fp16, bf16 or fp32 and floating point")
    if x.stride(3) != 1 and x.shape[3] > 1:
        raise ValueError(f"x: got strides {x.stride()}, wanted a contiguous last dimension")
    if any(n < 2 or n % 2 for n in factors) or not 2 <= math.prod(factors) <= MAX_BUCKETS:
        raise ValueError(f"factors: got {factors}, wanted even ints with a product of 2 to {MAX_BUCKETS}")
    H, D, width = x.shape[1], x.shape[3], sum(factors) // 2
    if rotations.dim() != 4 or 0 in rotations.shape or H % rotations.shape[0] or rotations.shape[1::2] != (D, width):
        raise ValueError(f"rotations: got {list(rotations.shape)}, wanted [Hr, {D}, R, {width}], Hr a divisor of {H}")
    if rotations.device != x.device:
        raise ValueError(f"rotations: got a tensor on {rotations.device}, wanted {x.device} like x")
