"""The oracle: dense LSH attention, slow and obviously right, straight from the definitions. Tests and diagnosis only.

A pair of query i and key j has a count N_ij: in how many ways (round and slot) key j passes the hard masks of query i.
`candidates` builds N literally, one [L, S] comparison per round; attention is then a softmax of `s_ij + log N_ij` with
the diagonal rules of shared QK. Everything is differentiable, so the gradients of the oracle are autograd's.

Source: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020 (arXiv 2001.04451).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from lsh_kernels.config import bucket_factors

# what the paper takes off the logit of a token's own key
SELF_PENALTY = 1e5


def lsh_attention(
    query, key, value, *, config, is_causal=False, key_padding_mask=None, dropout_p=0.0, scale=None,
    buckets=None, rotations=None, seed=None, dtype=torch.float64,
):  # fmt: skip
    """LSH attention, dense.

    With s_ij = scale * q_i.k_j and N from `candidates`: lse_i = log sum_j N_ij exp(s_ij), p_ij = N_ij exp(s_ij-lse_i),
    out_i = sum_j p_ij v_j. Shared QK has k_j = q_j / ||q_j||. A query that sees no key at all attends its own, if that
    is no padding: shared QK always does (out = v_i, lse = s_ii - 1e5), separate keys do where L == S (out = v_i,
    lse = s_ii). Otherwise out is 0 and lse is -inf.
    Rows at padded positions are zeroed before use: keys and values, and with shared QK the queries too, for they are
    the same rows. NaN or inf there reach no output and no gradient.

    Args:
        query: [B, H, L, D]. key: [B, Hkv, S, D], or None for shared QK. value: [B, Hkv, S, Dv].
        config: an `LSHConfig`.
        key_padding_mask: [B, S] bool, True = ignore.
        scale: None means 1 for shared QK and D**-0.5 for separate keys.
        buckets: integers [B, H, R, L]; with separate keys a pair ([B, H, R, L], [B, Hkv, R, S]). Clamped to [0, N).
        rotations: [Hkv or 1, D, R, W_rot], to hash with instead. Exactly one of the two.
        seed: int64 tensor of one element, for dropout_p > 0; see `dropout_mask`.
        dtype: of the inputs (rounded to it), the two matmuls and out. Logits, softmax and lse are float64 where dtype
            is, else float32.

    Returns:
        out [B, H, L, Dv] in `dtype`, lse [B, H, L] (natural log, before dropout).

    Raises:
        ValueError: buckets and rotations both given or both missing; dropout without a seed; causal, local_window or
            span="chunk" with L != S.
    """
    if (buckets is None) == (rotations is None):
        raise ValueError("buckets, rotations: wanted exactly one of the two")
    shared = key is None
    q_len, k_len = query.shape[2], value.shape[2]
    if buckets is None:
        n_buckets = config.factors(k_len)
        buckets = lsh_hash(query, rotations, n_buckets)
        if not shared:
            buckets = buckets, lsh_hash(key, rotations, n_buckets)
    counts = candidates(config, buckets, q_len, k_len, shared=shared, is_causal=is_causal, key_padding_mask=key_padding_mask)
    # queries without any target fall back on their own key, on the diagonal
    own = torch.zeros_like(counts, dtype=torch.bool)  # [B, H, L, S]
    if q_len == k_len:
        own |= (counts == 0).all(-1, keepdim=True) & torch.eye(q_len, dtype=torch.bool, device=counts.device)
        if key_padding_mask is not None:
            own &= ~key_padding_mask[:, None, None, :]

    if shared:
        query = _round(query, dtype, key_padding_mask)
        key = _unit(query, config.norm_eps)
    scale = scale if scale is not None else 1.0 if shared else query.shape[-1] ** -0.5
    offset = -SELF_PENALTY * own if shared else 0
    return _attend(query, key, value, counts + own, offset, key_padding_mask, dropout_p, scale, seed, dtype)


def local_attention(
    query, key, value, *, window=None, chunk_length=None, chunks_before=1, chunks_after=0, wrap=False, is_causal=False,
    key_padding_mask=None, dropout_p=0.0, scale=None, seed=None, dtype=torch.float64,
):  # fmt: skip
    """Attention to near positions, dense: no hash, no self mask, no fallback (without a target: out 0, lse -inf).

    window: query i sees keys i - window .. i + window. chunk_length: a query of chunk c = i // chunk_length sees the
    chunks c - chunks_before .. c + chunks_after; with `wrap` modulo the number of chunks, each at most once.

    Args: exactly one of `window` and `chunk_length`; the rest as in `lsh_attention`, with L = S.

    Returns: out [B, H, L, Dv], lse [B, H, L].

    Raises:
        ValueError: both or neither of window and chunk_length; wrap with window; L != S; dropout without a seed.
    """
    if (window is None) == (chunk_length is None):
        raise ValueError("window, chunk_length: wanted exactly one of the two")
    if wrap and chunk_length is None:
        raise ValueError("wrap: wanted chunk_length, got window")
    length = query.shape[2]
    if key.shape[2] != length:
        raise ValueError(f"key: got length {key.shape[2]}, wanted {length} (that of query)")
    i = torch.arange(length, device=query.device)[:, None]  # [L, 1]
    j = torch.arange(length, device=query.device)[None, :]  # [1, S]
    if window is not None:
        visible = (i - window <= j) & (j <= i + window)
    else:
        n_chunks = math.ceil(length / chunk_length) if wrap else None
        visible = _near_chunks(i // chunk_length, j // chunk_length, chunks_before, chunks_after, n_chunks)
    counts = visible & _pointwise(i, j, is_causal, key_padding_mask)  # [B or 1, 1, L, S]
    scale = scale if scale is not None else query.shape[-1] ** -0.5
    return _attend(query, key, value, counts.long(), 0, key_padding_mask, dropout_p, scale, seed, dtype)


def candidates(config, buckets, q_len, k_len, *, shared, is_causal=False, key_padding_mask=None):
    """N_ij: in how many (round, slot) ways key j passes the hard masks of query i; with `config.dedupe` at most 1.

    The interval of the span, key padding, causality and the bucket are the hard masks. A shared key never counts for
    the query at its own position; the rule for rows that are left with nothing is `lsh_attention`'s.

    Args:
        buckets: [B, H, R, L] if `shared`, else the pair ([B, H, R, L], [B, Hkv, R, S]).

    Returns: int64 [B, H, L, S].

    Raises: ValueError: is_causal, local_window or span="chunk" with q_len != k_len.
    """
    if q_len != k_len and (is_causal or config.local_window or config.span == "chunk"):
        raise ValueError(f"key: got length {k_len}, wanted {q_len} (query's) where causal, with local_window or chunks")
    n_buckets = math.prod(config.factors(k_len))
    q_buckets, k_buckets = (buckets, buckets) if shared else buckets
    q_buckets = q_buckets.long().clamp(0, n_buckets - 1)
    k_buckets = _with_pad_bucket(k_buckets, n_buckets, key_padding_mask)
    k_buckets = k_buckets.repeat_interleave(q_buckets.shape[1] // k_buckets.shape[1], dim=1)  # [B, H, R, S]
    if shared:
        q_buckets = k_buckets
    # slot of each position in the order of its round; two argsorts invert the stable sort
    q_slot = q_buckets.argsort(dim=-1, stable=True).argsort(dim=-1)[..., :, None]  # [B, H, R, L, 1]
    k_slot = k_buckets.argsort(dim=-1, stable=True).argsort(dim=-1)[..., None, :]  # [B, H, R, 1, S]
    same_bucket = q_buckets[..., :, None] == k_buckets[..., None, :]  # [B, H, R, L, S]
    i = torch.arange(q_len, device=q_buckets.device)[:, None]  # [L, 1]
    j = torch.arange(k_len, device=q_buckets.device)[None, :]  # [1, S]

    if config.span == "bucket":
        visible = same_bucket
    elif config.span == "window":
        # one past the last key of i's bucket that is not after i (L == S; else in proportion); shared: i's slot + 1
        bucket_start = (k_buckets[..., None, :] < q_buckets[..., :, None]).sum(-1, keepdim=True)
        end = bucket_start + (same_bucket & (j * q_len <= i * k_len)).sum(-1, keepdim=True)  # [B, H, R, L, 1]
        ahead = 0 if is_causal else config.window_length
        visible = same_bucket & (end - config.window_length - 1 <= k_slot) & (k_slot < end + ahead)
    else:
        q_chunk, k_chunk = q_slot // config.chunk_length, k_slot // config.chunk_length
        n_rounds = q_chunk.shape[2]
        n_chunks = math.ceil(k_len / config.chunk_length)
        if config.wrap:
            # the rounds are one cyclic sequence of chunks: a query of round r may see key slots of other rounds
            first = n_chunks * torch.arange(n_rounds, device=q_chunk.device)[:, None, None]  # [R, 1, 1]
            q_chunk = (q_chunk + first)[:, :, :, None]  # [B, H, R, 1, L, 1]
            k_chunk = (k_chunk + first)[:, :, None, :]  # [B, H, 1, R, 1, S]
            visible = _near_chunks(q_chunk, k_chunk, config.chunks_before, config.chunks_after, n_rounds * n_chunks)
            visible = visible.flatten(2, 3)  # [B, H, R * R, L, S]
        else:
            visible = _near_chunks(q_chunk, k_chunk, config.chunks_before, config.chunks_after)
            if config.within_bucket:
                visible = visible & same_bucket

    counts = visible.sum(2)  # [B, H, L, S]
    if config.local_window:
        counts = counts + (abs(i - j) <= config.local_window)
    counts = counts * _pointwise(i, j, is_causal, key_padding_mask)
    if shared:
        counts = counts * (i != j)
    return counts.clamp(max=1) if config.dedupe else counts


def lsh_hash(x, rotations, n_buckets):
    """h(x) = argmax([xR ; -xR]) per round and factor, in float64; ties go to the lowest index.

    Args:
        x: [B, H, L, D]. rotations: [heads, D, R, W_rot], heads a divisor of H. n_buckets: even int or tuple of them;
            factors are combined as h_0 + N_0 h_1 + N_0 N_1 h_2 ..

    Returns: int32 [B, H, R, L].

    Source: Andoni et al. 2015 (arXiv 1509.02897).
    """
    rotations = rotations.repeat_interleave(x.shape[1] // rotations.shape[0], dim=0)  # [H, D, R, W_rot]
    rotated = torch.einsum("bhld,hdrw->bhrlw", x.detach().double(), rotations.double())
    buckets, stride, column = 0, 1, 0
    for n in bucket_factors(n_buckets):
        y = rotated[..., column : column + n // 2]
        buckets = buckets + stride * torch.cat([y, -y], dim=-1).argmax(-1)
        stride, column = stride * n, column + n // 2
    return buckets.int()


def bucket_sort(buckets, n_buckets, key_padding_mask=None):
    """Stable sort of positions by bucket, padded ones last: order (slot -> position), int32 [B, H, R, L].

    Args:
        buckets: integers [B, H, R, L], clamped to [0, N). n_buckets: N, or its factors. key_padding_mask: [B, L] bool.
    """
    n_buckets = math.prod(bucket_factors(n_buckets))
    return _with_pad_bucket(buckets, n_buckets, key_padding_mask).sort(dim=-1, stable=True).indices.int()


def dropout_mask(seed, B, H, L, S, dropout_p):
    """Which probabilities dropout keeps: bool [B, H, L, S], a pure function of (seed, b, h, i, j).

    u = word 0 of Philox4x32 with 7 rounds, key = (low, high) 32 bits of the seed, counter = (j, i, h, b); keep where
    u >= round(dropout_p * 2**32). The kept ones are scaled by 1 / (1 - dropout_p); p = 1 keeps none.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    b, h, i, j = np.ogrid[:B, :H, :L, :S]
    counter = [c.astype(np.uint64) for c in (j, i, h, b)]
    word = philox4x32(int(seed), counter, n_rounds=7)[0]
    keep = np.broadcast_to(word >= np.uint64(round(dropout_p * 2**32)), (B, H, L, S))
    return torch.from_numpy(keep.copy())


def philox4x32(seed, counter, n_rounds):
    """Philox4x32: four 32-bit words of random bits for a 64-bit seed and a counter of four words (uint64 arrays)."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    for _ in range(n_rounds):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (product1 >> shift) ^ c1 ^ np.uint64(k0), product1 & low
        c2, c3 = (product0 >> shift) ^ c3 ^ np.uint64(k1), product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _attend(query, key, value, counts, offset, key_padding_mask, dropout_p, scale, seed, dtype):
    """softmax(s + log counts + offset) @ value. counts: int [B or 1, H or 1, L, S], 0 = not visible."""
    softmax_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    n_heads = query.shape[1]
    query = _round(query, dtype)
    key = _round(key, dtype, key_padding_mask).repeat_interleave(n_heads // key.shape[1], dim=1)
    value = _round(value, dtype, key_padding_mask).repeat_interleave(n_heads // value.shape[1], dim=1)

    logits = (query @ key.mT).to(softmax_dtype) * scale  # [B, H, L, S]
    logits = logits + counts.clamp(min=1).to(softmax_dtype).log() + offset
    no_target = (counts == 0).all(-1, keepdim=True)  # [B or 1, H or 1, L, 1]
    # rows without a target stay finite up to the last step, so that their gradients are 0 and not NaN
    logits = logits.masked_fill((counts == 0) & ~no_target, -math.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    probs = (logits - lse).exp().masked_fill(no_target, 0.0)
    if dropout_p > 0:
        if seed is None:
            raise ValueError("seed: got None, wanted an int64 tensor where dropout_p > 0")
        keep = dropout_mask(seed, *probs.shape, dropout_p).to(probs.device)
        probs = probs * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    out = probs.to(dtype) @ value
    return out, lse.masked_fill(no_target, -math.inf).squeeze(-1)


def _unit(x, norm_eps):
    """x / sqrt(sum(x^2) + D * norm_eps); a zero vector stays zero and gets no gradient."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    square = (wide * wide).sum(-1, keepdim=True)
    zero = square == 0
    norm = (square + x.shape[-1] * norm_eps).masked_fill(zero, 1.0).sqrt()
    return (wide.masked_fill(zero, 0.0) / norm).to(x.dtype)


def _round(x, dtype, key_padding_mask=None):
    """x [B, H, S, D] in `dtype`, with zeros at padded positions."""
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    return x.to(dtype)


def _with_pad_bucket(buckets, n_buckets, key_padding_mask):
    """Buckets clamped to [0, N), padded positions in a bucket N of their own."""
    buckets = buckets.long().clamp(0, n_buckets - 1)
    if key_padding_mask is not None:
        buckets = buckets.masked_fill(key_padding_mask[:, None, None, :], n_buckets)
    return buckets


def _pointwise(i, j, is_causal, key_padding_mask):
    """Key j is no padding and, if causal, not after query i: bool [B or 1, 1, L, S]."""
    allowed = (j <= i) if is_causal else torch.ones_like(j <= i)
    allowed = allowed[None, None]
    return allowed if key_padding_mask is None else allowed & ~key_padding_mask[:, None, None, :]


def _near_chunks(q_chunk, k_chunk, before, after, cycle=None):
    """Is k_chunk one of q_chunk - before .. q_chunk + after, modulo `cycle` if given (then each at most once)?"""
    if cycle is None:
        return (q_chunk - before <= k_chunk) & (k_chunk <= q_chunk + after)
    visible = torch.zeros_like(q_chunk == k_chunk)
    for offset in range(-before, after + 1):
        visible = visible | ((q_chunk + offset) % cycle == k_chunk)
    return visible
