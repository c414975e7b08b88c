"""Custom ops: schemas, fake kernels and autograd. No maths and no grids here.

One op does the whole forward (hash, sort, attention, combine) and one the whole backward, since a call into an op costs as
much host time as a launch. The stages are ops of their own too, for microbenchmarks.
"""

from __future__ import annotations

import math
from typing import get_type_hints

import torch
from torch import Tensor

from . import recompute
from .config import AttentionOptions
from .torch_backend import SortedRounds

_SCHEMA_TYPES = {list[int]: "int[]", int: "int", bool: "bool", float: "float", str: "str"}
_OPTIONS = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(AttentionOptions).items())
_INPUTS = "Tensor query, Tensor? key, Tensor value, Tensor? key_padding_mask, Tensor? seed"
_ROUNDS = ("q_order", "q_stretched", "k_order", "k_stretched")

_library = torch.library.Library("lsh_kernels", "DEF")
_library.define(
    f"attention_forward({_INPUTS}, Tensor? rotations, Tensor? q_buckets, Tensor? k_buckets, {_OPTIONS}, "
    f"str backend) -> (Tensor out, Tensor lse, {', '.join(f'Tensor {name}' for name in _ROUNDS)})"
)
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, "
    f"{', '.join(f'Tensor {name}' for name in _ROUNDS)}, {_OPTIONS}, str backend) -> "
    "(Tensor dquery, Tensor dkey, Tensor dvalue)"
)
_library.define("lsh_hash(Tensor x, Tensor rotations, int[] factors, str backend) -> Tensor")
_library.define("bucket_sort(Tensor buckets, int n_buckets, Tensor? key_padding_mask, str backend) -> Tensor")
_library.define(
    "attention_rounds(Tensor query, Tensor? key, Tensor value, Tensor? key_padding_mask, Tensor q_order, Tensor q_stretched, "
    f"Tensor? k_order, Tensor? k_stretched, {_OPTIONS}, str backend) -> (Tensor, Tensor)"
)
_library.define("combine_rounds(Tensor out, Tensor lse, str backend) -> (Tensor, Tensor)")
_library.define(
    "residual_add(Tensor stream, Tensor addend, ScalarType dtype, bool undo, str backend) -> (Tensor, Tensor, Tensor)"
)


def _implement(name: str):
    """Register a function as the kernel of an op: run on the device of its tensors, out of autocast's reach, since dtypes are
    the kernel's own."""

    def register(function):
        def kernel(*args):
            first = next(a for a in args if isinstance(a, Tensor))
            with torch.cuda.device_of(first):
                # entering an autocast context takes 10 us
                if not torch.is_autocast_enabled(first.device.type):
                    return function(*args)
                with torch.autocast(first.device.type, enabled=False):
                    return function(*args)

        _library.impl(name, kernel, "CompositeExplicitAutograd")
        return function

    return register


def attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    rotations: Tensor | None,
    q_buckets: Tensor | None,
    k_buckets: Tensor | None,
    options: AttentionOptions,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The whole forward as one op, with autograd: out [B,H,L,Dv], lse [B,H,L]."""
    inputs = (query, key, value, key_padding_mask, seed, rotations, q_buckets, k_buckets)
    out, lse, *_ = torch.ops.lsh_kernels.attention_forward(*inputs, *options, backend)
    return out, lse


def residual_add(stream: Tensor, addend: Tensor, dtype: torch.dtype, undo: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `fixed_point.residual_add` as one op: the new stream, its values in `dtype`, checksum int64 []."""
    return torch.ops.lsh_kernels.residual_add(stream, addend, dtype, undo, backend)


@_implement("attention_forward")
def _attention_forward(query, key, value, key_padding_mask, seed, rotations, q_buckets, k_buckets, *options):
    *options, backend = options
    options = AttentionOptions(*options)
    if rotations is not None and recompute.is_active():
        q_buckets, k_buckets = _kept_buckets(query, key, rotations, options.factors, backend)
        rotations = None
    # nothing to launch for an empty batch
    if backend == "triton" and query.shape[0]:
        from .csrc_triton.pipeline import attention_forward
    else:
        from .torch_backend import attention_forward
    out, lse, state = attention_forward(query, key, value, key_padding_mask, seed, rotations, q_buckets, k_buckets, options)
    if state.k_order is None:
        # an op's outputs may not be one tensor twice
        k_rounds = (query.new_empty(0, dtype=torch.int32), query.new_empty(0, dtype=torch.int32))
    else:
        k_rounds = (state.k_order, state.k_stretched)
    return out, lse, state.q_order, state.q_stretched, *k_rounds


def _kept_buckets(query, key, rotations, factors, backend):
    """Bucket ids of queries and keys (None if shared), kept in as few bytes as they need if this run will be repeated."""
    dtype = torch.uint8 if math.prod(factors) <= 256 else torch.int16
    hashed = recompute.keep(
        lambda: [None if x is None else _lsh_hash(x, rotations, factors, backend).to(dtype) for x in (query, key)]
    )
    return [None if buckets is None else buckets.to(torch.int32) for buckets in hashed]


@torch.library.register_fake("lsh_kernels::attention_forward", lib=_library)
def _(query, key, value, key_padding_mask, seed, rotations, q_buckets, k_buckets, *options):
    options = AttentionOptions(*options[:-1])
    B, H, L, _ = query.shape
    if rotations is not None:
        n_hashes = rotations.shape[2]
    else:
        n_hashes = 0 if q_buckets is None else q_buckets.shape[2]
    out = query.new_empty((B, H, L, value.shape[-1]))
    lse = query.new_empty((B, H, L), dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    q_rounds = [query.new_empty((B, H, n_hashes, L), dtype=torch.int32) for _ in range(2)]
    separate = options.hashed and key is not None
    k_shape = (B, value.shape[1], n_hashes, value.shape[2]) if separate else (0,)
    return out, lse, *q_rounds, *(query.new_empty(k_shape, dtype=torch.int32) for _ in range(2))


@_implement("attention_backward")
def _attention_backward(
    dout,
    dlse,
    query,
    key,
    value,
    key_padding_mask,
    seed,
    out,
    lse,
    q_order,
    q_stretched,
    k_order,
    k_stretched,
    *options,
):
    *options, backend = options
    options = AttentionOptions(*options)
    if backend == "triton" and query.shape[0]:
        from .csrc_triton.pipeline import attention_backward
    else:
        from .torch_backend import attention_bwd as attention_backward
    k_rounds = (None, None) if k_order.numel() == 0 else (k_order, k_stretched)
    state = SortedRounds(q_order, q_stretched, *k_rounds)
    dquery, dkey, dvalue = attention_backward(dout, dlse, query, key, value, key_padding_mask, seed, out, lse, state, options)
    return dquery, query.new_empty(0) if dkey is None else dkey, dvalue


@torch.library.register_fake("lsh_kernels::attention_backward", lib=_library)
def _(dout, dlse, query, key, value, *_):
    empty = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, value)]
    return empty[0], query.new_empty(0 if key is None else key.shape), empty[1]


def _save_for_backward(ctx, inputs, output):
    query, key, value, key_padding_mask, seed, _, _, _, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, key_padding_mask, seed, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse, *_):
    query, key, value, key_padding_mask, seed, out, lse, *rounds = ctx.saved_tensors
    n_inputs = 9 + len(ctx.options)
    if dout is None and dlse is None:
        return (None,) * n_inputs
    if dout is None:
        dout = torch.zeros_like(out)
    dquery, dkey, dvalue = torch.ops.lsh_kernels.attention_backward(
        dout, dlse, query, key, value, key_padding_mask, seed, out, lse, *rounds, *ctx.options, ctx.backend
    )
    return dquery, None if key is None else dkey, dvalue, *(None,) * (n_inputs - 3)


torch.library.register_autograd("lsh_kernels::attention_forward", _differentiate, setup_context=_save_for_backward, lib=_library)


def _refuse_gradient(op: str, why: str) -> None:
    def refuse(ctx, *_):
        raise NotImplementedError(f"lsh_kernels: {why}")

    torch.library.register_autograd(f"lsh_kernels::{op}", refuse, lib=_library)


_refuse_gradient("attention_backward", "LSH attention can't be differentiated twice")


@_implement("lsh_hash")
def _lsh_hash(x, rotations, factors, backend):
    if backend == "triton" and x.shape[0]:
        from .csrc_triton.hashing import lsh_hash
    else:
        from .torch_backend import lsh_hash
    return lsh_hash(x, rotations, factors)


@torch.library.register_fake("lsh_kernels::lsh_hash", lib=_library)
def _(x, rotations, factors, backend):
    B, H, L, _ = x.shape
    return x.new_empty((B, H, rotations.shape[2], L), dtype=torch.int32)


@_implement("bucket_sort")
def _bucket_sort(buckets, n_buckets, key_padding_mask, backend):
    if backend == "triton" and buckets.shape[0]:
        from .csrc_triton.bucket_sort import bucket_sort
    else:
        from .torch_backend import bucket_sort
    return bucket_sort(buckets, n_buckets, key_padding_mask)


@torch.library.register_fake("lsh_kernels::bucket_sort", lib=_library)
def _(buckets, n_buckets, key_padding_mask, backend):
    return buckets.new_empty(buckets.shape, dtype=torch.int32)


@_implement("attention_rounds")
def _attention_rounds(query, key, value, key_padding_mask, q_order, q_stretched, k_order, k_stretched, *options):
    *options, backend = options
    if backend == "triton" and query.shape[0]:
        from .csrc_triton.pipeline import attention_rounds
    else:
        from .torch_backend import attention_rounds
    state = SortedRounds(q_order, q_stretched, k_order, k_stretched)
    return attention_rounds(query, key, value, key_padding_mask, None, state, AttentionOptions(*options))


@torch.library.register_fake("lsh_kernels::attention_rounds", lib=_library)
def _(query, key, value, key_padding_mask, q_order, q_stretched, k_order, k_stretched, *options):
    B, H, L, _ = query.shape
    n_rounds = q_order.shape[2] + (AttentionOptions(*options[:-1]).local_window > 0)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((B, H, n_rounds, L, value.shape[3])), query.new_empty((B, H, n_rounds, L), dtype=lse_dtype)


_refuse_gradient("attention_rounds", "attention_rounds has no gradient; train with lsh_attention")


@_implement("combine_rounds")
def _combine_rounds(out, lse, backend):
    if backend == "triton" and out.shape[0]:
        from .csrc_triton.combine_rounds import combine_rounds
    else:
        from .torch_backend import combine_rounds
    return combine_rounds(out, lse)


@torch.library.register_fake("lsh_kernels::combine_rounds", lib=_library)
def _(out, lse, backend):
    B, H, R, L, Dv = out.shape
    return out.new_empty((B, H, L, Dv)), lse.new_empty((B, H, L))


_refuse_gradient("combine_rounds", "combine_rounds has no gradient; train with lsh_attention")


@_implement("residual_add")
def _residual_add(stream, addend, dtype, undo, backend):
    if backend == "triton" and stream.numel():
        from .csrc_triton.residual import residual_add
    else:
        from .fixed_point import residual_add
    return residual_add(stream, addend, dtype, undo)


@torch.library.register_fake("lsh_kernels::residual_add", lib=_library)
def _(stream, addend, dtype, undo, backend):
    return torch.empty_like(stream), stream.new_empty(stream.shape, dtype=dtype), stream.new_empty((), dtype=torch.int64)


_refuse_gradient("residual_add", "residual_add has no gradient; train with ReversibleSequence(blocks, exact=True)")
