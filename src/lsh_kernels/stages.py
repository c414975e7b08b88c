"""The stages of `lsh_attention` one by one, for microbenchmarks: `lsh_hash`, `bucket_sort`, `attention_rounds`, `combine_rounds`.

    buckets = lsh_hash(query, rotations, n_buckets)
    rounds = sort_rounds(bucket_sort(buckets, n_buckets), buckets, config=config)
    out, lse = combine_rounds(*attention_rounds(query, None, value, rounds, config=config))

They have no gradients; `lsh_attention`, which does all of them in one op, is what to train with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import functional
from .config import LSHConfig
from .functional import bucket_sort, combine_rounds, lsh_hash
from .torch_backend import SortedRounds, padded_buckets, sorted_rounds

__all__ = ["SortedRounds", "attention_rounds", "bucket_sort", "combine_rounds", "lsh_hash", "sort_rounds"]


def sort_rounds(
    order: Tensor | tuple[Tensor, Tensor],
    buckets: Tensor | tuple[Tensor, Tensor],
    *,
    config: LSHConfig = LSHConfig(),  # noqa: B008 (frozen)
    key_padding_mask: Tensor | None = None,
) -> SortedRounds:
    """What `attention_rounds` reads of the sorted rounds: order, and per position one number that fixes slot and bucket.

    Args:
        order: int32 [B, H, R, L] of `bucket_sort`; for separate keys a pair ([B, H, R, L], [B, Hkv, R, S]), that of the
            queries sorted without the mask, that of the keys with it.
        buckets: the ids that were sorted, int32 or int64, in the same form.
        config: see `LSHConfig`; its `n_hashes` is not read.
        key_padding_mask: bool [B, S], True = ignore: the one that was given to `bucket_sort`.

    Returns:
        `SortedRounds`: `q_order`, `q_stretched` and for separate keys `k_order`, `k_stretched` (else None), int32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    if not isinstance(config, LSHConfig):
        raise TypeError(f"config: got {type(config).__name__}, wanted an LSHConfig")
    separate = isinstance(buckets, (tuple, list))
    pairs = tuple(zip(("buckets", "order"), (buckets, order)))
    for name, given in pairs:
        parts = given if separate else (given,)
        if not isinstance(parts, (tuple, list)) or len(parts) != 1 + separate or not all(isinstance(x, Tensor) for x in parts):
            wanted = "a pair of tensors (of queries, of keys)" if separate else "a tensor"
            raise TypeError(f"{name}: got {type(given).__name__}, wanted {wanted}")
    (q_buckets, k_buckets), (q_order, k_order) = ((given if separate else (given, None)) for _, given in pairs)
    for ids, slots in ((q_buckets, q_order), (k_buckets, k_order)):
        if ids is None:
            continue
        if ids.dim() != 4 or 0 in ids.shape[1:]:
            raise ValueError(f"buckets: got shape {tuple(ids.shape)}, wanted [B, H, R, L], only B may be 0")
        functional.check_integer("buckets", ids)
        if slots.shape != ids.shape or slots.dtype != torch.int32 or slots.device != ids.device:
            got = f"{slots.dtype} {tuple(slots.shape)} on {slots.device}"
            raise ValueError(f"order: got {got}, wanted torch.int32 {tuple(ids.shape)} on {ids.device} as buckets")
    keys = k_buckets if separate else q_buckets
    functional.check_padding(key_padding_mask, keys.shape[0], keys.shape[3], keys.device)
    factors = config.factors(keys.shape[3])
    functional.check_slots(config, math.prod(factors), keys.shape[3])
    options = config.options(factors, is_causal=False, dropout_p=0.0, scale=1.0)
    q_buckets, k_buckets = padded_buckets(q_buckets, k_buckets, key_padding_mask, options)
    return sorted_rounds(q_order, q_buckets, k_order, k_buckets, options)


def attention_rounds(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rounds: SortedRounds,
    *,
    config: LSHConfig = LSHConfig(),  # noqa: B008 (frozen)
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each hash round apart, over the intervals that `config` gives in its sorted order; without dropout.

    `combine_rounds` of what comes back is `lsh_attention`, but for a query without any candidate: there it is 0 and -inf, and
    `lsh_attention` has it attend itself.

    Args:
        query, key, value, is_causal, key_padding_mask, scale, backend: as in `lsh_attention`.
        rounds: `sort_rounds` of R rounds for this config and mask; `config.n_hashes` is not read.
        config: see `LSHConfig`. With `dedupe` a pair counts in the first round that has it.

    Returns:
        out [B, H, R', L, Dv] in query's dtype and lse [B, H, R', L] (float32, float64 for float64; natural log), where R' is R
        or, with `local_window`, R + 1 with the local round last. Where a round has no candidate for a query lse is -inf, and out
        is not defined: `combine_rounds` does not read it. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
        RuntimeError: `backend` can't run, and why.
    """
    shared = key is None
    functional.check_call(query, key, value, key_padding_mask, config, is_causal)
    _, scale = functional.check_numbers(0.0, scale, 1.0 if shared else query.shape[3] ** -0.5)
    _check_rounds(rounds, query, value, shared)
    options = config.options(config.factors(value.shape[2]), is_causal=is_causal, dropout_p=0.0, scale=scale)
    state = (rounds.q_order, rounds.q_stretched, rounds.k_order, rounds.k_stretched)
    chosen = functional.choose_backend(backend, query)
    return torch.ops.lsh_kernels.attention_rounds(query, key, value, key_padding_mask, *state, *options, chosen)


def _check_rounds(rounds: SortedRounds, query: Tensor, value: Tensor, shared: bool) -> None:
    if not isinstance(rounds, SortedRounds):
        raise TypeError(f"rounds: got {type(rounds).__name__}, wanted the SortedRounds of sort_rounds")
    if shared != (rounds.k_order is None):
        kinds = "shared QK", "separate keys"
        raise ValueError(f"rounds: got those of {kinds[shared]}, wanted those of {kinds[not shared]} as key has it")
    n_hashes = rounds.q_order.shape[2]
    for name, x, of in (("q_order", rounds.q_order, query), ("k_order", rounds.k_order, value)):
        if x is None:
            continue
        shape = (*of.shape[:2], n_hashes, of.shape[2])
        if x.shape != shape or x.device != query.device:
            raise ValueError(f"rounds.{name}: got {tuple(x.shape)} on {x.device}, wanted {shape} on {query.device}")
