"""Walks: where the slots of a hash round lie, which keys each query sees there, and how both are cut into blocks.

Heads are laid end to end on one slot axis, cut into tiles of queries; a tile meets one window of keys (`window` and `chunk`
spans with aligned orders) or several, one after the other (`bucket` span and separate keys, where the intervals depend on the
data).

Masks are integers, 1 where a pair is excluded: on a CPU, comparisons of 16-bit integers run ten times faster when they write
16-bit integers than when they write booleans. Whether lo <= j < hi is one comparison: of j - lo with hi - lo, both modulo the
range of the integers and less half of it, so that signed numbers are ordered as unsigned ones (`halfway`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .config import AttentionOptions

_TILE = 64
# narrow windows waste fewer pairs in narrow tiles: (tile + W) keys are met for W wanted
_NARROW_TILE, _NARROW_WINDOW = 32, 128
# (query, key) pairs of a block, about: more leave the caches, fewer are slower by what every operation costs to start
_BLOCK_PAIRS = 2**19
# keys per step where the key range of a tile depends on the data
_DYNAMIC_WINDOW = 128


class Rows:
    """A tensor [B,H,L,D] as a matrix of rows: row(b, h, l) = base[b, h] + l * step. A view wherever strides allow."""

    def __init__(self, x: Tensor):
        B, H, L, D = x.shape
        if x.stride(-1) != 1 or any(s % D for s in x.stride()[:3]):
            x = x.contiguous()
        batch_step, head_step, self.step = (s // D for s in x.stride()[:3])
        n_rows = 1 + (B - 1) * batch_step + (H - 1) * head_step + (L - 1) * self.step if x.numel() else 0
        self.matrix = x.as_strided((n_rows, D), (D, 1))
        b = torch.arange(B, device=x.device)[:, None]
        h = torch.arange(H, device=x.device)[None, :]
        self.base = b * batch_step + h * head_step

    def index(self, b: int, heads: Tensor, positions: Tensor) -> Tensor:
        """Row numbers [n, L] of positions [n, L] in the n heads of batch element b."""
        return torch.add(self.base[b, heads, None], positions, alpha=self.step)

    def take(self, index: Tensor, out: Tensor) -> Tensor:
        """Gather rows into `out` [.., D], in out's dtype."""
        flat = out.view(-1, out.shape[-1])
        if self.matrix.dtype == out.dtype:
            torch.index_select(self.matrix, 0, index.reshape(-1), out=flat)
        else:
            flat.copy_(torch.index_select(self.matrix, 0, index.reshape(-1)))
        return out


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Buffers:
    """Reused scratch memory: one allocation per name, a view of the wanted shape on every request."""

    def __init__(self, device: torch.device):
        self.device = device
        self.views: dict[str, dict[tuple, Tensor]] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        views = self.views.setdefault(name, {})
        if (shape, dtype) not in views:
            # the first of a name's views is its whole allocation
            flat = next(iter(views.values())).flatten() if views else torch.empty(0, dtype=dtype, device=self.device)
            size = math.prod(shape)
            if flat.numel() < size or flat.dtype != dtype:
                views.clear()
                flat = torch.empty(size, dtype=dtype, device=self.device)
            views[shape, dtype] = flat[:size].view(shape)
        return views[shape, dtype]


def bucket_stretch(options: AttentionOptions, k_len: int) -> int:
    return min(options.window, k_len) + 1


def invert(order: Tensor) -> Tensor:
    """slot -> position becomes position -> slot, int64."""
    order = order.to(torch.int64)
    slots = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, slots)


@dataclass(frozen=True)
class Round:
    """One hash round (or the local one) of n heads: orders, and the interval of key slots of each query, in slot order."""

    q_order: Tensor  # [n, L] slot -> position
    q_slot: Tensor  # [n, L] position -> slot
    k_order: Tensor  # [n, S]
    k_slot: Tensor  # [n, S]
    lo: Tensor  # [n, L]
    hi: Tensor  # [n, L]
    reach: Reach | None  # None: which keys a tile needs depends on the data
    by_slot: bool  # causality follows from slots; False: positions have to be compared
    meets_padding: bool  # intervals may hold padded keys


def hashed_rounds(
    q_order: Tensor, q_stretched: Tensor, k_order: Tensor, k_stretched: Tensor, shared: bool, options: AttentionOptions
) -> list[Round]:
    """The orders [n, R, L] and stretched slots of the hash rounds decoded, and their intervals worked out."""
    (n, R, L), S, device = q_order.shape, k_order.shape[-1], q_order.device
    o = _bounded(options, max(L, S))
    n_buckets, stretch = math.prod(o.factors), bucket_stretch(o, S)
    q_slot = invert(q_order)
    k_slot = q_slot if shared else invert(k_order)
    q_order, k_order = q_order.to(torch.int64), k_order.to(torch.int64)
    slot = torch.arange(L, dtype=torch.int32, device=device)

    q_bucket = (q_stretched.gather(-1, q_order) - slot) // stretch  # [n, R, L] of the query in each slot
    k_bucket = q_bucket
    if not shared:
        k_bucket = (k_stretched.gather(-1, k_order) - torch.arange(S, dtype=torch.int32, device=device)) // stretch
    # without separate keys the bucket of padding holds no target: it ends where it starts
    ids = torch.arange(n_buckets + 2, dtype=torch.int32, device=device).clamp_(max=n_buckets + (not shared))
    starts = torch.searchsorted(k_bucket, ids.expand(n, R, -1).contiguous(), out_int32=True)  # [n, R, N + 2]
    q_bucket = q_bucket.to(torch.int64)
    first, last = starts.gather(-1, q_bucket), starts.gather(-1, q_bucket + 1)
    if shared:
        end = (slot + 1).expand(n, R, L)
    else:
        # key j of i's bucket counts if j * L <= i * S; the codes (bucket, position) ascend along the key order
        code = q_bucket * S + q_order * S // L
        end = torch.searchsorted(k_bucket.to(torch.int64) * S + k_order, code, right=True, out_int32=True)

    lo, hi = _span_interval(o, slot, end, first, last)
    if o.within_bucket:
        lo, hi = torch.maximum(lo, first), torch.minimum(hi, last)
        if o.is_causal:
            # positions ascend within a bucket: "up to i" is an end of the slot interval, and strict, it drops self
            hi = torch.minimum(hi, end - 1 if shared else end)
    lo, hi = (x.expand(n, R, L).clamp(0, S) for x in (lo, hi))
    hi = torch.maximum(hi, lo)
    reach = _reach(o, n, L, shared and o.within_bucket) if shared or o.span == "chunk" else None
    return [
        Round(*(x[:, r] for x in (q_order, q_slot, k_order, k_slot, lo, hi)), reach, o.within_bucket, not o.within_bucket)
        for r in range(R)
    ]


def identity_round(n: int, L: int, shared: bool, options: AttentionOptions, device: torch.device) -> Round:
    """A round in identity order with a single bucket: local attention, or the round of near tokens."""
    o = _bounded(options, L)
    order = torch.arange(L, device=device).expand(n, L)
    slot = order.to(torch.int32)
    lo, hi = _span_interval(o, slot, slot + 1, torch.zeros_like(slot), torch.full_like(slot, L))
    if o.is_causal:
        hi = torch.minimum(hi, slot if shared else slot + 1)
    lo = lo.clamp(0, L)
    reach = _reach(o, n, L, True)
    return Round(order, order, order, order, lo, torch.maximum(hi.clamp(0, L), lo), reach, True, True)


def _span_interval(o: AttentionOptions, slot: Tensor, end: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """[lo, hi) of the query in slot `slot`, up to whose position the key order runs to `end`, in the bucket [first, last)."""
    if o.span == "window":
        return end - o.window - 1, end + o.window
    if o.span == "chunk":
        chunk = slot // o.chunk_length
        return (chunk - o.chunks_before) * o.chunk_length, (chunk + 1 + o.chunks_after) * o.chunk_length
    return first, last


def _bounded(o: AttentionOptions, length: int) -> AttentionOptions:
    """The same intervals in `length` slots, from numbers that 32 bits hold."""
    chunk_length = min(o.chunk_length, length)
    n_chunks = -(-length // chunk_length)
    return o._replace(
        window=min(o.window, length),
        chunk_length=chunk_length,
        chunks_before=min(o.chunks_before, n_chunks),
        chunks_after=min(o.chunks_after, n_chunks),
    )


class Reach(NamedTuple):
    """Tiles of `tile` query slots need the key slots from `left` before their first to `right` after their last."""

    left: int
    right: int
    tile: int


def _reach(o: AttentionOptions, n: int, L: int, ordered: bool, *offsets: int) -> Reach | None:
    """The reach that serves all tiles of n axes of L slots. `ordered`: a causal query sees no slot after its own."""
    tile = _TILE
    if o.span == "window":
        left = right = o.window
        tile = _NARROW_TILE if o.window <= _NARROW_WINDOW else _TILE
    elif o.span == "chunk":
        # chunks start on multiples of `grid`, so a tile starts at most C - grid slots into a chunk
        grid = math.gcd(tile, o.chunk_length, L if n > 1 else 0, *offsets)
        slack = o.chunk_length - grid
        left, right = o.chunks_before * o.chunk_length + slack, o.chunks_after * o.chunk_length + slack
    else:
        return None
    return Reach(min(left, L), 0 if o.is_causal and ordered else min(right, L), tile)


@dataclass(frozen=True)
class Walk:
    """n slot axes laid end to end: which position each slot holds and the interval of keys that each query sees."""

    q_pos: Tensor  # [n, slots] of queries
    k_pos: Tensor  # [n, slots] of keys
    lo: Tensor  # [n, slots], on the axis of all n heads
    hi: Tensor  # [n, slots]
    reach: Reach | None
    by_slot: bool
    meets_padding: bool
    q_places: list[Tensor]  # per round [n, L]: position -> slot on the axis of all n heads
    k_places: list[Tensor]  # per round [n, S]
    earlier: tuple[Tensor, Tensor, Tensor] | None = None
    """Dedupe: in each of the r earlier rounds the slots of the keys [r, n, slots], and lo and hi of the queries."""
    repeats: list[tuple[slice, Tensor]] = field(default_factory=list)
    """Slots that repeat others (both ends of a cyclic axis), per head, and the slots that they repeat."""


def walks_of(rounds: list[Round], options: AttentionOptions) -> list[Walk]:
    """One walk per round; with wrap one for all hash rounds, as a cyclic sequence."""
    n_cyclic = len(rounds) - (options.local_window > 0) if options.wrap else 0
    walks = [_cyclic_walk(rounds[:n_cyclic], options)] if n_cyclic else []
    if options.dedupe and len(rounds) > 1:
        # by position, what the queries and keys of each round are asked for in later ones
        k_slot = torch.stack([r.k_slot for r in rounds]).to(torch.int32)
        lo = torch.stack([r.lo.gather(1, r.q_slot) for r in rounds])
        hi = torch.stack([r.hi.gather(1, r.q_slot) for r in rounds])
    for r in range(n_cyclic, len(rounds)):
        this, earlier = rounds[r], None
        if options.dedupe and r:
            q_order, k_order = (order.expand(r, *order.shape) for order in (this.q_order, this.k_order))
            earlier = k_slot[:r].gather(2, k_order), lo[:r].gather(2, q_order), hi[:r].gather(2, q_order)
        q_base, k_base = _axis_starts(this.q_order), _axis_starts(this.k_order)
        lo_here, hi_here = (x + k_base.to(x.dtype) for x in (this.lo, this.hi))
        walks.append(
            Walk(
                this.q_order, this.k_order, lo_here, hi_here, this.reach, this.by_slot, this.meets_padding,
                [this.q_slot + q_base], [this.k_slot + k_base], earlier,
            )
        )  # fmt: skip
    return walks


def _axis_starts(order: Tensor) -> Tensor:
    n, length = order.shape
    return torch.arange(0, n * length, length, device=order.device)[:, None]


def _cyclic_walk(rounds: list[Round], o: AttentionOptions) -> Walk:
    """The rounds of a head as one cyclic sequence of chunks, on an axis that repeats both its ends."""
    (n, L), device = rounds[0].q_order.shape, rounds[0].q_order.device
    C, n_chunks = o.chunk_length, -(-L // o.chunk_length)
    length, all_chunks = len(rounds) * L, len(rounds) * n_chunks
    before, after = o.chunks_before, o.chunks_after
    if before + 1 + after >= all_chunks:
        # every chunk once
        before, after = all_chunks - 1, 0
    halo, halo_after = min(before * C, length), min(after * C, length)

    def start(chunk):  # first slot of a chunk on the endless sequence
        return chunk // n_chunks * L + chunk % n_chunks * C

    slots = torch.arange(-halo, length + halo_after, device=device)
    chunk = slots // L * n_chunks + slots % L // C
    real = (slots >= 0) & (slots < length)
    base = torch.arange(0, n * len(slots), len(slots), device=device)[:, None]
    lo = torch.where(real, start(chunk - before), -halo) + halo + base
    hi = torch.where(real, start(chunk + after + 1), -halo) + halo + base
    around = slots % length
    pos = torch.cat([r.q_order for r in rounds], 1)[:, around]
    k_pos = torch.cat([r.k_order for r in rounds], 1)[:, around]
    reach = _reach(o._replace(chunks_before=before, chunks_after=after), n, length, False, L, halo, len(slots) if n > 1 else 0)
    head, tail = slice(0, halo), slice(halo + length, len(slots))
    return Walk(
        pos, k_pos, lo, hi, reach, False, True,
        [r.q_slot + base + halo + i * L for i, r in enumerate(rounds)],
        [r.k_slot + base + halo + i * L for i, r in enumerate(rounds)],
        repeats=[(part, around[part] + halo) for part in (head, tail) if part.start < part.stop],
    )  # fmt: skip


class Entries:
    """A walk cut into blocks of entries, each a tile of query slots against a window of key slots."""

    def __init__(self, walk: Walk, buffers: Buffers):
        self.walk, self.buffers = walk, buffers
        self.device = walk.lo.device
        n_slots = walk.lo.numel()
        self.static = walk.reach is not None
        self.left, self.right, self.tile = walk.reach or (0, 0, _TILE)
        self.n_tiles = -(-n_slots // self.tile)
        self.tail = self.n_tiles * self.tile - n_slots
        self.width = self.tile + self.left + self.right if self.static else _DYNAMIC_WINDOW
        # without keys ahead, a tile is the first to reach the key slots of its own queries
        self.writes_own_keys_first = self.static and self.right == 0
        # masks are worked out in integers that hold every position and every end of an interval, read as unsigned ones
        largest = max(self.width, walk.q_pos.shape[1], walk.k_pos.shape[1])
        self.int_dtype = torch.int16 if largest < 2**16 else torch.int32
        self.lo, self.hi = self.q_side(walk.lo), self.q_side(walk.hi)
        if self.static:
            starts = torch.arange(self.n_tiles, dtype=walk.lo.dtype, device=self.device)
            self.starts = starts * self.tile - self.left
            self.relative = self.relative_interval(slice(None), self.starts)

    def relative_interval(self, tiles: slice | Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The intervals [lo, hi) of tiles within windows from `starts` on: halfway(lo), halfway(hi - lo), each [G, M, 1]."""
        lo, hi = ((x[tiles] - starts[:, None]).clamp_(0, self.width).unsqueeze(-1) for x in (self.lo, self.hi))
        return self.halfway(lo), self.halfway(hi - lo)

    def halfway(self, x: Tensor) -> Tensor:
        """x, unsigned, less half the range of the mask's integers: signed integers in the same order."""
        return (x + torch.iinfo(self.int_dtype).min).to(self.int_dtype)

    def q_side(self, x: Tensor, repeat_last: bool = False) -> Tensor:
        """Per query slot [.., n, slots] -> per tile [.., n_tiles, tile]; the last tile is filled up with 0 or the last entry."""
        x = x.flatten(-2)
        if self.tail:
            fill = x[..., -1:].expand(*x.shape[:-1], self.tail)
            x = torch.cat((x, fill if repeat_last else torch.zeros_like(fill)), -1)
        return x.view(*x.shape[:-1], self.n_tiles, self.tile)

    def k_side(self, x: Tensor) -> Tensor:
        """Per key slot [.., n, slots] -> [.., axis], with room on both sides for the first and the last window; there the entry
        at the end is repeated."""
        x = x.flatten(-2)
        if not self.static:
            return x
        before, after = x[..., :1], x[..., -1:]
        rows = x.shape[:-1]
        return torch.cat((before.expand(*rows, self.left), x, after.expand(*rows, self.right + self.tail)), -1)

    def blocks(self) -> Iterator[Block]:
        n_blocks = max(1, round(self.n_tiles * self.tile * self.width / _BLOCK_PAIRS))
        size = -(-self.n_tiles // n_blocks)
        if self.static:
            for first in range(0, self.n_tiles, size):
                tiles = slice(first, min(first + size, self.n_tiles))
                yield Block(self, tiles, self.starts[tiles])
            return
        begin, end = self.lo[:, 0], self.hi.amax(1)
        n_windows = -((begin - end) // self.width)
        for step in range(int(n_windows.max())):
            active = (n_windows > step).nonzero().squeeze(1)
            for tiles in active.split(size):
                yield Block(self, tiles, begin[tiles] + step * self.width)


class Block:
    """Some entries of a walk: tiles of queries [G, M] against windows of keys [G, N]."""

    def __init__(self, entries: Entries, tiles: slice | Tensor, starts: Tensor):
        self.entries, self.tiles, self.starts = entries, tiles, starts
        self.shape = (len(starts), entries.tile, entries.width)
        if entries.static:
            self.keys = slice(tiles.start * entries.tile, tiles.stop * entries.tile + entries.left + entries.right)
        else:
            last = entries.walk.k_pos.numel() - 1
            self.keys = (starts[:, None] + torch.arange(entries.width, device=starts.device)).clamp_(max=last)

    def window(self, x: Tensor) -> Tensor:
        """Per key slot [..] -> per entry [G, N]; overlapping views where the windows are a fixed grid."""
        x = x[self.keys]
        return x.as_strided(self.shape[::2], (self.entries.tile, 1)) if self.entries.static else x

    def buffer(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.entries.buffers(name, shape, dtype)

    def key_rows(self, name: str, rows: Rows, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Gather the rows of all key slots of the block: [slots, D] on a fixed grid, else [G, N, D]."""
        index = index[self.keys]
        return rows.take(index, self.buffer(name, *index.shape, rows.matrix.shape[1], dtype=dtype))

    def key_windows(self, x: Tensor) -> Tensor:
        """Key rows as [G, N, D]."""
        G, M, N = self.shape
        D = x.shape[-1]
        return x.as_strided((G, N, D), (M * D, D, 1)) if self.entries.static else x

    def query_rows(self, name: str, rows: Rows, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Gather the rows of the block's queries: [G, M, D]."""
        index = index[self.tiles]
        return rows.take(index, self.buffer(name, *index.shape, rows.matrix.shape[1], dtype=dtype))

    def own_rows(self, x: Tensor) -> Tensor:
        """Of the key rows of a fixed grid, those in the slots of the queries: [G, M, D]."""
        G, M, _ = self.shape
        return x[self.entries.left :][: G * M].view(G, M, -1)

    def add_to_keys(self, axis: Tensor, weights: Tensor, rows: Tensor) -> None:
        """axis += weights^T rows on the key axis (k_side layout), for weights [G,M,N], rows [G,M,D]; in a fixed order."""
        if not self.entries.static:
            return add_rows(axis, self.keys.flatten(), torch.bmm(weights.transpose(1, 2), rows).flatten(0, 1))
        G, M, N = self.shape
        D = rows.shape[-1]
        target = axis[self.keys]
        # windows overlap, but their parts of M slots do not; the last part is new ground
        for first in reversed(range(0 if N % M == 0 else N % M - M, N, M)):
            first, last = max(first, 0), first + M
            part = target[first:].as_strided((G, last - first, D), (M * D, D, 1))
            transposed = weights[:, :, first:last].transpose(1, 2)
            if last == N and self.entries.writes_own_keys_first:
                torch.bmm(transposed, rows, out=part)
            else:
                part.baddbmm_(transposed, rows)


def add_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """target[index] += rows with repeated indices, in a fixed order."""
    if target.device.type == "cpu":
        target.index_add_(0, index, rows)
    else:
        # unlike index_add_ this sorts first, so that the sum does not depend on the scheduling of threads
        target.index_put_((index,), rows, accumulate=True)


class Exclusions:
    """Integer masks of a walk: 1 excludes a pair."""

    def __init__(self, entries: Entries, shared: bool, padding: Tensor | None, options: AttentionOptions):
        self.entries = entries
        walk, dtype = entries.walk, entries.int_dtype
        self.columns = torch.arange(entries.width, device=entries.device).to(dtype)
        self.earlier = []
        if walk.earlier is not None:
            k_slot, lo, hi = walk.earlier
            q_sides = entries.q_side(entries.halfway(lo)), entries.q_side(entries.halfway(hi - lo))
            self.earlier = list(zip(entries.k_side(k_slot.to(dtype)), *q_sides))
        # self: on a fixed grid without repeats it stands on the diagonal; strict intervals have dropped it already
        strict = options.is_causal and walk.by_slot
        self.self_on_diagonal = shared and not strict and entries.static and not walk.repeats
        self.excluded_position = None
        if options.is_causal and not walk.by_slot:
            self.excluded_position = torch.ge if shared else torch.gt
        elif shared and not strict and not self.self_on_diagonal:
            self.excluded_position = torch.eq
        if self.excluded_position:
            self.q_pos = entries.q_side(entries.halfway(walk.q_pos))
            self.k_pos = entries.k_side(entries.halfway(walk.k_pos))
        self.padding = None
        if padding is not None and walk.meets_padding:
            self.padding = entries.k_side(padding[walk.k_pos].to(dtype))

    def of(self, block: Block) -> Tensor:
        """[G, M, N], 1 where the pair is excluded, else 0."""
        entries, tiles = self.entries, block.tiles
        bad, test = (block.buffer(name, *block.shape, dtype=entries.int_dtype) for name in ("bad", "test"))
        if entries.static:
            lo, width = (x[tiles] for x in entries.relative)
        else:
            lo, width = entries.relative_interval(tiles, block.starts)
        torch.sub(self.columns, lo, out=bad).ge_(width)
        if self.self_on_diagonal:
            bad.diagonal(entries.left, 1, 2).fill_(1)
        for k_slot, lo, width in self.earlier:
            torch.sub(block.window(k_slot).unsqueeze(1), lo[tiles].unsqueeze(-1), out=test).lt_(width[tiles].unsqueeze(-1))
            torch.maximum(bad, test, out=bad)
        if self.excluded_position:
            self.excluded_position(block.window(self.k_pos).unsqueeze(1), self.q_pos[tiles].unsqueeze(-1), out=test)
            torch.maximum(bad, test, out=bad)
        if self.padding is not None:
            torch.maximum(bad, block.window(self.padding).unsqueeze(1), out=bad)
        return bad
