"""Sums on the fixed-point grid of `lsh_kernels.fixed_point`, and how they are taken back."""

import torch
import triton
import triton.language as tl

from ._options import target_options
from ._tile import ceil_div

_ADDENDS = (torch.float16, torch.bfloat16, torch.float32)
_FRACTION_BITS = tl.constexpr(16)
_NONE = tl.constexpr(-(2**31))  # stands for NaN
_SPREAD = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)


@triton.jit
def round_to_even(x):
    """The nearest integer, ties to even: 2^23 + |x| has no bits for a fraction, from 2^23 on neither has |x|."""
    size = tl.abs(x)
    rounded = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0.0, -rounded, rounded)


@target_options
@triton.jit
def _residual_fwd_kernel(
    stream_ptr, addend_ptr,                   # inputs   [n] int32, [n], contiguous
    result_ptr, values_ptr, checksums_ptr,    # outputs  [n] int32, [n], [programs] int64
    n,
    UNDO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK elements: rounds the addend to grid steps, adds them to the stream or with UNDO takes them
    back, and writes the new stream, the values it stands for and the checksum of its steps. A sum out of range or of what
    is no number is NaN."""
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    before = tl.load(stream_ptr + offs, mask=mask, other=0)
    addend = tl.load(addend_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale: tl.constexpr = 2.0**_FRACTION_BITS.value
    scaled = addend * scale
    # not if NaN
    fits_mask = tl.abs(scaled) < 2147483648.0
    # the cast of a value out of range is undefined
    steps = round_to_even(tl.where(fits_mask, scaled, 0.0)).to(tl.int64)
    if UNDO:
        after = before.to(tl.int64) - steps
    else:
        after = before.to(tl.int64) + steps
    fits_mask = fits_mask & (before != _NONE) & (tl.abs(after) < 2147483648)
    after = tl.where(fits_mask, after, _NONE).to(tl.int32)
    values = tl.where(fits_mask, after.to(tl.float32) * (1.0 / scale), float("nan"))
    tl.store(result_ptr + offs, after, mask=mask)
    tl.store(values_ptr + offs, values.to(values_ptr.dtype.element_ty), mask=mask)
    position = offs * _SPREAD
    # arithmetic shift, as torch's; times an odd number, so that a change at one position is never lost
    tl.store(checksums_ptr + pid, tl.sum(steps * ((position ^ (position >> 32)) | 1), 0))


def residual_add(stream, addend, dtype, undo):
    """stream + addend, or stream - addend; see `lsh_kernels.fixed_point.residual_add`.

    Args:
        stream: int32, any shape, contiguous.
        addend: fp16, bf16 or fp32, of that shape.
        dtype: of `values`: fp16, bf16 or fp32.
        undo: subtract.

    Returns:
        the new stream int32; `values`, what it stands for; checksum of the rounded addend, int64 [].
    """
    if stream.dtype != torch.int32 or addend.dtype not in _ADDENDS or dtype not in _ADDENDS:
        raise TypeError(
            f"stream, addend, dtype: got {stream.dtype}, {addend.dtype}, {dtype}, wanted int32 and fp16, bf16 or fp32"
        )
    if stream.shape != addend.shape or stream.device != addend.device or not stream.is_contiguous():
        raise ValueError(
            f"stream, addend: got {list(stream.shape)} with strides {stream.stride()} on {stream.device}, {list(addend.shape)} "
            f"on {addend.device}, wanted one shape and device, stream contiguous"
        )
    n, block, num_warps = stream.numel(), *_launch_config()
    programs = ceil_div(n, block)
    result = torch.empty(stream.shape, dtype=torch.int32, device=stream.device)
    values = torch.empty(stream.shape, dtype=dtype, device=stream.device)
    checksums = torch.empty((programs,), dtype=torch.int64, device=stream.device)
    if programs:
        _residual_fwd_kernel[(programs,)](
            stream, addend.contiguous(), result, values, checksums, n, UNDO=undo, BLOCK=block, num_warps=num_warps
        )
    return result, values, checksums.sum()


def _launch_config():
    """(BLOCK, num_warps): 8 elements per thread, two 128-bit loads of int32 and of fp32; DRAM bounds it at any size."""
    return 1024, 4
