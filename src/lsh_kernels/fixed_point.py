"""Residual streams on a fixed-point grid, where a sum can be taken back to the bit.

A stream is a tensor of integers n that stand for n * 2^-k:

| model | integers | k | largest value | a float of the model's dtype holds n exactly up to |
|---|---|---|---|---|
| float32 | int32 | 16 | 32,768 | 256 |
| float16, bfloat16 | int32 | 16 | 32,768 | 2^-5, 2^-8 (layers read a rounded copy, the stream itself is exact) |
| float64 | int64 | 44 | 262,144 | 512 |

What a layer adds is rounded to the nearest multiple of 2^-k, ties to even, and added as an integer. Its error is at most
2^-17 = 7.6e-6 per layer, whatever the size of the stream: float32 residuals err by up to 2^-24 of their value, which is less
below 128; float16 and bfloat16 residuals by up to 2^-11 and 2^-8 of it, which is less below 2^-6 and 2^-9 only. A stream
takes 4 bytes per element (8 for float64), and the copy that layers read those of its dtype.

The least integer stands for NaN. A value that is not finite, or a sum that leaves the range, becomes NaN, stays NaN in
every later sum, and reads as NaN: nothing has to be looked at on the host.

Each sum comes with a checksum of what was added: equal checksums mean that a layer that is run again has returned the
same, to the bit of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

# positions of one block of the torch twin: what it needs beside its result stays in the cache
_BLOCK = 1 << 16
# an odd number near 2^64 / golden ratio, as int64: spreads positions over all bits
_SPREAD = 0x9E3779B97F4A7C15 - 2**64


def fraction_bits(integers: torch.dtype) -> int:
    """k of a stream of int32 or int64."""
    return 44 if integers == torch.int64 else 16


def limit(integers: torch.dtype) -> int:
    """Values and sums are below it; twice as much still fits into 64 bits."""
    return 2**62 if integers == torch.int64 else 2**31


def integers_for(dtype: torch.dtype) -> torch.dtype:
    """The dtype of streams in a model of `dtype`.

    Raises:
        TypeError: not a float of 16, 32 or 64 bits.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x: got {dtype}, wanted float16, bfloat16, float32 or float64")
    return torch.int64 if dtype == torch.float64 else torch.int32


def read(stream: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a stream, rounded to `dtype`."""
    wide = torch.float64 if stream.dtype == torch.int64 else torch.float32
    values = stream.to(wide).mul_(2.0 ** -fraction_bits(stream.dtype)).to(dtype)
    return values.masked_fill_(stream == torch.iinfo(stream.dtype).min, torch.nan)


def residual_add(stream: Tensor, addend: Tensor, dtype: torch.dtype, undo: bool) -> tuple[Tensor, Tensor, Tensor]:
    """stream + addend, or stream - addend.

    Args:
        stream: int32 or int64, any shape, contiguous.
        addend: floating point, of that shape.
        dtype: of `values`.
        undo: subtract.

    Returns:
        the new stream; `values`, what it stands for; checksum of the rounded addend, int64 [].
    """
    wide, none = (torch.float64 if stream.dtype == torch.int64 else torch.float32), torch.iinfo(stream.dtype).min
    bits, end = fraction_bits(stream.dtype), limit(stream.dtype)
    result, checksum = torch.empty_like(stream), torch.zeros((), dtype=torch.int64, device=stream.device)
    flat, flat_addend, flat_result = stream.view(-1), addend.reshape(-1), result.view(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = slice(start, start + _BLOCK)
        rounded = (flat_addend[block].to(wide) * 2.0**bits).round_()
        fits = rounded.abs() < end  # not if NaN
        steps = rounded.masked_fill_(~fits, 0.0).to(torch.int64)
        before = flat[block].to(torch.int64)
        after = before - steps if undo else before + steps
        fits = fits & (before != none) & (after.abs() < end)
        flat_result[block] = after.masked_fill_(~fits, none)
        position = torch.arange(start, start + steps.numel(), device=stream.device) * _SPREAD
        checksum += (steps * (position ^ (position >> 32))).sum()
    return result, read(result, dtype), checksum
