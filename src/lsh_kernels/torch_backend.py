"""The whole pipeline in plain torch (and NumPy's radix sort): any device, O(L) memory, blocks that stay in cache.

Every variant of the attention is one walk over sorted slots, see `torch_walk`.

Sources: Kitaev et al. 2020 (the attention), Andoni et al. 2015 (the hash), Dao 2022 (the backward from lse), Salmon et al.
2011 (Philox).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import AttentionOptions
from .torch_walk import (
    Block,
    Buffers,
    Entries,
    Exclusions,
    Rows,
    Walk,
    add_rows,
    bucket_stretch,
    compute_dtype,
    hashed_rounds,
    identity_round,
    invert,
    walks_of,
)

# what an excluded pair's logit is lowered by: near the end of float32, but finite
_EXCLUDE = 1e38
# logits are in base 2: exp2 takes half the time of exp on a CPU, and a twentieth where it underflows
_LOG2E = math.log2(math.e)
# slots of the heads that are walked together; they belong to one batch element, so that no sample can touch another
_HEAD_BLOCK_SLOTS = 2**14
_PHILOX_ROUNDS = 7
# rows that are projected at a time
_HASH_BLOCK = 4096


def lsh_hash(x: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Angular LSH: `argmax([xR ; -xR])` per round and factor, as int32 [B,H,R,L].

    x [B,H,L,D], rotations [Hr,D,R,W_rot] with H % Hr = 0.
    """
    B, H, L, _ = x.shape
    n_rot_heads, D, R, width = rotations.shape
    dtype = compute_dtype(x.dtype)
    # columns first: every reduction below runs over whole vectors of positions
    rot = rotations.to(dtype).permute(0, 2, 3, 1).reshape(n_rot_heads, R * width, D)
    buckets = torch.empty(B * H, R, L, dtype=torch.int32, device=x.device)
    heads = max(1, _HASH_BLOCK // L)
    buffers = Buffers(x.device)
    for first in range(0, B * H, heads):
        block = torch.arange(first, min(first + heads, B * H), device=x.device)
        n = len(block)
        rows = x[first // H, first % H][None] if n == 1 else x[block // H, block % H]
        rot_block = rot.expand(n, -1, -1) if n_rot_heads == 1 else rot[block % H // (H // n_rot_heads)]
        positive = buffers("positive", (len(factors), n, R, L), torch.bool)
        countdown = buffers("countdown", (len(factors), n, R, L), dtype)
        for start in range(0, L, _HASH_BLOCK):
            part = slice(start, start + _HASH_BLOCK)
            columns = rows[:, part].to(dtype).transpose(1, 2)
            y = torch.bmm(rot_block, columns, out=buffers("y", (n, R * width, columns.shape[2]), dtype))
            _argmax_of_signed(y.view(n, R, width, -1), factors, positive[..., part], countdown[..., part])
        bucket, stride = torch.zeros((), dtype=torch.int32, device=x.device), 1
        for i, factor in enumerate(factors):
            index = factor - countdown[i].to(torch.int32) - factor // 2 * positive[i]
            bucket = bucket + stride * index
            stride *= factor
        buckets[first : first + n] = bucket
    return buckets.view(B, H, R, L)


def _argmax_of_signed(y: Tensor, factors: tuple[int, ...], positive: Tensor, countdown: Tensor) -> None:
    """The first argmax of [y ; -y] per factor, of its columns of y [.., W_rot, rows], as two numbers, each [factors, .., rows]:
    whether it is in y, and how many columns of its half are left from it on. Overwrites y."""
    column = 0
    for i, n in enumerate(factors):
        half = n // 2
        part = y[..., column : column + half, :]
        high, low = part.amax(-2), part.amin(-2)
        torch.ge(high, -low, out=positive[i])
        # in place, and as numbers: see the masks of torch_walk
        part.eq_(torch.where(positive[i], high, low).unsqueeze(-2))
        part.mul_(torch.arange(half, 0, -1, dtype=y.dtype, device=y.device)[:, None])
        # a row of NaN equals nothing: it gets the last column
        torch.amax(part, -2, out=countdown[i]).clamp_(min=1)
        column += half


def bucket_sort(buckets: Tensor, n_buckets: int, key_padding_mask: Tensor | None = None) -> Tensor:
    """Stable sort of positions by bucket, padded positions last. buckets [B,H,R,L] -> order int32 [B,H,R,L]."""
    return _sort(_with_padding(buckets, n_buckets, key_padding_mask)).to(torch.int32)


def _with_padding(buckets: Tensor, n_buckets: int, key_padding_mask: Tensor | None) -> Tensor:
    """Clamp bucket ids to [0, n_buckets) and give padded positions the bucket n_buckets, a bucket of their own."""
    buckets = buckets.clamp(0, n_buckets - 1)
    if key_padding_mask is not None:
        buckets = buckets.masked_fill(key_padding_mask[:, None, None, :], n_buckets)
    return buckets


def _sort(buckets: Tensor) -> Tensor:
    if buckets.device.type == "cpu":
        # NumPy sorts 16-bit keys by radix, ten times faster than torch.sort; 32,768 buckets and the padding fit
        return torch.from_numpy(np.argsort(buckets.numpy().astype(np.uint16), axis=-1, kind="stable"))
    return torch.sort(buckets, dim=-1, stable=True).indices


@dataclass(frozen=True)
class SortedRounds:
    """What forward leaves for backward, besides its tensors: per round the sorted orders of queries and of separate keys.

    `order` [B,H,R,L] int32: slot -> position. `stretched` [B,H,R,L] int32: position -> t = slot + bucket * stretch, which
    fixes slot and bucket; ~t in the last round of a query whose only target is itself. Keys: [B,Hkv,R,S], or None if shared.
    """

    q_order: Tensor
    q_stretched: Tensor
    k_order: Tensor | None
    k_stretched: Tensor | None


def sort_rounds(
    q_buckets: Tensor, k_buckets: Tensor | None, key_padding_mask: Tensor | None, options: AttentionOptions
) -> SortedRounds:
    """Sort queries (and separate keys) by bucket. In the shared case padded positions go along, last."""
    q_buckets, k_buckets = padded_buckets(q_buckets, k_buckets, key_padding_mask, options)
    return sorted_rounds(_sort(q_buckets), q_buckets, None if k_buckets is None else _sort(k_buckets), k_buckets, options)


def padded_buckets(
    q_buckets: Tensor, k_buckets: Tensor | None, key_padding_mask: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor | None]:
    """Bucket ids of queries and of separate keys in range, padded keys (without separate ones, queries) in the last bucket."""
    n_buckets = math.prod(options.factors)
    if k_buckets is None:
        return _with_padding(q_buckets, n_buckets, key_padding_mask), None
    return _with_padding(q_buckets, n_buckets, None), _with_padding(k_buckets, n_buckets, key_padding_mask)


def sorted_rounds(
    q_order: Tensor, q_buckets: Tensor, k_order: Tensor | None, k_buckets: Tensor | None, options: AttentionOptions
) -> SortedRounds:
    """The orders of queries and of separate keys with the stretched slots of their positions, from `padded_buckets`."""
    stretch = bucket_stretch(options, q_buckets.shape[3] if k_buckets is None else k_buckets.shape[3])

    def stretched(order, buckets):
        return order.to(torch.int32), (invert(order) + buckets.to(torch.int64) * stretch).to(torch.int32)

    if k_buckets is None:
        return SortedRounds(*stretched(q_order, q_buckets), None, None)
    return SortedRounds(*stretched(q_order, q_buckets), *stretched(k_order, k_buckets))


def head_walks(state: SortedRounds, b: int, heads: slice, kv_ids: Tensor, options: AttentionOptions) -> list[Walk]:
    """The walks of some heads of batch element b, whose keys are those of the heads `kv_ids`."""
    q_order, q_stretched = state.q_order[b, heads], state.q_stretched[b, heads]
    n, _, L = q_order.shape
    if not options.hashed:
        return walks_of([identity_round(n, L, False, options, q_order.device)], options)
    shared = state.k_order is None
    q_stretched = torch.where(q_stretched < 0, ~q_stretched, q_stretched)
    keys = (q_order, q_stretched) if shared else (state.k_order[b, kv_ids], state.k_stretched[b, kv_ids])
    rounds = hashed_rounds(q_order, q_stretched, *keys, shared, options)
    if options.local_window:
        local = options._replace(span="window", window=options.local_window)
        rounds.append(identity_round(n, L, shared, local, q_order.device))
    return walks_of(rounds, options)


def combine_rounds(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Weigh the rounds by softmax(lse). out [B,H,R,L,Dv], lse [B,H,R,L] -> (out [B,H,L,Dv], lse [B,H,L])."""
    weights, total = _round_weights(lse, dim=2)
    weights = weights.unsqueeze(-1)
    partial = out.to(weights.dtype).masked_fill(weights == 0, 0)
    return (weights * partial).sum(2).to(out.dtype), total


def _round_weights(lse: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Softmax over rounds, 0 where no round has a target, and logsumexp over rounds, -inf there."""
    top = lse.amax(dim, keepdim=True)
    weights = torch.exp(lse - top.masked_fill(top == -math.inf, 0))
    mass = weights.sum(dim, keepdim=True)
    # weights are normalised by their own sum: exp(lse_r - lse) loses digits where |lse| is large
    return weights / mass.clamp(min=1e-37), (top + mass.log()).squeeze(dim)


def dropout_keep(seed: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor, dropout_p: float) -> Tensor:
    """Keep-mask of pairs: word 0 of Philox4x32-7 with key `seed` and counter (key_pos, query_pos, head, batch) >= p * 2^32.

    The index tensors (int64) broadcast against each other; a pure function of positions, the same in every backend.
    """
    low32 = 0xFFFFFFFF
    key0, key1 = seed & low32, (seed >> 32) & low32
    c0, c1, c2, c3 = key_pos, query_pos, head, batch
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        # the products of two 32-bit numbers fill 64 bits: the shift must not carry the sign
        high0, high1 = (product0 >> 32) & low32, (product1 >> 32) & low32
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & low32, high0 ^ c3 ^ key1, product0 & low32
        key0, key1 = (key0 + 0x9E3779B9) & low32, (key1 + 0xBB67AE85) & low32
    return c0 >= dropout_threshold(dropout_p)


def dropout_threshold(dropout_p: float) -> int:
    """The smallest 32-bit word that keeps a pair."""
    return round(dropout_p * 2**32)


def inverse_norm(x: Tensor, norm_eps: float, dtype: torch.dtype) -> Tensor:
    """What shared keys are multiplied with: 1 / |x|, 0 for a zero row. x [.., D] -> [..]."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    inverse = (norm.square() + x.shape[-1] * norm_eps).rsqrt() if norm_eps else 1 / norm
    return inverse.masked_fill_(norm == 0, 0)


def _dropout_scale(dropout_p: float) -> float:
    return 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p)


class _Heads:
    """Some heads of one batch element: their rows, key norms, and walks."""

    def __init__(self, tensors: _Tensors, b: int, first: int, n: int):
        o, self.tensors, self.b = tensors.options, tensors, b
        query = tensors.query
        self.heads = slice(first, first + n)
        self.n = n
        self.q_ids = torch.arange(first, first + n, device=query.device)
        self.kv_ids = self.q_ids // (query.shape[1] // tensors.value.shape[1])
        self.padding = None if tensors.padding is None else tensors.padding[b]  # [S]
        self.inverse_norm = None
        if tensors.shared:
            self.inverse_norm = inverse_norm(query[b, self.heads], o.norm_eps, tensors.dtype)  # [n, L]
            if self.padding is not None:
                self.inverse_norm.masked_fill_(self.padding, 0)

        self.walks = head_walks(tensors.state, b, self.heads, self.kv_ids, o)


@dataclass(frozen=True)
class _Tensors:
    """The arguments of forward that backward needs again."""

    query: Tensor
    key: Tensor | None
    value: Tensor
    padding: Tensor | None
    seed: Tensor | None
    state: SortedRounds
    options: AttentionOptions

    @property
    def shared(self) -> bool:
        return self.key is None

    @property
    def k_len(self) -> int:
        return self.value.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.query.dtype)

    @property
    def attends_self(self) -> bool:
        """A query without a target attends itself."""
        return self.options.hashed and self.query.shape[2] == self.k_len

    def head_blocks(self) -> Iterator[_Heads]:
        B, H, L, _ = self.query.shape
        size = max(1, _HEAD_BLOCK_SLOTS // max(L, self.k_len))
        for b in range(B):
            for first in range(0, H, size):
                yield _Heads(self, b, first, min(size, H - first))


class _Logits:
    """Gathers the rows of a block and forms its masked logits."""

    def __init__(self, heads: _Heads, walk: Walk, buffers: Buffers, rows: dict[str, Rows]):
        self.heads, self.rows, self.tensors = heads, rows, heads.tensors
        self.entries = entries = Entries(walk, buffers)
        self.dtype = self.tensors.dtype
        self.exclusions = Exclusions(entries, self.tensors.shared, heads.padding, self.tensors.options)
        self.k_pos = walk.k_pos
        key_rows, ids = (rows["query"], heads.q_ids) if self.tensors.shared else (rows["key"], heads.kv_ids)
        # shared keys on a fixed grid are gathered together with the queries
        self.q_index = None if self.tensors.shared and entries.static else self.query_index("query")
        self.k_index = entries.k_side(key_rows.index(heads.b, ids, walk.k_pos))
        self.v_index = entries.k_side(rows["value"].index(heads.b, heads.kv_ids, walk.k_pos))
        if self.tensors.shared:
            self.inverse_norm = entries.k_side(heads.inverse_norm.gather(1, walk.k_pos))
        self.padding = None
        if heads.padding is not None:
            self.padding = entries.k_side(heads.padding[walk.k_pos])
            if self.tensors.shared:
                self.q_padding = entries.q_side(heads.padding[walk.q_pos], repeat_last=True)
        if self.tensors.options.dropout_p:
            self.q_pos, self.q_head = (
                entries.q_side(walk.q_pos),
                entries.q_side(heads.q_ids[:, None].expand_as(walk.q_pos)),
            )
            self.k_pos = entries.k_side(walk.k_pos)

    def query_index(self, name: str) -> Tensor:
        """Row numbers of a tensor [B,H,L,..] for the queries of every tile."""
        # the last tile is filled up with rows of its own head: no other sample may reach it
        index = self.rows[name].index(self.heads.b, self.heads.q_ids, self.entries.walk.q_pos)
        return self.entries.q_side(index, repeat_last=True)

    def operands(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """q [G,M,D], k [G,N,D], v [G,N,Dv], keys normalised if shared, padded rows zero."""
        key_name = "query" if self.tensors.shared else "key"
        x = block.key_rows("x", self.rows[key_name], self.k_index, self.dtype)
        v = block.key_rows("v", self.rows["value"], self.v_index, self.dtype)
        if self.padding is not None:
            # whatever stands in a padded row, 0 * it must be 0
            padded = self.padding[block.keys].unsqueeze(-1)
            x.masked_fill_(padded, 0)
            v.masked_fill_(padded, 0)
        if self.q_index is None:
            q = block.own_rows(x)
        else:
            q = block.query_rows("q", self.rows["query"], self.q_index, self.dtype)
            if self.tensors.shared and self.padding is not None:
                q.masked_fill_(self.q_padding[block.tiles].unsqueeze(-1), 0)
        k = x
        if self.tensors.shared:
            k = torch.mul(x, self.inverse_norm[block.keys].unsqueeze(-1), out=block.buffer("k", *x.shape, dtype=self.dtype))
        return q, block.key_windows(k), block.key_windows(v)

    def of(self, block: Block, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Masked logits [G,M,N] times log2(e), and a second buffer of their shape."""
        logits, other = (block.buffer(name, *block.shape, dtype=self.dtype) for name in ("logits", "other"))
        logits.copy_(self.exclusions.of(block))
        torch.baddbmm(logits, q, k.transpose(1, 2), beta=-_EXCLUDE, alpha=self.tensors.options.scale * _LOG2E, out=logits)
        return logits, other

    def keep(self, block: Block) -> Tensor | None:
        """Dropout factors [G,M,N]."""
        p = self.tensors.options.dropout_p
        if not p:
            return None
        q_pos, head = self.q_pos[block.tiles].unsqueeze(-1), self.q_head[block.tiles].unsqueeze(-1)
        batch = torch.full_like(head, self.heads.b)
        keep = dropout_keep(self.tensors.seed, batch, head, q_pos, block.window(self.k_pos).unsqueeze(1), p)
        return keep.to(self.dtype) * _dropout_scale(p)


def attention_forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    rotations: Tensor | None,
    q_buckets: Tensor | None,
    k_buckets: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, SortedRounds]:
    """The whole forward: hash (or take the buckets given), sort, attend, combine."""
    if not options.hashed:
        none = query.new_empty((*query.shape[:2], 0, query.shape[2]), dtype=torch.int32)
        state = SortedRounds(none, none.clone(), None, None)
    else:
        if rotations is not None:
            q_buckets = lsh_hash(query, rotations, options.factors)
            k_buckets = None if key is None else lsh_hash(key, rotations, options.factors)
        state = sort_rounds(q_buckets, k_buckets, key_padding_mask, options)
    return *attention_fwd(query, key, value, key_padding_mask, seed, state, options), state


def attention_fwd(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    state: SortedRounds,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Interval attention over all rounds, combined: out [B,H,L,Dv], lse [B,H,L]. Marks self-only queries in `state`."""
    tensors = _Tensors(query, key, value, key_padding_mask, seed, state, options)
    B, H, L, _ = query.shape
    Dv, dtype = value.shape[-1], tensors.dtype
    out = torch.empty(B, H, L, Dv, dtype=query.dtype, device=query.device)
    lse = torch.empty(B, H, L, dtype=dtype, device=query.device)
    for heads, places, part_out, part_top, part_sum in _parts(tensors):
        weights, total = _weights(part_top[places], part_sum[places])
        combined = F.embedding_bag(places.flatten(0, 1), part_out, per_sample_weights=weights.flatten(0, 1), mode="sum").view(
            heads.n, L, Dv
        )
        if tensors.attends_self:
            alone = total == -math.inf
            if heads.padding is not None:
                alone &= ~heads.padding
            rows_alone = _Alone(heads, alone)
            combined[rows_alone.index] = rows_alone.merge(rows_alone.value() * rows_alone.keep(), combined)
            total[rows_alone.index] = rows_alone.merge(rows_alone.logit() - (1e5 if tensors.shared else 0), total)
            last_round = state.q_stretched[heads.b, heads.heads, -1]
            last_round.copy_(torch.where(alone, ~last_round, last_round))
        out[heads.b, heads.heads] = combined
        lse[heads.b, heads.heads] = total
    return out, lse


def attention_rounds(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    state: SortedRounds,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Interval attention of each round apart: out [B,H,R,L,Dv], lse [B,H,R,L]; 0 and -inf without target in the round."""
    tensors = _Tensors(query, key, value, key_padding_mask, seed, state, options)
    B, H, L, _ = query.shape
    n_rounds = state.q_order.shape[2] + (options.local_window > 0)
    out = torch.empty(B, H, n_rounds, L, value.shape[-1], dtype=query.dtype, device=query.device)
    lse = torch.empty(B, H, n_rounds, L, dtype=tensors.dtype, device=query.device)
    for heads, places, part_out, part_top, part_sum in _parts(tensors):
        places = places.transpose(1, 2)
        # each round is the only one of its softmax
        weights, total = _weights(part_top[places].unsqueeze(-1), part_sum[places].unsqueeze(-1))
        out[heads.b, heads.heads] = (weights * part_out[places]).masked_fill_(weights == 0, 0).to(out.dtype)
        lse[heads.b, heads.heads] = total
    return out, lse


def _parts(tensors: _Tensors) -> Iterator[tuple[_Heads, Tensor, Tensor, Tensor, Tensor]]:
    """Per block of heads what the walks leave in the slots of all rounds: (heads, places, sum_j 2^(s_ij - top_i) v_j, top, sum of
    weights), where places [n, L, R] are the slots of each position. The next block overwrites them."""
    query, key, value = tensors.query, tensors.key, tensors.value
    Dv, dtype = value.shape[-1], tensors.dtype
    rows = {name: Rows(x) for name, x in (("query", query), ("key", key), ("value", value)) if x is not None}
    buffers = Buffers(query.device)
    for heads in tensors.head_blocks():
        logits_of = [_Logits(heads, walk, buffers, rows) for walk in heads.walks]
        first_slot = np.cumsum([0] + [x.entries.lo.numel() for x in logits_of]).tolist()
        part_out = buffers("part_out", (first_slot[-1], Dv), dtype)
        part_top, part_sum = (buffers(name, (first_slot[-1],), dtype) for name in ("part_top", "part_sum"))
        for first, source in zip(first_slot, logits_of):
            shape = source.entries.lo.shape
            slots = slice(first, first + shape.numel())
            _walk_fwd(source, part_out[slots].view(*shape, Dv), part_top[slots].view(shape), part_sum[slots].view(shape))
        places = [place + first for first, walk in zip(first_slot, heads.walks) for place in walk.q_places]
        yield heads, torch.stack(places, -1), part_out, part_top, part_sum


def _walk_fwd(source: _Logits, out: Tensor, top: Tensor, mass: Tensor) -> None:
    """One walk in slot order: sum_j 2^(s_ij - top_i) v_j [n_tiles, M, Dv], top [n_tiles, M] (-inf: no target), sum of weights."""
    static = source.entries.static
    if not static:
        out.zero_()
        top.fill_(-math.inf)
        mass.zero_()
    for block in source.entries.blocks():
        tiles = block.tiles
        q, k, v = source.operands(block)
        logits, _ = source.of(block, q, k)
        block_top = logits.amax(-1)
        probs = logits.sub_(block_top.unsqueeze(-1)).exp2_()
        block_mass = probs.sum(-1)
        block_top.masked_fill_(block_top < -_EXCLUDE / 2, -math.inf)
        keep = source.keep(block)
        if keep is not None:
            probs.mul_(keep)
        if static:
            torch.bmm(probs, v, out=out[tiles])
            top[tiles], mass[tiles] = block_top, block_mass
        else:
            new_top = torch.maximum(top[tiles], block_top)
            finite = new_top.masked_fill(new_top == -math.inf, 0)
            old, new = (torch.exp2(x - finite) for x in (top[tiles], block_top))
            out[tiles] = old.unsqueeze(-1) * out[tiles] + new.unsqueeze(-1) * torch.bmm(probs, v)
            top[tiles], mass[tiles] = new_top, old * mass[tiles] + new * block_mass


def _weights(top: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the rounds' unnormalised sums, and lse (natural log; -inf without target). top, mass [.., R]."""
    highest = top.amax(-1, keepdim=True)
    weights = torch.exp2(top - highest.masked_fill(highest == -math.inf, 0))
    total = (weights * mass).sum(-1, keepdim=True)
    lse = (highest + total.log2()) / _LOG2E
    return weights / total.masked_fill(total == 0, 1), lse.squeeze(-1)


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    state: SortedRounds,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of query, key (None if shared) and value, from probabilities recomputed as exp(s - lse)."""
    tensors = _Tensors(query, key, value, key_padding_mask, seed, state, options)
    B, H, L, D = query.shape
    Dv, dtype, shared, device = value.shape[-1], tensors.dtype, tensors.shared, query.device
    dquery = torch.empty(B, H, L, D, dtype=query.dtype, device=device)
    # heads of a group add up in their shared key head
    grouped = value.shape[1] != H
    new = torch.zeros if grouped else torch.empty
    dkey = None if shared else new(key.shape, dtype=dtype if grouped else key.dtype, device=device)
    dvalue = new(value.shape, dtype=dtype if grouped else value.dtype, device=device)
    rows = {"query": query, "key": key, "value": value, "dout": dout}
    rows = {name: Rows(x) for name, x in rows.items() if x is not None}
    buffers = Buffers(device)
    for heads in tensors.head_blocks():
        b, own = heads.b, heads.heads
        d_out = dout[b, own].to(dtype)
        delta = torch.einsum("nld,nld->nl", d_out, out[b, own].to(dtype))
        d_lse = None
        if dlse is not None:
            d_lse = dlse[b, own].to(dtype).masked_fill(lse[b, own] == -math.inf, 0)
            delta = delta - d_lse
        # without a target every pair is excluded, so any finite lse gives probabilities of 0
        own_lse = lse[b, own].masked_fill(lse[b, own] == -math.inf, 0) * _LOG2E

        logits_of = [_Logits(heads, walk, buffers, rows) for walk in heads.walks]
        first_q = np.cumsum([0] + [x.entries.lo.numel() for x in logits_of]).tolist()
        first_k = np.cumsum([0] + [len(x.v_index) for x in logits_of]).tolist()
        dq_axis = buffers("dq_axis", (first_q[-1], D), dtype)
        dk_axis = buffers("dk_axis", (first_k[-1], D), dtype)
        dv_axis = buffers("dv_axis", (first_k[-1], Dv), dtype)
        for r, source in enumerate(logits_of):
            q_span, k_span = slice(first_q[r], first_q[r + 1]), slice(first_k[r], first_k[r + 1])
            _walk_bwd(source, own_lse, delta, dq_axis[q_span].view(*source.entries.lo.shape, D), dk_axis[k_span], dv_axis[k_span])

        q_places = [place + first for first, walk in zip(first_q, heads.walks) for place in walk.q_places]
        k_places = [
            place + first + source.entries.left
            for first, source in zip(first_k, logits_of)
            for place in source.entries.walk.k_places
        ]
        dq = _sum_rounds(dq_axis, q_places).mul_(options.scale)  # [n, L, D]
        dk = _sum_rounds(dk_axis, k_places).mul_(options.scale)  # [n, S, D]
        dv = _sum_rounds(dv_axis, k_places)  # [n, S, Dv]
        if tensors.attends_self:
            _Alone(heads, state.q_stretched[b, own, -1] < 0).add_gradients(d_out, d_lse, dq, dk, dv)
        if shared:
            # k = q / |q|, so the gradient through k loses its part along k
            k = query[b, own].to(dtype) * heads.inverse_norm.unsqueeze(-1)
            if heads.padding is not None:
                k.masked_fill_(heads.padding[:, None], 0)
                dq.masked_fill_(heads.padding[:, None], 0)
            dk.sub_(k.mul_(torch.einsum("nld,nld->nl", k, dk).unsqueeze(-1)))
            dq.addcmul_(dk, heads.inverse_norm.unsqueeze(-1))
        dquery[b, own] = dq
        for total, part in ((dkey, dk), (dvalue, dv)):
            if total is not None and grouped:
                add_rows(total[b], heads.kv_ids, part)
            elif total is not None:
                total[b, own] = part
    return dquery, None if shared else dkey.to(key.dtype), dvalue.to(value.dtype)


def _sum_rounds(axis: Tensor, places: list[Tensor]) -> Tensor:
    """Rows of a slot axis back in positions, summed over rounds: places R x [n, L] -> [n, L, D]."""
    index = torch.stack(places, -1)
    return F.embedding_bag(index.flatten(0, 1), axis, mode="sum").view(*index.shape[:2], axis.shape[-1])


def _walk_bwd(source: _Logits, lse: Tensor, delta: Tensor, dq_tiles: Tensor, dk_axis: Tensor, dv_axis: Tensor) -> None:
    """Gradients of one walk in slot order, without the factor `scale` of dq and dk."""
    entries, walk = source.entries, source.entries.walk
    dout_index = source.query_index("dout")
    lse, delta = entries.q_side(lse.gather(1, walk.q_pos)), entries.q_side(delta.gather(1, walk.q_pos))
    if not entries.static:
        dq_tiles.zero_()
    if not entries.writes_own_keys_first:
        dk_axis.zero_()
        dv_axis.zero_()
    for block in entries.blocks():
        tiles = block.tiles
        q, k, v = source.operands(block)
        dout = block.query_rows("dout", source.rows["dout"], dout_index, source.dtype)
        logits, dprobs = source.of(block, q, k)
        # never above 1, however coarse the grid of huge logits is
        probs = logits.sub_(lse[tiles].unsqueeze(-1)).clamp_(max=0).exp2_()
        keep = source.keep(block)
        torch.bmm(dout, v.transpose(1, 2), out=dprobs)
        dropped = probs
        if keep is not None:
            dprobs.mul_(keep)
            dropped = probs * keep
        block.add_to_keys(dv_axis, dropped, dout)
        dlogits = dprobs.sub_(delta[tiles].unsqueeze(-1)).mul_(probs)
        block.add_to_keys(dk_axis, dlogits, q)
        if entries.static:
            torch.bmm(dlogits, k, out=dq_tiles[tiles])
        else:
            dq_tiles[tiles] += torch.bmm(dlogits, k)

    n, n_slots = walk.k_pos.shape
    for axis in (dk_axis, dv_axis):
        per_head = axis[entries.left :][: n * n_slots].view(n, n_slots, -1)
        for part, canonical in walk.repeats:
            per_head.index_add_(1, canonical, per_head[:, part].clone())


class _Alone:
    """Queries whose only target is themselves; their rows in a head block's [n, L, ..]."""

    def __init__(self, heads: _Heads, alone: Tensor):
        self.heads, self.tensors = heads, heads.tensors
        if alone.device.type == "cpu":
            self.index, self.mask = alone.nonzero(as_tuple=True), None
        else:
            # counting them would wait for the device: take all rows
            n, L = (torch.arange(size, device=alone.device) for size in alone.shape)
            self.index, self.mask = (n[:, None].expand_as(alone), L.expand_as(alone)), alone
        head, self.pos = self.index
        self.q_head, self.kv_head = heads.q_ids[head], heads.kv_ids[head]

    def merge(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` in the rows of queries that are alone, elsewhere `old` [n, L, ..]."""
        if self.mask is None:
            return new
        return torch.where(self.mask if new.dim() == 2 else self.mask.unsqueeze(-1), new, old[self.index])

    def query(self) -> Tensor:
        return self.tensors.query[self.heads.b, self.q_head, self.pos].to(self.tensors.dtype)

    def key(self) -> Tensor:
        if self.tensors.shared:
            return self.query() * self.heads.inverse_norm[self.index].unsqueeze(-1)
        return self.tensors.key[self.heads.b, self.kv_head, self.pos].to(self.tensors.dtype)

    def value(self) -> Tensor:
        return self.tensors.value[self.heads.b, self.kv_head, self.pos].to(self.tensors.dtype)

    def logit(self) -> Tensor:
        """s_ii."""
        return (self.query() * self.key()).sum(-1) * self.tensors.options.scale

    def keep(self) -> Tensor | float:
        """Dropout factor of the pair (i, i)."""
        p = self.tensors.options.dropout_p
        if not p:
            return 1.0
        batch = torch.full_like(self.pos, self.heads.b)
        keep = dropout_keep(self.tensors.seed, batch, self.q_head, self.pos, self.pos, p)
        return keep.unsqueeze(-1).to(self.tensors.dtype) * _dropout_scale(p)

    def add_gradients(self, dout: Tensor, dlse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """out = v_i, and lse = s_ii up to a constant; all [n, L, ..]. dq and dk before the gradient of the key's norm."""
        dv[self.index] = self.merge(dv[self.index] + dout[self.index] * self.keep(), dv)
        if dlse is not None:
            dlogit = dlse[self.index].unsqueeze(-1) * self.tensors.options.scale
            dq[self.index] = self.merge(dq[self.index] + dlogit * self.key(), dq)
            dk[self.index] = self.merge(dk[self.index] + dlogit * self.query(), dk)
