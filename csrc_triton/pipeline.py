"""The whole forward in launches: hash, sort, attention, combine; and the whole backward."""

import math
from typing import NamedTuple

import torch

from .attention_bwd import attention_bwd
from .attention_fwd import attend_rounds, attention_fwd
from .bucket_sort import sort_buckets
from .hashing import hash_rows


class SortedRounds(NamedTuple):
    """Per round the orders (slot -> position) and stretched slots (position -> slot + bucket * stretch), int32."""

    q_order: torch.Tensor
    q_stretched: torch.Tensor
    k_order: torch.Tensor | None
    k_stretched: torch.Tensor | None


def attention_forward(query, key, value, key_padding_mask, seed, rotations, q_buckets, k_buckets, options):
    """Hash (or take the buckets given), sort, attend, combine.

    Args:
        query, key, value, key_padding_mask, seed, options: as in `attention_fwd`.
        rotations: [H or Hkv or 1, D, R, W_rot], or None with buckets.
        q_buckets, k_buckets: int32 or int64 [B, H, R, L], [B, Hkv, R, S], or None.

    Returns:
        out [B, H, L, Dv], lse [B, H, L] float32, `SortedRounds` for backward.
    """
    query, key, value = _with_contiguous_rows(query, key, value)
    n_buckets, stretch = math.prod(options.factors), min(options.window, value.shape[2]) + 1

    def sort(x, buckets, padding, norm_eps):
        counts = inverse_norm = None
        # where a norm is wanted of x, the same launch counts the buckets given
        if buckets is None or norm_eps is not None:
            buckets, inverse_norm, counts = hash_rows(x, rotations, options.factors, padding, norm_eps, buckets=buckets)
        return *sort_buckets(buckets, n_buckets, stretch, padding, counts), inverse_norm

    inverse_norm = None
    if not options.hashed:
        none = query.new_empty((*query.shape[:2], 0, query.shape[2]), dtype=torch.int32)
        state = SortedRounds(none, none.clone(), None, None)
    elif key is None:
        *rounds, inverse_norm = sort(query, q_buckets, key_padding_mask, options.norm_eps)
        state = SortedRounds(*rounds, None, None)
    else:
        state = SortedRounds(*sort(query, q_buckets, None, None)[:2], *sort(key, k_buckets, key_padding_mask, None)[:2])
    out, lse = attention_fwd(query, key, value, key_padding_mask, seed, state, options, inverse_norm)
    return out, lse, state


def attention_rounds(query, key, value, key_padding_mask, seed, state, options):
    """Attention of each round apart: out [B, H, R, L, Dv], lse [B, H, R, L]. Arguments as in `attend_rounds`, any strides."""
    query, key, value = _with_contiguous_rows(query, key, value)
    return attend_rounds(query, key, value, key_padding_mask, seed, state, options)[:2]


def attention_backward(dout, dlse, query, key, value, key_padding_mask, seed, out, lse, state, options):
    """Gradients of `attention_forward`: dquery, dkey (None if shared), dvalue. Arguments as in `attention_bwd`, any strides."""
    dout, query, key, value = _with_contiguous_rows(dout, query, key, value)
    return attention_bwd(dout, dlse, query, key, value, key_padding_mask, seed, out, lse, state, options)


def _with_contiguous_rows(*tensors):
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
